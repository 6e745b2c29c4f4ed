"""Second times, guidance scales, signs and variances as inputs that change nothing until they are trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.sampling import ODESampler
from stillroom.errors import UserError
from stillroom.folders.attachments import ATTACHED, attach
from stillroom.folders.diffusers_networks import some_conditions
from stillroom.losses.score import square
from stillroom.networks.extra_inputs import INPUTS, with_inputs
from stillroom.networks.parallel_heads import with_heads
from stillroom.networks.scalars import LogVariance, ScalarFeatures
from stillroom.tasks.class_images.model import ImageGenerator
from tiny_denoisers import dit_teacher, point_teacher
from tiny_pipelines import PIPELINES

MADE = {"point": point_teacher, "dit": dit_teacher}
OWN = {"r": torch.tensor([0.1, 0.6]), "guidance_scale": torch.tensor([1.0, 5.0]), "sign": torch.tensor([1.0, 1.0])}


def of_family(name: str) -> Denoiser:
    if name in MADE:
        return MADE[name]().eval()
    from pipeline_pairs import teacher_of

    generator, data = teacher_of(name)
    denoiser = copy.deepcopy(generator.denoiser)
    denoiser.null = dict(data.null)
    return denoiser


def ask(denoiser: Denoiser, own: dict[str, Tensor], **how: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *denoiser.shape, generator=generator)
    t = torch.tensor([0.3, 0.7]) * denoiser.process.t_max
    cond = {name: value.expand(2, *value.shape).contiguous() for name, value in some_conditions(denoiser).items()}
    with torch.no_grad():
        return denoiser(x, t, cond | own, **how).value


UNLIKE = ("sd", "sdxl", "sana", "flux", "chroma", "hunyuan-image", "z-image", "wan")
FAMILIES = [*MADE, *(pytest.param(f, marks=() if f in UNLIKE else pytest.mark.slow) for f in PIPELINES)]


@pytest.mark.parametrize("name", FAMILIES)
def test_new_inputs_change_nothing_until_they_are_trained(name: str) -> None:
    if name == "kolors":
        pytest.importorskip("sentencepiece")
    plain = of_family(name)
    before, guided = ask(plain, {}), ask(plain, {}, guidance=2.0)
    torch.manual_seed(0)
    asked = with_inputs(plain, *INPUTS)
    torch.testing.assert_close(ask(asked, OWN), before, rtol=0, atol=1e-6)
    torch.testing.assert_close(ask(asked, OWN, guidance=2.0), guided, rtol=0, atol=1e-5)
    assert torch.equal(ask(asked, {}), before)
    for layer in asked.attachment.out:  # type: ignore[union-attr]
        torch.nn.init.normal_(layer.weight, std=0.5)  # type: ignore[union-attr]
    moved = ask(asked, OWN)
    assert torch.isfinite(moved).all()
    differ = [ask(asked, OWN | {key: value}) for key, value in (("r", OWN["r"] + 0.2), ("guidance_scale", OWN["r"]))]
    assert all(not torch.allclose(one, moved, atol=1e-6) for one in (before, *differ))
    assert torch.equal(ask(asked, {}), before)  # silent again


def test_rows_that_a_network_is_asked_about_apart_are_told_their_own() -> None:
    """Of Qwen-Image 2.1, texts of each length go through the network by themselves."""
    from pipeline_pairs import teacher_of

    generator, data = teacher_of("qwen-image-2.1")
    torch.manual_seed(0)
    plain = copy.deepcopy(generator.denoiser)
    plain.null = dict(data.null)
    asked = with_inputs(plain, "guidance_scale", width=16)
    for layer in asked.attachment.out:  # type: ignore[union-attr]
        torch.nn.init.normal_(layer.weight, std=0.5)  # type: ignore[union-attr]
    cond = data.batch(0, 0, 3)["cond"]
    assert len(set(cond["encoder_hidden_states_mask"].sum(1).tolist())) > 1
    x, t, w = torch.randn(3, *plain.shape), torch.tensor([300.0, 500.0, 700.0]) / 1000, torch.tensor([1.0, 3.0, 6.0])
    with torch.no_grad():
        whole = asked(x, t, {**cond, "guidance_scale": w}).value
        for i in range(3):
            own = {key: value[i : i + 1] for key, value in cond.items()} | {"guidance_scale": w[i : i + 1]}
            torch.testing.assert_close(
                asked(x[i : i + 1], t[i : i + 1], own).value, whole[i : i + 1], rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("name", MADE)
def test_a_network_is_told_a_negative_time_from_a_positive_one(name: str) -> None:
    asked = with_inputs(of_family(name), "sign")
    assert not torch.allclose(ask(asked, {"sign": -torch.ones(2)}), ask(asked, {"sign": torch.ones(2)}), atol=1e-4)


def test_features_of_times_tell_signs_apart_and_are_dense() -> None:
    torch.manual_seed(0)
    features = ScalarFeatures(256)
    t = torch.linspace(0.05, 1, 50)
    assert float((features(t) - features(-t)).square().mean(1).min()) > 0.01
    near = torch.nn.functional.cosine_similarity(features(t), features(t + 0.01))
    far = torch.nn.functional.cosine_similarity(features(t), features(1000 * (t + 0.01)))
    assert float(near.min()) > 0.99
    assert float(far.mean()) < 0.1


def test_a_new_log_variance_weighs_nothing_and_learns_the_logarithm_of_the_squared_error() -> None:
    """``exp(-w) e^2 + w`` is least at ``w = log e^2``."""
    torch.manual_seed(0)
    head, t = LogVariance(64), torch.tensor([0.2, 1.2])
    assert torch.equal(head(t), torch.zeros(2))
    error = torch.tensor([[0.3, 0.4], [2.0, 1.0]])
    assert torch.equal((-head(t)).exp() * square(error) + head(t), square(error))
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        ((-head(t)).exp() * square(error) + head(t)).sum().backward()
        optimizer.step()
    torch.testing.assert_close(head(t), square(error).log(), rtol=0, atol=0.02)


def trained(name: str) -> Denoiser:
    torch.manual_seed(0)
    asked = with_inputs(of_family(name), "r", "guidance_scale", width=16)
    for layer in asked.attachment.out:  # type: ignore[union-attr]
        torch.nn.init.normal_(layer.weight, std=0.1)  # type: ignore[union-attr]
    return asked


@pytest.mark.parametrize("name", MADE)
def test_a_saved_denoiser_with_more_inputs_is_the_same_one(name: str, tmp_path: Path) -> None:
    asked = trained(name)
    ImageGenerator(asked, ODESampler("euler", 2)).save(tmp_path)
    again = ImageGenerator.load(tmp_path).denoiser
    assert torch.equal(ask(again, OWN), ask(asked, OWN))
    assert torch.equal(ask(again, {}), ask(asked, {}))
    assert set(again.role_parameters()) == {name for name, _ in again.named_parameters()}  # type: ignore[operator]
    alone = attach(of_family(name), tmp_path / ATTACHED)
    assert torch.equal(ask(alone, OWN), ask(asked, OWN))


def test_a_copy_speaks_with_its_own_voice() -> None:
    asked = trained("point")
    other, before = copy.deepcopy(asked), ask(asked, OWN)
    with torch.no_grad():
        other.attachment.out[0].weight.mul_(2)  # type: ignore[index,union-attr]
    assert torch.equal(ask(asked, OWN), before)
    assert not torch.allclose(ask(other, OWN), before)


def test_what_does_not_fit_is_refused_with_a_cure(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no input 'guidance'"):
        with_inputs(point_teacher(), "guidance")
    ImageGenerator(trained("point"), ODESampler("euler", 2)).save(tmp_path)
    with pytest.raises(UserError, match="a module 'embed_t'"):
        attach(dit_teacher(), tmp_path / ATTACHED)
    (tmp_path / ATTACHED / "attachment.safetensors").unlink()
    with pytest.raises(UserError, match="are missing"):
        attach(point_teacher(), tmp_path / ATTACHED)


def test_inputs_that_are_there_stay_and_others_are_refused() -> None:
    """A second attachment would leave the first one's weights silent, and what was learnt with them lost."""
    asked = with_inputs(point_teacher(), "r", "sign", width=8)
    assert with_inputs(asked, "r") is asked
    assert with_inputs(asked, "r", "sign") is asked
    with pytest.raises(UserError, match="has r, sign attached, and is to have r, guidance_scale"):
        with_inputs(asked, "r", "guidance_scale")
    with pytest.raises(UserError, match="has ParallelHeads attached, and is to have r"):
        with_inputs(with_heads(point_teacher(), 4), "r")
    with pytest.raises(UserError, match="has ExtraInputs attached, and is to have 4 heads"):
        with_heads(asked, 4)
    headed = with_heads(point_teacher(), 4)
    assert with_heads(headed, 4) is headed
    with pytest.raises(UserError, match="has 4 heads attached, and is to have 8"):
        with_heads(headed, 8)
