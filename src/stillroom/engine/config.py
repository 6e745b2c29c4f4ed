"""What a run's engine does, as plain values that survive a round trip through YAML."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from stillroom.errors import UserError
from stillroom.values import construct, fit_fields, unknown

# Changing one of these between a run and its resumption does not change what is computed (up to rounding).
_FREE = (
    "accumulate",
    "compile",
    "activation_checkpointing",
    "tf32",
    "channels_last",
    "prefetch",
    "backward_per_term",
    "offload",
    "parallel",
    "device",
    "checkpoint_every",
    "keep",
    "log_every",
    "export",
    "check_freezing",
    "loss_limit",
    "growth_limit",
)


_WHOLE = {"min": 1}
_LIMIT = {"above": 0, "infinite": True, "cure": ".inf switches it off"}


@dataclass(frozen=True)
class EMARule:
    """How fast an average forgets: a fixed ``decay`` per update of the role, or a ``half_life`` in images.

    With a half-life H the decay of an update that saw B images is ``0.5 ** (B / min(H, ramp * images_seen))``, the rule
    of EDM (arXiv:2206.00364, App. F.2): early on, it forgets the initial weights faster; ``ramp = 0`` turns that off.
    """

    name: str = "ema"
    of: str = "student"
    decay: float | None = field(default=None, metadata={"min": 0, "below": 1, "cure": "for example 0.999"})
    half_life: float | None = field(default=None, metadata={"above": 0, "cure": "give it in images"})
    ramp: float = field(default=0.05, metadata={"min": 0})

    def decay_at(self, images_seen: int, batch: int) -> float:
        """The decay of one update; ``images_seen`` counts the images of the role's updates, this one included."""
        if self.half_life is None:
            assert self.decay is not None
            return self.decay
        half_life = min(self.half_life, self.ramp * images_seen) if self.ramp > 0 else self.half_life
        return 0.5 ** (batch / half_life)


@dataclass
class EngineConfig:
    """Settings of the engine. Lengths are in steps, ``batch`` is the global batch, half-lives are in images."""

    steps: int = field(default=1000, metadata={"min": 0, "cure": "0 trains nothing: the student as it is built"})
    batch: int = field(default=128, metadata=_WHOLE)
    accumulate: int = field(default=1, metadata=_WHOLE)  # micro-batches per process and step
    seed: int = field(default=0, metadata={"min": 0, "max": 2**63 - 1})
    device: str = "auto"  # "auto": cuda where there is one, else cpu
    precision: Literal["fp32", "bf16"] = (
        "fp32"  # "bf16": networks run under autocast; weights, losses and optimizer state stay fp32
    )
    # "bf16": networks that are frozen for good hold their matrices in bfloat16, at half the memory, and run under
    # autocast
    frozen: Literal["fp32", "bf16"] = field(default="fp32", metadata={"later": True})
    tf32: bool = field(default=True, metadata={"later": True})  # on CUDA: float32 products in TF32
    channels_last: bool = field(default=False, metadata={"later": True})  # filters of convolutions, for U-Nets
    prefetch: bool = field(default=True, metadata={"later": True})  # on CUDA: the next batch is made during a step
    compile: bool = False
    activation_checkpointing: bool = False
    # one backward pass for each term of a turn that its method lets wait, in place of one for all: less memory at once,
    # the same gradients up to rounding
    backward_per_term: bool = field(default=False, metadata={"later": True})
    offload: bool = False  # keep the weights that no turn trains in host memory, on the device only while they are used
    parallel: Literal["ddp", "fsdp"] = "ddp"  # under torchrun: "ddp" or "fsdp"
    optim: dict[str, dict[str, Any]] = field(default_factory=dict)  # {turn or "all": {field of Optim: value}}
    warmup: int = field(default=0, metadata={"min": 0})  # linear learning-rate warm-up; 0: none
    schedule: Literal["constant", "cosine", "linear"] = (
        "constant"  # after the warm-up: "constant", or "cosine"/"linear" down to 0 at the last step
    )
    ema: list[dict[str, Any]] = field(default_factory=list)  # {"name", "of", "decay"} or {..., "half_life", "ramp"}
    export: str = "student"  # the role, or the EMA, that becomes the finished student
    checkpoint_every: int = field(default=1000, metadata=_WHOLE)
    keep: int = field(default=2, metadata=_WHOLE)
    log_every: int = field(default=50, metadata=_WHOLE)
    # "per-rank": own rows alone are drawn; cheaper, depends on the split of the batch
    draws: Literal["global", "per-rank"] = "global"
    loss_limit: float = field(default=1e9, metadata=_LIMIT)  # a term beyond this magnitude counts as divergence
    # so does an RMS weight beyond this factor of max(1, the RMS weight at the start)
    growth_limit: float = field(default=100.0, metadata=_LIMIT)
    check_freezing: bool = False  # compare every frozen tensor before and after each turn (slow; for tests)

    def __post_init__(self) -> None:
        fit_fields(self, "engine.")
        if self.batch % self.accumulate:
            raise UserError(
                f"engine.batch={self.batch} does not split into engine.accumulate={self.accumulate} micro-batches",
                cure="choose a batch that accumulate divides",
            )
        if self.offload and self.compile:
            raise UserError(
                "engine.offload moves weights behind the back of engine.compile", cure="switch one of the two off"
            )
        if self.frozen == "bf16" and self.parallel == "fsdp":
            raise UserError(
                "engine.frozen=bf16 leaves weights of two types in a block, which engine.parallel=fsdp cannot spread",
                cure="leave engine.frozen at fp32, or use engine.parallel=ddp",
            )
        if self.backward_per_term and self.parallel == "fsdp":
            raise UserError(
                "engine.backward_per_term parts a turn's passes, which engine.parallel=fsdp wants in one call",
                cure="use engine.parallel=ddp, or engine.activation_checkpointing=true",
            )
        if self.optim:
            self._check_optim()
        self._check_emas()

    def _check_optim(self) -> None:
        from stillroom.method import Optim  # heavy

        for turn, settings in self.optim.items():
            construct(Optim, settings, f"engine.optim.{turn}.")

    def _check_emas(self) -> None:
        names: set[str] = set()
        for i, entry in enumerate(self.ema):
            rule: EMARule = construct(EMARule, entry, f"engine.ema[{i}].")
            if (rule.decay is None) == (rule.half_life is None):
                raise UserError(
                    f"recipe key 'engine.ema[{i}]' needs exactly one of decay and half_life",
                    cure="for example decay: 0.999",
                )
            if rule.name in names or rule.name == rule.of:
                raise UserError(
                    f"recipe key 'engine.ema[{i}].name': {rule.name!r} is taken",
                    cure="give every EMA a name of its own",
                )
            names.add(rule.name)
            self.ema[i] = entry | {key: getattr(rule, key) for key in ("name", "of") if key in entry}

    def check_turns(self, names: Sequence[str]) -> None:
        """Raises UserError where ``optim`` names a turn that is none of these."""
        for turn in self.optim:
            if turn != "all" and turn not in names:
                raise unknown(f"engine.optim.{turn}", [f"engine.optim.{name}" for name in ("all", *names)])

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def trajectory(self) -> dict[str, Any]:
        """The settings that decide the final weights; a resumed run must agree on them."""
        return {key: value for key, value in self.to_dict().items() if key not in _FREE}

    def fingerprint(self) -> str:
        """SHA-256 of :meth:`trajectory`."""
        return hashlib.sha256(json.dumps(self.trajectory(), sort_keys=True, default=str).encode()).hexdigest()
