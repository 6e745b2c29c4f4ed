"""What a run's engine does, as plain values that survive a round trip through YAML."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from stillroom.errors import UserError

_CHOICES = {
    "precision": ("fp32", "bf16"),
    "parallel": ("ddp", "fsdp"),
    "schedule": ("constant", "cosine", "linear"),
    "draws": ("global", "per-rank"),
}
_POSITIVE = ("batch", "accumulate", "keep", "log_every", "checkpoint_every")
_EMA_KEYS = ("name", "of", "decay", "half_life", "ramp")

# Changing one of these between a run and its resumption does not change what is computed (up to rounding).
_FREE = (
    "accumulate",
    "compile",
    "activation_checkpointing",
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


@dataclass
class EngineConfig:
    """Settings of the engine. Lengths are in steps, ``batch`` is the global batch, half-lives are in images."""

    steps: int = 1000  # 0: nothing is trained, the student is what the method has built
    batch: int = 128
    accumulate: int = 1  # micro-batches per process and step
    seed: int = field(default=0, metadata={"min": 0, "max": 2**63 - 1})
    device: str = "auto"  # "auto": cuda where there is one, else cpu
    precision: str = "fp32"  # "bf16": networks run under autocast; weights, losses and optimizer state stay fp32
    compile: bool = False
    activation_checkpointing: bool = False
    offload: bool = False  # keep the weights that no turn trains in host memory, on the device only while they are used
    parallel: str = "ddp"  # under torchrun: "ddp" or "fsdp"
    optim: dict[str, dict[str, Any]] = field(default_factory=dict)  # {turn or "all": {field of Optim: value}}
    warmup: int = 0  # linear learning-rate warm-up
    schedule: str = "constant"  # after the warm-up: "constant", or "cosine"/"linear" down to 0 at the last step
    ema: list[dict[str, Any]] = field(default_factory=list)  # {"name", "of", "decay"} or {..., "half_life", "ramp"}
    export: str = "student"  # the role, or the EMA, that becomes the finished student
    checkpoint_every: int = 1000
    keep: int = 2
    log_every: int = 50
    draws: str = "global"  # "per-rank": each process draws only its own rows; cheaper, depends on the world size
    loss_limit: float = 1e9  # a term beyond this magnitude counts as divergence
    growth_limit: float = 100.0  # so does an RMS weight beyond this factor of max(1, the RMS weight at the start)
    check_freezing: bool = False  # compare every frozen tensor before and after each turn (slow; for tests)

    def __post_init__(self) -> None:
        for key in _POSITIVE:
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(
                    f"engine.{key} must be a positive whole number, got {value!r}", cure=f"set engine.{key} >= 1"
                )
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise UserError(
                f"engine.steps must be a whole number from 0 on, got {self.steps!r}",
                cure="0 trains nothing: the student as it is built",
            )
        if self.warmup < 0:
            raise UserError(f"engine.warmup must not be negative, got {self.warmup}", cure="0 means no warm-up")
        for key in ("loss_limit", "growth_limit"):
            if not getattr(self, key) > 0:
                raise UserError(
                    f"engine.{key} must be positive, got {getattr(self, key)!r}", cure=".inf switches it off"
                )
        for key, allowed in _CHOICES.items():
            if getattr(self, key) not in allowed:
                raise UserError(f"engine.{key} is {getattr(self, key)!r}", cure="choose one of: " + ", ".join(allowed))
        if self.batch % self.accumulate:
            raise UserError(
                f"engine.batch={self.batch} does not split into engine.accumulate={self.accumulate} micro-batches",
                cure="choose a batch that accumulate divides",
            )
        if self.offload and self.compile:
            raise UserError(
                "engine.offload moves weights behind the back of engine.compile", cure="switch one of the two off"
            )
        self._check_emas()

    def _check_emas(self) -> None:
        names: set[str] = set()
        for i, ema in enumerate(self.ema):
            where = f"engine.ema[{i}]"
            if unknown := sorted(set(ema) - set(_EMA_KEYS)):
                raise UserError(f"{where} has unknown key {unknown[0]!r}", cure="known keys: " + ", ".join(_EMA_KEYS))
            if ("decay" in ema) == ("half_life" in ema):
                raise UserError(f"{where} needs exactly one of decay and half_life", cure="for example decay: 0.999")
            if "decay" in ema and not 0 <= ema["decay"] < 1:
                raise UserError(f"{where}.decay must lie in [0, 1), got {ema['decay']}", cure="for example 0.999")
            if "half_life" in ema and not ema["half_life"] > 0:
                raise UserError(f"{where}.half_life must be positive, got {ema['half_life']}", cure="give it in images")
            name = ema.get("name", "ema")
            if name in names or name == ema.get("of", "student"):
                raise UserError(f"{where}: the name {name!r} is taken", cure="give every EMA a name of its own")
            names.add(name)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def trajectory(self) -> dict[str, Any]:
        """The settings that decide the final weights; a resumed run must agree on them."""
        return {key: value for key, value in self.to_dict().items() if key not in _FREE}

    def fingerprint(self) -> str:
        """SHA-256 of :meth:`trajectory`."""
        return hashlib.sha256(json.dumps(self.trajectory(), sort_keys=True, default=str).encode()).hexdigest()
