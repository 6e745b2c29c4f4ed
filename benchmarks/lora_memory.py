"""Peak memory of three roles on one set of weights, against training a student alone.

    python benchmarks/lora_memory.py

Each measurement is a process of its own. A process that only imports what all of them import is subtracted, for beside
a network of this size it would hide the differences.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Row, median, record
from torch import Tensor

from stillroom.bench.teach import Denoising
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import RectifiedFlow
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.evaluation.cost import peak_memory
from stillroom.folders.diffusers_networks import denoiser_from_diffusers, make_network, scheduler_config
from stillroom.method import Method, get_method
from stillroom.surgery.lora import lora_role
from stillroom.surgery.modules import parameter_count

BATCH, STEPS, REPEATS, LIMIT = 8, 2, 2, 1.5
WIDTH, DEPTH, PATCH = 512, 8, 7
LORA = {"rank": 16, "targets": ("to_q", "to_k", "to_v", "to_out.0")}


class Noise:
    """Data of the right shape: memory does not depend on the pixels."""

    def batch(self, seed: int, step: int, size: int, rows: slice) -> dict[str, Any]:
        images: Tensor = torch.rand(size, 1, 28, 28, generator=torch.Generator().manual_seed(step))[rows] * 2 - 1
        return {"x": images, "cond": {"label": torch.arange(size)[rows] % 10}}


def network() -> Denoiser:
    config = {
        "in_channels": 1, "out_channels": 1, "sample_size": 28, "patch_size": PATCH, "num_layers": DEPTH,
        "num_attention_heads": WIDTH // 64, "attention_head_dim": 64, "num_embeds_ada_norm": 10,
        "norm_type": "ada_norm_zero", "attention_bias": True, "activation_fn": "gelu-approximate", "dropout": 0.0,
    }  # fmt: skip
    flow = RectifiedFlow(shift=1.0)
    made = make_network("DiTTransformer2DModel", config)
    return denoiser_from_diffusers(made, scheduler_config(flow, "v"), process=flow)


def train(method: Method) -> None:
    optim = {"all": {"lr": 1e-4, "name": "adamw", "betas": [0.9, 0.999], "clip_norm": 1.0}}
    config = EngineConfig(steps=STEPS, batch=BATCH, device="cpu", optim=optim)
    Trainer(method, Noise(), config, show=False).fit()


def imports_only() -> None:
    """What every measured process holds before it makes a network."""
    torch.set_num_threads(1)
    import peft  # noqa: F401
    from diffusers import DiTTransformer2DModel  # noqa: F401

    get_method("dmd2")


def student_alone(lora: bool) -> None:
    imports_only()
    method = Denoising()
    denoiser = network()
    method.build(lora_role(denoiser.requires_grad_(False), "student", **LORA) if lora else denoiser)
    train(method)


def three_roles(lora: bool) -> None:
    imports_only()
    cls = get_method("dmd2")
    method = cls(
        cls.Options(critic_turns=1, gan_weight=0.0),  # type: ignore[call-arg]
        lora={"student": LORA, "fake": LORA} if lora else {},
    )
    method.build(network())
    train(method)


def main() -> None:
    torch.set_num_threads(1)
    floor = median(peak_memory(imports_only).peak for _ in range(REPEATS))
    arms = {
        "student alone, all weights": (student_alone, False),
        "student alone, LoRA": (student_alone, True),
        "teacher, student and fake score, LoRA on one base": (three_roles, True),
        "teacher, student and fake score, three full copies": (three_roles, False),
    }
    peaks: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(REPEATS):
        for name, (function, lora) in arms.items():
            peaks[name].append(peak_memory(function, lora).peak)
    full, adapter = (median(peaks[name]) - floor for name in list(arms)[:2])
    rows: list[Row] = []
    for name, values in peaks.items():
        peak = median(values)
        rows.append(
            {
                "training": name,
                "peak, MiB": peak,
                "without imports, MiB": peak - floor,
                "x student alone, all weights": (peak - floor) / full,
                "x student alone, LoRA": (peak - floor) / adapter,
            }
        )
    size = parameter_count(network()) / 1e6
    record(
        "Memory of LoRA roles",
        f"Three roles (dmd2 without GAN) as LoRA adapters of rank {LORA['rank']} on one base need at most {LIMIT}x the "
        f"peak memory of training the student alone with all its weights (DiT of {size:.0f}M parameters, "
        f"batch {BATCH}, AdamW; median of {REPEATS} fresh processes; imports, {floor:.0f} MiB, not counted).",
        "python benchmarks/lora_memory.py",
        rows,
        rows[2]["x student alone, all weights"] <= LIMIT,
    )


if __name__ == "__main__":
    main()
