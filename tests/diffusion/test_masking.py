"""Masked-token sampling: laws, schedules, exact reuse, in-painting."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gaussians import draws
from stillroom.diffusion.masking import TEXT, MaskedSampler, MaskRatio, random_orders, token_counts
from stillroom.diffusion.sampling import sampler_from_dict
from stillroom.errors import UserError
from stillroom.networks.mar import MAR, take
from tiny_mar import DIM, PLACES, latents, make_mar, texts

FAST = MaskedSampler(steps=5, guidance=3.0, head_steps=4, clip=2.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(sampler: MaskedSampler = FAST, mar: MAR | None = None, n: int = 3, seed: int = 0, **given: Any) -> Tensor:
    """Samples for ``n`` texts from fixed starting noise."""
    return sampler.sample(mar or make_mar(), latents(n), {TEXT: texts(n)}, generator(seed), **given)


# --- laws and schedules -----------------------------------------------------------------------------------------------
def test_the_truncated_normal_has_its_mean_and_its_edges() -> None:
    law = MaskRatio()
    values = torch.tensor([law.quantile((i + 0.5) / 2000) for i in range(2000)])
    assert float(values.min()) >= 0.7
    assert float(values.max()) <= 1.0

    def density(x: float) -> float:
        return math.exp(-(x * x) / 2) / math.sqrt(2 * math.pi)

    share = 0.5 - 0.5 * (1 + math.erf(-1.2 / math.sqrt(2)))
    assert float(values.mean()) == pytest.approx(1 + 0.25 * (density(-1.2) - density(0)) / share, abs=1e-4)


def test_the_cosine_law_masks_two_thirds_on_average() -> None:
    law = MaskRatio("cosine", low=0.0)
    values = [law.quantile((i + 0.5) / 2000) for i in range(2000)]
    assert sum(values) / 2000 == pytest.approx(2 / math.pi, abs=1e-4)
    assert law.count(0.999999, 16) == 1
    assert law.count(0.0, 16) == 16


@pytest.mark.parametrize(("u", "tokens", "masked"), [(0.0, 16, 12), (0.0, 10, 7), (0.99999, 256, 256)])
def test_the_count_is_rounded_up(u: float, tokens: int, masked: int) -> None:
    assert MaskRatio().count(u, tokens) == masked


def test_one_number_for_the_whole_batch_whoever_draws_it() -> None:
    whole, part = draws(8, seed=3), draws(8, seed=3)
    part.rows = slice(4, 8)
    assert MaskRatio().sample(whole, 256) == MaskRatio().sample(part, 256)


@pytest.mark.parametrize("settings", [{"low": 0.9, "high": 0.8}, {"std": 0.0}, {"low": -0.1}, {"high": 1.1}])
def test_impossible_laws_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="mask ratio"):
        MaskRatio(**settings)  # type: ignore[arg-type]


def test_orders_are_permutations_and_differ() -> None:
    orders = random_orders(draws(6), 16)
    assert torch.equal(orders.sort(1).values, torch.arange(16).expand(6, 16))
    assert len({tuple(row) for row in orders.tolist()}) == 6


def test_token_counts_by_hand() -> None:
    """floor(16 cos(pi/8 s)): 14.78, 11.31, 6.12."""
    assert token_counts(16, 4) == [16, 14, 11, 6, 0]
    assert token_counts(16, 1) == [16, 0]
    assert token_counts(4, 64) == [4, 3, 2, 1, 0]
    assert token_counts(256, 64)[:3] == [256, 255, 254]


@given(st.integers(1, 300), st.integers(1, 300))
def test_every_step_predicts_something_and_the_last_the_rest(tokens: int, steps: int) -> None:
    counts = token_counts(tokens, steps)
    assert counts[0] == tokens
    assert counts[-1] == 0
    assert len(counts) == min(steps, tokens) + 1
    assert all(a > b for a, b in zip(counts, counts[1:], strict=False))


def test_guidance_schedules() -> None:
    assert MaskedSampler(guidance=4.0).guidance_at(0.25) == 4.0
    linear = MaskedSampler(guidance=4.0, guidance_schedule="linear")
    assert [linear.guidance_at(share) for share in (0.0, 0.5, 1.0)] == [1.0, 2.5, 4.0]


# --- sampling ---------------------------------------------------------------------------------------------------------
def plain_sample(sampler: MaskedSampler, mar: MAR, noise: Tensor, text: Tensor, g: torch.Generator) -> Tensor:
    """The card's algorithm with nothing reused or left out: the whole network on [text; null], for all places, every
    step; the head's embeddings made anew for every token and step."""
    n, tokens, start = len(noise), torch.zeros(len(noise), PLACES, DIM), mar.tokens(noise)
    order = torch.rand(n, PLACES, generator=g).argsort(1)
    counts = token_counts(PLACES, sampler.steps)
    for left, after in zip(counts[:-1], counts[1:], strict=True):
        aligned = torch.cat([mar.align(text), mar.null_text.expand(n, text.shape[1], -1)])
        visible = order[:, left:].repeat(2, 1)
        decoded = mar.decode(tokens.repeat(2, 1, 1), visible, (4, 4))
        everywhere = torch.arange(PLACES).expand(2 * n, -1)
        z = mar.cross(decoded, everywhere, mar.keys_and_values(aligned), (4, 4))
        at = order[:, after:left]
        z = take(z, at.repeat(2, 1)).reshape(2, n, left - after, -1)
        w = sampler.guidance_at((PLACES - after) / PLACES)
        new = mar.head.sample(
            z, take(start, at), mar.head.plan(sampler.head_steps), guidance=w, temperature=sampler.temperature,
            clip=sampler.clip, generator=g,
        )  # fmt: skip
        tokens = tokens.scatter(1, at[..., None].expand(-1, -1, DIM), new)
    return mar.latents(tokens, (4, 4))


@pytest.mark.parametrize("schedule", ["constant", "linear"])
@torch.no_grad()
def test_reuse_changes_nothing(schedule: Any) -> None:
    sampler, mar = dataclasses.replace(FAST, guidance_schedule=schedule), make_mar()
    plain = plain_sample(sampler, mar, latents(3), texts(3), generator())
    assert torch.allclose(draw(sampler, mar), plain, atol=1e-5)


def test_work_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text and head times once a call; the encoder, blind to the text, on one half of the guided batch; the text stack
    on the tokens that are wanted, each once."""
    mar, seen = make_mar(), {"align": 0, "times": 0, "decoder": [], "cross": []}  # type: ignore[var-annotated]
    mar.align_norm.register_forward_hook(lambda *_: seen.update(align=seen["align"] + 1))
    mar.head.embed_time.register_forward_hook(lambda *_: seen.update(times=seen["times"] + 1))
    mar.decoder_norm.register_forward_hook(lambda _, inputs, __: seen["decoder"].append(len(inputs[0])))
    mar.cross_norm.register_forward_hook(lambda _, inputs, __: seen["cross"].append(inputs[0].shape[:2]))
    draw(FAST, mar)
    assert (seen["align"], seen["times"], seen["decoder"]) == (1, 1, [3] * 5)
    assert sum(tokens for _, tokens in seen["cross"]) == PLACES
    assert {rows for rows, _ in seen["cross"]} == {6}


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 3), (0.0, 3), (2.0, 6)])
def test_unguided_sampling_costs_one_half(guidance: float, rows: int) -> None:
    mar, seen = make_mar(), set()
    mar.cross_norm.register_forward_hook(lambda _, inputs, __: seen.add(len(inputs[0])))
    sampler = dataclasses.replace(FAST, guidance=guidance)
    draw(sampler, mar)
    assert seen == {rows}
    assert sampler.nfe == 5 * rows // 3


def test_guidance_zero_does_not_hear_the_text() -> None:
    sampler, mar = dataclasses.replace(FAST, guidance=0.0), make_mar()
    one = sampler.sample(mar, latents(3), {TEXT: texts(3)}, generator())
    other = sampler.sample(mar, latents(3), {TEXT: texts(3, seed=8)}, generator())
    assert torch.equal(one, other)
    assert not torch.equal(draw(FAST, mar), FAST.sample(mar, latents(3), {TEXT: texts(3, seed=8)}, generator()))


def test_the_same_seed_gives_the_same_samples() -> None:
    mar = make_mar()
    assert torch.equal(draw(mar=mar, seed=1), draw(mar=mar, seed=1))
    assert not torch.equal(draw(mar=mar, seed=1), draw(mar=mar, seed=2))


def test_a_token_starts_from_its_own_noise() -> None:
    """One token at temperature 0: only its own part of the noise moves it."""
    mar, sampler = make_mar(), MaskedSampler(1, 1.0, temperature=0.0, head_steps=3)
    noise = latents(1)
    other = noise.clone()
    other[:, :, 0:2, 2:4] += 1.0  # the second token
    one, two = (mar.tokens(sampler.sample(mar, x, {TEXT: texts(1)}, generator())) for x in (noise, other))
    assert (one != two).any(-1).nonzero().tolist() == [[0, 1]]


def test_another_grid_than_the_stored_one() -> None:
    found = FAST.sample(make_mar(), latents(2, side=12), {TEXT: texts(2)}, generator())
    assert found.shape == (2, 2, 12, 12)
    assert bool(torch.isfinite(found).all())


def test_samplers_are_saved_by_name() -> None:
    sampler = MaskedSampler(8, 2.0, "linear", 0.9, 25, 1.3)
    assert sampler_from_dict(sampler.to_dict()) == sampler


# --- in-painting ------------------------------------------------------------------------------------------------------
def holes(*boxes: tuple[int, int, int, int]) -> Tensor:
    hole = torch.zeros(len(boxes), 8, 8, dtype=torch.bool)
    for i, (top, bottom, left, right) in enumerate(boxes):
        hole[i, top:bottom, left:right] = True
    return hole


def test_what_is_known_stays_and_what_is_not_is_filled() -> None:
    known = latents(3, seed=6)
    hole = holes((0, 4, 0, 4), (2, 4, 2, 8), (4, 8, 0, 4))  # 4, 3 and 4 tokens
    found = draw(known=known, hole=hole)
    inside = hole[:, None].expand_as(known)
    assert torch.equal(found[~inside], known[~inside])
    assert bool((found[inside] != known[inside]).all())


def test_a_token_is_filled_whole() -> None:
    known, hole = latents(1, seed=6), torch.zeros(8, 8, dtype=torch.bool)
    hole[3, 5] = True
    found = draw(n=1, known=known, hole=hole)
    changed = (found != known).any(1)[0].nonzero()
    assert {tuple(cell) for cell in changed.tolist()} == {(2, 4), (2, 5), (3, 4), (3, 5)}


def test_the_known_tokens_are_visible_from_the_start() -> None:
    mar, seen = make_mar(), []
    hook = mar.encoder_in.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].clone()))
    known = latents(1, seed=6)
    draw(mar=mar, n=1, known=known, hole=holes((0, 4, 0, 4)))
    hook.remove()
    tokens = mar.tokens(known)[0]
    outside = [i for i in range(PLACES) if i not in (0, 1, 4, 5)]
    assert seen[0].shape[1] == 12
    assert sorted(seen[0][0].tolist()) == sorted(tokens[outside].tolist())
    assert [x.shape[1] for x in seen] == [12, 13, 14, 15]  # four tokens, one at a time


def test_what_is_in_the_hole_is_not_looked_at() -> None:
    mar, hole, known = make_mar(), holes((0, 4, 0, 4)), latents(1, seed=6)
    other = known.clone()
    other[hole[:, None].expand_as(known)] = 5.0
    assert torch.equal(draw(mar=mar, n=1, known=known, hole=hole), draw(mar=mar, n=1, known=other, hole=hole))


def test_a_hole_as_large_as_the_image_is_plain_sampling_and_none_is_none() -> None:
    mar, known = make_mar(), latents(3, seed=6)
    assert torch.equal(draw(mar=mar, known=known, hole=torch.ones(8, 8)), draw(mar=mar))
    assert torch.equal(draw(mar=mar, known=known, hole=torch.zeros(8, 8)), known)


@pytest.mark.parametrize(
    "given",
    [
        {"known": latents(3)},
        {"hole": torch.ones(8, 8)},
        {"known": latents(3), "hole": torch.ones(4, 4)},
        {"known": latents(2), "hole": torch.ones(8, 8)},
    ],
)
def test_holes_that_do_not_fit_are_refused(given: dict[str, Tensor]) -> None:
    with pytest.raises(UserError, match=r"in-painting needs|do not fit"):
        draw(**given)


@pytest.mark.parametrize(("cond", "message"), [(None, "needs text features"), ({TEXT: texts(2)}, "2 texts for 3")])
def test_missing_texts_are_named(cond: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FAST.sample(make_mar(), latents(3), cond)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"head_steps": 0}, {"head_steps": 1001}, {"temperature": -0.1}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        MaskedSampler(**settings)
