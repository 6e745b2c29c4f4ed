"""Method, turn, stage, registry: the one abstraction to learn.

A :class:`Method` is an ``nn.Module`` that owns its networks and says, turn by turn, what is minimised. It holds no
optimizer, no device, no logging and no loop: the engine brings those. A method file reads like its paper's algorithm
box.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from stillroom.draws import Draws
from stillroom.errors import UserError, nearest
from stillroom.registry import Registry
from stillroom.surgery.freezing import frozen, unfrozen

__all__ = [
    "Batch", "Draws", "Method", "Optim", "Paper", "Parted", "Stage", "Target", "Terms", "Turn", "frozen", "get_method",
    "methods", "nearest", "option_fields", "register", "turn", "unfrozen",
]  # fmt: skip

if TYPE_CHECKING:
    from stillroom.diffusion.denoiser import Denoiser
    from stillroom.diffusion.process import Process
    from stillroom.diffusion.sampling import Sampler

Batch = Mapping[str, Any]
"""``{"x": [B, ...], "cond": {name: [B, ...]}}``; ``x`` is what the data hold: images, latents, vectors. A method reads
what it needs (image-free: ``cond`` only)."""


@dataclass(frozen=True)
class Parted:
    """A term that is ``now + later()``: a part that is there, and one of passes of its own, which waits."""

    now: Tensor
    later: Callable[[], Tensor]


Terms = Mapping[str, Tensor | Callable[[], Tensor] | Parted]
"""Named, already weighted scalar loss terms. The engine minimises their sum and logs each by name. A term of passes of
its own may be a function that makes it, and a term in two parts may have a second one that is such a function: it is
asked last, and the engine may have done with the rest by then."""


@dataclass(frozen=True)
class Paper:
    """Where a method was published."""

    title: str
    arxiv: str
    year: int
    venue: str = ""
    code: str = ""

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"


@dataclass(frozen=True)
class Optim:
    """A turn's optimizer as its paper states it; a recipe may override any field. Clips of 0 mean "off"."""

    lr: float = field(default=1e-4, metadata={"min": 0})
    name: Literal["adam", "adamw", "sgd", "adamw8bit"] = "adamw"
    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata={"min": 0, "below": 1})
    weight_decay: float = field(default=0.0, metadata={"min": 0})
    eps: float = field(default=1e-8, metadata={"above": 0})
    clip_norm: float = field(default=0.0, metadata={"min": 0, "cure": "0 switches it off"})
    clip_value: float = field(default=0.0, metadata={"min": 0, "cure": "0 switches it off"})
    # > 0: gradients are sanitised, nan -> 0 and +-inf -> +-this (SiD's rule)
    nan_to_num: float = field(default=0.0, metadata={"min": 0, "cure": "0 switches it off"})
    # share of the run's steps after which the turn rests and its networks stay as they are; 1: never
    until: float = field(default=1.0, metadata={"min": 0, "max": 1})


@dataclass(frozen=True)
class Turn:
    """One player's update inside a step.

    ``trains`` names the networks (attributes of the method) that move; all others are frozen while the turn runs. One
    that the method has set to None is left out. ``every`` is a period in steps: a number, or the name of an integer
    option; the turn runs at steps 0, every, 2*every, ... ``when`` names options (fields or properties of ``Options``)
    or attributes of the method: where one of them is zero, empty or False, the turn does not exist.
    """

    name: str
    trains: tuple[str, ...]
    every: int | str = 1
    optim: Optim = Optim()
    when: tuple[str, ...] = ()

    def period(self, method: Method) -> int:
        return int(getattr(method.options, self.every)) if isinstance(self.every, str) else self.every


@dataclass(frozen=True)
class Stage:
    """A run of steps with its own turns and share of the budget (``share`` of the recipe's steps, normalised).

    turns: the names of its turns, of those that there are; None: all. data: the part of the data that the stage reads
    (``data.parts[name]``); empty: the data itself; several names: batches hold one batch of each, by name. lr: factor
    on the learning rate of every turn. own_schedule: warm-up and schedule run over this stage alone, not over the
    whole run. fresh_optimizer: the optimizers forget their moments when the stage begins. kind, round: what the method
    knows the stage by; ``name`` is for people, and is the kind where none is given.
    """

    name: str
    turns: tuple[str, ...] | None = None
    share: float = 1.0
    data: str | tuple[str, ...] = ""
    lr: float = 1.0
    own_schedule: bool = False
    fresh_optimizer: bool = False
    kind: str = ""
    round: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", self.kind or self.name)


@dataclass(frozen=True)
class Target:
    """A network of the method that follows another one, whether turns train it as well or not: after each update of
    ``of``, ``w <- d w + (1 - d) w_of``.

    decay: d; 0 copies, 1 stays as it is. warm_up: ``d + (1 - d) (decay - d) / 2`` replaces d at every update, from 0 on
    (arXiv 2512.05150's code).
    """

    of: str
    decay: float = 0.999
    warm_up: bool = False

    def decay_after(self, last: float) -> float:
        """d of an update, from that of the update before it (0 where there was none)."""
        return last + (1 - last) * (self.decay - last) / 2 if self.warm_up else self.decay


def turn(
    trains: str | tuple[str, ...], every: int | str = 1, optim: Optim = Optim(), when: str | tuple[str, ...] = ()
) -> Callable[[Callable], Callable]:
    """Mark a method's function as a turn (:class:`Turn`). Turns of one step run in the order in which the class defines
    them."""

    def names(given: str | tuple[str, ...]) -> tuple[str, ...]:
        return (given,) if isinstance(given, str) else tuple(given)

    def mark(function: Callable) -> Callable:
        function.turn = Turn(function.__name__, names(trains), every, optim, names(when))  # type: ignore[attr-defined]
        return function

    return mark


class Method(nn.Module):
    """Base of all distillation methods. A subclass defines :class:`Options`, :meth:`build`, turns, :meth:`sampler`."""

    slug: ClassVar[str]
    paper: ClassVar[Paper]
    wing: ClassVar[str]
    health: ClassVar[Mapping[str, str]] = {}  # what each number that it notes is, with its formula
    blank_stores: ClassVar[bool] = False  # whether a plan may put zeros in the place of what options.stored keeps
    experts: ClassVar[bool] = False  # whether a teacher may be several networks, each asked at its own noise
    task: ClassVar[str] = "class-images"  # what a run reads, gives to build() and scores: a name of tasks/

    @dataclass
    class Options:
        """Every choice or ablation that the paper makes. Subclasses replace this."""

    # Set by the engine before each turn.
    step: int = 0
    progress: float = 0.0
    stage: Stage = Stage("train")
    draw: Draws

    def __init__(self, options: Any = None, lora: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.options = options if options is not None else self.Options()
        self.lora = dict(
            lora or {}
        )  # role name -> LoRA settings: that role becomes an adapter on the teacher's weights
        self.shared: dict[str, Any] = {}  # what this step (and micro-batch) has already made; emptied by the engine
        self.notes: dict[str, Tensor] = {}  # health numbers of the last turn
        self.weights: Mapping[str, Tensor] = {}  # of this micro-batch's means, by what they are taken over

    # --- what a method writes -------------------------------------------------------------------------------------
    def build(self, *args: Any, **kwargs: Any) -> None:
        """Make the networks. A method declares the things it wants as parameters, by the names that they have in every
        task: ``teacher`` (the one), ``teachers`` (all, a list), ``student`` (what is to be trained), ``space``,
        ``classes``; those that it can do without have a default. Called once, before the optimizers exist."""
        raise NotImplementedError

    def prepare(self, data: Any) -> None:
        """Calibration before training (probes, statistics). Default: nothing."""

    def stages(self) -> tuple[Stage, ...]:
        return (Stage("train"),)

    def fit(self, data: Any) -> None:
        """Training without gradients (closed forms, statistics, searches), called once, before the first step; a method
        without turns has this alone, and ``engine.steps: 0``. Default: nothing."""

    def enter(self, stage: Stage, data: Any, resumed: bool) -> Mapping[str, Tensor] | None:
        """Called when a stage begins: to take a reference copy, or to draw samples of the student as it stands.

        What it returns, tensors by name with one row for each row of the data, becomes part of the data that the stage
        reads: batches hold those rows beside their own. The run folder keeps it. Called with ``resumed`` when a run
        goes on inside the stage, weights and such data restored: what is neither must then be the same again. Default:
        nothing."""

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """How many things a turn's means are taken over, by name, where batches hold unequally many (tokens that are
        no padding): see :meth:`over`. Asked before a turn where its batch is split, with the turn's own draws. Default:
        rows alone, of which there are equally many."""
        return {}

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether an optimizer's weight decay acts on this parameter. Default: on all."""
        return True

    def finish(self, network: nn.Module) -> None:
        """Calibration after training (thresholds, mixing weights) of the network that becomes the student; called once,
        before :meth:`sampler`. Under several processes each calls it, with the same whole network. Default: nothing."""

    def rate(self, turn: Turn, name: str) -> float:
        """The factor on a turn's learning rate for the parameter of this name (layer-wise decay). Default: 1 for
        all."""
        return 1.0

    def teachers(self) -> Mapping[str, nn.Module]:
        """The teachers that the method holds, given or trained, by the names that tables call them. Default: its frozen
        networks."""
        return {name: child for name, child in self.named_children() if getattr(child, "is_frozen", False)}

    @classmethod
    def begins(cls, options: Any) -> Literal["given", "new", "teacher"]:
        """Whose weights the student begins with: its own, as they are given; new ones; in part its teacher's. Default:
        its own."""
        return "given"

    def sampler(self) -> Sampler:
        """How the finished student is run; saved beside its weights."""
        raise NotImplementedError

    @classmethod
    def also(cls, options: Any, process: Process) -> Mapping[str, Sampler]:
        """Other ways in which the finished student may be run, a denoiser of this process: by name, for the report,
        which shows them beside :meth:`sampler`'s. Default: none."""
        return {}

    # --- what a method uses ---------------------------------------------------------------------------------------
    def over(self, name: str, mean: Tensor) -> Tensor:
        """A micro-batch's mean over what :meth:`counts` calls ``name``, weighted by how many it has of them: the mean
        of these over micro-batches and processes is the mean over all."""
        return mean * self.weights[name] if name in self.weights else mean

    def note(self, name: str, value: Tensor) -> None:
        """Record a health number (detached scalar) for the log, one of those that ``health`` defines; it does not enter
        the loss."""
        self.notes[name] = value.detach()

    def clone(self, teacher: Denoiser, role: str, part: str = "") -> Denoiser:
        """A trainable copy of ``teacher``; a LoRA adapter on the teacher's weights where the recipe asks for one.
        part: which of several experts of the role it is; each has an adapter of its own.
        Raises UserError for adapters beside a frozen model, which are silent unless they are told a scale."""
        if getattr(teacher, "alone", False):
            raise UserError(
                f"{self.slug} trains all weights of its {role}, and this model is adapters beside a frozen one (agd's)",
                cure="give the model that they stand beside",
            )
        if isinstance(teacher.network, nn.ModuleDict):  # several experts: each becomes what one would
            routed: Any = teacher
            return routed.with_experts({name: self.clone(one, role, part) for name, one in routed.experts.items()})
        if role in self.lora:
            from stillroom.surgery.lora import lora_role

            return lora_role(teacher, f"{role}-{part}" if part else role, **self.lora[role])
        if hasattr(teacher.network, "lora_switch"):  # another role already lives on these weights
            from stillroom.surgery.lora import plain_copy

            return unfrozen(plain_copy(teacher))
        return unfrozen(copy.deepcopy(teacher))

    # --- what runs and the engine use -----------------------------------------------------------------------------
    def build_from(self, given: Mapping[str, Any]) -> None:
        """Call :meth:`build` with those of the ``given`` things that it names. Raises UserError for one that is missing
        and for several teachers where it takes one."""
        wanted = inspect.signature(self.build).parameters
        several = len(given.get("teachers", ()))
        if not self.experts and isinstance(getattr(given.get("teacher"), "network", None), nn.ModuleDict):
            raise UserError(
                f"{self.slug} takes a teacher of one network, this one is several experts",
                cure="choose a method that takes them: phased-dmd, dmd2, sim",
            )
        if "teacher" in wanted and several > 1:
            raise UserError(f"{self.slug} learns from one teacher, {several} were given", cure="name one")
        for name, parameter in wanted.items():
            if name in given or parameter.default is not parameter.empty:
                continue
            if name in ("teacher", "teachers"):
                raise UserError(f"{self.slug} has no teacher", cure="name one: --teacher FOLDER")
            raise UserError(f"{self.slug} wants a {name}, which is not there", cure=f"given: {', '.join(given)}")
        self.build(**{name: given[name] for name in wanted if name in given})

    @classmethod
    def declared_turns(cls) -> dict[str, Turn]:
        """All turns by name, whatever the options, in definition order, base classes first."""
        found: dict[str, Turn] = {}
        for base in reversed(cls.__mro__):
            for value in vars(base).values():
                if isinstance(marked := getattr(value, "turn", None), Turn):
                    found[marked.name] = marked
        return found

    @classmethod
    def turns_for(cls, options: Any) -> tuple[Turn, ...]:
        """The turns that there may be under these options, in definition order, one per name; what depends on the
        networks is taken for true."""
        turns = cls.declared_turns().values()
        return tuple(t for t in turns if all(getattr(options, name, True) for name in t.when))

    def turns(self) -> tuple[Turn, ...]:
        """The turns that there are, each with the networks that there are."""
        return tuple(
            dataclasses.replace(t, trains=tuple(role for role in t.trains if getattr(self, role, self) is not None))
            for t in self.turns_for(self.options)
            if all(getattr(self, name) for name in t.when if not hasattr(self.options, name))
        )

    def followers(self) -> Mapping[str, Target]:
        """The networks that follow others, by attribute. Default: none."""
        return {}

    def trained_teachers(self) -> Mapping[str, nn.Module]:
        """Those of :meth:`teachers` that turns train."""
        roles = [self.role(name) for t in self.turns() for name in t.trains]
        return {
            name: teacher
            for name, teacher in self.teachers().items()
            if any(teacher is part for role in roles for part in (role, *role.children()))
        }

    def role(self, name: str) -> nn.Module:
        module = getattr(self, name, None)
        if not isinstance(module, nn.Module):
            owned = ", ".join(n for n, _ in self.named_children())
            raise AttributeError(f"method {self.slug!r} has no network {name!r}; it owns: {owned}")
        return module

    def trained_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Parameters of one role, by name. A LoRA role gives its adapter only."""
        module = self.role(name)
        own = getattr(module, "role_parameters", None)
        return dict(own()) if own is not None else dict(module.named_parameters())

    def train(self, mode: bool = True) -> Method:
        """Like ``nn.Module.train``, but frozen networks stay in eval mode whatever happens."""
        super().train(mode)
        for module in self.modules():
            if getattr(module, "is_frozen", False):
                nn.Module.train(module, False)
        return self


# --- registry -----------------------------------------------------------------------------------------------------
_METHODS: Registry[type[Method]] = Registry("method", "methods", "stillroom.methods")


def register(slug: str, paper: Paper) -> Callable[[type[Method]], type[Method]]:
    """Class decorator: make a method known by its slug. The wing is the package that the file lies in."""

    def add(cls: type[Method]) -> type[Method]:
        cls.slug, cls.paper, cls.wing = slug, paper, ("own." + cls.__module__).split(".")[-2]
        return _METHODS.add(slug, cls)

    return add


def methods() -> dict[str, type[Method]]:
    """All known methods by slug: stillroom's own and those that installed packages offer as ``stillroom.methods``."""
    return _METHODS.known()


def get_method(slug: str) -> type[Method]:
    """A method by its slug. Raises UserError for an unknown one, naming the nearest."""
    return _METHODS.get(slug, "`stillroom methods` lists them all")


def option_fields(cls: type[Method]) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(cls.Options)}
