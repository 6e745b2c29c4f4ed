"""Recipes: what goes in comes out again, and every mistake is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.errors import UserError
from stillroom.method import get_method
from stillroom.recipe import DEFAULT, Recipe, shipped


@pytest.mark.parametrize("slug", shipped())
def test_a_shipped_recipe_survives_the_round_trip(slug: str, tmp_path: Path) -> None:
    recipe = Recipe.load(slug)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    again = Recipe.load(tmp_path / "recipe.yaml")
    assert again == recipe
    assert again.hash() == recipe.hash()


def test_the_resolved_recipe_states_every_option_and_setting() -> None:
    recipe = Recipe.load(DEFAULT)
    tree = yaml.safe_load(recipe.to_yaml())
    assert set(tree["options"]) == set(get_method(recipe.method).Options.__dataclass_fields__)
    assert {"steps", "batch", "seed", "precision", "ema"} <= set(tree["engine"])


def test_options_become_the_methods_own_options() -> None:
    recipe = Recipe.load("dmd2", ["options.critic_times={law: logit-normal, mean: 0.5}", "options.gan_weight=0"])
    options = recipe.method_options()
    assert isinstance(options, get_method("dmd2").Options)
    assert (options.critic_times.law, options.critic_times.mean, options.gan_weight) == ("logit-normal", 0.5, 0.0)


def test_overrides_take_the_type_of_their_key() -> None:
    overrides = ["engine.steps=1e3", "engine.optim.all.lr=1e-4", "name=007", "options.backward_simulation=false"]
    recipe = Recipe.load("dmd2", overrides)
    assert recipe.engine.steps == 1000
    assert isinstance(recipe.engine.steps, int)
    assert recipe.engine.optim["all"]["lr"] == 1e-4
    assert recipe.name == "007"
    assert recipe.options["backward_simulation"] is False


def test_an_override_leaves_its_neighbours_alone() -> None:
    before, after = Recipe.load("dmd2"), Recipe.load("dmd2", ["engine.optim.generator.lr=0.5"])
    assert after.engine.optim["generator"]["lr"] == 0.5
    assert after.engine.optim["critic"] == before.engine.optim["critic"]
    assert after.options == before.options
    several = Recipe.load("dmd2", ["options={guidance: 2}", "options.gan_weight=0"])
    assert (several.options["guidance"], several.options["gan_weight"]) == (2, 0)


def test_a_recipe_with_a_base_holds_only_what_differs(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: dmd2\noptions: {gan_weight: 0}\nengine:\n  optim:\n    generator: {lr: 0.5}\n")
    assert Recipe.load(file) == Recipe.load("dmd2", ["options.gan_weight=0", "engine.optim.generator.lr=0.5"])
    assert "base" not in Recipe.load(file).to_yaml()
    file.write_text("base: dmd3\n")
    with pytest.raises(UserError, match=r"mine.yaml: base 'dmd3' is no shipped recipe \(did you mean 'dmd2'"):
        Recipe.load(file)
    file.write_text("base: [dmd2]\n")
    with pytest.raises(UserError, match="is no shipped recipe"):
        Recipe.load(file)


def test_the_hash_is_of_what_determines_the_result() -> None:
    base = Recipe.load("dmd2").hash()
    assert Recipe.load("dmd2", name="another").hash() == base
    assert Recipe.load("dmd2", ["engine.seed=1"]).hash() != base
    assert Recipe.load("dmd2", ["options.guidance=2"]).hash() != base


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("options.gan_weigth=0", "did you mean 'options.gan_weight'"),
        ("gan_weight=0", "did you mean 'options.gan_weight'"),
        ("engine.setps=3", "did you mean 'engine.steps'"),
        ("steps=3", "did you mean 'engine.steps'"),
        ("engine.optim.genrator.lr=1", "did you mean 'engine.optim.generator'"),
        ("engine.optim.generator.lrr=1", "did you mean 'engine.optim.generator.lr'"),
        ("options.renoise=frsh", "one of fresh, fixed, ddim"),
        ("options.critic_times.law=unifrm", "did you mean 'uniform'"),
        ("options.gan_weight=much", "'options.gan_weight' must be a number, got 'much'"),
        ("options.gan_weight=.nan", "'options.gan_weight' must be a number"),
        ("options.student_steps=1.5", "'options.student_steps' must be a whole number"),
        ("options.backward_simulation=1", "'options.backward_simulation' must be true or false"),
        ("options.critic_times.std=-1", "options.critic_times"),
        ("engine.steps=-1", "engine.steps"),
        ("engine.steps=-5", "engine.steps"),
        ("engine.steps=true", "'engine.steps' must be a whole number"),
        ("engine.precision=fp8", "fp32, bf16"),
        ("engine.seed=-1", "'engine.seed' must be from 0"),
        ("engine.export=emma", "engine.export"),
        ("engine.ema=0.99", "'engine.ema' must be a list"),
        ("engine=3", "'engine' must be a mapping"),
        ("engine.steps.x=3", "engine.steps"),
        ("evaluate.n=-1", "'evaluate.n' must be at least 0"),
        ("name=a/b", "'name' must be letters"),
        ("method=dmd3", "did you mean 'dmd2'"),
        ("options=[1, 2", "override options"),
        ("no-equals-sign", "key=value"),
        ("engine.steps=!!python/object:os.system 3", "python/object"),
    ],
)
def test_a_wrong_override_is_named(override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        Recipe.load("dmd2", [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: dmd2\nengine: {steps: 3}\nengine: {steps: 4}\n", "line 3: key 'engine' is given twice"),
        ("method: !!python/name:os.system\n", "python/name"),
        ("- method\n", "mapping"),
        ("teacher: fashion\n", "'method' is missing"),
        ("method: [dmd2\n", "line"),
        ("method: dmd2\noptions: 3\n", "'options' must be a mapping"),
        ("method: dmd2\nlora: {fake: 8}\n", "lora.fake"),
    ],
)
def test_a_wrong_file_is_named(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        Recipe.load(path)
    assert words in str(caught.value)


KEYS = st.sampled_from(
    ["method", "name", "options", "options.guidance", "engine.steps", "engine.optim.all", "lora", "x"]
)


@settings(max_examples=60)
@given(KEYS, st.text(max_size=12))
def test_no_text_on_the_command_line_escapes_the_check(key: str, value: str) -> None:
    try:
        recipe = Recipe.load("dmd2", [f"{key}={value}"])
    except UserError:
        return
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


def test_reading_the_recipe_module_does_not_import_torch() -> None:
    code = "import sys, stillroom.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("override", "now"), [("options.start=lightgen", "student"), ("synthesis.images=5", "options.synthesis")]
)
def test_a_renamed_key_is_told_its_new_name(override: str, now: str) -> None:
    with pytest.raises(UserError, match=f"did you mean '{now}'"):
        Recipe.load("lightgen", [override])
