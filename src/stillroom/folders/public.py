"""Public models and data sets by their sizes alone: what the recipes of papers name before anything is downloaded.

A model is a JSON file beside those recipes, with the entries of its library's own configs; for a plan its folder is
written as the library would, without weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillroom.errors import UserError

if TYPE_CHECKING:
    from stillroom.recipe import Recipe

MODELS = Path(__file__).resolve().parents[1] / "recipes" / "papers" / "models"
SPECIAL = {
    "clip": ("<pad>", "<s>", "</s>", "<unk>", "<s> $A </s>"),
    "t5": ("<pad>", "<s>", "</s>", "<unk>", "$A </s>"),
    "bert": ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[CLS] $A [SEP]"),
}
"""Of a tokenizer: padding, first, last and unknown token, and how a text is wrapped."""


@dataclass(frozen=True)
class PublicData:
    """A data set: ``what`` it is, in words. shape: of one row; None where plans do not look at rows. classes: how many.
    texts: whether rows are texts. rows: as many stand in for a plan."""

    what: str
    shape: tuple[int, int, int] | None = None
    classes: int = 0
    texts: bool = False
    rows: int = 0


IMAGENET = "ImageNet-1k"
DATA = {
    "laion-aesthetics": PublicData("images with captions, LAION's with an aesthetic score above 6.25"),
    "aesthetics-prompts": PublicData("prompts, one to a line: the captions of LAION-Aesthetics 6+"),
    "diffusiondb-prompts": PublicData("prompts, one to a line: those of DiffusionDB"),
    "journeydb-prompts": PublicData("prompts, one to a line: those of JourneyDB"),
    "sam-llava-prompts": PublicData("prompts, one to a line: LLaVA's captions of SA-1B"),
    "video-prompts": PublicData("prompts of videos, one to a line; Phased DMD's own are not public"),
    "text-to-image-2m": PublicData("two million images that text-to-image models drew, with their captions"),
    "cifar10-images": PublicData("CIFAR-10's images alone, 32x32 pixels, without classes", (3, 32, 32), rows=1000),
    "cifar10": PublicData("CIFAR-10, 32x32 pixels, in ten classes", (3, 32, 32), 10, rows=1000),
    "imagenet64": PublicData(f"{IMAGENET}, 64x64 pixels, in 1,000 classes", (3, 64, 64), 1000, rows=5000),
    "imagenet256-latents": PublicData(
        f"{IMAGENET}, latents 4x32x32 of images of 256x256 pixels, in 1,000 classes", (4, 32, 32), 1000, rows=5000
    ),
    "imagenet": PublicData(f"{IMAGENET}, 224x224 pixels, in 1,000 classes", (3, 224, 224), 1000, rows=50_000),
    "sst2": PublicData("SST-2 of GLUE: sentences in two classes", classes=2, texts=True, rows=1000),
}


@cache
def public_models() -> dict[str, Path]:
    """Name -> file of sizes."""
    return {path.stem: path for path in sorted(MODELS.glob("*.json"))}


def described(name: str) -> dict[str, Any]:
    """What the file of a model says: ``repository`` (where its weights are), ``parts`` (sub-folder -> class and config;
    the folder itself is ``""``), ``parameters`` (of each part, as published), for a pipeline its class."""
    return json.loads(public_models()[name].read_text(encoding="utf-8"))


def is_public(name: str) -> bool:
    """Whether it is the name of such a model, and no folder."""
    return name.partition("@")[0] in public_models() and not Path(name.partition("@")[0]).exists()


def refuse_public(recipe: Recipe, given: Mapping[str, Any]) -> None:
    """Raises UserError for a run of which a teacher, student or data are known by their sizes alone."""
    for who, names in (("teacher", recipe.teacher), ("student", recipe.student)):
        for name in [] if who in given else map(str.strip, names.split(",")):
            if is_public(name):
                raise UserError(
                    f"{who} {name!r} is {described(name)['repository']}, whose weights do not come with stillroom",
                    cure=f"download it, then --{who} FOLDER; `stillroom plan` needs no weights",
                )
    if "data" not in given and recipe.data in DATA and not Path(recipe.data).exists():
        raise UserError(
            f"data {recipe.data!r} do not come with stillroom: {DATA[recipe.data].what}", cure="--data FOLDER or FILE"
        )


# --- folders ----------------------------------------------------------------------------------------------------------
def write_sizes(name: str, folder: Path) -> None:
    """Write the folder of a public model as its library does, without weights. Its tokenizers know as many words as the
    model's own, but other words."""
    import transformers

    about = described(name)
    index: dict[str, Any] = {"_class_name": about.get("pipeline"), **about.get("kept", {})}
    for part, content in about["parts"].items():
        place = folder / part
        place.mkdir(parents=True, exist_ok=True)
        if "tokenizer" in content:
            _tokenizer(content).save_pretrained(place)
            index[part] = ["transformers", "PreTrainedTokenizerFast"]
            continue
        library, _, kind = content["class"].partition(".")
        file = "scheduler_config.json" if "Scheduler" in kind else "config.json"
        if library == "diffusers":
            tree = {"_class_name": kind, **content["config"]}
        else:
            model_type = getattr(transformers, kind).config_class.model_type
            tree = {"architectures": [kind], "model_type": model_type, **content["config"]}
        (place / file).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
        index[part] = [library, kind]
    if "pipeline" in about:
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file, tree in about.get("files", {}).items():
        (folder / file).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _tokenizer(content: Mapping[str, Any]) -> Any:
    """A tokenizer of so many words, which cuts after and pads to a length."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pad, first, last, unknown, wrapped = SPECIAL[content["tokenizer"]]
    tokens = [pad, first, last, unknown, "word", "a"]
    tokens += [f"[unused{i}]" for i in range(content.get("words", len(tokens)) - len(tokens))]
    fast = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unknown))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.post_processor = processors.TemplateProcessing(single=wrapped, special_tokens=[(first, 1), (last, 2)])
    named = {"pad_token": pad, "bos_token": first, "eos_token": last, "unk_token": unknown}
    if content["tokenizer"] == "bert":
        named |= {"cls_token": first, "sep_token": last}
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, model_max_length=content["length"], padding_side="right", **named
    )
