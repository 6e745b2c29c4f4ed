"""The command line: a thin shell over the library. Nothing heavy is imported before a command runs.

Exit codes: 0 done; 1 training diverged, or ``doctor`` found something wrong; 2 bad input; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from stillroom.arguments import parse
from stillroom.errors import TrainingDiverged, UserError
from stillroom.files import refusal, stay_inside, write

if TYPE_CHECKING:
    from stillroom.recipe import Recipe

RUNS = Path("runs")

_Text = Annotated[str | None, arg(metavar="TEXT")]
_Number = Annotated[int | None, arg(metavar="N")]


@dataclass(frozen=True)
class Run:
    """Distil a teacher into a student; without arguments, the default recipe (and again: carries on or shows it)."""

    recipe: Annotated[Positional[str], arg(metavar="RECIPE", help_behavior_hint="")] = ""
    """A method or shipped recipe by name, or a .yaml file."""
    overrides: Annotated[Positional[tuple[str, ...]], arg(metavar="KEY=VALUE ...", help_behavior_hint="")] = ()
    """Recipe keys to change, e.g. engine.batch=64 options.gan_weight=0."""
    teacher: _Text = None
    """A shipped teacher by name, or a model folder; several by commas."""
    student: _Text = None
    """What is trained: a network by name, a model folder, or a run; by default a copy of the teacher."""
    data: _Text = None
    """A data set by name, or a folder of images."""
    steps: _Number = None
    """Training steps (engine.steps)."""
    seed: _Number = None
    """Seed of everything random (engine.seed)."""
    name: _Text = None
    """Name of the run's folder under runs/."""
    resume: Annotated[Path | None, arg(metavar="RUN")] = None
    """Carry on an interrupted run with its own recipe."""

    def __call__(self) -> int:
        from stillroom.recipe import Recipe

        named = {"teacher": self.teacher, "student": self.student, "data": self.data, "name": self.name}
        given = named | {"engine.steps": self.steps, "engine.seed": self.seed}
        bare = not (self.recipe or self.overrides or any(value is not None for value in given.values()))
        if self.resume is not None:
            if not bare:
                raise UserError("a resumed run keeps its own recipe", cure="give --resume RUN and nothing else")
            folder = _run_folder(self.resume)
            if not (folder / "recipe.yaml").is_file():
                raise UserError(f"{folder} is no run folder: it has no recipe.yaml", cure=_listing(RUNS))
            return _run(Recipe.load(folder), folder, resume=True)
        recipe = _recipe(self.recipe, self.overrides, given)
        folder = RUNS / recipe.name
        return _run_again(recipe, folder) if bare else _run(recipe, folder, resume=False)


def _recipe(source: str, overrides: Sequence[str], given: Mapping[str, Any]) -> Recipe:
    """The recipe that a command names, by default the default one, with what its arguments change."""
    from stillroom.recipe import DEFAULT, Recipe

    if empty := [key for key in ("teacher", "data", "name") if given.get(key) == ""]:
        raise UserError(f"--{empty[0]} is empty", cure="give it a value, or leave it out")
    if "=" in source:
        source, overrides = "", [source, *overrides]
    return Recipe.load(source or DEFAULT, overrides, **{key: v for key, v in given.items() if v is not None})


def _run(recipe: Recipe, folder: Path, resume: bool) -> int:
    from stillroom.run import run

    if run(recipe, folder, resume).report is not None:
        _show(folder)
    return 0


def _run_again(recipe: Recipe, folder: Path) -> int:
    """``stillroom run`` alone may be typed any number of times: it starts, carries on, or shows what is there."""
    from stillroom.recipe import Recipe
    from stillroom.report.log import is_finished

    if not (folder / "recipe.yaml").is_file() or Recipe.load(folder).hash() != recipe.hash():
        return _run(recipe, folder, resume=False)
    if not is_finished(folder):
        return _run(recipe, folder, resume=True)
    print(f"{folder} is already finished:")
    _show(folder)
    return 0


def _show(folder: Path) -> None:
    from rich.console import Console

    from stillroom.report.log import read_result
    from stillroom.report.rows import in_one_line
    from stillroom.report.tables import comparison

    console = Console()
    if first := in_one_line(read_result(folder)):
        console.print(first, highlight=False, markup=False)
    console.print(comparison([folder]))
    console.print(f"student  {folder / 'student'}\nreport   {folder / 'report.html'}", highlight=False)


@dataclass(frozen=True)
class Plan:
    """Say what a recipe takes before it is run: memory and operations of each turn, and what to change."""

    recipe: Annotated[Positional[str], arg(metavar="RECIPE", help_behavior_hint="")] = ""
    """A method or shipped recipe by name, or a .yaml file."""
    overrides: Annotated[Positional[tuple[str, ...]], arg(metavar="KEY=VALUE ...", help_behavior_hint="")] = ()
    """Recipe keys to change, e.g. engine.batch=64 engine.parallel=fsdp."""
    teacher: _Text = None
    """A shipped teacher by name, or a model folder; weights are not read."""
    student: _Text = None
    """What is trained: a network by name, a model folder, or a run; by default a copy of the teacher."""
    data: _Text = None
    """A data set by name, or a folder of images."""
    world: Annotated[int, arg(metavar="N")] = 1
    """Processes, of one device each; engine.parallel says how they share the work."""
    memory: Annotated[str, arg(metavar="SIZE", help_behavior_hint="")] = ""
    """Memory of one device, e.g. 24GB or 80GiB: where it is too little, the plan says what to change."""
    json: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print JSON, in bytes, instead of a table."""

    def __call__(self) -> int:
        named = {"teacher": self.teacher, "student": self.student, "data": self.data}
        recipe = _recipe(self.recipe, self.overrides, named)
        from stillroom.planning import plan, turns_table, verdict

        found = plan(
            recipe, world=self.world, memory=self.memory or 0, report=lambda line: print(line, file=sys.stderr)
        )
        if self.json:
            import json

            print(json.dumps(found.to_dict(), indent=2))
            return 0
        from rich.console import Console

        (Console() if sys.stdout.isatty() else Console(width=160)).print(turns_table(found))
        print(*verdict(found), sep="\n")
        return 0


@dataclass(frozen=True)
class Prove:
    """Train a method and the baselines its paper argues against; check the paper's claims."""

    methods: Annotated[Positional[tuple[str, ...]], arg(metavar="METHOD ...")]
    """Methods by name."""
    seeds: Annotated[tuple[int, ...], arg(metavar="N ...")] = (0, 1, 2)
    """One training per arm and seed."""
    level: Literal["mechanism", "image", "text", "all"] = "all"
    """Tiny worlds (seconds), real images or texts (minutes), or all that a method has."""
    jobs: Annotated[int, arg(metavar="N")] = 1
    """Trainings at the same time."""

    def __call__(self) -> int:
        if not self.methods:
            raise UserError("no method to prove was named", cure="for example `stillroom prove dmd2`")
        if not self.seeds or min(self.seeds) < 0:
            raise UserError(f"--seeds must be whole numbers from 0, got {' '.join(map(str, self.seeds)) or 'none'}")
        if self.jobs < 1:
            raise UserError(f"--jobs must be at least 1, got {self.jobs}")
        from stillroom.method import get_method

        for slug in self.methods:
            get_method(slug)
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        from stillroom.proofs.runner import prove, table

        for result in prove(self.methods, self.seeds, self.level, self.jobs, report=print):
            shown = Table("claim", "arm", "value", "cost", "verdict", header_style="bold", title=result["method"])
            for row in table(result):
                shown.add_row(*(Text(cell) for cell in row))
            Console().print(shown)
        return 0


@dataclass(frozen=True)
class Compare:
    """Finished runs side by side: quality, speed, size, training cost."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN ...")]
    """Run folders, or their names under runs/."""

    def __call__(self) -> int:
        if not self.runs:
            raise UserError("no runs to compare were named", cure=_listing(RUNS))
        from rich.console import Console

        from stillroom.report.tables import comparison

        Console().print(comparison([_run_folder(run) for run in self.runs]))
        return 0


@dataclass(frozen=True)
class Sample:
    """Draw images from a student or a teacher into one PNG."""

    model: Annotated[Positional[Path], arg(metavar="DIR")]
    """A student or teacher folder, a run, or a shipped model: fashion, scenes-sd3, scenes-sd3-large, scenes-pixart,
    lightgen."""
    labels: Annotated[tuple[str, ...], arg(metavar="LABEL ...")] = ()
    """Classes by number or name; by default every class."""
    captions: Annotated[tuple[str, ...], arg(metavar="TEXT ...")] = ()
    """What to draw, for a model that understands words; by default one caption of each kind."""
    n: Annotated[int, arg(metavar="N")] = 8
    """Images per class or caption."""
    negative: _Text = None
    """What the images must not show, for a model with cross-attention: one pass, no second one for guidance."""
    negative_scale: Annotated[float | None, arg(metavar="A")] = None
    """How hard they are steered away from it; by default the model's own scale, else 0.5."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Seed of the noise."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("samples.png")
    """Where the PNG goes."""

    def __call__(self) -> int:
        if self.n < 1:
            raise UserError(f"--n must be at least 1, got {self.n}")
        if self.seed < 0:
            raise UserError(f"--seed must be at least 0, got {self.seed}")
        if self.out.suffix.lower() != ".png":
            raise UserError(f"--out must end in .png, got {self.out}")
        if not self.out.absolute().parent.is_dir():
            raise UserError(
                f"--out: folder {self.out.parent} does not exist", cure="create it, or choose another place"
            )
        if self.out.is_dir() or not os.access(self.out.absolute().parent, os.W_OK):
            raise UserError(f"--out: {self.out} cannot be written", cure="choose another place")
        if self.negative_scale is not None and self.negative is None:
            raise UserError("--negative-scale has no text to steer away from", cure='add --negative "red"')
        from stillroom.report.images import save_grid
        from stillroom.task import load_model, sample_rows

        model = load_model(_model(self.model))
        if self.negative is not None:
            model = model.away(self.negative, self.negative_scale)
        found = sample_rows(model, self.labels, self.captions, self.n, self.seed)
        if found.images is not None:
            images = found.images
            write(self.out, lambda aside: save_grid(images, aside))
            print(self.out, *(f"  {name}" for name in found.names if self.captions or " " in name), sep="\n")
        for name, lines in zip(found.names, found.texts):
            print(name, *(f"  {line}" for line in lines), sep="\n")
        return 0


@dataclass(frozen=True)
class Join:
    """Put students that were trained apart, each for a part of the conditions (msd's options.only), into one model."""

    models: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN|DIR ...", help_behavior_hint="")] = ()
    """The runs, or their students' folders, one for each part."""
    out: Annotated[Path, arg(metavar="DIR")] = Path("joined")
    """Where the model goes."""

    def __call__(self) -> int:
        from stillroom.task import load_model

        if not self.models:
            raise UserError("nothing was named to join", cure="name the runs, one for each part")
        if self.out.exists():
            raise UserError(f"--out: {self.out} already exists", cure="choose another folder")
        first, *others = [load_model(_model(name)) for name in self.models]
        first.join(others).save(self.out)
        print(self.out)
        return 0


@dataclass(frozen=True)
class Export:
    """Write a finished model for another runtime; state its error and its speed against eager."""

    model: Annotated[Positional[str], arg(metavar="RUN|DIR|NAME")]
    """A run, a student's folder, or a shipped model by name."""
    to: Literal["onnx", "openvino", "torch"] = "onnx"
    """ONNX, OpenVINO's IR, or torch.export's .pt2."""
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder of the files; by default exports/NAME-TO."""
    int8: Annotated[bool, arg(help_behavior_hint="")] = False
    """Also a quantised file of a classifier or encoder (onnx), with its test scores before and after."""
    whole: Annotated[bool, arg(help_behavior_hint="")] = False
    """Also the whole of a one-step generator, from noise and conditions to images."""
    data: _Text = None
    """Labelled data for the scores and the size of images; by default the run's."""
    force: Annotated[bool, arg(help_behavior_hint="")] = False
    """Replace an older export."""

    def __call__(self) -> int:
        from rich.console import Console

        from stillroom.exports import export_model
        from stillroom.report.tables import export_table

        made = export_model(
            _model(self.model), self.to, self.out, int8=self.int8, whole=self.whole, data=self.data, force=self.force
        )
        Console().print(export_table(made.facts))
        print(made.folder)
        return 0


@dataclass(frozen=True)
class Report:
    """Write a run's report.html anew from what lies in its folder."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """A run folder, or its name under runs/."""

    def __call__(self) -> int:
        from stillroom.report import write_report

        print(write_report(_run_folder(self.run)))
        return 0


@dataclass(frozen=True)
class Methods:
    """List the methods; with a name, its paper and options."""

    method: Annotated[Positional[str], arg(metavar="METHOD", help_behavior_hint="")] = ""
    """A method by name."""

    def __call__(self) -> int:
        from rich.console import Console

        if not self.method:
            from stillroom.catalogue import methods_table

            Console().print(methods_table())
            return 0
        from stillroom.report.tables import options_table

        Console().print(options_table(self.method))
        return 0


@dataclass(frozen=True)
class Bench:
    """Print the card of a bench: data, teacher, metrics, floor."""

    name: Annotated[Positional[str], arg(metavar="NAME")] = "fashion"
    """A bench by name; mnist, or a folder of 28x28 grey images in classes."""

    def __call__(self) -> int:
        from stillroom.bench import bench_card

        print(bench_card(self.name))
        return 0


@dataclass(frozen=True)
class Teach:
    """Train a bench's teacher from its data, or a network that the bench itself needs."""

    name: Annotated[Positional[str], arg(metavar="NAME")] = "fashion"
    """fashion, ring, pair, scenes-sd3, scenes-sd3-large, scenes-pixart; scenes-space (codec and text encoder),
    scenes-parser."""
    overrides: Annotated[Positional[tuple[str, ...]], arg(metavar="KEY=VALUE ...", help_behavior_hint="")] = ()
    """Recipe keys to change, e.g. engine.steps=1000."""
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder of the finished teacher; by default runs/teach-NAME/teacher."""
    resume: Annotated[bool, arg(help_behavior_hint="")] = False
    """Carry on an interrupted training."""

    def __call__(self) -> int:
        from stillroom.bench.teach import teach

        folder = RUNS / f"teach-{self.name}"
        out = self.out or folder / "teacher"
        teach(self.name, out, list(self.overrides), run_dir=folder, resume=self.resume)
        print(out)
        return 0


@dataclass(frozen=True)
class Synthesize:
    """Let teachers draw captions into a store: data to distil from. Under torchrun the processes share the work."""

    teachers: Annotated[tuple[str, ...], arg(metavar="TEACHER ...")] = ()
    """Shipped models (scenes-sd3, scenes-sd3-large, scenes-pixart), model folders, folders of images with captions; or
    NAME=DIR."""
    captions: Annotated[str, arg(metavar="SOURCE", help_behavior_hint="")] = ""
    """A text file with a caption per line, a .jsonl or .csv table, or scenes:N; by default those of the folders."""
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder of the store."""
    seeds: Annotated[tuple[int, ...], arg(metavar="N ...")] = (0,)
    """Each caption is drawn once per seed."""
    route: Literal["one", "all", "round-robin"] = "one"
    """One teacher for each caption, all of them, or the teachers in turn."""
    filters: Annotated[tuple[str, ...], arg(metavar="FILTER ...")] = ("readable",)
    """What must be passed: readable, parser, dedup, or a plug-in's; NAME=THRESHOLD sets a threshold."""
    guidance: Annotated[float | None, arg(metavar="W")] = None
    """Guidance scale of the models; by default their own."""
    steps: _Number = None
    """Sampling steps of the models; by default their own."""
    size: Annotated[int, arg(metavar="PIXELS")] = 0
    """Crop and resize images of another size to this square; 0 takes them as they are."""
    shard_size: Annotated[int, arg(metavar="N")] = 1000
    """Images per shard, the most that an interruption can cost."""
    batch: Annotated[int, arg(metavar="N")] = 64
    """Images drawn at once."""
    resume: Annotated[bool, arg(help_behavior_hint="")] = False
    """Carry on an interrupted synthesis."""

    def __call__(self) -> int:
        if not self.teachers:
            raise UserError("no teachers were named", cure="for example --teachers scenes-sd3 scenes-pixart")
        if self.out is None:
            raise UserError("no folder for the store was named", cure="give --out DIR")
        named = {given: given.rpartition("=") for given in self.teachers}
        teachers = {name or Path(folder).name: folder for name, _, folder in named.values()}
        if len(teachers) < len(self.teachers):
            raise UserError("two teachers have one name", cure="name them: --teachers A=DIR B=DIR")
        from rich.console import Console

        from stillroom.engine.distributed import World
        from stillroom.synthesis import synthesize

        world, changed = World.join("auto"), {"guidance": self.guidance, "steps": self.steps}
        made = synthesize(
            teachers, self.captions or None, self.out, seeds=self.seeds, route=self.route, filters=self.filters,
            shard_size=self.shard_size, batch=self.batch, size=self.size, resume=self.resume, world=world,
            settings={key: value for key, value in changed.items() if value is not None},
        )  # fmt: skip
        world.leave()
        if world.first:
            Console().print(made.table())
            print(made.headline)
        return 0


@dataclass(frozen=True)
class Demo:
    """Open a web page, for this machine only, on which student and teachers draw side by side."""

    model: Annotated[Positional[str], arg(metavar="RUN|DIR|NAME", help_behavior_hint="")] = "lightgen"
    """The student: a run (runs/lightgen by default), a model folder, or a shipped model by name."""
    teachers: _Text = None
    """Other models, separated by commas; by default those that it learned from."""
    port: _Number = None
    """Port on 127.0.0.1; by default the first free one from 7860."""

    def __call__(self) -> int:
        from stillroom.demo.server import serve

        named = None if self.teachers is None else filter(None, map(str.strip, self.teachers.split(",")))
        serve(_model(self.model), None if named is None else [_model(name) for name in named], self.port)
        return 0


@dataclass(frozen=True)
class Doctor:
    """Say what looks wrong in a run, finished or not, and what to try."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """A run folder, or its name under runs/."""

    def __call__(self) -> int:
        from rich.console import Console
        from rich.text import Text

        from stillroom.report.doctor import examine

        findings = examine(_run_folder(self.run))
        colours = {"wrong": "bold red", "doubtful": "yellow", "well": "green"}
        for finding in findings:
            head = Text.assemble((f"{finding.level:>8}", colours[finding.level]), f"  {finding.what}")
            Console(soft_wrap=True).print(head)
            if finding.advice:
                Console(soft_wrap=True).print(Text(f"          try: {finding.advice}", style="dim"))
        return 1 if any(finding.level == "wrong" for finding in findings) else 0


COMMANDS = (Run, Plan, Prove, Compare, Sample, Join, Export, Report, Methods, Bench, Teach, Synthesize, Demo, Doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. ``argv`` defaults to the process's arguments."""
    try:
        return parse(COMMANDS, list(sys.argv[1:] if argv is None else argv))()
    except UserError as error:
        rank = f" [rank {os.environ['RANK']}]" if os.environ.get("RANK", "0") != "0" else ""
        print(f"stillroom{rank}: {error}", file=sys.stderr)
        return 1 if isinstance(error, TrainingDiverged) else 2
    except OSError as error:
        if (refused := refusal(error)) is None:
            raise
        print(f"stillroom: {refused}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"stillroom: {stop or 'interrupted'}", file=sys.stderr)
        return 130


# --- names ------------------------------------------------------------------------------------------------------------
def _model(name: str | Path) -> str:
    """A model as it was named; a run's name becomes its folder."""
    return str(RUNS / name if (RUNS / name / "recipe.yaml").is_file() else name)


def _run_folder(run: Path) -> Path:
    folder = run if run.is_dir() or run.is_absolute() or (RUNS / run).is_dir() is False else RUNS / run
    if not folder.is_dir():
        raise UserError(f"run folder {run} does not exist", cure=_listing(RUNS))
    if folder.is_symlink():
        raise UserError(f"run folder {folder} is a symbolic link", cure="name the folder that it leads to")
    stay_inside(folder)
    return folder


def _listing(runs: Path) -> str:
    names = sorted(path.parent.name for path in runs.glob("*/recipe.yaml"))
    return f"runs here: {', '.join(names)}" if names else f"there are no runs under {runs}/ here"
