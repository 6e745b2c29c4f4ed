"""What test_classifiers_two.py runs, alone and under torchrun: ``recognise.py FOLDER`` trains every case of CASES with
FSDP2, in one process group, and leaves FOLDER/<case>.safetensors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from given import given as by_name
from stillroom.bench.digits.teachers import tiny_clip
from stillroom.data.source import ArrayData
from stillroom.engine.config import EngineConfig
from stillroom.engine.distributed import World
from stillroom.engine.trainer import Trainer
from stillroom.method import Method
from stillroom.methods.classifier.dho import DHO
from stillroom.methods.classifier.gt_self_distill import GTSelfDistill
from stillroom.methods.classifier.meal_v2 import MEALV2
from stillroom.networks.prompt_classifier import PromptClassifier

# Networks without batch normalisation, and SGD: what then differs between one process and two is rounding.
CASES: dict[str, tuple[type[Method], dict[str, Any], int]] = {
    "rounds": (GTSelfDistill, {"rounds": 3, "penalty": 0.01}, 1),
    "estimate": (GTSelfDistill, {"rounds": 2, "gt_weight": "estimate"}, 1),
    "last": (GTSelfDistill, {"rounds": 2, "start": "last"}, 1),
    "given": (GTSelfDistill, {"rounds": 2, "start": "given", "penalty": 0.01}, 1),
    "meal": (MEALV2, {"teachers": 2, "shift": 1}, 1),
    "meal-given": (MEALV2, {"gt_weight": 0.3}, 3),
    "dho": (DHO, {"labelled": 2, "shift": 1, "flip": 0.5}, 2),
}

CASES["captions"] = (DHO, {"labelled": 2, "prompts": ("the {}.",), "zeta": 0.1}, 2)
CASES["few-shot"] = (DHO, {**CASES["captions"][1], "cache": "tuned", "cache_share": 1.0}, 2)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 9), nn.LayerNorm(9), nn.ReLU(), nn.Linear(9, 3))


def data() -> ArrayData:
    images = torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = ArrayData(images, {"label": torch.arange(40) % 3}, ["a", "b", "c"])
    whole.parts["heldout"] = whole.take(torch.arange(12))
    return whole


def trained(case: str, **settings: Any) -> dict[str, Tensor]:
    """The finished student, and the mixture that it was given."""
    cls, options, networks = CASES[case]
    method = cls(cls.Options(**options))
    given = [network(seed) for seed in range(networks)]
    if case in ("captions", "few-shot"):
        torch.manual_seed(1)
        given[1] = PromptClassifier(*tiny_clip("abc", ["the {}."], 4, 2, width=8), "abc")
    method.build_from(by_name(given))
    optim = {"all": {"name": "sgd", "lr": 0.05, "betas": (0.9, 0.0)}}
    run = Trainer(method, data(), EngineConfig(steps=8, batch=8, log_every=2, optim=optim, **settings), show=False)
    run.fit()
    student = run.export_role()
    method.finish(student)
    return {**student.state_dict(), "mixture": torch.tensor(getattr(method, "mixture", ()))}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    world = World.join("cpu")
    for case in CASES:
        found = trained(case, parallel="fsdp")
        if world.first:
            save_file(found, folder / f"{case}.safetensors")
    world.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
