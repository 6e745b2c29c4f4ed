"""Teachers, students and data of the wrong kind, as folders and as objects: one line that says what each is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import stillroom as sr
from stillroom.data.source import ArrayData
from stillroom.errors import UserError
from stillroom.folders.image_networks import make_classifier
from stillroom.task import find_model_class, get_task

LABELS = {"label": torch.arange(12) % 2}
GREY = torch.zeros(12, 1, 8, 8, dtype=torch.uint8)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def bert(place: Path) -> Path:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=20, **sizes)
    transformers.BertForMaskedLM(config).save_pretrained(place / "bert")
    return place / "bert"


# --- objects ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["dmd2", "gt-self-distill", "distiller", "g2sd", "lightgen"])
@pytest.mark.parametrize("who", ["teacher", "student", "data"])
@pytest.mark.parametrize("act", [sr.distill, sr.plan])
def test_an_object_of_a_wrong_class_is_refused(place: Path, act: Any, method: str, who: str) -> None:
    with pytest.raises(UserError, match=f"{who} is an object of class Tensor, which {method} cannot use as its {who}"):
        act(method, **{who: torch.zeros(9, 1, 8, 8)})
    assert not list(place.iterdir())


def test_a_network_that_is_no_denoiser_is_refused(place: Path) -> None:
    with pytest.raises(UserError, match=r"class Linear.* an object of class .*\.ImageGenerator or .*\.Denoiser"):
        sr.distill("dmd2", teacher=nn.Linear(2, 2), data="fashion", steps=2)


def test_one_of_several_teachers_of_a_wrong_class_is_refused(place: Path) -> None:
    network = make_classifier("resnet-small", 1, 2)
    with pytest.raises(UserError, match="teacher is an object of class int"):
        sr.distill("meal-v2", student=network, teacher=[network, 3])
    with pytest.raises(UserError, match="teacher is an object of class list"):
        sr.distill("dmd2", teacher=[network])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (ArrayData(torch.zeros(12, 2), LABELS, ["a", "b"]), r"rows of shape \[2\], no images"),
        (ArrayData(GREY, {}, ["a", "b"]), "no classes to tell apart"),
        (ArrayData(GREY[:4], {"label": torch.arange(4) % 2}, ["a", "b"]), "has 4 images to train on, too few"),
    ],
)
def test_data_without_what_a_classifier_needs_are_refused(place: Path, data: ArrayData, words: str) -> None:
    with pytest.raises(UserError, match=words):
        sr.distill("gt-self-distill", student="resnet-small", data=data, steps=2)


def test_a_plan_takes_the_objects_that_a_run_takes(place: Path) -> None:
    network, data = make_classifier("resnet-small", 1, 2), ArrayData(GREY, LABELS, ["a", "b"])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    by_object = sr.plan("gt-self-distill", student=network, data=data)
    assert by_object.total == sr.plan("gt-self-distill", student="resnet-small", data=data).total
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_advice_leaves_out_what_a_network_cannot_do(place: Path) -> None:
    network, data = make_classifier("resnet-small", 1, 2), ArrayData(GREY, LABELS, ["a", "b"])
    advice = sr.plan("gt-self-distill", student=network, data=data, memory="1MB", overrides=["engine.batch=2"]).advice
    assert advice is not None
    assert not any("checkpointing" in argument for change in advice.changes for argument in change.arguments)


# --- data by name or file ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("method", "data", "words"),
    [
        ("dmd2", "glosses", "data 'glosses' are texts for task classify-text; dmd2 reads images"),
        ("gt-self-distill", "scenes", "are images for task text-.*; .* one of: fashion, mnist"),
        ("distiller", "fashion", "are images for task .*; distiller reads texts .*, or one of: glosses"),
        ("gt-self-distill", "plain.csv", "plain.csv holds texts, images are read here"),
        ("distiller", "plain.csv", "plain.csv:2 has the columns 'sentence', 'class', not text and label"),
    ],
)
def test_data_of_another_kind_are_refused(place: Path, method: str, data: str, words: str) -> None:
    (place / "plain.csv").write_text("sentence,class\nhello,a\nbye,b\n")
    with pytest.raises(UserError, match=words):
        sr.distill(method, student="resnet-small" if method == "gt-self-distill" else None, data=data, steps=2)


# --- folders ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("act", [sr.distill, sr.plan])
@pytest.mark.parametrize(
    ("method", "who", "name", "words"),
    [
        ("dmd2", "teacher", "fashion-clip", r"is an image classifier \(task classify\); dmd2 takes an image generator"),
        ("dmd2", "student", "fashion-clip", r"is an image classifier .*, or one of: fashion$"),
        ("dmd2", "teacher", "lightgen", r"is a text-to-image model \(task text-images\)"),
        ("meal-v2", "teacher", "fashion", r"is an image generator \(task class-images\); meal-v2 takes an image class"),
        ("distiller", "student", "fashion-clip", "is an image classifier .*; distiller takes a text classifier"),
        ("g2sd", "teacher", "fashion", "is an image generator .*; g2sd takes an image encoder"),
        ("lightgen", "teacher", "scenes-sd3,fashion", "teacher 'fashion' is an image generator"),
        ("dmd2", "teacher", "bert", "holds a BertForMaskedLM of transformers; dmd2 takes"),
        ("dho", "student", "bert", "holds a BertForMaskedLM of transformers; dho takes an image classifier"),
    ],
)
def test_a_model_of_another_kind_is_refused(bert: Path, act: Any, method: str, who: str, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        act(method, **{who: name})
    assert f"{who} '{name.split(',')[-1]}'" in str(caught.value)
    assert "assets" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("distiller", "no text encoder './nope'; give a trained one's folder, or minilm$"),
        ("gt-self-distill", "no classifier './nope'; give a trained one's folder, or one of: fashion-clip$"),
    ],
)
def test_untrained_networks_are_not_offered_as_teachers(place: Path, method: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        sr.distill(method, teacher="./nope", steps=2)


def test_encoders_of_texts_are_taken_but_are_no_finished_models(bert: Path) -> None:
    assert find_model_class(bert) is None
    assert get_task("classify-text").reads(bert)
    with pytest.raises(UserError, match="bert holds a BertForMaskedLM, which is no finished model"):
        sr.load(bert)
