"""Task and model: what a kind of model must say so that every command works with it.

A :class:`Task` says what a run reads, what a method's ``build`` is given and how the result is looked at and measured.
A :class:`Model` is a finished network that can be loaded, saved, asked, timed and written for other runtimes. Both are
found by name: no command knows a class of model.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from stillroom.diffusion.sampling import Sampler
from stillroom.errors import UserError
from stillroom.evaluation.scores import Score
from stillroom.files import stay_inside
from stillroom.folders.image_networks import architecture
from stillroom.folders.pipelines import sized
from stillroom.folders.public import refuse_public
from stillroom.folders.shipped import SHIPPED, model_folder
from stillroom.parsing import read_json
from stillroom.registry import Registry
from stillroom.surgery.modules import parameter_count

if TYPE_CHECKING:
    from stillroom.recipe import Recipe

IN_MEMORY = "(in memory)"
"""Stands in a recipe for a teacher, a student or data that were given as objects."""
COLUMNS = 8
"""Samples in a row of a sample grid."""
NOTHING: Mapping[str, Any] = MappingProxyType({})
SIDE_FILE = "stillroom.json"
Runner = Callable[..., tuple[Tensor, ...]]
"""An exported file as its own runtime opens it: tensors in by position, tensors out."""
FileJudge = Callable[[Runner], dict[str, float]]
"""A file's scores by key."""


# --- what is shown ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Rows:
    """Something of a model's to look at, row by row. names: of the rows. images: ``[rows, columns, C, H, W]`` in
    [-1, 1]; None where there are no pictures. texts: lines of text for each row instead."""

    names: Sequence[str] = ()
    images: Tensor | None = None
    texts: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Card:
    """A task's part of the model card. makes: the sentence of what the student is. use: lines of Python after
    ``student = sr.load(...)``; where ``alone`` says what else is needed, all of the lines. hub_library, tag: as
    model hubs call them (empty: they have no name for it). front: more of the front matter. before_scores,
    after_scores: lines of Markdown there."""

    makes: str
    use: Sequence[str]
    hub_library: str = ""
    tag: str = ""
    kind: str = ""  # of the task in the model index, where hubs have no tag
    alone: str = ""
    front: Mapping[str, Any] = field(default_factory=dict)
    before_scores: Sequence[str] = ()
    after_scores: Sequence[str] = ()


@dataclass
class Part:
    """One file of an export. module: called with tensors by position. inputs, outputs: their names, in order. example:
    ``(batch, generator)`` to random inputs. axes: input -> {axis: name} of axes of any length besides the first.
    reference: what the file must answer as, where that is not ``module`` itself."""

    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    example: Callable[[int, torch.Generator], tuple[Tensor, ...]]
    axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    reference: Callable[..., Any] | None = None

    @property
    def kind(self) -> str:
        """Class of the network inside."""
        network = self.module
        while isinstance(inner := getattr(network, "network", None), nn.Module):
            network = inner
        return type(network).__name__

    @torch.no_grad()
    def eager(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the model itself answers."""
        output = (self.reference or self.module)(*inputs)
        return (output,) if isinstance(output, Tensor) else tuple(output)


# --- the finished model -----------------------------------------------------------------------------------------------
class Model:
    """A finished model. A subclass has :meth:`holds`, :meth:`load`, :meth:`save` and a verb of its own (``sample``,
    ``classify``, ...), and says how one call of it is timed (:meth:`call`).

    task: name of the task whose finished models are of this class. noun: what such a model is called. does: "this model
    ..." in words. usage: the Python call that does it, for whoever asks for something else. asked_by: what `stillroom
    sample` takes: ``labels``, ``captions``, or nothing.
    """

    task: ClassVar[str] = ""
    noun: ClassVar[str] = "a model"
    does: ClassVar[str] = "draws nothing"
    usage: ClassVar[str] = "stillroom.load(DIR)"
    asked_by: ClassVar[str] = ""
    int8: ClassVar[bool] = False  # whether a quantised export makes sense
    sampler: Sampler

    # --- folders --------------------------------------------------------------------------------------------------
    @classmethod
    def holds(cls, folder: Path) -> bool:
        """Whether a folder without a ``stillroom.json`` that names a task holds such a model."""
        return False

    @property
    def reloads(self) -> bool:
        """Whether :meth:`load` reads what :meth:`save` writes of this network."""
        return True

    @classmethod
    def load(cls, folder: str | Path) -> Model:
        """Read a folder. Raises UserError for a missing, incomplete or damaged one, naming the file."""
        raise NotImplementedError

    def save(self, folder: str | Path, **extra: Any) -> None:
        """Write the folder; ``extra`` entries go into its ``stillroom.json``."""
        raise NotImplementedError

    def join(self, others: Sequence[Model]) -> Model:
        """One model of this and others that were trained apart, each for its part. Raises UserError where they are none
        of these."""
        raise UserError(f"{self.noun} is no part of several", cure="give students that were trained apart (msd)")

    # --- costs ----------------------------------------------------------------------------------------------------
    def brief(self) -> Model:
        """A twin that answers with the least work, to see that it does. Default: the model itself."""
        return self

    @property
    def module(self) -> nn.Module:
        """The network whose parameters count."""
        return self.network  # type: ignore[attr-defined]

    @property
    def nfe(self) -> int:
        """Network evaluations for one answer."""
        return self.sampler.nfe

    @property
    def parameters(self) -> int:
        return parameter_count(self.module)

    @property
    def flops(self) -> float:
        """Floating-point operations of one answer, roughly."""
        return 2.0 * self.parameters * self.nfe

    # --- looked at ------------------------------------------------------------------------------------------------
    def rows(self, asked: Sequence[str] = (), n: int = COLUMNS, seed: int = 0) -> Rows:
        """``n`` answers for each thing that is asked for (by default one of each kind), to look at. Raises UserError
        for a model that has none."""
        raise UserError(f"this model {self.does}", cure=self.usage)

    def away(self, negative: str, scale: float | None = None) -> Self:
        """A twin whose answers are steered away from what a text names, inside the network's cross-attention, at one
        pass a step (:mod:`stillroom.surgery.negatives`). scale: by default the model's own; 0 leaves every bit as it
        is. Raises UserError for a model that has no cross-attention, naming it."""
        raise UserError(f"this model {self.does}, and takes no negative text", cure="leave --negative away")

    # --- other runtimes -------------------------------------------------------------------------------------------
    def parts(self, whole: bool = False, size: tuple[int, int] | None = None) -> dict[str, Part]:
        """File stem -> part, for an export. whole: the whole of a one-step generator too. size: (height, width) of
        images, for models whose config does not say. Raises UserError for what cannot be exported."""
        raise UserError(
            f"a {type(self).__name__} cannot be exported", cure="give a student of stillroom, or its folder"
        )

    def export_facts(self) -> dict[str, Any]:
        """What ``export.json`` says of this model beside its files."""
        return {}

    def export_extras(self, folder: Path) -> None:
        """Write what the exported files need beside them (a tokenizer)."""

    def test_data(self, name: str) -> Any:
        """The labelled test split of this data set, which :meth:`judge` takes; None for models that no labels judge.
        Raises UserError where it cannot be read."""
        return None

    def judge(self, data: str, test: Any) -> FileJudge:
        """What scores an exported file on labelled data. data: the name that :meth:`test_data` was given. test: what it
        gave."""
        raise NotImplementedError


# --- the task ---------------------------------------------------------------------------------------------------------
class Task:
    """What a run is about. One object serves one run; :meth:`load` comes first.

    name: set by :func:`task`. serves: other tasks' names that methods may ask for and that this one can stand in for,
    where :meth:`takes` the teacher. model: the class of its finished models. things: what the data hold, in words.
    data_names: of data that it knows, those of other tasks are refused. objects: of which classes a ``teacher``,
    ``student`` or ``data`` must be that is given as an object; what is not in it is not checked. several: whether a
    list of teachers may be given.
    data: what the trainer reads. origin: where it came from. made: teachers that the method itself trained. folders: of
    teachers that were read from one, where scores may lie that were measured earlier.
    """

    name: ClassVar[str]
    serves: ClassVar[tuple[str, ...]] = ()
    model: ClassVar[type[Model]]
    things: ClassVar[str] = "images"
    timed: ClassVar[tuple[int, ...]] = (1, 32)  # batch sizes
    data_names: ClassVar[tuple[str, ...]] = ()
    objects: ClassVar[Mapping[str, tuple[type, ...]]] = NOTHING
    several: ClassVar[bool] = False
    data: Any
    origin: str

    def __init__(self) -> None:
        self.made: Mapping[str, nn.Module] = {}
        self.folders: dict[str, Path] = {}

    @classmethod
    def takes(cls, teacher: Any) -> bool:
        """Whether this teacher, by name or as an object, is of this task's kind. Asked of tasks that stand in for
        another."""
        return False

    @classmethod
    def reads(cls, folder: Path) -> bool:
        """Whether what lies in a folder may be a teacher or a student. Default: a model of this task's class, or what
        neither a task nor transformers knows."""
        found = find_model_class(folder)
        return not architecture(folder) if found is None else issubclass(found, cls.model)

    def check_kinds(self, recipe: Recipe, given: Mapping[str, Any] = NOTHING) -> None:
        """Raises UserError for a teacher, a student or data of another kind than this task's, named or given. Comes
        before :meth:`load`."""
        refuse_public(recipe, given)
        for who, thing in given.items():
            listed = who == "teacher" and self.several and isinstance(thing, list | tuple)
            for one in thing if listed else [thing]:
                check_object(who, one, self.objects.get(who, (object,)), recipe.method)
        if "data" not in given:
            self._check_source(recipe)
        for who, names in (("teacher", recipe.teacher), ("student", recipe.student)):
            for name in [names] if Path(names).exists() else map(str.strip, names.split(",")):
                folder = None if who in given else _named_folder(name)
                if folder is not None and not self.reads(folder):
                    fit = [name for name in SHIPPED if self.reads(model_folder(name))]
                    raise UserError(
                        f"{who} {name!r} {_described(folder)}; {recipe.method} takes {self.model.noun} "
                        f"(task {self.name})",
                        cure="name one by its folder or run" + (f", or one of: {', '.join(fit)}" if fit else ""),
                    )

    def _check_source(self, recipe: Recipe) -> None:
        """Raises UserError for the name of another task's data."""
        if not self.data_names or recipe.data in self.data_names or Path(recipe.data).exists():
            return
        others = [cls for cls in tasks().values() if recipe.data in cls.data_names]
        if others:
            raise UserError(
                f"data {recipe.data!r} are {others[0].things} for task {others[0].name}; {recipe.method} reads "
                f"{self.things} (task {self.name})",
                cure=f"give a folder or file of {self.things}, or one of: {', '.join(self.data_names)}",
            )

    # --- before the training --------------------------------------------------------------------------------------
    def load(self, recipe: Recipe, given: Mapping[str, Any] = NOTHING) -> None:
        """Read student, teachers and data and check that they fit together. Writes nothing into the run's folder.

        given: ``teacher``, ``student``, ``data``: objects to use instead of those that the recipe names. Raises
        UserError.
        """
        raise NotImplementedError

    def sketch(self, recipe: Recipe, given: Mapping[str, Any] = NOTHING) -> None:
        """Like :meth:`load`, for a plan: networks have no weights (:func:`~stillroom.surgery.skeleton.weights_unread`),
        and what networks would have to compute of the data has the right shapes alone."""
        self.load(recipe, given)

    def given(self) -> Mapping[str, Any]:
        """What a method's ``build`` may ask for, by name: ``teacher`` (where there is one), ``teachers`` (a list),
        ``student``, ``space``, ``classes``."""
        raise NotImplementedError

    def check(self, method: Any) -> None:
        """Raises UserError where the built method does not fit this task. Default: it does."""

    # --- after the training ---------------------------------------------------------------------------------------
    def student(self, network: nn.Module, sampler: Sampler) -> Model:
        """The trained network as a finished model."""
        raise NotImplementedError

    def teachers(self) -> Mapping[str, Model]:
        """The teachers by the name that tables and files call them."""
        raise NotImplementedError

    def rows(self, model: Model, seed: int, most: int = 80) -> Rows:
        """Samples to look at. most: how many pictures may be drawn for them."""
        return model.rows(seed=seed)

    def call(self, model: Model, batch: int) -> Any:
        """One typical call of the model's verb on ``batch`` inputs, to be timed."""
        raise NotImplementedError

    def brief_call(self, model: Model) -> Any:
        """The least call that shows that the model works, before a run begins. Default: for one input."""
        return self.call(model.brief(), 1)

    def cost(self, model: Model) -> dict[str, Any]:
        """``latency_ms`` (median of as many calls as a second holds, by batch size), ``latency_calls``, and ``macs``
        for one input."""
        from stillroom.evaluation import cost

        found: dict[str, Any] = {"latency_ms": {}, "latency_calls": {}}
        for batch in self.timed:
            milliseconds, calls = cost.median_ms(lambda batch=batch: self.call(model, batch))
            found["latency_ms"][str(batch)] = round(milliseconds, 3)
            found["latency_calls"][str(batch)] = calls
        return found | {"macs": cost.macs(lambda: self.call(model, 1))}

    def facts(self, recipe: Recipe, student: Model) -> dict[str, Any]:
        """More that ``result.json`` is to say of the run, for the report and the card."""
        return {}

    def brief_scores(self, recipe: Recipe, student: Model, bench: Any = None) -> None:
        """Raises what :meth:`scores` would raise, as far as that is known before the run begins. Default: the bench is
        asked."""
        if bench is not None:
            bench.try_out(student)

    def scores(self, recipe: Recipe, everyone: Mapping[str, Model], bench: Any = None) -> dict[str, Any]:
        """``{"scores": {who: {key: value}}, "metrics": [Score.to_dict()], "bench": {"n", "reference"}}``, or nothing
        where nothing can be measured. Default: what the bench says."""
        if bench is None:
            return {}
        return bench.compare(everyone, recipe.evaluate.n, recipe.evaluate.seed, self.folders)

    # --- in words -------------------------------------------------------------------------------------------------
    @classmethod
    def card(cls, recipe: Recipe, result: Mapping[str, Any]) -> Card:
        """This task's part of the model card, from the run's recipe and result."""
        taught = " and ".join(f"`{name}`" for name in (recipe.teacher or recipe.student).split(","))
        return Card(makes=f"A student of {taught}", use=[cls.model.usage.replace("stillroom.load(DIR)", "student")])

    @classmethod
    def report_part(cls) -> Path | None:
        """The template of this task's own part of the report, beside the class; None where it has none."""
        path = Path(sys.modules[cls.__module__].__file__ or "").parent / "report.html"
        return path if path.is_file() else None


def check_object(who: str, thing: Any, wanted: tuple[type, ...], method: str) -> None:
    """Raises UserError for an object of none of these classes."""
    if not isinstance(thing, wanted):
        names = [f"{'torch.nn' if cls is nn.Module else cls.__module__}.{cls.__qualname__}" for cls in wanted]
        raise UserError(
            f"{who} is an object of class {type(thing).__name__}, which {method} cannot use as its {who}",
            cure=f"give the name or folder of one, or an object of class {' or '.join(names)}",
        )


def _named_folder(name: str) -> Path | None:
    """Where a model of this name lies; None where there is no such folder."""
    folder, _ = sized(name)
    return model_home(folder) if folder.is_dir() or name in SHIPPED else None


def _described(folder: Path) -> str:
    found = find_model_class(folder)
    return f"is {found.noun} (task {found.task})" if found else f"holds a {architecture(folder)} of transformers"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def sheet(rows: int, columns: int, most: int) -> tuple[int, int]:
    """Rows and columns of a sheet of at most ``most`` pictures, one at least: columns go first."""
    columns = max(1, min(columns, most // max(rows, 1)))
    return max(1, min(rows, most // columns)), columns


def told(scores: Iterable[Score], values: Mapping[str, Mapping[str, Any]], **bench: Any) -> dict[str, Any]:
    """What :meth:`Task.scores` gives, from the scores that are shown and each model's values."""
    shown = [score.to_dict() for score in scores]
    return {"bench": bench, "metrics": shown, "scores": {who: dict(found) for who, found in values.items()}}


# --- registry ---------------------------------------------------------------------------------------------------------
_TASKS: Registry[type[Task]] = Registry("task", "tasks", "stillroom.tasks", inside="task")


def task(name: str) -> Callable[[type[Task]], type[Task]]:
    """Class decorator: make a task known by its name."""

    def add(cls: type[Task]) -> type[Task]:
        cls.name = name
        if not cls.model.task:
            cls.model.task = name
        return _TASKS.add(name, cls)

    return add


def tasks() -> dict[str, type[Task]]:
    """All known tasks by name: stillroom's own and those that installed packages offer as ``stillroom.tasks``."""
    return _TASKS.known()


def get_task(name: str) -> type[Task]:
    """A task by its name. Raises UserError for an unknown one, naming the nearest."""
    return _TASKS.get(name)


def make_task(name: str, teacher: Any = "") -> Task:
    """A new task of this name, or of one that stands in for it and takes this teacher (by name, or an object)."""
    found = get_task(name)
    stand_ins = (cls for cls in tasks().values() if name in cls.serves and cls.takes(teacher))
    return next(stand_ins, found)()


def trained_teacher(name: str, data: str) -> nn.Module | None:
    """A network that a bench trains on these data on first use, by name; None for a name that no bench has."""
    return importlib.import_module("stillroom.bench").trained_teacher(name, data)


# --- models by folder -------------------------------------------------------------------------------------------------
def model_home(name: str | Path) -> Path:
    """Where a model lies: a shipped one by name, a model folder, or what a run has finished. Raises UserError for a
    name that is none, for links that lead out of the folder, and for a run without a student."""
    folder = model_folder(name)
    stay_inside(folder)
    if not (folder / "recipe.yaml").is_file():
        return folder
    if not (folder / "student").is_dir():
        raise UserError(f"run {folder} has no student yet", cure=f"finish it: stillroom run --resume {folder}")
    return folder / "student"


def find_model_class(folder: Path) -> type[Model] | None:
    """The class of the model in a folder: of whichever task its ``stillroom.json`` names, or else its files show. None
    where there is no model."""
    side = read_json(folder / SIDE_FILE) if (folder / SIDE_FILE).is_file() else {}
    known = tasks()
    if (named := str(side.get("task"))) in known:
        return known[named].model
    return next((cls.model for cls in known.values() if cls.model.holds(folder)), None)


def model_class(folder: Path) -> type[Model]:
    """As :func:`find_model_class`. Raises UserError where there is no model."""
    if (found := find_model_class(folder)) is not None:
        return found
    if not folder.is_dir():
        raise UserError(
            f"model folder {folder} does not exist",
            cure=f"give a run, a folder that diffusers or transformers loads, or one of: {', '.join(SHIPPED)}",
        )
    named = architecture(folder)
    what = f"a {named}, which is no finished model" if named else "no model"
    raise UserError(f"{folder} holds {what}", cure="give a folder that diffusers or transformers loads, or a run")


def load_model(name: str | Path) -> Model:
    """The finished model of a run, in a model folder, or a shipped one by name. Raises UserError."""
    folder = model_home(name)
    return model_class(folder).load(folder)


def sample_rows(model: Model, labels: Sequence[str], captions: Sequence[str], n: int, seed: int) -> Rows:
    """``n`` samples for each label or caption, by default for one of each kind. Raises UserError for a model that is
    asked for the other, or draws nothing."""
    given = {"labels": labels, "captions": captions}
    wrong = [name for name, values in given.items() if values and name != model.asked_by]
    if wrong and model.asked_by:
        draws = {"labels": "classes", "captions": "captions"}
        raise UserError(
            f"this model draws {draws[model.asked_by]}, not {draws[wrong[0]]}", cure=f"give --{model.asked_by}"
        )
    return model.rows(given.get(model.asked_by, ()), n, seed)
