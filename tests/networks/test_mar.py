"""The masked-autoregressive network and its diffusion head, against closed forms and the paper's own numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from stillroom.diffusion.process import VP
from stillroom.errors import UserError
from stillroom.networks import token_head
from stillroom.networks.mar import MAR, CrossBlock, MARSettings, take
from stillroom.networks.token_head import Prediction, TokenDiffusionHead, respaced
from tiny_mar import DIM, PLACES, latents, make_mar, random_parts, texts

COSINE = VP("squaredcos_cap_v2", 1000)


def cosine_betas() -> Tensor:
    """The card's schedule, written out."""
    u = torch.arange(1001, dtype=torch.float64) / 1000
    kept = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - kept[1:] / kept[:-1]).clamp(max=0.999)


def make_head(seed: int = 0, **settings: Any) -> TokenDiffusionHead:
    torch.manual_seed(seed)
    head = TokenDiffusionHead(**{"dim": 3, "z_width": 4, "width": 8, "blocks": 2, **settings})
    with torch.no_grad():
        for p in head.parameters():
            p += 0.2 * torch.randn_like(p)
    return head


def head_inputs(b: int = 3, r: int = 2, m: int = 4, seed: int = 1) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "z": torch.randn(b, m, 4, generator=g), "x": torch.randn(b, m, 3, generator=g),
        "t": torch.randint(1000, (b, r, m), generator=g), "eps": torch.randn(b, r, m, 3, generator=g),
    }  # fmt: skip


# --- the schedule -----------------------------------------------------------------------------------------------------
def test_all_times_give_the_cosine_schedule() -> None:
    table, betas = respaced(COSINE, 1000), cosine_betas()
    kept = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    posterior = betas * (1 - before) / (1 - kept)
    posterior[0] = posterior[1]
    expected = {
        "signal": kept.sqrt(), "noise": (1 - kept).sqrt(), "log_beta": betas.log(), "log_posterior": posterior.log(),
        "x0_weight": betas * before.sqrt() / (1 - kept), "xt_weight": (1 - before) * (1 - betas).sqrt() / (1 - kept),
        "scale": (1 - betas).rsqrt(), "eps_weight": betas / ((1 - kept) * (1 - betas)).sqrt(),
    }  # fmt: skip
    for name, value in expected.items():
        assert torch.allclose(getattr(table, name).double(), value, rtol=1e-4, atol=1e-7), name


def test_respaced_times_are_those_of_improved_ddpm() -> None:
    times = respaced(COSINE, 100).times
    assert times.tolist() == [round(i * 999 / 99) for i in range(100)]
    assert respaced(COSINE, 1).times.tolist() == [999]
    assert respaced(COSINE, 2).times.tolist() == [0, 999]


@pytest.mark.parametrize("steps", [2, 25, 100])
def test_a_respaced_step_takes_the_marginals_from_one_time_to_the_next(steps: int) -> None:
    """With the true x0, ``x0_weight x0 + xt_weight x_t`` and the posterior's noise have the next time's marginal."""
    table = respaced(COSINE, steps)
    for i in range(1, steps):
        signal = table.x0_weight[i] + table.xt_weight[i] * table.signal[i]
        variance = (table.xt_weight[i] * table.noise[i]) ** 2 + table.log_posterior[i].exp()
        assert float(signal) == pytest.approx(float(table.signal[i - 1]), rel=1e-4)
        assert float(variance) == pytest.approx(float(table.noise[i - 1]) ** 2, rel=1e-4)


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 1000"):
        respaced(COSINE, steps)


# --- the head's loss --------------------------------------------------------------------------------------------------
def test_a_new_head_says_zero_noise_and_the_middle_variance() -> None:
    head = TokenDiffusionHead(3, 4, 8, 2)
    eps, v = head(torch.randn(5, 3), torch.randn(5, 8))
    assert v is not None
    assert float(eps.abs().max()) == 0.0
    assert float(v.abs().max()) == 0.0


def test_a_new_heads_blocks_are_the_identity() -> None:
    head = TokenDiffusionHead(3, 4, 8, 2)
    seen: list[Tensor] = []
    head.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    head.blocks[1].register_forward_hook(lambda _, inputs, output: seen.append(output))
    head(torch.randn(5, 3), torch.randn(5, 8))
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_squared_error_by_hand(prediction: Prediction) -> None:
    head, given = make_head(prediction=prediction), head_inputs()
    mse, _ = head.errors(**given)
    kept = torch.cumprod(1 - cosine_betas(), 0).float()
    for b, r, m in [(0, 0, 0), (2, 1, 3)]:
        t, eps = given["t"][b, r, m], given["eps"][b, r, m]
        x_t = kept[t].sqrt() * given["x"][b, m] + (1 - kept[t]).sqrt() * eps
        said, _ = head(x_t, head.times(t[None])[0] + head.embed_z(given["z"][b, m]))
        asked = eps if prediction == "eps" else kept[t].sqrt() * eps - (1 - kept[t]).sqrt() * given["x"][b, m]
        assert float(mse[b, r, m]) == pytest.approx(float((said - asked).square().mean()), rel=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_variational_bound_by_torch_distributions(prediction: Prediction) -> None:
    """KL of the reverse step, and at t = 0 the mass in a bin of 2/255, in bits per dimension."""
    head, given = make_head(prediction=prediction), head_inputs()
    given["t"][0, 0] = torch.tensor([0, 1, 999, 500])
    given["x"][0] = torch.tensor([-1.0, 0.3, 1.0])
    _, vb = head.errors(**given)
    assert vb is not None
    betas = cosine_betas()
    kept = torch.cumprod(1 - betas, 0)
    for m in range(4):
        t, x, eps = int(given["t"][0, 0, m]), given["x"][0, m].double(), given["eps"][0, 0, m].double()
        before = kept[t - 1] if t else torch.ones(())
        x_t = kept[t].sqrt() * x + (1 - kept[t]).sqrt() * eps
        said, v = (
            a.double() for a in head(x_t.float(), head.times(torch.tensor([t]))[0] + head.embed_z(given["z"][0, m]))
        )
        wide, posterior = betas[t], betas[t] * (1 - before) / (1 - kept[t])
        least = posterior if t else betas[1] * (1 - kept[0]) / (1 - kept[1])
        log_variance = (v + 1) / 2 * wide.log() + (1 - v) / 2 * least.log()

        def mean(x0: Tensor, t: int = t, before: Tensor = before, x_t: Tensor = x_t) -> Tensor:
            return (
                betas[t] * before.sqrt() * x0 + (1 - before) * (1 - betas[t]).sqrt() * x_t
            ) / (1 - kept[t])  # fmt: skip

        by_eps, by_v = (
            (x_t - (1 - kept[t]).sqrt() * said) / kept[t].sqrt(),
            kept[t].sqrt() * x_t - (1 - kept[t]).sqrt() * said,
        )
        ours = Normal(mean(by_eps if prediction == "eps" else by_v), (0.5 * log_variance).exp())
        if t:
            bits = kl_divergence(Normal(mean(x), posterior.sqrt().expand(3)), ours)
        else:
            upper = ours.cdf(x + 1 / 255).where(x < 0.999, torch.ones(3, dtype=torch.float64))
            lower = ours.cdf(x - 1 / 255).where(x > -0.999, torch.zeros(3, dtype=torch.float64))
            bits = -(upper - lower).clamp_min(1e-12).log()
        assert float(vb[0, 0, m]) == pytest.approx(float(bits.mean() / math.log(2)), rel=2e-3, abs=1e-6), t


def test_the_bound_trains_the_variance_alone() -> None:
    head = make_head()
    _, vb = head.errors(**head_inputs())
    assert vb is not None
    vb.mean().backward()
    assert head.out.weight.grad is not None
    assert float(head.out.weight.grad[:3].abs().max()) == 0.0
    assert float(head.out.weight.grad[3:].abs().min()) > 0.0


def test_the_squared_error_does_not_train_the_variance() -> None:
    head = make_head()
    head.errors(**head_inputs())[0].mean().backward()
    assert head.out.weight.grad is not None
    assert float(head.out.weight.grad[3:].abs().max()) == 0.0


def test_fixed_variance_has_no_bound_and_half_the_outputs() -> None:
    head = make_head(learned_variance=False)
    assert head.out.out_features == 3
    assert head.errors(**head_inputs())[1] is None


def test_draws_share_their_token_but_nothing_else() -> None:
    head, given = make_head(), head_inputs(r=3)
    mse, vb = head.errors(**given)
    assert vb is not None
    for r in range(3):
        alone = {**given, "t": given["t"][:, r : r + 1], "eps": given["eps"][:, r : r + 1]}
        one, bound = head.errors(**alone)
        assert bound is not None
        assert torch.allclose(mse[:, r : r + 1], one, atol=1e-6)
        assert torch.allclose(vb[:, r : r + 1], bound, rtol=1e-4)


def test_looked_up_time_embeddings_are_the_computed_ones() -> None:
    head, t = make_head(), torch.randint(1000, (3, 400))
    assert torch.allclose(head.times(t), torch.stack([head.times(row) for row in t]), atol=1e-6)


# --- the head's sampler -----------------------------------------------------------------------------------------------
class Exact(TokenDiffusionHead):
    """Knows the noise in samples of a normal law: ``E[eps | x_t] = sigma (x_t - alpha mu) / (alpha^2 s^2 + sigma^2)``,
    or v: ``E[v | x_t] = (E[eps | x_t] - sigma x_t) / alpha``, since ``x_t`` is ``alpha x0 + sigma eps``.
    The embedding of a time is made to carry the time itself; ``z`` is the mean."""

    def __init__(self, std: float, prediction: Prediction) -> None:
        super().__init__(1, 1, 2, 0, learned_variance=False, prediction=prediction)
        self.std = std

    def times(self, t: Tensor) -> Tensor:
        return torch.stack([t.float(), torch.zeros_like(t.float())], -1)

    def modulations(self, about: Tensor, times: Tensor) -> Iterator[Tensor]:  # type: ignore[override]
        return (about + time for time in times.flip(0))

    def modulated(self, x_t: Tensor, parts: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        return self(x_t, parts)

    def forward(self, x_t: Tensor, y: Tensor) -> tuple[Tensor, None]:
        table, t = respaced(self.process, 1000), y[..., :1].round().long()
        signal, noise = table.signal[t], table.noise[t]
        signal, noise, x_t = (
            signal.double(),
            noise.double(),
            x_t.double(),
        )  # v: a small difference over a small number
        eps = noise * (x_t - signal * y[..., 1:]) / ((signal * self.std) ** 2 + noise**2)
        return (eps if self.prediction == "eps" else (eps - noise * x_t) / signal).float(), None


def exact_samples(
    steps: int, mean: float = 0.5, std: float = 0.7, n: int = 20000, prediction: Prediction = "eps", **settings: Any
) -> Tensor:
    head = Exact(std, prediction)
    head.embed_z = torch.nn.Linear(1, 2, bias=False)
    head.embed_z.weight.data = torch.tensor([[0.0], [1.0]])
    g = torch.Generator().manual_seed(0)
    z = torch.full((1, n, 1), mean)
    return head.sample(z, torch.randn(n, 1, generator=g), head.plan(steps), generator=g, **settings)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_ancestral_sampling_with_the_exact_answer_draws_the_law(prediction: Prediction) -> None:
    x = exact_samples(250, prediction=prediction)
    assert float(x.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(x.std()) == pytest.approx(0.7, rel=0.03)


@pytest.mark.parametrize("settings", [{}, {"clip": 0.6}, {"temperature": 0.3}])
def test_both_predictions_draw_the_same_tokens(settings: dict[str, float]) -> None:
    ours, theirs = (exact_samples(20, n=200, prediction=p, **settings) for p in ("eps", "v"))  # type: ignore[arg-type]
    assert torch.allclose(ours, theirs, atol=1e-3)


def test_temperature_zero_draws_less_widely() -> None:
    assert float(exact_samples(250, temperature=0.0).std()) < 0.5 * float(exact_samples(250).std())


def test_the_result_stays_within_the_clip() -> None:
    x = exact_samples(50, clip=0.6)
    assert float(x.max()) <= 0.6 + 1e-6
    assert float(x.std()) > 0.2


class Says(TokenDiffusionHead):
    """Says these numbers about the two halves, whatever it is asked."""

    def __init__(self, eps: tuple[float, float], v: tuple[float, float]) -> None:
        super().__init__(1, 1, 2, 0)
        self.said = torch.tensor(eps), torch.tensor(v)

    def modulated(self, x_t: Tensor, parts: Any) -> tuple[Tensor, Tensor]:
        return tuple(a[: len(parts[0]), None, None].expand(-1, *x_t.shape[-2:]) for a in self.said)  # type: ignore[return-value]


def test_guidance_acts_on_the_noise_and_the_variance_is_the_conditional_ones() -> None:
    head, table = Says((0.3, 0.1), (1.0, -1.0)), respaced(COSINE, 2)
    noise = torch.tensor([[0.5], [-2.0]])
    found = head.sample(
        torch.zeros(2, 2, 1), noise, head.plan(2), guidance=4.0, temperature=0.5,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    eps = 0.1 + 4.0 * 0.2
    fresh = torch.randn(2, 1, generator=torch.Generator().manual_seed(5))
    x = table.scale[1] * noise - table.eps_weight[1] * eps + 0.5 * (0.5 * table.log_beta[1]).exp() * fresh
    assert torch.allclose(found, table.scale[0] * x - table.eps_weight[0] * eps, rtol=1e-5)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("rows", [1, 12, 30, 10_000])
def test_the_modulation_of_many_steps_is_that_of_each(
    rows: int, learned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 rows a step, 7 steps: one by one, two and five at a time (the last ones fewer), all at once."""
    head, inputs = make_head(learned_variance=learned), head_inputs()
    z, plan = torch.stack([inputs["z"], inputs["z"].flip(0)])[:, :, :1], head.plan(7)
    monkeypatch.setattr(token_head, "ROWS", rows)
    with torch.no_grad():
        about = head.embed_z(z)
        found = list(head.modulations(about, plan[1]))
        assert len(found) == 7
        for time, parts in zip(plan[1].flip(0), found, strict=True):
            expected = head.modulation(torch.nn.functional.silu(about + time)).chunk(8, -1)
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(parts, expected, strict=True))


def test_sampling_asks_the_head_as_its_loss_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler's way through many steps at once gives the tokens that ``forward``, step by step, gives."""
    head, inputs = make_head(), head_inputs()
    z, noise, plan = torch.stack([inputs["z"], inputs["z"].flip(0)]), inputs["eps"][:, 0], head.plan(9)

    def drawn() -> Tensor:
        return head.sample(
            z, noise, plan, guidance=2.5, temperature=0.9, clip=2.0, generator=torch.Generator().manual_seed(3)
        )

    found = drawn()
    asked = head.modulated
    monkeypatch.setattr(head, "modulations", lambda about, times: iter([about + t for t in times.flip(0)]))
    monkeypatch.setattr(head, "modulated", lambda x, y: asked(x, head._modulate(torch.nn.functional.silu(y))))
    assert torch.allclose(found, drawn(), rtol=1e-4, atol=1e-5)


def test_one_step_is_the_implied_clean_token() -> None:
    head = Says((0.3, 0.1), (0.0, 0.0))
    found = head.sample(torch.zeros(1, 1, 1), torch.tensor([[0.301]]), head.plan(1))
    process_time = torch.tensor(999.0, dtype=torch.float64)
    expected = (0.301 - COSINE.sigma(process_time) * 0.3) / COSINE.alpha(process_time)
    assert float(found) == pytest.approx(float(expected), rel=1e-3)


# --- the network ------------------------------------------------------------------------------------------------------
def test_the_large_network_has_the_papers_size() -> None:
    with torch.device("meta"):
        counts = {
            size: sum(p.numel() for p in MARSettings(preset=size).make().parameters())  # type: ignore[arg-type]
            for size in ("base", "large", "huge")
        }
    assert counts == {"base": 406_689_152, "large": 792_244_352, "huge": 1_414_206_336}


def test_tokens_are_patches_row_by_row() -> None:
    mar, x = make_mar(), latents(3)
    tokens = mar.tokens(x)
    assert tokens.shape == (3, PLACES, DIM)
    assert torch.equal(tokens[:, 1], x[:, :, 0:2, 2:4].reshape(3, DIM))
    assert torch.equal(tokens[:, 4], x[:, :, 2:4, 0:2].reshape(3, DIM))
    assert torch.equal(mar.latents(tokens, (4, 4)), x)
    wide = x[:, :, :4]
    assert torch.equal(mar.latents(mar.tokens(wide), mar.grid_of(wide)), wide)


def z_of(mar: MAR, x: Tensor, order: Tensor, masked: int, text: Tensor) -> Tensor:
    parts = random_parts(len(x), masked)
    return mar(x, text, **{**parts, "order": order}).z


@pytest.mark.parametrize("masked", [1, 10, PLACES])
def test_the_network_sees_the_visible_tokens_and_no_others(masked: int) -> None:
    mar, x, text = make_mar(), latents(3), texts(3)
    order = random_parts(3, masked)["order"]
    z = z_of(mar, x, order, masked, text)
    assert z.shape == (3, masked, 16)
    hidden, seen = mar.tokens(x), mar.tokens(x)
    hidden.scatter_(1, order[:, :masked, None].expand(-1, -1, DIM), 7.0)
    assert torch.equal(z_of(mar, mar.latents(hidden, (4, 4)), order, masked, text), z)
    seen.scatter_(1, order[:, masked:, None].expand(-1, -1, DIM), 7.0)
    changed = z_of(mar, mar.latents(seen, (4, 4)), order, masked, text)
    assert torch.equal(changed, z) == (masked == PLACES)


def test_the_order_of_the_visible_tokens_does_not_matter() -> None:
    mar, x, text = make_mar(), latents(3), texts(3)
    order = random_parts(3, 6)["order"]
    other = torch.cat([order[:, :6], order[:, 6:].flip(1)], 1)
    assert torch.allclose(z_of(mar, x, order, 6, text), z_of(mar, x, other, 6, text), atol=1e-5)


def test_places_have_names() -> None:
    """Two masked places, with nothing visible, are told apart by the position tables alone."""
    mar, x = make_mar(), latents(1)
    z = z_of(mar, x, torch.arange(PLACES)[None], PLACES, texts(1))
    assert float((z[0, 0] - z[0, 1]).abs().max()) > 1e-3
    with torch.no_grad():
        for table in (mar.encoder_positions, mar.decoder_positions, mar.cross_positions):
            table.zero_()
    z = z_of(mar, x, torch.arange(PLACES)[None], PLACES, texts(1))
    assert torch.allclose(z[0, 0], z[0, 1], atol=1e-6)


def test_the_loss_is_the_heads_over_the_masked_tokens() -> None:
    mar, x, text, parts = make_mar(), latents(4), texts(4), random_parts(4, 5)
    loss = mar(x, text, **parts)
    hidden = take(mar.tokens(x), parts["order"][:, :5])
    mse, vb = mar.head.errors(loss.z, hidden, parts["t"], parts["eps"])
    assert loss.mse.shape == (4,)
    assert torch.allclose(loss.mse, mse.mean((1, 2)))
    assert vb is not None
    assert torch.allclose(loss.vb, vb.mean((1, 2)))


def test_gradients_reach_every_parameter() -> None:
    mar, x, text, parts = make_mar(), latents(4), texts(4), random_parts(4, 5)
    loss = mar(x, text, **parts, drop=torch.tensor([True, False, False, False]))
    (loss.mse.mean() + loss.vb.mean()).backward()
    dead = [name for name, p in mar.named_parameters() if p.grad is None or float(p.grad.abs().max()) == 0.0]
    assert dead == []


def test_the_cross_block_adds_to_its_normalised_query() -> None:
    torch.manual_seed(0)
    block, x = CrossBlock(8, 2, 2.0, 0.0, 0.0), torch.randn(2, 3, 8)
    with torch.no_grad():
        for layer in (block.attention.out, block.mlp.down):
            layer.weight.zero_()
            layer.bias.zero_()
    assert torch.allclose(block(x, *block.remember(torch.randn(2, 4, 8))), block.norm_q(x))


def test_cross_attention_is_torchs_multihead_attention() -> None:
    torch.manual_seed(0)
    block = CrossBlock(8, 2, 2.0, 0.0, 0.0)
    reference = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([block.attention.q.weight, block.attention.kv.weight]))
        reference.in_proj_bias.copy_(torch.cat([block.attention.q.bias, block.attention.kv.bias]))
        reference.out_proj.weight.copy_(block.attention.out.weight)
        reference.out_proj.bias.copy_(block.attention.out.bias)
    q, text = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    expected = reference(q, block.norm_text(text), block.norm_text(text))[0]
    assert torch.allclose(block.attention(q, *block.remember(text)), expected, atol=1e-6)


def test_a_dropped_text_is_the_null_text() -> None:
    mar, x, parts = make_mar(), latents(3), random_parts(3, 6)
    drop = torch.tensor([True, False, True])
    one, other = mar(x, texts(3), **parts, drop=drop).z, mar(x, texts(3, seed=9), **parts, drop=drop).z
    assert torch.equal(one[drop], other[drop])
    assert not torch.equal(one[~drop], other[~drop])
    assert torch.equal(one[~drop], mar(x, texts(3), **parts).z[~drop])


def test_fewer_texts_than_samples_serve_them_in_turn() -> None:
    mar, parts, x = make_mar(), random_parts(6, 5), latents(6)
    shared, repeated = mar(x, texts(3), **parts), mar(x, texts(3).repeat(2, 1, 1), **parts)
    assert torch.allclose(shared.mse, repeated.mse, atol=1e-6)


# --- other grids ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("grid", [(2, 2), (8, 8), (3, 7), (16, 4)])
def test_position_tables_are_resized(grid: tuple[int, int]) -> None:
    mar = make_mar()
    ramp = torch.linspace(0, 1, 4)
    with torch.no_grad():
        mar.encoder_positions[:] = 3.0
        mar.encoder_positions[0, :, 0] = ramp.repeat(4)  # rises with the column alone
    table = mar.positions(mar.encoder_positions, grid).reshape(*grid, 16)
    assert torch.allclose(table[..., 1:], torch.full_like(table[..., 1:], 3.0), atol=1e-5)
    assert torch.allclose(table[..., 0], table[:1, :, 0].expand(grid), atol=1e-5)
    assert bool((table[0, 1:, 0] > table[0, :-1, 0]).all())


def test_the_stored_grid_is_used_as_it_is() -> None:
    mar = make_mar()
    assert mar.positions(mar.encoder_positions, (4, 4)) is mar.encoder_positions


@pytest.mark.parametrize("side", [4, 16])
def test_training_and_its_gradients_at_another_resolution(side: int) -> None:
    mar, x = make_mar(), latents(2, side=side)
    places = (side // 2) ** 2
    mar(x, texts(2), **random_parts(2, places - 1, places=places)).mse.mean().backward()
    assert mar.encoder_positions.grad is not None
    assert float(mar.encoder_positions.grad.abs().max()) > 0


# --- settings ---------------------------------------------------------------------------------------------------------
def test_a_network_is_rebuilt_from_its_config() -> None:
    mar = make_mar(grid=(2, 3), learned_variance=False)
    again = MAR(**json.loads(json.dumps(mar.config)))
    again.load_state_dict(mar.state_dict())
    assert again.config == mar.config
    assert again.grid == (2, 3)


def test_settings_change_the_preset() -> None:
    settings = MARSettings(preset="base", width=24, heads=3, encoder_blocks=1, decoder_blocks=1, cross_blocks=1)
    with torch.device("meta"):
        mar = settings.make(channels=4, text_width=8, grid=(2, 2))
    assert {k: mar.config[k] for k in ("width", "heads", "channels", "text_width", "grid", "aligner_blocks")} == {
        "width": 24, "heads": 3, "channels": 4, "text_width": 8, "grid": [2, 2], "aligner_blocks": 6,
    }  # fmt: skip


def test_dropout_acts_in_training_only() -> None:
    mar, x, text, parts = make_mar(dropout=0.5, attention_dropout=0.5), latents(3), texts(3), random_parts(3, 6)
    assert torch.equal(mar(x, text, **parts).z, mar(x, text, **parts).z)
    mar.train()
    assert not torch.equal(mar(x, text, **parts).z, mar(x, text, **parts).z)


def test_position_tables_begin_at_their_scale() -> None:
    torch.manual_seed(0)
    for std in (0.02, 0.5):
        mar = MAR(2, 2, (8, 8), 5, 32, 2, 1, 1, 1, 1, head_width=8, head_blocks=1, position_std=std)
        assert float(mar.cross_positions.std()) == pytest.approx(std, rel=0.1)
        assert float(mar.null_text.std()) == pytest.approx(0.02, rel=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 18, "heads": 4}, "does not split into 4 heads"),
        ({"cross_blocks": 0}, "cannot read text"),
        ({"grid": (4, 0)}, "rows and columns"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_mar(**settings)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 2, 7, 8), (1, 2, 8, 9)])
def test_latents_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="do not fit a MAR"):
        make_mar().tokens(torch.zeros(shape))
