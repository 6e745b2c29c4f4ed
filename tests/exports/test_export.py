"""Exported files: they answer as the model does, load without this package, and appear whole or not at all."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import stillroom as sr
from stillroom import cli
from stillroom.data.scenes.captions import vocabulary
from stillroom.data.source import load_data
from stillroom.diffusion.masking import MaskedSampler
from stillroom.diffusion.process import EDM
from stillroom.diffusion.routed import ByNoise, RoutedDenoiser
from stillroom.diffusion.sampling import FewStepSampler
from stillroom.errors import UserError
from stillroom.exports import Exported, export_model, formats, writing
from stillroom.folders.image_networks import make_classifier
from stillroom.networks.dual_head import exchange
from stillroom.networks.recognition import TwoHeadPass
from stillroom.networks.text_image_space import TextImageSpace
from stillroom.recipe import Recipe
from stillroom.task import Part
from stillroom.tasks.class_images.model import ImageGenerator
from stillroom.tasks.classify.model import ImageClassifier
from stillroom.tasks.classify_text.model import TextClassifier
from stillroom.tasks.encode.model import ImageEncoder
from stillroom.tasks.parts import NetworkCall, sampling_steps
from stillroom.tasks.pipelines.model import PipelineGenerator
from stillroom.tasks.text_images.model import TextImageGenerator
from tiny import CLASSES, SIZE, make_data, make_teacher
from tiny_mar import make_mar
from tiny_pipelines import PIPELINES, WIDER, make_pipeline
from tiny_text import CLASSES as KINDS
from tiny_text import WORDS, encoder, tokenizer
from tiny_text_images import tiny_codec, tiny_text

DOCS = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
BRIEF = {"seconds": 0.02}


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


ONNX, OPENVINO = needs("onnx", "onnxscript", "onnxruntime"), needs("openvino")


def student(folder: Path, times: tuple[float, ...] = (0.8,), renoise: str = "fresh") -> ImageGenerator:
    model = ImageGenerator.load(make_teacher(folder / "teacher", num_layers=1))
    torch.nn.init.normal_(model.denoiser.network.proj_out_2.weight, std=0.1)
    return ImageGenerator(model.denoiser, FewStepSampler(times, renoise), CLASSES)  # type: ignore[arg-type]


def classifier(heads: bool = False) -> ImageClassifier:
    network = make_classifier("resnet-small", 1, len(CLASSES))
    if heads:
        exchange(network, "paper", 0.1)
    return ImageClassifier(network, CLASSES, TwoHeadPass(0.3, 0.5) if heads else None)


def image_encoder() -> ImageEncoder:
    from transformers import ViTMAEConfig, ViTMAEModel

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return ImageEncoder(ViTMAEModel(ViTMAEConfig(**shape, image_size=SIZE, patch_size=4, num_channels=1)))


def text_classifier() -> TextClassifier:
    return TextClassifier(encoder(layers=1), tokenizer(), KINDS, 16)


def images(n: int) -> Tensor:
    return torch.rand(n, 1, SIZE, SIZE) * 2 - 1


MODELS: dict[str, Callable[[Path], Any]] = {
    "generator": student,
    "classifier": lambda _: classifier(),
    "two heads": lambda _: classifier(heads=True),
    "encoder": lambda _: image_encoder(),
    "texts": lambda _: text_classifier(),
}


# --- the answers ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Exported, Any]]:
    """A kind's model, its export to torch, and what that file does once it is loaded."""
    place = tmp_path_factory.mktemp("written")
    data = str(make_data(place / "data"))

    @functools.cache
    def one(kind: str) -> tuple[Any, Exported, Any]:
        torch.manual_seed(0)
        model = MODELS[kind](place)
        about = data if kind in ("classifier", "two heads") else None
        made = export_model(model, "torch", place / kind, data=about, **BRIEF)
        return model, made, torch.export.load(place / kind / "model.pt2").module()

    return one


@pytest.mark.parametrize("kind", MODELS)
def test_a_torch_file_answers_as_the_model(written: Any, kind: str) -> None:
    _, made, _ = written(kind)
    (facts,) = made.facts["files"].values()
    assert facts["parity"]["batches"] == [1, 2, 5]
    assert facts["parity"]["max_abs_error"] < 1e-6 < facts["parity"]["largest_output"]
    assert [row["batch"] for row in facts["latency"]] == [1, 32]
    for row in facts["latency"]:
        assert row["ratio"] == pytest.approx(row["eager_ms"] / row["exported_ms"])
    assert json.loads((made.folder / "export.json").read_text()) == made.facts


def test_two_heads_are_exported_as_their_mixture(written: Any) -> None:
    model, _, loaded = written("two heads")
    x = images(7)
    assert torch.allclose(loaded(x).softmax(-1), model.probabilities(x), atol=1e-6)


def test_texts_of_any_length_and_padding_are_answered(written: Any) -> None:
    model, _, loaded = written("texts")
    for texts in (["a"], [" ".join(WORDS), "a small dog", "the river"]):
        tokens = tokenizer()(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
        logits = loaded(tokens["input_ids"], tokens["attention_mask"])
        assert torch.allclose(logits.softmax(-1), model.probabilities(texts), atol=1e-6)


def test_an_encoders_features_are_those_of_the_library(written: Any) -> None:
    model, _, loaded = written("encoder")
    tokens, features = loaded(x := images(3))
    assert torch.allclose(tokens, model.tokens(x), atol=1e-5)
    assert torch.allclose(features, model.features(x), atol=1e-5)


@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "edm"])
def test_the_steps_in_the_facts_are_the_samplers(tmp_path: Path, prediction: str) -> None:
    """Every prediction is a linear map of sample and output, whose numbers stand in export.json."""
    model = student(tmp_path, (0.9, 0.4), "fixed")
    model.denoiser.prediction = prediction
    if prediction == "edm":
        model.denoiser.process = EDM()
    noise, labels = torch.randn(4, 1, SIZE, SIZE), torch.tensor([0, 1, 2, 0])
    x0: Any = 0.0
    for step in sampling_steps(model.sampler, model.denoiser):
        x = step["alpha"] * x0 + step["sigma"] * noise
        call = NetworkCall(model.denoiser, ("label",))
        output = call(step["scale"] * x, torch.full((4,), step["timestep"]), labels)
        x0 = step["x0_of_sample"] * x + step["x0_of_output"] * output
    expected = model.sampler.sample(model.denoiser, noise, {"label": labels})
    assert torch.allclose(x0, expected, atol=1e-5, rtol=1e-5)


def block(heading: str) -> str:
    """The first Python block under a heading of the page."""
    (found,) = re.findall(rf"^#+ {re.escape(heading)}\n.*?```python\n(.*?)```", DOCS, re.DOTALL | re.MULTILINE)
    assert "stillroom" not in found
    return found


@ONNX
def test_the_pages_onnx_code_draws_what_the_student_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = student(tmp_path)
    made = export_model(model, "onnx", "exports/dmd2-onnx", whole=True, **BRIEF)
    assert made.facts["files"].keys() == {"model.onnx", "generator.onnx"}
    names: dict[str, Any] = {}
    exec(block("ONNX"), names)
    label = torch.from_numpy(names["label"])
    drawn = model.sampler.sample(model.denoiser, torch.from_numpy(names["first"]), {"label": label})
    assert np.abs(names["x0"] - drawn.numpy()).max() < 1e-4
    assert np.abs(names["images"] - drawn.numpy()).max() < 1e-4


# --- a masked generator -----------------------------------------------------------------------------------------------
def masked(**settings: Any) -> TextImageGenerator:
    """Of 4x4 tokens, in another grid than its position tables are stored for."""
    space = TextImageSpace(tiny_text(length=16, words=vocabulary()), tiny_codec(blocks=1), (8, 8))
    sizes = {"channels": space.codec.channels, "text_width": space.text.width, "cross_blocks": 1, "head_blocks": 1}
    mar = make_mar(grid=(3, 4), **sizes, **settings)
    return TextImageGenerator(mar, MaskedSampler(5, 2.5, "linear", 0.9, head_steps=4, clip=2.0), space)


@ONNX
@pytest.mark.parametrize(
    "settings",
    [
        {"learned_variance": True, "prediction": "v"},
        pytest.param({"learned_variance": False}, marks=pytest.mark.slow),
        pytest.param({"learned_variance": False, "prediction": "v"}, marks=pytest.mark.slow),
    ],
)
def test_the_pages_loop_draws_what_the_masked_student_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """The loop's random numbers, in its order, are put in the place of torch's."""
    monkeypatch.chdir(tmp_path)
    model = masked(**settings)
    made = export_model(model, "onnx", "exports/lightgen-onnx", seconds=0.0)
    assert list(made.facts["files"]) == [f"{name}.onnx" for name in ("text_encoder", "transformer", "head", "decoder")]
    names: dict[str, Any] = {}
    exec(block("A masked generator"), names)
    assert names["known"].all()
    random = np.random.default_rng(0)
    mar: Any = model.network
    noise = mar.latents(torch.from_numpy(random.standard_normal(names["start"].shape, dtype=np.float32)), (4, 4))
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.from_numpy(random.random(tuple(shape))))
    monkeypatch.setattr(
        torch, "randn", lambda shape, **_: torch.from_numpy(random.standard_normal(tuple(shape), dtype=np.float32))
    )
    latents = model.sampler.sample(mar, noise, model.cond(names["texts"]))
    images = model.space.codec.decode(latents).numpy()
    assert images.std() > 0.05
    assert np.abs(names["tokens"] - mar.tokens(latents).numpy()).max() < 1e-3
    assert np.abs(names["images"] - images).max() < 1e-3


@torch.no_grad()
def test_the_masked_network_is_the_models_own_for_any_number_of_known_tokens() -> None:
    """None, some and all but one; and what unknown tokens hold does not matter."""
    part = masked().parts()["transformer"]
    tokens, _, text = part.example(3, torch.Generator().manual_seed(0))
    order = torch.rand(tokens.shape[:2]).argsort(1)
    for count in (0, 1, 9, 15):
        known = order < count
        theirs = part.eager(tokens, known, text)
        noisy = torch.where(known[..., None], tokens, torch.randn_like(tokens))
        for mine, other, wanted in zip(
            part.module(tokens, known, text), part.module(noisy, known, text), theirs, strict=True
        ):
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(*theirs, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "openvino", "torch"])
def test_the_shipped_masked_student_is_exported(tmp_path: Path, to: str) -> None:
    for package in formats.FORMATS[to].needs:
        pytest.importorskip(package)
    made = export_model("lightgen", to, tmp_path / "out", **BRIEF)
    assert len(made.facts["files"]) == 4
    for file in made.facts["files"].values():
        assert file["parity"]["max_abs_error"] < 1e-4
        assert [row["batch"] for row in file["latency"]] == [1, 32]
    assert made.facts["steps"][-1] == {"left": 2, "after": 0, "guidance": 2.0}  # 16 tokens in 12 steps
    assert [made.facts["head"][i]["time"] for i in (0, -1)] == [999, 0]
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").is_file()


@ONNX
def test_a_quantised_classifier_is_smaller_and_scored_before_and_after(tmp_path: Path) -> None:
    data = str(make_data(tmp_path / "data"))
    made = export_model(classifier(), "onnx", tmp_path / "out", int8=True, data=data, **BRIEF)
    plain, small = made.facts["files"]["model.onnx"], made.facts["files"]["model.int8.onnx"]
    assert small["bytes"] < plain["bytes"] / 2
    assert small["parity"]["max_abs_error"] > plain["parity"]["max_abs_error"]
    import onnxruntime

    test = load_data(data, "test")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.int8.onnx")
    (logits,) = session.run(None, {"images": test.images().numpy()})
    right = float((torch.from_numpy(logits).argmax(-1) == test.labels).float().mean())
    assert small["scores"] == {"accuracy": pytest.approx(right), "n": test.n}


@OPENVINO
def test_the_pages_openvino_code_reads_the_texts_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CI", "as it was")
    model = text_classifier()
    tokenizer().save_pretrained("student")
    export_model(model, "openvino", "exports/ernie-tiny-openvino", **BRIEF)
    code = block("OpenVINO").replace("runs/ernie-tiny/student", "student")
    names: dict[str, Any] = {}
    exec(code, names)
    expected = model.probabilities(names["texts"])
    assert np.abs(torch.from_numpy(names["logits"]).softmax(-1).numpy() - expected.numpy()).max() < 1e-5
    assert names["answers"] == model.classify(names["texts"])
    assert os.environ["CI"] == "as it was"


def test_the_pages_torch_code_reads_the_classifiers_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = classifier()
    monkeypatch.setattr(writing, "_data", lambda *_: (None, type("Test", (), {"shape": (1, 28, 28)})))
    export_model(model, "torch", "exports/meal-v2-torch", **BRIEF)
    names: dict[str, Any] = {}
    exec(block("torch"), names)
    assert torch.allclose(names["logits"].softmax(-1), model.probabilities(names["images"]), atol=1e-6)


def test_the_pages_text_pipeline_is_that_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = text_classifier()
    model.save("runs/ernie-tiny/student")
    names: dict[str, Any] = {}
    exec(block("transformers"), names)
    assert [answer["label"] for answer in names["answers"]] == model.classify(names["texts"])


def test_the_servers_code_stands_in_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """tools/serve.py runs the page's code, on another port."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    import serve

    for name in serve.SERVERS:
        assert serve.code_of(name) == block(name)
        assert block(name).count(serve.PORT) == 1


NOT_EXPORTABLE = ("z-image", "qwen-image-2.1", "chroma", "lumina2", "hunyuan-image", "cogview4", "kolors")
EXPORTABLE = [name for name in PIPELINES if name not in NOT_EXPORTABLE]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTABLE)
def test_a_pipelines_network_is_exported(tmp_path: Path, name: str) -> None:
    side = WIDER.get(name, 16)
    pipeline = PipelineGenerator(make_pipeline(name), size=(side, side))
    made = export_model(pipeline, "torch", tmp_path / "out", **BRIEF)
    inputs = [entry["name"] for entry in made.facts["files"]["model.pt2"]["inputs"]]
    assert inputs[:2] == ["sample", "timestep"]
    assert "encoder_hidden_states" in inputs


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_a_text_to_image_student_is_exported_whole(tmp_path: Path, to: str) -> None:
    pytest.importorskip("onnxscript" if to == "onnx" else "openvino")
    model = sr.load("scenes-sd3")
    model.sampler = FewStepSampler((0.8,))  # type: ignore[union-attr]
    made = export_model(model, to, tmp_path / "out", whole=True, **BRIEF)
    assert made.facts["files"][f"generator{formats.FORMATS[to].suffix}"]["outputs"][0]["shape"] == ["batch", 3, 32, 32]


# --- folders ----------------------------------------------------------------------------------------------------------
def test_a_runs_student_is_exported_by_the_runs_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    student(tmp_path).save("runs/a/student")
    Path("runs/a/recipe.yaml").write_text(Recipe.load("dmd2").to_yaml())
    monkeypatch.setattr(writing, "ROUNDS", 3)
    assert cli.main(["export", "a", "--to", "torch", "--whole"]) == 0
    out = capsys.readouterr().out
    assert "max abs error" in out
    assert out.splitlines()[-1] == "exports/a-torch"
    facts = json.loads(Path("exports/a-torch/export.json").read_text())
    assert facts["source"] == "runs/a"
    assert {path.name for path in Path("exports/a-torch").iterdir()} == {"model.pt2", "generator.pt2", "export.json"}
    assert [path.name for path in Path("exports").iterdir()] == ["a-torch"]
    before = Path("exports/a-torch/export.json").read_bytes()
    assert cli.main(["export", "runs/a/student", "--to", "torch"]) == 2
    assert (
        "exports/a-torch is there already; choose another --out, or replace it with --force" in capsys.readouterr().err
    )
    assert Path("exports/a-torch/export.json").read_bytes() == before
    made = sr.export("runs/a/student", "torch", force=True)
    assert made.folder == Path("exports/a-torch")
    assert made.facts["classes"] == list(CLASSES)
    assert {path.name for path in Path("exports/a-torch").iterdir()} == {"model.pt2", "export.json"}
    assert [path.name for path in Path("exports").iterdir()] == ["a-torch"]


def test_force_replaces_nothing_that_is_no_export(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is there already and is no export"):
        export_model(image_encoder(), "torch", tmp_path / "mine", force=True)
    with pytest.raises(UserError, match=r"cannot write to .*thesis\.txt \(.*\); choose another --out"):
        export_model(image_encoder(), "torch", tmp_path / "mine" / "thesis.txt" / "out")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("moment", ["capture", "write", "open", "place"])
def test_a_failure_leaves_nothing_and_keeps_the_older_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    out = tmp_path / "exports" / "e"
    out.mkdir(parents=True)
    for name in ("export.json", "model.pt2"):
        (out / name).write_text(f"an older {name}")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*_: Any) -> Any:
        raise RuntimeError("a dark reason\nwith details")

    if moment in ("capture", "place"):
        monkeypatch.setattr(writing, {"capture": "capture", "place": "_put"}[moment], fail)
    else:
        usual = formats.FORMATS["torch"]
        changed = {"write": usual.write, "open": usual.open} | {moment: fail}
        monkeypatch.setitem(formats.FORMATS, "torch", formats.Format(usual.suffix, usual.needs, **changed))
    said = "" if moment == "place" else "a ViTMAEModel cannot be exported to torch .*"
    with pytest.raises(UserError if said else RuntimeError, match=f"{said}a dark reason"):
        export_model(image_encoder(), "torch", out, force=True, **BRIEF)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in out.parent.iterdir()] == ["e"]


def test_a_file_that_answers_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = formats.FORMATS["torch"]

    def off(path: Path) -> Callable[..., tuple[Tensor, ...]]:
        run = usual.open(path)
        return lambda *inputs: tuple(output + 0.1 for output in run(*inputs))

    monkeypatch.setitem(formats.FORMATS, "torch", formats.Format(usual.suffix, usual.needs, usual.write, off))
    with pytest.raises(UserError, match=r"answers otherwise than the model: off by 0\.1"):
        export_model(image_encoder(), "torch", tmp_path / "out", **BRIEF)
    assert list(tmp_path.iterdir()) == []


def test_nan_counts_as_another_answer() -> None:
    part = Part(torch.nn.Identity(), ("x",), ("y",), lambda batch, generator: (torch.ones(batch, 2),))
    found = writing.compare(part, lambda x: (x * float("nan"),))
    assert found["max_abs_error"] == float("inf")


# --- bad input --------------------------------------------------------------------------------------------------------
def refused(tmp_path: Path, said: str, model: Any, *arguments: Any, **more: Any) -> None:
    with pytest.raises(UserError) as stop:
        export_model(model, *arguments, out=tmp_path / "out", **more)
    assert said in str(stop.value)
    assert "\n" not in str(stop.value)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path, "no format 'onx' (did you mean 'onnx'?); choose one of", image_encoder(), "onx")
    refused(tmp_path, "int8 is made by onnxruntime, not for torch", image_encoder(), "torch", int8=True)
    refused(tmp_path, "only image generators have a whole", image_encoder(), "torch", whole=True)
    refused(tmp_path, "takes 2 network evaluations", student(tmp_path, (0.9, 0.4)), "torch", whole=True)
    refused(tmp_path, "does not say how large its images are; give --data", classifier(), "torch")
    refused(tmp_path, "a masked generator is exported in parts", masked(), "torch", whole=True)
    refused(tmp_path, "no model 'fashon' (did you mean 'fashion'?)", "fashon", "torch")
    refused(tmp_path, "no texts at 'nothing'", text_classifier(), "torch", data="nothing")
    monkeypatch.setattr(formats.Format, "check", lambda *_: None)
    refused(tmp_path, "int8 is for classifiers and encoders", "fashion", "onnx", int8=True)


def test_of_several_experts_each_folder_is_exported(tmp_path: Path) -> None:
    one = student(tmp_path)
    experts = RoutedDenoiser({"early": one.denoiser, "late": copy.deepcopy(one.denoiser)}, ByNoise((0.5,)))
    model = ImageGenerator(experts, one.sampler, one.classes)
    refused(tmp_path, "2 experts is no single file; export each expert's folder: experts/early", model, "torch")
    model.save(tmp_path / "routed")
    made = export_model(tmp_path / "routed" / "experts" / "late", "torch", tmp_path / "out", **BRIEF)
    assert list(made.facts["files"]) == ["model.pt2"]


@pytest.mark.parametrize(("to", "package"), [("onnx", "onnxscript"), ("openvino", "openvino")])
def test_a_missing_package_is_one_line_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], to: str, package: str
) -> None:
    monkeypatch.chdir(tmp_path)
    usual = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else usual("json"))
    assert cli.main(["export", "nothing/here", "--to", to]) == 2
    said = f"stillroom: exporting to {to} needs {package}; pip install 'stillroom[export]'\n"
    assert capsys.readouterr().err == said
    assert list(tmp_path.iterdir()) == []
