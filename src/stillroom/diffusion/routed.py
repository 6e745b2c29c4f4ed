"""Several denoisers behind one: each sample of a batch is answered by the expert that its condition, or its noise
level, belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Cond, Denoiser, Prediction
from stillroom.errors import UserError, nearest


@dataclass(frozen=True)
class ByCondition:
    """By a condition that is a whole number: value v belongs to expert ``experts[v]``, counted from 0."""

    name: ClassVar[str] = "condition"
    condition: str
    experts: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", tuple(int(k) for k in self.experts))
        if not self.experts or sorted(set(self.experts)) != list(range(max(self.experts) + 1)):
            raise UserError(f"experts {self.experts} leave one out", cure="give each expert, from 0, some values")

    @property
    def count(self) -> int:
        return max(self.experts) + 1

    def expert(self, share: Tensor, cond: Cond) -> Tensor:
        if self.condition not in cond:
            raise UserError(f"experts are chosen by the condition {self.condition!r}", cure="give it")
        values = cond[self.condition].long()
        if not bool(((values >= 0) & (values < len(self.experts))).all()):
            raise UserError(
                f"the condition {self.condition!r} has values without an expert",
                cure=f"they are 0 to {len(self.experts) - 1}",
            )
        return torch.tensor(self.experts, device=values.device)[values]


@dataclass(frozen=True)
class ByNoise:
    """By time: expert k has ``bounds[k - 1] <= t / t_max < bounds[k]``, so expert 0 the least noise."""

    name: ClassVar[str] = "noise"
    bounds: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "bounds", tuple(float(b) for b in self.bounds))
        if (
            not self.bounds
            or list(self.bounds) != sorted({*self.bounds})
            or not 0 < self.bounds[0] <= self.bounds[-1] < 1
        ):
            raise UserError(
                f"bounds between experts must rise within (0, 1), got {self.bounds}", cure="0.5, for example"
            )

    @property
    def count(self) -> int:
        return len(self.bounds) + 1

    def expert(self, share: Tensor, cond: Cond) -> Tensor:
        return torch.bucketize(share, torch.tensor(self.bounds).to(share), right=True)


_SCALES = "guidance scales"
"""Under which name scales, one for each sample, go with its rows."""
_OTHER = "against "
"""Before the names of conditions that are guided from."""
Route = ByCondition | ByNoise
ROUTES: dict[str, type[ByCondition] | type[ByNoise]] = {route.name: route for route in (ByCondition, ByNoise)}


def route_to_dict(route: Route) -> dict[str, Any]:
    return {"name": route.name, **asdict(route)}


def route_from_dict(values: Mapping[str, Any]) -> Route:
    """What :func:`route_to_dict` described. Raises UserError for a name or a setting that is not known."""
    settings: dict[str, Any] = dict(values)
    name = settings.pop("name", "")
    if name not in ROUTES:
        raise UserError(f"unknown route {name!r}{nearest(name, ROUTES)}", cure=f"known: {', '.join(ROUTES)}")
    try:
        return ROUTES[name](**settings)
    except TypeError as error:
        raise UserError(f"route {name!r}: {error}") from error


class RoutedDenoiser(Denoiser):
    """Denoisers of one process, prediction kind and shape, asked as one (arXiv 2410.23274, 2510.27684).

    experts: by name, in the order that ``route`` counts them in; ``network``, a ``ModuleDict``, holds them. A batch is
    cut into the rows of each expert, which answers with its own guidance, and put together again; a sample costs what
    its expert costs. With guidance a sample's unconditional answer comes from the same expert. Gradients reach the
    experts that were asked; processes that ask different ones cannot share them (engine.parallel=fsdp).

    own: of experts that are trained apart, the one that this is about; the others stand in for theirs.

    Raises UserError for experts that do not fit together.
    """

    def __init__(self, experts: Mapping[str, Denoiser], route: Route, own: str = "") -> None:
        first, *others = experts.values()
        if len(experts) != route.count:
            raise UserError(f"{len(experts)} experts for a route to {route.count}", cure="give one denoiser for each")
        facts = ("process", "prediction", "shape")
        for name, other in zip(list(experts)[1:], others, strict=True):
            for fact in facts:
                if getattr(other, fact) != getattr(first, fact):
                    raise UserError(
                        f"expert {name!r} has another {fact} than {next(iter(experts))!r}",
                        cure="experts must agree on it",
                    )
        super().__init__(
            nn.ModuleDict(experts), first.process, first.prediction, null=first.null, shape=first.shape,
            guide=first.guide,
        )  # fmt: skip
        self.route, self.own = route, own

    @property
    def null(self) -> dict[str, Any]:  # type: ignore[override]
        """The experts', which all have the same."""
        return next(iter(self.experts.values())).null

    @null.setter
    def null(self, values: Mapping[str, Any]) -> None:
        for expert in self.experts.values():
            expert.null = dict(values)

    @property
    def experts(self) -> dict[str, Denoiser]:
        return dict(self.network.items())  # type: ignore[operator]

    @property
    def adapter(self) -> str | None:  # type: ignore[override]
        """The experts' adapters, one beside the other; each speaks for its own expert alone."""
        return ", ".join(one.adapter for one in self.experts.values() if one.adapter) or None

    def role_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained: of experts that are adapters those alone, of frozen ones nothing."""
        found: dict[str, nn.Parameter] = {}
        for name, expert in self.experts.items():
            if getattr(expert, "is_frozen", False):
                continue
            own = getattr(expert, "role_parameters", expert.named_parameters)()
            found |= {f"{name}.{key}": p for key, p in dict(own).items()}
        return found

    def with_experts(self, experts: Mapping[str, Denoiser]) -> RoutedDenoiser:
        """Others in their places."""
        return RoutedDenoiser(experts, self.route, self.own)

    def join(self, others: Sequence[RoutedDenoiser]) -> RoutedDenoiser:
        """One denoiser of the experts that these were trained apart for, each in its place. Raises UserError for those
        that are missing, come twice, or are of another kind."""
        found: dict[str, Denoiser] = {}
        first = self.stand_in
        for one in (self, *others):
            if not one.own:
                raise UserError("this student is whole: none of its experts was trained by itself", cure="leave it out")
            if (one.route, list(one.experts)) != (self.route, list(self.experts)):
                raise UserError(
                    f"{one.own!r} and {self.own!r} share the conditions in other ways", cure="train one anew"
                )
            if one.own in found:
                raise UserError(f"{one.own!r} comes twice", cure="give one run of each")
            if not (first is None or one.stand_in is None or alike(first, one.stand_in)):
                raise UserError(
                    f"{one.own!r} and {self.own!r} did not begin as the same network",
                    cure="give students of one recipe, with one teacher, which differ in options.only alone",
                )
            found[one.own] = one.experts[one.own]
        if missing := [name for name in self.experts if name not in found]:
            raise UserError(f"{', '.join(missing)} is missing", cure="give a run of each")
        return RoutedDenoiser({name: found[name] for name in self.experts}, self.route)

    @property
    def stand_in(self) -> Denoiser | None:
        """What stands in the places of experts that are trained elsewhere: what all of them began as."""
        return next((expert for name, expert in self.experts.items() if self.own and name != self.own), None)

    def expert_at(self, share: float) -> Denoiser:
        """Who answers at this share of ``t_max``. Raises UserError where the route is by condition."""
        if not isinstance(self.route, ByNoise):
            raise UserError("these experts are chosen by condition, not by noise", cure="give one of them")
        return list(self.experts.values())[int(self.route.expert(torch.tensor(float(share)), {}))]

    def native(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self._grouped(x_t, t, cond, lambda expert, *rows: expert.native(*rows))

    def forward(
        self, x_t: Tensor, t: Tensor | float, cond: Cond | None = None, guidance: Tensor | float = 1.0
    ) -> Prediction:
        t, cond = torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device), cond or {}
        if isinstance(guidance, Tensor):
            cond = {**cond, _SCALES: guidance.expand(len(x_t))}

        def asked(expert: Denoiser, x: Tensor, t: Tensor, rows: dict[str, Tensor]) -> Tensor:
            return expert(x, t, rows, rows.pop(_SCALES, guidance)).value

        return self._said(self._grouped(x_t, t, cond, asked), x_t, t)

    def _both(self, x_t: Tensor, t: Tensor, cond: Cond, other: Cond | None = None) -> tuple[Tensor, Tensor]:
        def asked(expert: Denoiser, x: Tensor, t: Tensor, rows: dict[str, Tensor]) -> Tensor:
            theirs = None if other is None else {name: rows.pop(f"{_OTHER}{name}") for name in other}
            return torch.stack(expert._both(x, t, rows, theirs), 1)

        beside = {f"{_OTHER}{name}": value for name, value in (other or {}).items()}
        conditional, unconditional = self._grouped(x_t, t, {**cond, **beside}, asked).unbind(1)
        return conditional, unconditional

    def _grouped(self, x_t: Tensor, t: Tensor, cond: Cond, ask: Callable[..., Tensor]) -> Tensor:
        experts, which = list(self.experts.values()), self.route.expert(t / self.process.t_max, cond)
        if type(which) is not Tensor:  # a plan's, without values: whoever is asked, all rows cost what one expert's do
            return ask(experts[-1], x_t, t, dict(cond))
        if not which.ndim:
            return ask(experts[int(which)], x_t, t, dict(cond))
        rows, answers = [], []
        for number, expert in enumerate(experts):
            mine = (which == number).nonzero()[:, 0]
            if len(mine):
                part = {name: value[mine] for name, value in cond.items()}
                answers.append(ask(expert, x_t[mine], t[mine] if t.ndim else t, part))
                rows.append(mine)
        return torch.cat(answers)[torch.cat(rows).argsort()]


def alike(one: Denoiser, other: Denoiser) -> bool:
    """Whether two have the same weights, up to what an average of them rounds."""
    mine, theirs = one.network.state_dict(), other.network.state_dict()
    return {name: value.shape for name, value in mine.items()} == {
        name: value.shape for name, value in theirs.items()
    } and all(torch.allclose(value.float(), theirs[name].float(), rtol=1e-4) for name, value in mine.items())
