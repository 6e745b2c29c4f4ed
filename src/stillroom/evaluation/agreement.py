"""A small network that says how well a sample agrees with what was asked for, trained on the data's own pairs.

It reads what denoisers read, pixels, latents or points, and class labels or features of texts: so it judges a student
of any world without an image being decoded, and is differentiable in the sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, log_softmax, logsigmoid, softplus

from stillroom.diffusion.process import Process
from stillroom.errors import UserError

WIDTH = 64
BATCH = 128


class Agreement(nn.Module):
    """``(x [B, ...], cond)`` to log probabilities ``[B]``: of the class that was asked for among all classes, or that
    sample and text belong together.

    shape: of one sample. classes: how many; 0: texts of ``text`` features in the condition ``name``.
    """

    def __init__(self, shape: tuple[int, ...], name: str, classes: int = 0, text: int = 0) -> None:
        super().__init__()
        self.name, self.classes = name, classes
        if len(shape) == 3:
            strides = (2, 2, 2) if min(shape[1:]) >= 16 else (1, 2, 2)
            widths = (shape[0], WIDTH // 2, WIDTH, WIDTH)
            layers: list[nn.Module] = []
            for k, stride in enumerate(strides):
                layers += [nn.Conv2d(widths[k], widths[k + 1], 3, stride, 1), nn.SiLU()]
            self.body = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(WIDTH))
            self.body(torch.zeros(1, *shape))
        else:
            self.body = nn.Sequential(
                nn.Flatten(), nn.Linear(math.prod(shape), WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(),
                nn.Linear(WIDTH, WIDTH),
            )  # fmt: skip
        self.head = nn.Linear(WIDTH, classes or WIDTH)
        if not classes:
            self.words = nn.Sequential(nn.Linear(text, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
            self.scale = nn.Parameter(torch.tensor([math.log(10.0), 0.0]))

    def pairs(self, x: Tensor, cond: Mapping[str, Tensor], each: bool = False) -> Tensor:
        """Logits of texts that belong to samples, ``[B]``; each: of every text with every sample, ``[B, B]``."""
        seen, text = self.head(nn.functional.silu(self.body(x))), cond[self.name].float()
        said = self.words(text.mean(1) if text.ndim == 3 else text)
        seen, said = (seen[:, None], said[None]) if each else (seen, said)
        return self.scale[0].exp() * cosine_similarity(seen, said, -1) + self.scale[1]

    def forward(self, x: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        if not self.classes:
            return logsigmoid(self.pairs(x, cond))
        logits = self.head(nn.functional.silu(self.body(x)))
        return log_softmax(logits.float(), -1).gather(1, cond[self.name][:, None])[:, 0]

    def loss(self, x: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy of classes; of texts every pair of the batch, the own one against the others, as SigLIP does
        (arXiv 2303.15343)."""
        if self.classes:
            return -self(x, cond).mean()
        logits = self.pairs(x, cond, each=True)
        own = torch.eye(len(x), device=x.device)
        return (softplus(logits) - own * logits).sum(1).mean()


def agreement_for(data: Any, conditions: Mapping[str, Tensor], shape: tuple[int, ...]) -> Agreement:
    """An untrained one for these data. conditions: of a batch. Raises UserError for data without any."""
    label = next((name for name in conditions if "label" in name), "")
    if label:
        classes = len(getattr(data, "classes", ())) or int(getattr(data, "cond", conditions)[label].max()) + 1
        return Agreement(shape, label, classes)
    texts = [name for name, value in conditions.items() if value.is_floating_point() and value.ndim in (2, 3)]
    texts.sort(key=lambda name: -conditions[name].ndim)
    if not texts:
        raise UserError(
            "the data have neither classes nor texts, so nothing can agree with them",
            cure="give a reward of your own: options.reward=package.module:function",
        )
    return Agreement(shape, texts[0], text=conditions[texts[0]].shape[-1])


class TimedAgreement(nn.Module):
    """An :class:`Agreement` that reads noised samples and is told how noised they are: the time, as a share of the
    process's range, is one more channel. ``(x_t [B, ...], cond, share [B])`` to log probabilities ``[B]``."""

    def __init__(self, judge: Agreement) -> None:
        super().__init__()
        self.judge = judge

    def forward(self, x_t: Tensor, cond: Mapping[str, Tensor], share: Tensor) -> Tensor:
        return self.judge(timed(x_t, share), cond)


def timed(x_t: Tensor, share: Tensor) -> Tensor:
    """``x_t [B, C, ...]`` with one more channel, all of it ``share [B]``."""
    own = share.to(x_t).reshape(-1, *[1] * (x_t.ndim - 1)).expand(len(x_t), 1, *x_t.shape[2:])
    return torch.cat([x_t, own], 1)


def timed_agreement_for(data: Any, conditions: Mapping[str, Tensor], shape: tuple[int, ...]) -> TimedAgreement:
    """An untrained one, as :func:`agreement_for` makes it."""
    return TimedAgreement(agreement_for(data, conditions, (shape[0] + 1, *shape[1:])))


def trained_agreement(data: Any, shape: tuple[int, ...], steps: int, seed: int = 0) -> Agreement:
    """One that has learnt from these data: samples ``x`` with their conditions; the same each time. Raises UserError
    for data without samples, or without conditions."""
    return _trained(data, steps, seed, lambda cond: agreement_for(data, cond, shape), lambda x: x)


def trained_timed_agreement(
    data: Any, shape: tuple[int, ...], steps: int, process: Process, seed: int = 0
) -> TimedAgreement:
    """One that has learnt from these data, noised at uniform times of the process: a reward of noisy latents."""

    def noised(x: Tensor) -> Tensor:
        share = torch.rand(len(x)) * 0.999
        return timed(process.add_noise(x, torch.randn_like(x), share * process.t_max), share)

    wide = (shape[0] + 1, *shape[1:])
    return TimedAgreement(_trained(data, steps, seed, lambda cond: agreement_for(data, cond, wide), noised))


def _trained(
    data: Any,
    steps: int,
    seed: int,
    make: Callable[[Mapping[str, Tensor]], Agreement],
    shown: Callable[[Tensor], Tensor],
) -> Agreement:
    first = data.batch(seed, 0, 2)
    first["x"]
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        judge = make(first["cond"])
        optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.01)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
            batch = data.batch(seed, step, BATCH)
            loss = judge.loss(shown(batch["x"]), batch["cond"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return judge
