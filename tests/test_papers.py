"""The papers' settings: every recipe is valid, says its source, and can be planned on the public model's own sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from stillroom.diffusion.process import RectifiedFlow
from stillroom.diffusion.times import TimeLaw
from stillroom.errors import UserError
from stillroom.folders.public import DATA, is_public, public_models
from stillroom.method import methods
from stillroom.planning import plan
from stillroom.recipe import PAPERS, Recipe, papers
from stillroom.run import run

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "results" / "benchmarks" / "paper-plans.json"
QUICK = ("papers/dho-resnet18", "papers/g2sd-vit-tiny")
MISSPELT = "dmd2-sdlx"


@pytest.mark.parametrize("name", papers())
def test_a_recipe_of_a_paper_is_valid_and_says_its_source(name: str) -> None:
    recipe = Recipe.load(name)
    assert name == f"papers/{recipe.name}"
    assert name in papers(recipe.method)
    head = (PAPERS / f"{recipe.name}.yaml").read_text().split("\nmethod:")[0].split("\nbase:")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert "# Source: " in head
    assert recipe.data in DATA
    for taught in filter(None, recipe.teacher.split(",")):
        assert is_public(taught)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_every_method_and_every_public_model_is_in_some_recipe() -> None:
    recipes = [Recipe.load(name) for name in papers()]
    assert {recipe.method for recipe in recipes} == set(methods())
    named = {name for recipe in recipes for name in (*recipe.teacher.split(","), recipe.student)}
    assert set(public_models()) <= named


def test_the_settings_are_the_papers_own() -> None:
    dmd2, adapter = Recipe.load("papers/dmd2-sdxl"), Recipe.load("papers/dmd2-sdxl-lora")
    assert (dmd2.options["guidance"], dmd2.options["gan_weight"], dmd2.options["critic_gan_weight"]) == (8, 5e-3, 1e-2)
    assert (dmd2.engine.batch, dmd2.engine.steps, dmd2.engine.optim["all"]["lr"]) == (128, 19000, 5e-7)
    assert (adapter.lora["student"]["rank"], adapter.lora["student"]["alpha"]) == (64, 8)
    assert adapter.engine.optim["all"] == dmd2.engine.optim["all"] | {"lr": 5e-5}
    brush = Recipe.load("papers/swiftbrush-sd21")
    assert brush.options["guidance"] == brush.options["fake_guidance"] == 4.5
    assert brush.options["targets"] == ("to_q", "to_v")
    wan = Recipe.load("papers/phased-dmd-wan22")
    for name in ("generator_times", "critic_times"):  # 20 to 980 of 1,000, shifted by 7, whatever the folder's shift
        law = TimeLaw(**wan.options[name]) if isinstance(wan.options[name], dict) else wan.options[name]
        ends = law.quantile(torch.tensor([0.0, 1.0]), RectifiedFlow(shift=3.0)).tolist()
        assert ends == pytest.approx([7 * u / (1 + 6 * u) for u in (0.02, 0.98)])
    assert {turn["clip_norm"] for turn in wan.engine.optim.values()} == {1.0}
    sid = Recipe.load("papers/sid-lsg-sd15")
    assert sid.options["t_init"] * 999 == pytest.approx(625, abs=0.1)
    assert sid.engine.optim["all"]["betas"] == [0.0, 0.999]


@pytest.mark.parametrize(("world", "numel"), [("cifar10", 3072), ("cifar10-classes", 3072), ("imagenet64", 12288)])
def test_uni_instruct_s_gan_weighs_as_in_the_released_code(world: str, numel: int) -> None:
    """There the score loss weighs 100 and the GAN 0.01, and the critic's terms stand beside a sum over elements, under
    EDM's weights, and its gradient is clipped at 1."""
    uni = Recipe.load(f"papers/uni-instruct-{world}")
    assert uni.options["gan_weight"] == pytest.approx(0.01 / 100)
    assert uni.options["gan_time_weight"] == "edm"
    assert uni.options["critic_gan_weight"] * numel == pytest.approx(1, rel=1e-3)
    assert uni.engine.optim["critic"]["clip_value"] * numel == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in papers()])
@pytest.mark.timeout(900)
def test_a_recipe_is_planned_without_weights_and_data(name: str) -> None:
    found = plan(Recipe.load(name))
    assert found.recipe == Recipe.load(name)  # the plan names the model, not where its configs were written
    assert all(turn.trained > 1e6 or turn.turn == "judge" for turn in found.turns)
    recorded = {entry["recipe"]: entry for entry in json.loads(RECORD.read_text())["plans"]}
    if name in recorded:
        assert max(turn.total for turn in found.turns) == pytest.approx(recorded[name]["step"], rel=0.01)
        assert found.flops == pytest.approx(recorded[name]["flops_per_step"], rel=0.01)


def test_the_page_has_every_recipe_and_the_record_no_other() -> None:
    plans = [entry["recipe"] for entry in json.loads(RECORD.read_text())["plans"]]
    assert set(plans) <= set(papers())
    page = (ROOT / "docs" / "papers.md").read_text()
    for name in papers():
        assert f"- [`{name}`](" in page
        assert (f"| `{name}` |" in page) == (name in plans)


def test_a_run_asks_for_what_only_a_plan_can_do_without(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"teacher 'sdxl' is stabilityai/stable-diffusion-xl-base-1\.0, whose weights"):
        run(Recipe.load("papers/dmd2-sdxl"), tmp_path / "run")
    with pytest.raises(UserError, match=r"data 'cifar10' do not come with stillroom: CIFAR-10"):
        run(Recipe.load("dmd2", data="cifar10"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_name_of_a_paper_is_found_and_hinted_at() -> None:
    assert Recipe.load("papers/dmd2-sdxl", teacher="./mine").teacher == "./mine"
    with pytest.raises(UserError, match="did you mean 'papers/dmd2-sdxl'"):
        Recipe.load(f"papers/{MISSPELT}")
    with pytest.raises(UserError, match=r"no method or recipe 'papers/\.\./dmd2'"):
        Recipe.load("papers/../dmd2")


def test_a_recipe_of_ones_own_may_build_on_one_of_a_paper(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"base": "papers/dmd2-sdxl", "name": "mine", "options": {"guidance": 6.0}}))
    assert Recipe.load(file).options["guidance"] == 6.0
    assert Recipe.load(file).engine.batch == 128
