"""Routed denoisers: each row is answered by its expert, as that expert alone would; they survive a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import VP, RectifiedFlow
from stillroom.diffusion.routed import ByCondition, ByNoise, RoutedDenoiser, route_from_dict, route_to_dict
from stillroom.diffusion.sampling import FewStepSampler, ODESampler
from stillroom.errors import UserError
from stillroom.folders.denoisers import load_denoiser
from stillroom.folders.diffusers_networks import some_conditions
from stillroom.networks.point_mlp import PointMLP
from stillroom.surgery.lora import lora_role
from stillroom.tasks.class_images.model import ImageGenerator

BY_CLASS = ByCondition("label", (0, 1, 1, 0, 2, 0))


def expert(seed: int, **more: Any) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(PointMLP(2, 16, 2, 5), **{"process": RectifiedFlow(), "null": {"label": 5}, "shape": (2,), **more})


def routed(route: Any = BY_CLASS) -> RoutedDenoiser:
    return RoutedDenoiser({name: expert(k) for k, name in enumerate("abc"[: route.count])}, route)


def rows(n: int = 12) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 2, generator=generator), torch.rand(n, generator=generator), {"label": torch.arange(n) % 5}


def test_a_mixed_batch_is_answered_row_by_row() -> None:
    denoiser, (x, t, cond) = routed(), rows()
    found = denoiser(x, t, cond).x0
    for i, label in enumerate(cond["label"].tolist()):
        own, row = denoiser.experts["abc"[BY_CLASS.experts[label]]], slice(i, i + 1)
        torch.testing.assert_close(found[row], own(x[row], t[row], {"label": cond["label"][row]}).x0)
    torch.testing.assert_close(denoiser.native(x, t, cond), denoiser(x, t, cond).value)


def test_guidance_asks_the_same_expert_twice() -> None:
    """The null label is another expert's, but a sample's unconditional answer is its own expert's."""
    denoiser, (x, t, cond) = routed(), rows()
    found = denoiser(x, t, cond, 2.0)
    mine = cond["label"] == 1
    own = denoiser.experts["b"](x[mine], t[mine], {"label": cond["label"][mine]}, 2.0)
    torch.testing.assert_close(found.v[mine], own.v)


def test_noise_levels_choose_the_expert_and_each_step_asks_one() -> None:
    denoiser = routed(ByNoise((0.25, 0.75)))
    x, _, cond = rows(4)
    t = torch.tensor([0.1, 0.25, 0.5, 0.75])
    asked: list[tuple[str, int]] = []
    for name, part in denoiser.experts.items():
        part.network.register_forward_pre_hook(lambda _, given, name=name: asked.append((name, len(given[0]))))
    found = denoiser(x, t, cond).x0
    assert asked == [("a", 1), ("b", 2), ("c", 1)]
    for i, name in enumerate("abbc"):
        own = denoiser.experts[name](x[i : i + 1], t[i : i + 1], {"label": cond["label"][i : i + 1]}).x0
        torch.testing.assert_close(found[i : i + 1], own)
    asked.clear()
    FewStepSampler((1.0, 0.5, 0.1)).sample(denoiser, x, cond)
    assert asked == [("c", 4), ("b", 4), ("a", 4)]


def test_gradients_reach_the_expert_that_was_asked() -> None:
    denoiser, (x, t, _) = routed(), rows(3)
    denoiser(x, t, {"label": torch.tensor([1, 1, 2])}).x0.sum().backward()
    moved = [name for name, part in denoiser.experts.items() if any(p.grad is not None for p in part.parameters())]
    assert moved == ["b"]


@pytest.mark.parametrize("route", [BY_CLASS, ByNoise((0.5,))])
def test_it_is_written_into_sub_folders_and_read_back(tmp_path: Path, route: Any) -> None:
    denoiser, (x, t, cond) = routed(route), rows()
    assert route_from_dict(json.loads(json.dumps(route_to_dict(route)))) == route
    ImageGenerator(denoiser, FewStepSampler((1.0,)), list("vwxyz")).save(tmp_path / "student")
    assert sorted(path.name for path in (tmp_path / "student" / "experts").iterdir()) == list("abc"[: route.count])
    again = ImageGenerator.load(tmp_path / "student")
    assert isinstance(again.denoiser, RoutedDenoiser)
    torch.testing.assert_close(again.denoiser(x, t, cond, 1.5).x0, denoiser(x, t, cond, 1.5).x0)
    assert again.sample([0, 1, 4], seed=1).shape == (3, 2)


def test_an_experts_adapter_is_folded_in(tmp_path: Path) -> None:
    first = lora_role(expert(0), "student", targets=linear_names(expert(0))[:1])
    for p in first.role_parameters().values():  # type: ignore[attr-defined]
        torch.nn.init.normal_(p)
    denoiser, (x, t, cond) = RoutedDenoiser({"a": first, "b": expert(1)}, ByNoise((0.5,))), rows()
    ImageGenerator(denoiser, ODESampler(steps=2)).save(tmp_path)
    torch.testing.assert_close(load_denoiser(tmp_path)(x, t, cond).x0, denoiser(x, t, cond).x0)


def linear_names(denoiser: Denoiser) -> list[str]:
    return [name for name, part in denoiser.network.named_modules() if isinstance(part, torch.nn.Linear)]


def test_what_does_not_fit_is_refused() -> None:
    x, t, _ = rows(3)
    with pytest.raises(UserError, match="2 experts for a route to 3"):
        RoutedDenoiser({"a": expert(0), "b": expert(1)}, BY_CLASS)
    with pytest.raises(UserError, match="expert 'b' has another process than 'a'"):
        RoutedDenoiser({"a": expert(0), "b": expert(1, process=VP(), prediction="eps")}, ByNoise((0.5,)))
    with pytest.raises(UserError, match="has values without an expert; they are 0 to 5"):
        routed()(x, t, {"label": torch.tensor([0, 1, 6])})
    with pytest.raises(UserError, match="chosen by the condition 'label'"):
        routed()(x, t)
    with pytest.raises(UserError, match="must rise within"):
        ByNoise((0.7, 0.2))
    with pytest.raises(UserError, match="leave one out"):
        ByCondition("label", (0, 2))
    with pytest.raises(UserError, match=r"unknown route 'noize' \(did you mean 'noise'\?\)"):
        route_from_dict({"name": "noize"})


def test_both_answers_apart_come_from_the_row_s_own_expert() -> None:
    denoiser, (x, t, cond) = routed(), rows()
    for found, guidance in zip(denoiser.apart(x, t, cond), (1.0, 0.0), strict=True):
        for i, label in enumerate(cond["label"].tolist()):
            own, row = denoiser.experts["abc"[BY_CLASS.experts[label]]], slice(i, i + 1)
            torch.testing.assert_close(found.x0[row], own(x[row], t[row], {"label": cond["label"][row]}, guidance).x0)


def test_guidance_from_another_condition_comes_from_the_row_s_own_expert() -> None:
    denoiser, (x, t, cond) = routed(), rows()
    other, w = {"label": (cond["label"] + 1) % 6}, torch.linspace(0.5, 3, len(x))
    found = denoiser.against(x, t, cond, other, w)
    for i, label in enumerate(cond["label"].tolist()):
        own, row = denoiser.experts["abc"[BY_CLASS.experts[label]]], slice(i, i + 1)
        expected = own.against(x[row], t[row], {"label": cond["label"][row]}, {"label": other["label"][row]}, w[row])
        torch.testing.assert_close(found.x0[row], expected.x0)


@pytest.mark.parametrize("null", [{}, {"label": 5}])
def test_a_sample_to_try_it_with_has_the_condition_that_experts_are_chosen_by(null: dict[str, int]) -> None:
    """Without an unconditional value there would be none, and one that no expert has (5) is refused."""
    experts = {name: expert(k, null=null) for k, name in enumerate("ab")}
    denoiser = RoutedDenoiser(experts, ByCondition("label", (0, 1, 1, 0, 0)))
    cond = {name: value[None] for name, value in some_conditions(denoiser).items()}
    assert torch.isfinite(denoiser(torch.randn(1, 2), torch.full((1,), 0.5), cond).x0).all()
