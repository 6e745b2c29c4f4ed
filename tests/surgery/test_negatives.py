"""Negative texts inside cross-attention, against an attention written by hand and a network that is called twice."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.routed import ByNoise, RoutedDenoiser
from stillroom.errors import UserError
from stillroom.surgery.negatives import (
    MASK,
    TEXT,
    cross_attention_paths,
    negative_conditions,
    steered,
    with_negatives,
)
from stillroom.tasks.pipelines.model import PipelineGenerator
from tiny_pipelines import SIDE, WIDER, make_pipeline

CROSSED = ("sd", "sdxl", "pixart", "sana")
JOINT = ("sd3", "flux")


def generator(family: str) -> PipelineGenerator:
    torch.manual_seed(0)
    side = WIDER.get(family, SIDE)
    made = PipelineGenerator(make_pipeline(family), size=(side, side))
    with torch.no_grad():  # what begins at zero would hide the texts
        for p in made.denoiser.network.parameters():
            p += 0.05 * torch.randn(p.shape)
    return made


def asked(made: PipelineGenerator, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor], Denoiser]:
    cond, null = made.conditions(prompts)
    made.denoiser.null = dict(null)
    x = torch.randn(len(prompts), *made.denoiser.shape, generator=torch.Generator().manual_seed(1))
    return x, cond, made.denoiser


def by_hand(attention: torch.nn.Module, hidden: Tensor, text: Tensor, kept: Tensor | None) -> Tensor:
    """``softmax(Q K^T / sqrt d) V`` of all heads, before the output projection, without a library's attention."""
    q, k, v = attention.to_q(hidden), attention.to_k(text), attention.to_v(text)  # type: ignore[operator]
    heads, width = attention.heads, q.shape[-1] // attention.heads  # type: ignore[operator]
    out = torch.empty_like(q)
    for head in range(int(heads)):  # type: ignore[arg-type]
        part = slice(head * width, (head + 1) * width)
        logits = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width)
        if kept is not None:
            logits = logits.masked_fill(~kept[:, None], -torch.inf)
        out[..., part] = logits.softmax(-1) @ v[..., part]
    return out


@pytest.mark.parametrize("family", ["sd", "pixart"])
@torch.no_grad()
def test_each_cross_attention_takes_away_what_it_reads_in_the_negative_text(family: str) -> None:
    """With recorded inputs of every cross-attention: what its output projection is fed is Z+ - alpha Z-."""
    made = generator(family)
    x, cond, denoiser = asked(made, ["a red cat", "the boat of the dog"])
    negative, _ = made.conditions(["blue"])
    paths, seen = cross_attention_paths(denoiser.network), {}
    assert len(paths) >= 2
    projected: dict[str, Tensor] = {}

    def inputs(path: str):
        def note(module, args, given):
            seen[path] = (args[0] if args else given["hidden_states"], given)

        return note

    with steered(denoiser, negative, 0.3):
        for path in paths:
            attention = denoiser.network.get_submodule(path)
            attention.register_forward_pre_hook(inputs(path), with_kwargs=True)
            attention.to_out[0].register_forward_pre_hook(  # type: ignore[index,union-attr]
                lambda module, args, path=path: projected.__setitem__(path, args[0])
            )
        denoiser(x, torch.tensor([0.4, 0.7]) * denoiser.process.t_max, cond)
    n = cond[TEXT].shape[1]
    for path in paths:
        attention, (hidden, given) = denoiser.network.get_submodule(path), seen[path]
        assert given["encoder_hidden_states"].shape[1] == n  # its own text alone
        masks = (cond[MASK].bool(), negative[MASK].bool().expand(2, -1)) if MASK in cond else (None, None)
        own = by_hand(attention, hidden, given["encoder_hidden_states"], masks[0])
        text = negative[TEXT].expand(2, -1, -1)
        if family == "pixart":
            text = denoiser.network.caption_projection(text)  # type: ignore[operator]
        expected = own - 0.3 * by_hand(attention, hidden, text, masks[1])
        torch.testing.assert_close(projected[path], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", CROSSED)
@torch.no_grad()
def test_a_scale_of_zero_leaves_every_bit_and_another_one_does_not(family: str) -> None:
    made = generator(family)
    x, cond, denoiser = asked(made, ["a red cat", "the boat of the dog"])
    negative, _ = made.conditions(["blue house"])
    t = torch.tensor(0.6 * denoiser.process.t_max)
    plain = denoiser(x, t, cond).value
    with steered(denoiser, negative, 0.0):
        assert torch.equal(denoiser(x, t, cond).value, plain)
    with steered(denoiser, negative, 0.5):
        away = denoiser(x, t, cond).value
    assert not torch.allclose(away, plain, rtol=1e-3, atol=1e-4)
    assert torch.equal(denoiser(x, t, cond).value, plain)  # nothing is left on the network
    hooks = [m for m in denoiser.network.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert not hooks
    attached = with_negatives(denoiser)
    told = negative_conditions({k: v.expand(2, *v.shape[1:]) for k, v in negative.items()}, torch.tensor([0.5, 0.0]))
    mixed = attached(x, t, {**cond, **told}).value
    torch.testing.assert_close(mixed[0], away[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], plain[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(attached(x, t, cond).value, plain)


@torch.no_grad()
def test_padding_of_the_negative_text_is_masked_as_that_of_the_text_is() -> None:
    made = generator("pixart")
    x, cond, denoiser = asked(made, ["a red cat"])
    negative, _ = made.conditions(["blue"])
    assert not bool(negative[MASK].all())
    t, found = torch.tensor(500.0), []
    for noise in (0.0, 5.0):
        other = {**negative, TEXT: negative[TEXT] + noise * (~negative[MASK].bool())[..., None]}
        with steered(denoiser, other, 0.5):
            found.append(denoiser(x, t, cond).value)
    assert torch.equal(found[0], found[1])


def test_a_gradient_reaches_the_projections_through_both_texts_also_when_activations_are_recomputed() -> None:
    made = generator("pixart")
    x, cond, denoiser = asked(made, ["a red cat", "the dog"])
    negative, _ = made.conditions(["blue", "a house"])
    told = negative_conditions(negative, torch.tensor([0.5, 0.9]))
    grads = []
    for again in (False, True):
        one = with_negatives(copy.deepcopy(denoiser)).requires_grad_(True).train()
        if again:
            network: torch.nn.Module = one.network
            network.enable_gradient_checkpointing(one.checkpoint_function)  # type: ignore[operator]
        one(x, torch.tensor([300.0, 700.0]), {**cond, **told}).value.square().sum().backward()
        grads.append({name: p.grad for name, p in one.network.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name])
    assert any("attn2.to_v" in name and bool(grad.abs().sum() > 0) for name, grad in grads[0].items())


@torch.no_grad()
def test_each_of_several_experts_is_steered() -> None:
    made = generator("pixart")
    x, cond, first = asked(made, ["a red cat", "the dog"])
    second = copy.deepcopy(first)
    negative, _ = made.conditions(["blue"])
    both = RoutedDenoiser({"low": first, "high": second}, ByNoise((0.5,)))
    t = torch.tensor([300.0, 700.0])
    with steered(first, negative, 0.5):
        expected = first(x, t, cond).value
    with steered(both, negative, 0.5):
        found = both(x, t, cond).value
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, both(x, t, cond).value, atol=1e-4)
    with pytest.raises(UserError, match="several experts"):
        with_negatives(both)


@pytest.mark.parametrize("family", JOINT)
def test_a_network_that_attends_jointly_is_refused_by_its_name(family: str) -> None:
    made = generator(family)
    with pytest.raises(UserError, match=f"{type(made.denoiser.network).__name__} attends to image and text jointly"):
        cross_attention_paths(made.denoiser.network)


def test_a_network_without_texts_is_refused() -> None:
    from tiny_denoisers import dit_teacher

    with pytest.raises(UserError, match="has no cross-attention"):
        cross_attention_paths(dit_teacher().network)


@torch.no_grad()
def test_one_pass_costs_less_than_two() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    made = generator("sd")
    x, cond, denoiser = asked(made, ["a red cat"])
    negative, _ = made.conditions(["blue"])
    counts = []
    for alpha in (0.0, 0.5):
        with FlopCounterMode(display=False) as counter, steered(denoiser, negative, alpha):
            denoiser(x, torch.tensor(500.0), cond)
        counts.append(counter.get_total_flops())
    assert 1 < counts[1] / counts[0] < 1.3
