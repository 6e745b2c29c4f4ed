"""Tables of conditioning: the same samples as from the network itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import RectifiedFlow
from stillroom.diffusion.sampling import FewStepSampler, ODESampler, Sampler
from stillroom.errors import UserError
from stillroom.networks.point_mlp import PointMLP
from stillroom.surgery.modules import parameter_count
from stillroom.surgery.tabulated import tabulate
from stillroom.tasks.class_images.model import ImageGenerator
from tiny import make_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> ImageGenerator:
    generator = ImageGenerator.load(make_teacher(Path(tmp_path_factory.mktemp("dit")) / "teacher"))
    torch.manual_seed(0)
    for parameter in generator.denoiser.network.parameters():  # a new DiT's modulation is small: here it must matter
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return generator


def tabulated(model: ImageGenerator) -> ImageGenerator:
    return ImageGenerator(tabulate(model.denoiser, model.sampler), model.sampler, model.classes)


@pytest.mark.parametrize(
    "sampler",
    [FewStepSampler((0.8,)), FewStepSampler((1.0, 0.5)), ODESampler("heun", 3, guidance=2.0)],
    ids=["one-step", "two-step", "guided"],
)
def test_samples_are_the_same(sampler: Sampler, teacher: ImageGenerator) -> None:
    plain = ImageGenerator(teacher.denoiser, sampler, teacher.classes)
    labels = [0, 1, 2, 2]
    fast = tabulated(plain)
    torch.testing.assert_close(fast.sample(labels), plain.sample(labels), rtol=1e-4, atol=1e-5)
    assert (plain.sample([0]) - plain.sample([1])).abs().max() > 1e-2  # the class has a say, or nothing was tested


def test_the_original_is_left_alone_and_the_copy_is_smaller(teacher: ImageGenerator) -> None:
    plain = ImageGenerator(teacher.denoiser, FewStepSampler((0.8,)), teacher.classes)
    before = plain.sample([0, 1])
    fast = tabulated(plain)
    assert parameter_count(fast.denoiser) < 0.8 * parameter_count(plain.denoiser)
    assert torch.equal(plain.sample([0, 1]), before)


def test_another_time_is_an_error(teacher: ImageGenerator) -> None:
    fast = tabulated(ImageGenerator(teacher.denoiser, FewStepSampler((0.8,)), teacher.classes))
    fast.sampler = FewStepSampler((0.7,))
    with pytest.raises(ValueError, match="tabulated for times"):
        fast.sample([0])


def test_another_network_is_refused() -> None:
    denoiser = Denoiser(PointMLP(), RectifiedFlow(), shape=(2,), null={"label": 8})
    with pytest.raises(UserError, match="PointMLP cannot be tabulated"):
        tabulate(denoiser, FewStepSampler((0.8,)))
