"""Class-conditional images: one teacher that draws classes (or nothing in particular), data in classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stillroom.data.conditions import LABELS_ALONE, LabelsAlone
from stillroom.data.labels import numbered, places
from stillroom.data.source import IMAGE_SETS, ArrayData, load_data
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.sampling import ODESampler, Sampler
from stillroom.errors import UserError
from stillroom.folders.diffusers_networks import label_count
from stillroom.recipe import Recipe
from stillroom.task import COLUMNS, NOTHING, Card, Rows, Task, model_home, sheet, task
from stillroom.tasks.class_images.model import ROWS, ImageGenerator, class_count
from stillroom.tasks.words import calls, made_from

DENOISERS = (ImageGenerator, Denoiser)


@task("class-images")
class ClassImages(Task):
    """One denoiser, sampled by label. The student begins as another denoiser of the same samples, or as a copy of the
    teacher."""

    model = ImageGenerator
    data_names = (*IMAGE_SETS, LABELS_ALONE)
    objects = {"teacher": DENOISERS, "student": DENOISERS, "data": (ArrayData,)}
    data: ArrayData

    def load(self, recipe: Recipe, given: Mapping[str, Any] = NOTHING) -> None:
        alone = "data" not in given and recipe.data == LABELS_ALONE
        if not alone:
            self.data = given["data"] if "data" in given else load_data(recipe.data, "train")
        self.teacher = as_generator(given["teacher"]) if "teacher" in given else load_denoiser(recipe.teacher)
        if alone:
            self.data = labels_of(self.teacher, recipe)
        self.origin = self.data.origin
        if "teacher" not in given:
            self.folders["teacher"] = model_home(recipe.teacher)
        check_fit(self.teacher.denoiser, self.data, f"teacher {recipe.teacher!r}", recipe.data, self.teacher.classes)
        if label_count(self.teacher.denoiser.network) and not self.teacher.denoiser.null:
            names = self.teacher.classes or self._by_number(self.teacher.denoiser.network, recipe)
            self.teacher = ImageGenerator(self.teacher.denoiser, self.teacher.sampler, names)
        elif takes_nothing(self.teacher.denoiser) and self.data.cond:
            self.data = ArrayData(self.data.array, name=self.data.name, origin=self.data.origin, ids=self.data.ids)
        self.data = self._by_names(self.data, self.teacher, f"the classes of teacher {recipe.teacher!r}")
        self.start = self.teacher.denoiser
        if "student" in given or recipe.student:
            begins = as_generator(given["student"]) if "student" in given else load_denoiser(recipe.student, "student")
            check_fit(begins.denoiser, self.data, f"student {recipe.student!r}", recipe.data, begins.classes)
            if self._by_names(self.data, begins, f"the classes of student {recipe.student!r}") is not self.data:
                raise UserError(
                    f"student {recipe.student!r} has its classes in another order than teacher {recipe.teacher!r}",
                    cure="give a student of the teacher's order",
                )
            self.start = begins.denoiser

    def _by_number(self, network: nn.Module, recipe: Recipe) -> list[str]:
        """What the labels of a network that knows them by number alone are called. Which of them means "unconditional"
        is not known: those of the data are classes in any case, and those below. Raises UserError for names of which
        nothing says which labels they are: all must be there, or all but one."""
        mine, count = list(self.data.classes), label_count(network)
        if names := numbered(mine, count):
            while names[-1] not in mine:
                names.pop()
            return names
        if mine and len(mine) < count - 1:
            raise UserError(
                f"teacher {recipe.teacher!r} knows {count} labels by number alone, and nothing says which of them are "
                f"the classes {', '.join(map(repr, mine[:5]))}{', ...' if len(mine) > 5 else ''} of data "
                f"{recipe.data!r}",
                cure='write {"classes": [...]}, the names of its labels in their order, into stillroom.json in its '
                "folder",
            )
        return mine

    @staticmethod
    def _by_names(data: ArrayData, model: ImageGenerator, whose: str) -> ArrayData:
        """The data with the classes in the model's order, matched by name; as they are where one has no names, or the
        data's are numbers."""
        if not (model.classes and data.classes):
            return data
        straight = places(data.classes, model.classes, whose) == list(range(len(data.classes)))
        return data if straight else data.by_names(model.classes, whose)

    def given(self) -> Mapping[str, Any]:
        teacher = self.teacher.denoiser
        return {"teacher": teacher, "teachers": [teacher], "student": self.start, "classes": self.data.classes}

    def teachers(self) -> Mapping[str, ImageGenerator]:
        return {"teacher": self.teacher}

    def student(self, network: nn.Module, sampler: Sampler) -> ImageGenerator:
        assert isinstance(network, Denoiser)
        return ImageGenerator(network, sampler, self.teacher.classes or self.data.classes)

    def rows(self, model: Any, seed: int, most: int = ROWS * COLUMNS) -> Rows:
        """Of all classes, at most ten."""
        classes = model.choices
        rows, columns = sheet(min(len(classes) or ROWS, ROWS), COLUMNS, most)
        if classes:
            return model.rows(classes[:rows], columns, seed)
        return Rows([""] * rows, model.sample(rows * columns, seed=seed).unflatten(0, (rows, columns)))

    def call(self, model: Any, batch: int) -> Tensor:
        """Samples of all classes in turn."""
        classes = len(model.choices)
        return model.sample([i % classes for i in range(batch)] if classes else batch)

    @classmethod
    def card(cls, recipe: Recipe, result: Mapping[str, Any]) -> Card:
        asked = "[0, 1, 2]" if any(result["rows"]) else "8"
        use = f"images = student.sample({asked}, seed=0)  # [N, C, H, W] in [-1, 1]"
        makes = f"A student of {made_from(recipe.teacher)} that makes an image in {calls(result)}"
        return Card(makes, [use], hub_library="diffusers", kind="image-generation")


def labels_of(model: ImageGenerator, recipe: Recipe) -> LabelsAlone:
    """The classes that ``model`` draws. Raises UserError where something is to be compared with pictures."""
    if recipe.evaluate.n:
        raise UserError(
            f"data {LABELS_ALONE!r} hold no images to compare with", cure="evaluate.n=0, or data with a test split"
        )
    return LabelsAlone(class_count(model.denoiser), model.classes, model.denoiser.shape)


# --- what goes in -----------------------------------------------------------------------------------------------------
def load_denoiser(name: str, who: str = "teacher") -> ImageGenerator:
    """A denoiser with its sampler, by name or folder. Raises UserError for none, and for one that works on latents: the
    data are pixels in [-1, 1]."""
    if not name:
        raise UserError("no teacher was named", cure="give a model folder, or the shipped one: teacher=fashion")
    if "," in name and not Path(name).exists():
        raise UserError(f"{who} {name!r} is several, this method learns from one", cure="name one")
    folder = model_home(name)
    if (folder / "vae").is_dir():
        raise UserError(
            f"{who} {name!r} works on the latents of its vae/, the data are pixels",
            cure=f"choose a pixel-space {who}",
        )
    return ImageGenerator.load(folder)


def as_generator(given: Denoiser | ImageGenerator) -> ImageGenerator:
    return given if isinstance(given, ImageGenerator) else ImageGenerator(given, ODESampler())


# --- checks -----------------------------------------------------------------------------------------------------------
def check_fit(denoiser: Denoiser, data: ArrayData, name: str, source: str, classes: Sequence[str] = ()) -> None:
    """Raises UserError where a denoiser cannot learn from, or speak about, the data. classes: its own, by name."""
    if tuple(denoiser.shape) != tuple(data.shape):
        raise UserError(
            f"{name} makes {_size(denoiser.shape)}, but data {source!r} holds {_size(data.shape)}",
            cure="convert the data, or choose a model of that size",
        )
    for condition in denoiser.null:
        if condition not in data.cond:
            raise UserError(
                f"{name} is conditioned on {condition!r}, but data {source!r} has none",
                cure="put the images into one sub-folder per class" if "label" in condition else "give data with it",
            )
    if count := class_count(denoiser):
        if not any("label" in key for key in data.cond):
            raise UserError(
                f"{name} is conditioned on 'label', but data {source!r} has none",
                cure="put the images into one sub-folder per class",
            )
        labels = [int(values.max()) + 1 for key, values in data.cond.items() if "label" in key]
        have = len(data.classes) or max(labels)
        if have != count and (denoiser.null or have > count):
            cure = "give pictures of each of its classes, and of no other"
            mine = data.classes
            if classes and mine and list(mine) != [str(i) for i in range(len(mine))]:
                there = {*places(mine, classes, f"the classes of {name}")}  # names the first that is none of them
                lacking = [repr(one) for place, one in enumerate(classes) if place not in there]
                cure = f"give pictures of {', '.join(lacking[:5])}{', ...' if len(lacking) > 5 else ''} as well"
            raise UserError(f"{name} knows {count} classes, but data {source!r} has {have}", cure=cure)


def takes_nothing(denoiser: Denoiser) -> bool:
    """Whether a network of diffusers draws without any condition."""
    network = denoiser.network
    return type(network).__name__ == "UNet2DModel" and not label_count(network)


def _size(shape: Sequence[int]) -> str:
    if len(shape) != 3:
        return f"samples of shape {'x'.join(map(str, shape))}"
    channels, height, width = shape
    return f"{width}x{height} images with {channels} channel{'s' if channels > 1 else ''}"
