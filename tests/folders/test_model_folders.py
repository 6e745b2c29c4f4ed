"""Folders of transformers as teachers and students: pixels as their processor wants them, names of classes, configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import stillroom as sr
import tiny_text
from model_pairs import pictures
from stillroom.data.labels import same_name
from stillroom.data.source import ArrayData, load_data
from stillroom.errors import UserError
from stillroom.folders.image_networks import make_classifier
from stillroom.folders.processors import PROCESSOR, Pixels, pixels_of
from stillroom.folders.text_networks import load_text_network, make_encoder
from stillroom.method import get_method
from stillroom.networks.mae import encode
from stillroom.networks.mae import make_encoder as make_mae
from stillroom.networks.recognition import class_logits
from stillroom.recipe import Recipe
from stillroom.run import run
from stillroom.surgery.text_reader import positions
from stillroom.task import IN_MEMORY, make_task
from stillroom.tasks.classify.model import ImageClassifier
from stillroom.tasks.encode.model import ImageEncoder
from tiny_models import CLASSES, CLASSIFIERS, ENCODERS, MEAN, SIDE, STD, TEXTS, make_model, save_images, save_texts


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def loaded(names: str, method: str = "meal-v2", data: Any = None) -> Any:
    """The task with the first of the names as student, the others as teachers."""
    student, _, teacher = names.partition(",")
    task, named = make_task(get_method(method).task), {"student": student, "teacher": teacher, "data": IN_MEMORY}
    task.load(Recipe.load(method, ["evaluate.n=0"], **named), {"data": data or pictures()})
    return task


def loaded_texts(names: str) -> Any:
    return loaded(names, "distiller", tiny_text.texts(30))


# --- pixels -----------------------------------------------------------------------------------------------------------
PROCESSORS: dict[str, dict[str, Any]] = {
    **{name: CLASSIFIERS[name].processor for name in ("vit", "dinov2", "convnext", "mobilenet_v2", "clip")},
    "large convnext": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}},
    "deit": {"image_processor_type": "DeiTImageProcessor", "size": {"height": 14, "width": 14}, "resample": 3,
             "do_center_crop": True, "crop_size": {"height": 12, "width": 12}},
    "crop of a smaller image": {"image_processor_type": "BitImageProcessor", "do_resize": False, "do_center_crop": True,
                                "crop_size": {"height": 18, "width": 23}},
    "no normalisation": {"image_processor_type": "ViTImageProcessor", "do_resize": False, "do_normalize": False},
    "no rescaling": {"image_processor_type": "ViTImageProcessor", "do_resize": False, "do_rescale": False},
    "larger, one side more": {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 40}},
    "defaults": {"image_processor_type": "ViTImageProcessor"},
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("shape", [(16, 20), (20, 16)])
def test_pixels_are_those_of_the_processor(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / PROCESSOR).write_text(json.dumps({"image_mean": MEAN, "image_std": STD, **PROCESSORS[name]}))
    made: Any = transformers.AutoImageProcessor.from_pretrained(tmp_path, local_files_only=True)
    raw = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    theirs = made(raw, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    images = torch.from_numpy(raw).permute(2, 0, 1)[None].float() / 127.5 - 1
    ours = Pixels.read(tmp_path, 3).of(images)
    assert ours.shape == theirs.shape
    unit = 255.0 if name == "no rescaling" else 1.0
    # a step of 255 that Pillow rounds away, before and after it resizes one side, in units of the smallest deviation
    assert float((ours - theirs).abs().max()) < 2.1 * unit / 255 / min(STD)


def test_plain_pixels_are_left_as_they_are(tmp_path: Path) -> None:
    made = ImageClassifier(make_classifier("resnet-small", 3, 3), CLASSES)
    made.save(tmp_path)
    pixels, images = Pixels.read(tmp_path, 3), pictures().images(slice(4))
    assert pixels.plain
    assert torch.equal(pixels.of(images), images)
    again = sr.load(tmp_path)
    assert torch.equal(again.probabilities(images), made.probabilities(images))


def test_grey_images_fill_the_channels_of_a_folder(tmp_path: Path) -> None:
    save_images(CLASSIFIERS["vit"], tmp_path)
    classifier: Any = sr.load(tmp_path)
    grey = torch.rand(3, 1, SIDE, SIDE) * 2 - 1
    assert torch.equal(classifier.probabilities(grey), classifier.probabilities(grey.expand(-1, 3, -1, -1)))
    with pytest.raises(UserError, match=r"give \[N, 3 or 1, H, W\]"):
        classifier.probabilities(torch.zeros(1, 2, SIDE, SIDE))


@torch.no_grad()
def test_a_folder_s_mean_and_size_reach_its_network(tmp_path: Path) -> None:
    save_images(CLASSIFIERS["vit"], tmp_path)
    network: Any = ImageClassifier.load(tmp_path).network
    bare = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
    images = pictures().images(slice(2))
    small = torch.nn.functional.interpolate((images + 1) / 2, (12, 12), mode="bilinear", antialias=True)
    seen = (small - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(network(images).logits, bare(seen).logits)
    torch.testing.assert_close(network(pixel_values=images).logits, bare(seen).logits)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image_processor_type": "PerceiverImageProcessor"}, "is for a PerceiverImageProcessor"),
        ({"image_processor_type": "OwnImageProcessor"}, "cannot be read"),
        ({"resample": 1}, "resizes with resample 1"),
        ({"image_mean": [0.5, 0.5]}, "another number of channels than 3"),
        ({"image_std": [0.5, 0.0, 0.5]}, "mean and deviation"),
        ({"size": {"width": 12}}, "cannot be read"),
    ],
)
def test_a_processor_that_does_something_else_is_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    save_images(CLASSIFIERS["vit"], tmp_path)
    change(tmp_path / PROCESSOR, **settings)
    with pytest.raises(UserError, match=rf"{PROCESSOR}.*{words}"):
        ImageClassifier.load(tmp_path)


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    save_images(CLASSIFIERS["vit"], tmp_path)
    half = transformers.ViTForImageClassification.from_pretrained(tmp_path).half()
    half.save_pretrained(tmp_path)
    network = ImageClassifier.load(tmp_path).network
    assert {p.dtype for p in network.parameters()} == {torch.float32}


# --- whole runs -------------------------------------------------------------------------------------------------------
def test_a_student_keeps_its_processor_and_answers_alone(tmp_path: Path) -> None:
    """DHO's, with two heads: transformers reads both of them, sr.load their mixture."""
    folder = save_images(CLASSIFIERS["vit"], tmp_path / "vit")
    recipe = Recipe.load(
        "dho", ["engine.steps=2", "engine.batch=6", "evaluate.n=0", "options.labelled=2"],
        student=str(folder), teacher=str(folder), data=IN_MEMORY,
    )  # fmt: skip
    student: Any = run(recipe, tmp_path / "run", data=pictures()).student
    images = pictures().images(slice(6))
    again: Any = sr.load(tmp_path / "run")
    assert torch.equal(again.probabilities(images), student.probabilities(images))
    assert json.loads((tmp_path / "run/student" / PROCESSOR).read_text())["image_mean"] == MEAN
    made: Any = transformers.AutoImageProcessor.from_pretrained(tmp_path / "run/student")
    assert (made.size["height"], list(made.image_std)) == (12, STD)


# --- what does not fit ------------------------------------------------------------------------------------------------
def seen_by(network: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        return class_logits(network.eval(), images)


def test_data_follow_the_first_teacher_s_order_of_classes(tmp_path: Path) -> None:
    """Data and students take the teacher's order; a second network in another one answers in the first one's."""
    good = save_images(CLASSIFIERS["resnet"], tmp_path / "good", ("Bar", "a_cross, cross", "DOT"))
    assert loaded(f"resnet-small,{good}").data.classes == list(CLASSES)
    turned = save_images(CLASSIFIERS["vit"], tmp_path / "turned", ("dot", "bar", "cross"))
    task = loaded(f"resnet-small,{turned}")
    assert task.data.classes == ["dot", "bar", "cross"]
    assert [task.data.classes[i] for i in task.data.labels.tolist()] == [CLASSES[i % 3] for i in task.data.ids.tolist()]
    images = task.data.images(slice(6))
    asis = seen_by(task.taught["teacher-1"], images)
    for names in (f"resnet-small,{good},{turned}", f"{turned},{good}"):
        task = loaded(names)
        assert task.data.classes == list(CLASSES)
        follower = task.own if names.startswith(str(turned)) else task.taught["teacher-2"]
        torch.testing.assert_close(seen_by(follower, images), asis[:, [1, 2, 0]])
        assert [follower.config.id2label[i] for i in range(3)] == list(CLASSES)
    alone = loaded(str(turned))
    assert torch.equal(seen_by(alone.own, images), asis)
    assert alone.data.classes == ["dot", "bar", "cross"]


def test_networks_without_names_follow_the_data_as_they_were_read(tmp_path: Path) -> None:
    nameless = save_images(CLASSIFIERS["resnet"], tmp_path / "nameless", ("LABEL_0", "LABEL_1", "LABEL_2"))
    assert loaded(f"resnet-small,{nameless}").data.classes == list(CLASSES)
    turned = save_images(CLASSIFIERS["vit"], tmp_path / "turned", ("dot", "bar", "cross"))
    images = pictures().images(slice(6))
    asis = seen_by(loaded(f"resnet-small,{nameless}").taught["teacher-1"], images)
    task = loaded(f"resnet-small,{nameless},{turned}")
    assert task.data.classes == ["dot", "bar", "cross"]
    torch.testing.assert_close(seen_by(task.taught["teacher-1"], images), asis[:, [2, 0, 1]])


def test_numbers_as_labels_are_the_network_s_outputs(tmp_path: Path) -> None:
    named = save_images(CLASSIFIERS["resnet"], tmp_path / "named", ("dot", "bar", "cross"))
    numbered = ArrayData(pictures().array, pictures().cond, ["0", "1", "2"], "pictures")
    task = loaded(f"resnet-small,{named}", data=numbered)
    assert task.data.classes == ["dot", "bar", "cross"]
    assert task.data.labels.tolist() == [i % 3 for i in task.data.ids.tolist()]


def test_texts_follow_the_teacher_s_order_of_classes(tmp_path: Path) -> None:
    turned = save_texts(TEXTS["bert"], tmp_path / "turned", ("thing", "deed", "animal"))
    task = loaded_texts(f"bert-2x64,{turned}")
    whole = tiny_text.texts(30)
    assert task.data.classes == ["thing", "deed", "animal"]
    known = dict(zip(whole.texts, (tiny_text.CLASSES[i] for i in whole.labels.tolist())))  # type: ignore[union-attr]
    for part in (task.data, task.data.parts["heldout"]):
        assert [part.classes[i] for i in part.labels.tolist()] == [known[text] for text in part.texts]
    other = save_texts(TEXTS["roberta"], tmp_path / "other", tiny_text.CLASSES)
    ids = torch.arange(4, 12)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    asis = seen_by(loaded_texts(f"{other}").own, inputs)  # type: ignore[arg-type]
    found = seen_by(loaded_texts(f"{other},{turned}").own, inputs)  # type: ignore[arg-type]
    torch.testing.assert_close(found, asis[:, [1, 2, 0]])


def test_classes_that_a_network_does_not_have_are_named(tmp_path: Path) -> None:
    other = save_images(CLASSIFIERS["resnet"], tmp_path / "other", ("bar", "dot", "square"))
    with pytest.raises(UserError, match=r"class 'cross' of the data is none of the classes of network '.*other'"):
        loaded(f"resnet-small,{other}")
    good = save_images(CLASSIFIERS["resnet"], tmp_path / "good", CLASSES)
    with pytest.raises(UserError, match=r"class 'cross' of the data is none of the classes of network '.*other'"):
        loaded(f"resnet-small,{good},{other}")
    turned = ImageClassifier.load(save_images(CLASSIFIERS["resnet"], tmp_path / "turned", ("dot", "bar", "cross")))
    task = make_task("classify", "")
    with pytest.raises(UserError, match="has its classes in another order than the first one"):
        task.load(
            Recipe.load("meal-v2", ["evaluate.n=0"], student="resnet-small", teacher="(objects)", data=IN_MEMORY),
            {"data": pictures(), "teacher": [ImageClassifier.load(good), turned]},
        )


def test_test_data_are_in_the_model_s_order(tmp_path: Path) -> None:
    """What an export is judged by."""
    images, labels = pictures().array.permute(0, 2, 3, 1).numpy(), pictures().labels.numpy()
    np.savez(tmp_path / "a.npz", images=images, labels=labels, classes=np.array(CLASSES))
    turned = ImageClassifier.load(save_images(CLASSIFIERS["resnet"], tmp_path / "turned", ("dot", "bar", "cross")))
    test, plain = turned.test_data(str(tmp_path / "a.npz")), load_data(tmp_path / "a.npz", "test")
    assert [test.classes[i] for i in test.labels.tolist()] == [plain.classes[i] for i in plain.labels.tolist()]
    assert test.classes == ["dot", "bar", "cross"]


def test_a_teacher_of_other_classes_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "five"
    ImageClassifier(make_classifier("resnet-small", 3, 5), list("abcde")).save(folder)
    with pytest.raises(UserError, match=r"network '.*five' has 5 classes, data '.in memory.' 3"):
        loaded(f"resnet-small,{folder}")
    ImageClassifier(make_classifier("resnet-small", 1, 3), CLASSES).save(tmp_path / "one")
    with pytest.raises(UserError, match=r"network '.*one' has 1 channels, data '.in memory.' 3"):
        loaded(f"resnet-small,{tmp_path / 'one'}")


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("tench, Tinca tinca", "Tinca_tinca", True), ("T-shirt", "t shirt", True), ("tench, fish", "tench, fish", True),
        ("cat", "cats", False), ("", "cat", False), ("dog, cat", "dog house", False),
    ],
)  # fmt: skip
def test_names_that_mean_one_class(a: str, b: str, same: bool) -> None:
    assert same_name(a, b) is same


def test_images_that_a_network_cannot_see_are_refused(tmp_path: Path) -> None:
    folder = save_images(CLASSIFIERS["vit"], tmp_path / "vit")
    (folder / PROCESSOR).unlink()
    with pytest.raises(UserError, match=r"network '.*vit' cannot see the images of data '.in memory.', 16x16"):
        loaded(f"resnet-small,{folder}")


def test_models_of_another_kind_are_named(tmp_path: Path) -> None:
    text = save_texts(TEXTS["bert"], tmp_path / "bert")
    with pytest.raises(UserError, match="describes no image classifier, but a BertConfig"):
        loaded(f"resnet-small,{text}")
    image = save_images(CLASSIFIERS["vit"], tmp_path / "vit")
    with pytest.raises(UserError, match=r"vit.*(no text encoder|Unrecognized)"):
        loaded_texts(f"bert-2x64,{image}")
    with pytest.raises(UserError, match=r"bert holds a BertForSequenceClassification, no image encoder"):
        loaded(f"mae-nano,{text}", "dmae")
    t5 = transformers.T5Config(vocab_size=17, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match="is of a t5, no text encoder"):
        loaded_texts(f"bert-2x64,{tmp_path / 't5'}")


# --- students by a config ---------------------------------------------------------------------------------------------
def test_a_student_may_be_a_config(tmp_path: Path) -> None:
    teacher = save_images(CLASSIFIERS["vit"], tmp_path / "vit")
    file = tmp_path / "student.json"
    config = transformers.ConvNextConfig(**CLASSIFIERS["convnext"].settings, num_labels=7)
    file.write_text(json.dumps({**config.to_dict(), "dtype": "float16"}))
    first, again = (loaded(f"{file},{teacher}").own for _ in range(2))
    assert type(first).__name__ == "ConvNextForImageClassification"
    assert (first.config.num_labels, first.config.num_channels) == (3, 3)
    assert next(first.parameters()).dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert pixels_of(first) is None


def test_an_encoder_and_a_text_encoder_may_be_configs(tmp_path: Path) -> None:
    file = tmp_path / "mae.json"
    file.write_text(json.dumps(transformers.ViTMAEConfig(**ENCODERS["vit_mae"].settings).to_dict()))
    network: Any = make_mae(str(file), 1, 8)
    assert (network.config.num_channels, network.config.image_size, network.config.hidden_size) == (1, 8, 16)
    assert bool(network.decoder.decoder_pos_embed.abs().sum() > 0)
    file.write_text(json.dumps(transformers.DistilBertConfig(**TEXTS["distilbert"].settings).to_dict()))
    text: Any = make_encoder(str(file), 0, 4)
    assert type(text).__name__ == "DistilBertForSequenceClassification"
    assert text.config.num_labels == 4
    with pytest.raises(UserError, match=r"mae\.json is of a distilbert"):
        make_mae(str(file), 1, 8)
    with pytest.raises(UserError, match=r"mae\.json cannot be read"):
        make_classifier(str(file), 1, 3)
    for text_of, words in (
        ("{}", "has no model_type"),
        ('{"model_type": "own"}', "cannot be read"),
        ("[", "valid JSON"),
    ):
        file.write_text(text_of)
        with pytest.raises(UserError, match=rf"mae\.json.*{words}"):
            make_classifier(str(file), 1, 3)
    with pytest.raises(UserError, match=r"nowhere\.json is missing"):
        make_encoder("nowhere.json", 17, 3)


# --- encoders ---------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_the_vision_part_of_a_clip_model_is_an_encoder(tmp_path: Path) -> None:
    config = transformers.CLIPConfig(
        vision_config=ENCODERS["clip_vision"].settings, text_config={"vocab_size": 17, "hidden_size": 8,
        "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}, projection_dim=4,
    )  # fmt: skip
    whole: Any = transformers.CLIPModel(config).eval()
    whole.save_pretrained(tmp_path)
    encoder = ImageEncoder.load(tmp_path)
    assert type(encoder.network).__name__ == "CLIPVisionModel"
    images = pictures().images(slice(2))
    theirs: Tensor = whole.vision_model(pixel_values=images).last_hidden_state
    torch.testing.assert_close(encoder.tokens(images), theirs[:, 1:])
    assert loaded(f"mae-nano,{tmp_path}", "dmae").taught.keys() == {tmp_path.name}


@torch.no_grad()
def test_the_encoder_of_a_classifier_sees_its_pixels(tmp_path: Path) -> None:
    folder = save_images(ENCODERS["vit_classifier"], tmp_path / "vit")
    teacher: Any = loaded(f"mae-nano,{folder}", "dmae").given()["teacher"]
    images = pictures().images(slice(2))
    bare = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    seen = ((images + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(encode(teacher.base_model, images), bare(seen).last_hidden_state)
    torch.testing.assert_close(teacher(images).logits, teacher.classifier(bare(seen).last_hidden_state[:, 0]))


# --- texts ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", [name for name in TEXTS if name not in ("gpt2", "albert")])
def test_an_encoder_without_a_head_is_given_one(family: str, tmp_path: Path) -> None:
    network = make_model(TEXTS[family])
    body: Any = transformers.AutoModel.from_config(network.config)
    body.save_pretrained(tmp_path)
    tiny_text.tokenizer().save_pretrained(tmp_path)
    made, tokenizer = load_text_network(tmp_path, 4)
    assert type(made) is type(network)
    assert made.config.num_labels == 4
    assert len(tokenizer) == 17
    theirs = body.state_dict()
    kept = {name: value for name, value in made.base_model.state_dict().items() if not name.startswith("pooler.")}
    assert kept
    assert all(torch.equal(value, theirs[name]) for name, value in kept.items())


def test_roberta_reads_as_far_as_its_places_go(tmp_path: Path) -> None:
    """Its first two places are not for tokens: a text as long as its table would end beyond it."""
    assert positions(make_model(TEXTS["bert"])) == 24
    network = make_model(TEXTS["roberta"])
    limit = positions(network)
    assert limit == 23
    ids = torch.full((1, limit), 5)
    network(input_ids=ids, attention_mask=torch.ones_like(ids))
    with pytest.raises((IndexError, RuntimeError)):
        network(input_ids=torch.full((1, limit + 1), 5), attention_mask=torch.ones(1, limit + 1))


def test_a_tokenizer_that_pads_otherwise_is_refused(tmp_path: Path) -> None:
    family = TEXTS["roberta"]._replace(settings={**TEXTS["roberta"].settings, "pad_token_id": 1})
    folder = save_texts(family, tmp_path / "roberta")
    with pytest.raises(UserError, match=r"roberta' counts places from token 1.*pads with 0"):
        loaded_texts(f"{folder},{folder}")


def test_vocabularies_of_two_kinds_are_told_apart(tmp_path: Path) -> None:
    bert = save_texts(TEXTS["bert"], tmp_path / "bert")
    other = tiny_text.tokenizer((*tiny_text.WORDS[:-1], "sea"))
    electra = save_texts(TEXTS["electra"], tmp_path / "electra", tokenizer=other)
    with pytest.raises(UserError, match=r"bert' and '.*electra' have different vocabularies"):
        loaded_texts(f"{bert},{electra}")
    mixed = save_texts(TEXTS["distilbert"], tmp_path / "distilbert")
    loaded_texts(f"{bert},{mixed}")
