"""Heads on a last layer: silent at the start, means of spans, one plain layer where a span is all that is asked."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import EDM, VP, Process, RectifiedFlow
from stillroom.diffusion.sampling import FewStepSampler, FlowMapSampler
from stillroom.errors import UserError
from stillroom.folders.diffusers_networks import some_conditions
from stillroom.networks.parallel_heads import fused, last_layer, with_heads
from stillroom.surgery.attached import AttachedDenoiser
from stillroom.tasks.class_images.model import ImageGenerator
from tiny_denoisers import dit_teacher, point_teacher
from tiny_pipelines import PIPELINES

MADE = {"point": point_teacher, "dit": dit_teacher}
SPAN = {"since": torch.tensor([1.0, 0.75]), "r": torch.tensor([0.25, 0.5])}


def of_family(name: str) -> tuple[Denoiser, dict[str, Tensor]]:
    """A denoiser and conditions of two samples."""
    if name in MADE:
        return MADE[name]().eval(), {"label": torch.tensor([0, 1])}
    from pipeline_pairs import teacher_of

    generator, data = teacher_of(name)
    denoiser = copy.deepcopy(generator.denoiser)
    denoiser.null = dict(data.null)
    found = some_conditions(denoiser)
    return denoiser, {name: value.expand(2, *value.shape).contiguous() for name, value in found.items()}


def ask(denoiser: Denoiser, cond: dict[str, Tensor], **how: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *denoiser.shape, generator=generator)
    with torch.no_grad():
        return denoiser(x, torch.tensor([0.3, 0.7]) * denoiser.process.t_max, cond, **how).value


def learnt(denoiser: AttachedDenoiser) -> AttachedDenoiser:
    torch.manual_seed(1)
    for p in denoiser.attachment.parameters():
        nn.init.normal_(p, std=0.1)
    return denoiser


UNLIKE = ("sd", "sdxl", "sana", "flux", "chroma", "hunyuan-image", "z-image", "wan")
FAMILIES = [*MADE, *(pytest.param(f, marks=() if f in UNLIKE else pytest.mark.slow) for f in PIPELINES)]


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_change_nothing_until_they_are_trained_and_a_span_says_their_mean(name: str) -> None:
    """Of any network: all between its last layer and its answer is linear, or the mean would be another."""
    if name == "kolors":
        pytest.importorskip("sentencepiece")
    plain, cond = of_family(name)
    before = ask(plain, cond)
    guided = ask(plain, cond, guidance=2.0)
    headed = with_heads(plain, 4)
    assert torch.equal(ask(headed, cond), before)
    torch.testing.assert_close(ask(headed, cond | SPAN), before, rtol=0, atol=1e-6)
    torch.testing.assert_close(ask(headed, cond | SPAN, guidance=2.0), guided, rtol=0, atol=1e-5)
    learnt(headed)
    flow = headed.attachment.flow
    single = [ask(headed, cond | {"since": flow[k].expand(2), "r": flow[k + 1].expand(2)}) for k in range(4)]
    assert all(not torch.allclose(one, other, atol=1e-4) for one, other in zip(single, single[1:], strict=False))
    spans = [(0, 3), (1, 2)]
    long = ask(headed, cond | {"since": flow[[0, 1]], "r": flow[[3, 2]]})
    for row, (a, b) in enumerate(spans):
        steps = (flow[a:b] - flow[a + 1 : b + 1]) / (flow[a] - flow[b])
        mean = sum(step * single[k][row] for k, step in zip(range(a, b), steps, strict=True))
        torch.testing.assert_close(long[row], mean, rtol=1e-4, atol=1e-5)
    assert torch.equal(ask(headed, cond), before)  # silent again


@pytest.mark.parametrize("process", [RectifiedFlow(), RectifiedFlow(3.0), VP(), EDM()])
def test_intervals_are_the_sampler_s_and_their_shares_are_lengths_in_the_flow_s_time(process: Process) -> None:
    kind: Any = "edm" if isinstance(process, EDM) else "v"
    heads: Any = with_heads(Denoiser(point_teacher().network, process, kind, shape=(2,)), 4).attachment
    grid = process.grid(4).float()
    u = process.sigma(grid) / (process.alpha(grid) + process.sigma(grid))
    torch.testing.assert_close(heads.flow[:-1], u[:-1])
    assert float(heads.flow[-1]) == 0
    between = (heads.flow[1] + heads.flow[2]) / 2  # half of an interval, and all of the next
    (d,) = heads.shares(between[None], heads.flow[3][None])
    half, whole = (heads.flow[1] - heads.flow[2]) / 2, heads.flow[2] - heads.flow[3]
    torch.testing.assert_close(d, torch.stack([0 * half, half, whole, 0 * half]) / (half + whole))
    assert torch.equal(heads.shares(between[None], between[None]), torch.zeros(1, 4))


@pytest.mark.parametrize("name", MADE)
def test_a_span_that_is_not_said_to_begin_begins_at_the_time_that_is_asked_about(name: str) -> None:
    plain, cond = of_family(name)
    headed = learnt(with_heads(plain, 4))
    asked = ask(headed, cond | {"r": SPAN["r"] * 0})
    torch.testing.assert_close(
        asked, ask(headed, cond | {"r": SPAN["r"] * 0, "since": torch.tensor([0.3, 0.7])}), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["point", "dit", "sd"])
def test_one_span_is_a_plain_network(name: str) -> None:
    plain, cond = of_family(name)
    headed = learnt(with_heads(plain, 4))
    other = fused(headed, 0.75, 0.0)
    assert type(other) is Denoiser
    assert not any(m._forward_hooks for m in other.network.modules())
    told = cond | {"since": torch.full((2,), 0.75), "r": torch.zeros(2)}
    torch.testing.assert_close(ask(other, cond), ask(headed, told), rtol=1e-4, atol=1e-5)
    assert set(other.network.state_dict()) == set(plain.network.state_dict())
    noise = torch.randn(2, *plain.shape)
    whole = FlowMapSampler((1.0,)).sample(headed, noise, cond)
    torch.testing.assert_close(FewStepSampler((1.0,)).sample(fused(headed), noise, cond), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MADE)
def test_a_saved_denoiser_with_heads_is_the_same_one_and_a_copy_speaks_with_its_own_voice(
    name: str, tmp_path: Path
) -> None:
    plain, cond = of_family(name)
    headed = learnt(with_heads(plain, 4))
    ImageGenerator(headed, FlowMapSampler((1.0, 0.5), to="next")).save(tmp_path)
    again = ImageGenerator.load(tmp_path)
    assert torch.equal(ask(again.denoiser, cond | SPAN), ask(headed, cond | SPAN))
    assert again.sampler.nfe == 2
    other, before = copy.deepcopy(headed), ask(headed, cond | SPAN)
    with torch.no_grad():
        other.attachment.weight.mul_(2)
    assert torch.equal(ask(headed, cond | SPAN), before)
    assert not torch.allclose(ask(other, cond | SPAN), before)


def test_rows_that_a_network_is_asked_about_apart_have_their_own_spans() -> None:
    """Of Qwen-Image 2.1, texts of each length go through the network by themselves."""
    from pipeline_pairs import teacher_of

    generator, data = teacher_of("qwen-image-2.1")
    plain = copy.deepcopy(generator.denoiser)
    plain.null = dict(data.null)
    headed = learnt(with_heads(plain, 4))
    cond = data.batch(0, 0, 3)["cond"]
    assert len(set(cond["encoder_hidden_states_mask"].sum(1).tolist())) > 1
    x, t = torch.randn(3, *headed.shape), torch.tensor([0.3, 0.5, 0.7])
    told = {**cond, "since": torch.tensor([1.0, 0.75, 0.5]), "r": torch.tensor([0.5, 0.0, 0.25])}
    with torch.no_grad():
        whole = headed(x, t, told).value
        for i in range(3):
            own = {key: value[i : i + 1] for key, value in told.items()}
            one = headed(x[i : i + 1], t[i : i + 1], own).value
            torch.testing.assert_close(one, whole[i : i + 1], rtol=1e-4, atol=1e-5)


class Strided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Conv2d(1, 4, 2, stride=2)

    def forward(self, x: Tensor, time: Tensor, cond: Any) -> Tensor:
        return nn.functional.pixel_shuffle(self.out(x), 2)


def test_the_last_layer_is_the_one_that_runs_last_and_must_be_plain() -> None:
    assert last_layer(point_teacher()) == "out"
    assert last_layer(dit_teacher()) == "proj_out_2"
    with pytest.raises(UserError, match="out is no plain convolution"):
        with_heads(Denoiser(Strided(), RectifiedFlow(), "v", shape=(1, 4, 4)), 2)
