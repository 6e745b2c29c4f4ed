"""Models as folders: bit for bit there and back, and clear words for what is broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import EDM, VP, RectifiedFlow, TrigFlow
from stillroom.diffusion.sampling import AncestralSampler, FewStepSampler, ODESampler
from stillroom.errors import UserError
from stillroom.folders.denoisers import SIDE_FILE, WEIGHTS, load_denoiser
from stillroom.folders.weights import read_tensors, save_tensors
from stillroom.networks.point_mlp import PointMLP
from stillroom.surgery.lora import lora_role
from stillroom.tasks.class_images.model import ImageGenerator
from tiny_denoisers import ask, dit_teacher, point_teacher, train

MAKE = {"dit": dit_teacher, "point": point_teacher}
NETWORK = {"dit": "transformer", "point": "network"}


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize(
    "sampler", [FewStepSampler((1.0, 0.5), "ddim"), ODESampler("euler", 3, 2.0), AncestralSampler(4)]
)
def test_a_folder_gives_back_the_same_samples_bit_for_bit(kind: str, sampler: Any, tmp_path: Path) -> None:
    generator = ImageGenerator(MAKE[kind](), sampler, ["a", "b", "c", "d"])
    generator.save(tmp_path / "x", trained_on="tests")
    back = ImageGenerator.load(tmp_path / "x")
    assert back.sampler == sampler
    assert back.classes == ["a", "b", "c", "d"]
    assert back.denoiser.process == generator.denoiser.process
    assert back.denoiser.null == generator.denoiser.null
    for (name, a), (other, b) in zip(
        generator.denoiser.network.state_dict().items(), back.denoiser.network.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)
    samples = generator.sample([0, 1, 2, 3], seed=4)
    assert samples.shape == (4, *generator.denoiser.shape)
    assert samples.dtype == torch.float32
    assert torch.equal(back.sample([0, 1, 2, 3], seed=4), samples)
    assert json.loads((tmp_path / "x" / SIDE_FILE).read_text())["trained_on"] == "tests"


def test_the_network_of_a_folder_is_one_that_diffusers_loads(tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

    generator = ImageGenerator(dit_teacher(), ODESampler())
    generator.save(tmp_path)
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer").eval()
    x, t, label = torch.randn(2, 1, 8, 8), torch.tensor([300.0, 600.0]), torch.tensor([0, 3])
    with torch.no_grad():
        ours = generator.denoiser.network(x, timestep=t, class_labels=label).sample
        torch.testing.assert_close(theirs(x, timestep=t, class_labels=label).sample, ours, rtol=0, atol=0)
    FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")


def test_a_folder_written_by_diffusers_alone_is_read(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    network = dit_teacher().network
    network.save_pretrained(tmp_path / "transformer")  # type: ignore[operator]
    DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).save_pretrained(
        tmp_path / "scheduler"
    )
    back = load_denoiser(tmp_path)
    assert back.process == VP()
    assert back.prediction == "eps"
    assert back.null == {"label": 4}
    assert not back.training
    assert all(
        torch.equal(a, b)
        for a, b in zip(network.state_dict().values(), back.network.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("process", [RectifiedFlow(2.0), TrigFlow(), EDM(sigma_data=0.3), VP("linear", 100, 1e-3, 0.1)])
def test_own_networks_keep_their_process_and_prediction(process: Any, tmp_path: Path) -> None:
    kind = "edm" if isinstance(process, EDM) else "x0"
    ImageGenerator(Denoiser(PointMLP(3, 8, 2, 2), process, kind, null={"label": 2}, shape=(3,)), ODESampler()).save(
        tmp_path
    )
    back = load_denoiser(tmp_path)
    assert (back.process, back.prediction, back.shape) == (process, kind, (3,))


def test_a_student_with_another_prediction_than_its_scheduler_says_keeps_it(tmp_path: Path) -> None:
    teacher = dit_teacher()
    teacher.prediction = "x0"
    ImageGenerator(teacher, ODESampler()).save(tmp_path)
    assert load_denoiser(tmp_path).prediction == "x0"


@pytest.mark.parametrize("kind", MAKE)
def test_a_lora_student_is_saved_merged(kind: str, tmp_path: Path) -> None:
    teacher = MAKE[kind]()
    role = lora_role(teacher.requires_grad_(False), "student", rank=4)
    train(role)
    ImageGenerator(role, ODESampler()).save(tmp_path)
    back = load_denoiser(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ask(back), ask(role), rtol=1e-5, atol=1e-5)


def test_a_text_model_s_null_embedding_survives(tmp_path: Path) -> None:
    from test_families import build

    denoiser, cond = build("unet-text")
    denoiser.null = {"encoder_hidden_states": torch.randn(5, 6)}
    ImageGenerator(denoiser, ODESampler("euler", 2, 2.0)).save(tmp_path)
    back = ImageGenerator.load(tmp_path)
    assert torch.equal(
        back.sample(cond, seed=1), ImageGenerator(denoiser, ODESampler("euler", 2, 2.0)).sample(cond, seed=1)
    )


def test_samples_do_not_depend_on_what_is_sampled_beside_them() -> None:
    generator = ImageGenerator(point_teacher(), ODESampler("euler", 4))
    assert torch.equal(generator.sample([1, 2, 3], batch=1)[:2], generator.sample([1, 2], batch=1))
    assert not torch.equal(generator.sample([1, 2], seed=1), generator.sample([1, 2], seed=2))
    assert generator.sample(5).shape == (5, 2)
    assert generator.sample({"label": torch.tensor([0, 1])}).shape == (2, 2)


def test_labels_that_are_no_classes_are_refused() -> None:
    generator = ImageGenerator(point_teacher(), ODESampler("euler", 2), ["a", "b"])
    for labels in ([0, 2], [-1, 1]):
        with pytest.raises(UserError, match=f"label {2 if 2 in labels else -1} is not a class"):
            generator.sample(labels)
    with pytest.raises(UserError, match="no samples"):
        generator.sample([])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ImageGenerator(dit_teacher(), ODESampler()).save(tmp_path)
    return tmp_path


def damage_truncate(folder: Path) -> None:
    path = folder / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def damage_garbage(folder: Path) -> None:
    (folder / "transformer" / WEIGHTS).write_bytes(b"\x00" * 64)


def damage_other_size(folder: Path) -> None:
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_head_dim": 16}))


def damage_other_depth(folder: Path) -> None:
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 4}))


def damage_class(folder: Path) -> None:
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "NoSuchModel"}))


def delete(*parts: str) -> Any:
    return lambda folder: folder.joinpath(*parts).unlink()


def garble(*parts: str) -> Any:
    return lambda folder: folder.joinpath(*parts).write_text("{")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_truncate, "cannot be read"),
        (damage_garbage, "cannot be read"),
        (damage_other_size, r"do not fit their config\.json"),
        (damage_other_depth, r"do not fit their config\.json"),
        (damage_class, "NoSuchModel"),
        (delete("transformer", WEIGHTS), "are missing"),
        (delete("transformer", "config.json"), r"config\.json is missing"),
        (delete("scheduler", "scheduler_config.json"), r"scheduler_config\.json is missing"),
        (garble("transformer", "config.json"), "not valid JSON"),
        (garble(SIDE_FILE), "not valid JSON"),
    ],
)
def test_a_damaged_folder_is_refused_with_the_file_and_the_reason(damage: Any, words: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(UserError, match=words) as error:
        ImageGenerator.load(folder)
    assert error.value.cure


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_denoiser(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no model"):
        load_denoiser(tmp_path)


def test_an_incomplete_side_file_of_an_own_network_is_refused(tmp_path: Path) -> None:
    ImageGenerator(point_teacher(), ODESampler()).save(tmp_path)
    side = json.loads((tmp_path / SIDE_FILE).read_text())
    for missing in ("process", "prediction", "null"):
        (tmp_path / SIDE_FILE).write_text(json.dumps({k: v for k, v in side.items() if k != missing}))
        with pytest.raises(UserError, match=missing):
            load_denoiser(tmp_path)
    side["process"]["name"] = "brownian"
    (tmp_path / SIDE_FILE).write_text(json.dumps(side))
    with pytest.raises(UserError, match="brownian"):
        load_denoiser(tmp_path)


def test_pickles_are_never_read(folder: Path) -> None:
    path = folder / "transformer" / WEIGHTS
    torch.save(nn.Linear(1, 1).state_dict(), path.with_name("diffusion_pytorch_model.bin"))
    path.unlink()
    with pytest.raises(UserError, match="never pickles"):
        load_denoiser(folder)


def test_a_weight_under_two_names_is_written_and_read(tmp_path: Path) -> None:
    """The format refuses tensors that share their storage."""
    weight = torch.arange(6.0).view(2, 3)
    given = {"embedding": weight, "head": weight, "part": weight[:1], "empty": torch.zeros(0)}
    save_tensors(given, tmp_path / "x.safetensors")
    assert {name: value.tolist() for name, value in read_tensors(tmp_path / "x.safetensors").items()} == {
        name: value.tolist() for name, value in given.items()
    }
