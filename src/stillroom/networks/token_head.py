"""A diffusion model of one token, conditioned on a vector: the head of masked-autoregressive models (arXiv 2406.11838,
section 3.2; LightGen, arXiv 2503.08619, eq. 6)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillroom.diffusion.process import VP, tabulated

FREQUENCIES = 256
ROWS = 256
"""Of a product that modulates several steps at once: with more, one step's is as fast, and takes less memory."""
Prediction = Literal["eps", "v"]


@dataclass(frozen=True)
class Respaced:
    """DDPM's reverse step on ``S`` of the process's times (arXiv 2102.09672, section 4), every field ``[S]`` float32,
    index 0 the least noise.

    times: int64, what the network is told. signal, noise: ``x_t = signal x0 + noise eps``. The posterior mean is
    ``scale x_t - eps_weight eps = x0_weight x0 + xt_weight x_t``; its variance lies between the fixed ``beta~`` and
    ``beta``, here as logarithms (that of ``beta~`` clipped at its second value, as it is 0 at the end).
    """

    times: Tensor
    signal: Tensor
    noise: Tensor
    scale: Tensor
    eps_weight: Tensor
    x0_weight: Tensor
    xt_weight: Tensor
    log_beta: Tensor
    log_posterior: Tensor

    def to(self, device: torch.device) -> Respaced:
        return Respaced(**{name: value.to(device) for name, value in vars(self).items()})


@tabulated
def respaced(process: VP, steps: int) -> Respaced:
    """``steps`` evenly spaced times of the process, the noisiest always among them; all of them gives the process.

    Raises ValueError unless 1 <= steps <= process.steps.
    """
    if not 1 <= steps <= process.steps:
        raise ValueError(f"head steps must lie between 1 and {process.steps}, got {steps}")
    times = torch.linspace(0, process.steps - 1, steps, dtype=torch.float64).round()
    times[-1] = process.steps - 1
    signal, noise = process.alpha(times), process.sigma(times)
    kept = signal**2
    before = torch.cat([kept.new_ones(1), kept[:-1]])  # no noise is left after the last step
    noise_before = torch.cat([noise.new_zeros(1), noise[:-1]]) ** 2
    alpha = kept / before
    beta = (noise**2 - alpha * noise_before).clamp_min(1e-20)  # 1 - alpha, without its cancellation
    posterior = beta * noise_before / noise**2
    posterior[0] = posterior[1] if steps > 1 else beta[0]
    fields = {
        "signal": signal,
        "noise": noise,
        "scale": alpha.rsqrt(),
        "eps_weight": beta / (noise * alpha.sqrt()),
        "x0_weight": beta * before.sqrt() / noise**2,
        "xt_weight": noise_before * alpha.sqrt() / noise**2,
        "log_beta": beta.log(),
        "log_posterior": posterior.log(),
    }
    return Respaced(times=times.long(), **{name: value.float() for name, value in fields.items()})


def time_features(t: Tensor) -> Tensor:
    """Sinusoids of integer times ``[...]``: ``[..., 256]``, cosines first."""
    half = FREQUENCIES // 2
    frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000.0) / half))
    angles = t.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class HeadBlock(nn.Module):
    """``h + gate * MLP(LN(h) * (1 + scale) + shift)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        return torch.addcmul(h, gate, self.down(F.silu(self.up(torch.addcmul(shift, self.norm(h), 1 + scale)))))


class TokenDiffusionHead(nn.Module):
    """Denoising of tokens ``[..., dim]`` under vectors ``z [..., z_width]``: VP, cosine schedule, 1000 steps.

    prediction: ``eps``, the noise, or ``v = signal eps - noise x0`` (arXiv 2202.00512). An error of v is one of eps
    over ``signal^2``: at much noise, where it is decided *what* a token shows, the squared error of eps hardly counts.
    learned_variance: the network also says where between ``beta~`` and ``beta`` the variance of the reverse step lies
    (arXiv 2102.09672, eq. 15); without it that variance is ``beta~``.
    """

    def __init__(
        self, dim: int, z_width: int, width: int = 1536, blocks: int = 8, learned_variance: bool = True,
        steps: int = 1000, prediction: Prediction = "eps",
    ) -> None:  # fmt: skip
        super().__init__()
        self.dim, self.width, self.learned_variance, self.prediction = dim, width, learned_variance, prediction
        self.process = VP("squaredcos_cap_v2", steps)
        self.embed_time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_z = nn.Linear(z_width, width)
        self.embed_x = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(blocks))
        # All blocks are modulated by one vector: one product gives (shift, scale, gate) of each, and the last pair.
        self.modulation = nn.Linear(width, (3 * blocks + 2) * width)
        self.out = nn.Linear(width, 2 * dim if learned_variance else dim)
        self.reset()

    def reset(self) -> None:
        """Xavier; small time embedding; the blocks begin as the identity and the answer as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.embed_time[0], self.embed_time[2]):
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.out.weight)

    def times(self, t: Tensor) -> Tensor:
        """Embedding of integer times ``[...]``: ``[..., width]``. More times than there are steps are looked up."""
        if t.numel() <= self.process.steps:
            return self.embed_time(time_features(t))
        every = self.embed_time(time_features(torch.arange(self.process.steps, device=t.device)))
        return F.embedding(t, every)

    def forward(self, x_t: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """``(said [..., dim], place)`` at ``x_t`` under ``y [..., width]``, the sum of the embeddings of time and of
        ``z``: the prediction, and the variance's place (None where it is fixed). ``x_t`` may lack leading dimensions
        of ``y``."""
        return self.modulated(x_t, self._modulate(F.silu(y)))

    def modulated(self, x_t: Tensor, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The same, the modulation given: ``(shift, scale, gate)`` of each block, then the last ``(shift, scale)``."""
        h = self.embed_x(x_t)
        for i, block in enumerate(self.blocks):
            h = block(h, *parts[3 * i : 3 * i + 3])
        shift, scale = parts[-2:]
        said = self.out(torch.addcmul(shift, F.layer_norm(h, (self.width,), eps=1e-6), 1 + scale)).float()
        return (said[..., : self.dim], said[..., self.dim :]) if self.learned_variance else (said, None)

    def _modulate(self, y: Tensor) -> Sequence[Tensor]:
        count = 3 * len(self.blocks) + 2
        if not torch.is_grad_enabled():
            return self.modulation(y).chunk(count, -1)
        # One product per part: the backward pass of a split would first put the parts' gradients together again.
        weights, biases = self.modulation.weight.chunk(count), self.modulation.bias.chunk(count)
        return [F.linear(y, w, b) for w, b in zip(weights, biases, strict=True)]

    def modulations(self, about: Tensor, times: Tensor) -> Iterator[Sequence[Tensor]]:
        """The modulation of every step under ``about [..., width]``, the embedding of ``z``, and ``times [S, width]``,
        the noisiest first. It does not depend on the tokens: where there are few, that of several steps is one product,
        which reads the largest weight of the head once for all of them."""
        together = max(1, ROWS // (about.numel() // self.width))
        for end in range(len(times), 0, -together):
            if together == 1:
                yield self._modulate(F.silu(about + times[end - 1]))
                continue
            some = times[max(0, end - together) : end].view(-1, *[1] * (about.ndim - 1), self.width)
            count = 3 * len(self.blocks) + 2
            yield from reversed([parts.chunk(count, -1) for parts in self.modulation(F.silu(about + some)).unbind()])

    def errors(self, z: Tensor, x: Tensor, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor | None]:
        """Denoising errors with everything random given: ``R`` draws per token share one ``z``.

        z: ``[B, M, z_width]``; x: clean tokens ``[B, M, dim]``; t: integers ``[B, R, M]``; eps: ``[B, R, M, dim]``.
        Returns ``l_mse [B, R, M]``, the mean over dim of the prediction's squared error, and ``l_vb [B, R, M]`` in bits
        per dim (None with fixed variance), which sees the prediction detached: it trains the variance alone.
        """
        table = respaced(self.process, self.process.steps).to(t.device)
        x, signal, noise = x.unsqueeze(1), table.signal[t][..., None], table.noise[t][..., None]
        x_t = signal * x + noise * eps
        said, place = self(x_t, self.times(t) + self.embed_z(z).unsqueeze(1))
        off = said - (eps if self.prediction == "eps" else signal * eps - noise * x)
        mse = off.square().mean(-1)
        if place is None:
            return mse, None
        off = off.detach() if self.prediction == "eps" else signal * off.detach()  # of the noise
        return mse, self._bound(table, off, place, x, x_t, t)

    def _bound(self, table: Respaced, off: Tensor, v: Tensor, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """``KL(q(x_{t-1} | x_t, x0) || p)``, and at t = 0 ``-log p(x0 | x_1)`` of values in bins of 2/255."""
        beta, posterior = table.log_beta[t][..., None], table.log_posterior[t][..., None]
        weight = table.eps_weight[t][..., None]
        log_variance = _between(v, beta, posterior)
        # The two means differ by weight * (eps_hat - eps): formed so, nothing large cancels at the noisy end.
        gap = (weight * off).square() * torch.exp(-log_variance)
        kl = 0.5 * (log_variance - posterior - 1 + torch.exp(posterior - log_variance) + gap)
        first = t[..., None] == 0
        mean = table.x0_weight[0] * x + table.xt_weight[0] * x_t - table.eps_weight[0] * off
        nll = _binned_nll(x, mean, (0.5 * log_variance).where(first, torch.zeros_like(log_variance)))
        return torch.where(first, nll, kl).mean(-1) / math.log(2)

    def plan(self, steps: int) -> tuple[Respaced, Tensor]:
        """What every token sampled in ``steps`` steps needs: the reverse steps and their time embeddings."""
        table = respaced(self.process, steps).to(self.out.weight.device)
        return table, self.times(table.times)

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        noise: Tensor,
        plan: tuple[Respaced, Tensor],
        *,
        guidance: float = 1.0,
        temperature: float = 1.0,
        clip: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """DDPM's ancestral sampling of tokens ``[..., dim]`` from unit ``noise``.

        z: ``[1, ..., z_width]``, or ``[2, ..., z_width]`` with the conditional vectors first; then the
        prediction is ``null + guidance (cond - null)``, one state serves both, and the variance is the conditional's.
        temperature: factor on the noise added by each step. clip: > 0 bounds the implied x0 to [-clip, clip].
        """
        table, times = plan
        about, x = self.embed_z(z), noise.float()
        for i, parts in zip(reversed(range(len(times))), self.modulations(about, times), strict=True):
            both, v = self.modulated(x, parts)
            said = both[0] if len(z) == 1 else both[1] + guidance * (both[0] - both[1])
            if self.prediction == "v" or clip > 0:
                x0 = self._x0(said, x, table.signal[i], table.noise[i])
                if clip > 0:
                    x0 = x0.clamp(-clip, clip)
                mean = table.x0_weight[i] * x0 + table.xt_weight[i] * x
            else:
                mean = table.scale[i] * x - table.eps_weight[i] * said
            if i == 0:
                return mean
            log_variance = (
                table.log_posterior[i] if v is None else _between(v[0], table.log_beta[i], table.log_posterior[i])
            )
            device = generator.device if generator is not None else x.device
            fresh = torch.randn(x.shape, generator=generator, device=device).to(x)
            x = mean + temperature * torch.exp(0.5 * log_variance) * fresh
        raise AssertionError("a plan has at least one step")

    def _x0(self, said: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        return signal * x_t - noise * said if self.prediction == "v" else (x_t - noise * said) / signal


def _between(v: Tensor, log_beta: Tensor, log_posterior: Tensor) -> Tensor:
    """``f log beta + (1 - f) log beta~`` with ``f = (v + 1) / 2``."""
    return torch.lerp(log_posterior.expand_as(v), log_beta.expand_as(v), (v + 1) / 2)


def _binned_nll(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """``-log`` of the mass that a normal law gives to the bin of width 2/255 around ``x``; the outer bins are open."""
    inverse, half = torch.exp(-log_std), 1 / 255
    upper = torch.special.ndtr((x - mean + half) * inverse).where(x < 0.999, torch.ones_like(mean))
    lower = torch.special.ndtr((x - mean - half) * inverse).where(x > -0.999, torch.zeros_like(mean))
    return -(upper - lower).clamp_min(1e-12).log()
