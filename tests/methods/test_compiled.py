"""Every method under engine.compile: torch.compile's own tracer at work, the weights of the plain run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters

import tiny_mar
import tiny_text
from given import given as by_name
from stillroom.data.source import ArrayData
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import RectifiedFlow
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.folders.image_networks import make_classifier
from stillroom.method import get_method, methods
from stillroom.networks.mae import make_encoder
from stillroom.networks.mar import MARSettings
from stillroom.networks.point_mlp import PointMLP

SLUGS = sorted(slug for slug, cls in methods().items() if cls.__module__.startswith("stillroom."))
GAN = {"gan_weight": 0.1}
OPTIONS: dict[str, dict[str, Any]] = {
    "agd": {"paths": 6, "path_steps": 3, "width": 8},
    "boot": {"guidance": 2.0},
    "dmd2": {"critic_turns": 2, **GAN},
    "decoupled-dmd": {"critic_turns": 2, "student_steps": 2, **GAN},
    "flash-dmd": {"critic_turns": 2, "student_steps": 2, "split": 0.6, **GAN},
    "hyper-sd": {"segments": (1,), "mse": (1.0,), "adversarial": (1.0,), "grids": (8,)},
    "sid-lsg": GAN,
    "uni-instruct": GAN,
    "swiftbrush": {"fake": "full"},
    "twinflow": {"width": 8},
    "dho": {"labelled": 2},
    "dmae": {"mask_ratio": 0.5},
    "g2sd": {"specific_share": 0.0},
    "kd": {"paths": 6, "path_steps": 3},
    "progressive": {"begin": 2},
    "lightgen": {"dpo_share": 0.0, "network": MARSettings(**tiny_mar.SIZES)},
}


def denoiser() -> Any:
    return Denoiser(PointMLP(2, 16, 3, 8), RectifiedFlow(), "v", null={"label": 8}, shape=(2,))


def images(side: int = 8) -> ArrayData:
    pixels = torch.randint(0, 256, (60, 1, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = ArrayData(pixels, {"label": torch.arange(60) % 3}, ["a", "b", "c"])
    data.parts["heldout"] = data.take(torch.arange(30))
    return data


def classifiers(count: int) -> Any:
    return [make_classifier("resnet-small", 1, 3) for _ in range(count)]


def encoders(count: int) -> Any:
    return [make_encoder("mae-nano", 1, 12) for _ in range(count)]


def texts() -> Any:
    return [tiny_text.encoder(2, 8), tiny_text.encoder(4, 12, seed=1)]


def points() -> ArrayData:
    return ArrayData(torch.randn(40, 2, generator=torch.Generator().manual_seed(0)), {"label": torch.arange(40) % 8})


WORLDS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "meal-v2": (lambda: classifiers(1), images),
    "gt-self-distill": (lambda: classifiers(1), images),
    "dho": (lambda: classifiers(2), images),
    "dmae": (lambda: encoders(2), lambda: images(12)),
    "g2sd": (lambda: encoders(2), lambda: images(12)),
    "hybrid-distill": (lambda: encoders(3), lambda: images(12)),
    "distiller": (texts, tiny_text.data),
    "ernie-tiny": (texts, tiny_text.data),
    "lightgen": (tiny_mar.space, tiny_mar.Captioned),
}


def trained(slug: str, given: Any, data: Any, compiled: bool) -> dict[str, Tensor]:
    torch.compiler.reset()
    counters.clear()
    cls = get_method(slug)
    method: Any = cls(cls.Options(**OPTIONS.get(slug, {})))
    torch.manual_seed(0)
    method.build_from(by_name(copy.deepcopy(given)))
    config = EngineConfig(steps=4, batch=4, device="cpu", compile=compiled, optim={"all": {"lr": 1e-3}})
    run = Trainer(method, data, config, show=False)
    run.fit()
    assert (counters["stats"]["unique_graphs"] > 0) == compiled
    return {name: p.detach().clone() for name, p in method.named_parameters()}


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: plain(self, backend=request.param))
    with dynamo.patch(recompile_limit=dynamo.recompile_limit, skip_nnmodule_hook_guards=True):
        yield request.param
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:.*lru_cache:UserWarning")
@pytest.mark.parametrize(
    ("slug", "backend"),
    [
        *((slug, "eager") for slug in SLUGS),
        *(pytest.param(slug, "inductor", marks=pytest.mark.slow) for slug in ("dmd2", "uni-instruct", "dmae")),
    ],
    indirect=["backend"],
)
def test_a_compiled_run_learns_what_the_plain_one_learns(slug: str, backend: str) -> None:
    make, data = WORLDS.get(slug, (denoiser, points))
    torch.manual_seed(0)
    given = make()
    plain, compiled = (trained(slug, given, data(), on) for on in (False, True))
    for name, value in plain.items():
        if backend == "eager":
            assert torch.equal(compiled[name], value), name
        else:
            torch.testing.assert_close(compiled[name], value, atol=2e-4, rtol=1e-3)
