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
        ("engine.seed=-1", "'engine.seed' must be a whole number from 0 to"),
        ("engine.export=emma", "engine.export"),
        ("engine.ema=0.99", "'engine.ema' must be a list"),
        ("engine=3", "'engine' must be a mapping"),
        ("engine.optim.all.lr=.nan", "'engine.optim.all.lr' must be finite, got nan"),
        ("engine.optim.all.lr=-.inf", "'engine.optim.all.lr' must be finite, got -inf"),
        ("engine.steps.x=3", "engine.steps"),
        ("evaluate.n=-1", "'evaluate.n' must be a whole number, at least 0"),
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


NO_NUMBER = ("x", "null", "true", "[1]", "{}", ".nan")
BELOW, NEGATIVE, ENDLESS = ("0", "-1"), ("-1",), (".inf",)
NO_WHOLE = (*NO_NUMBER, "1.5", ".inf")
IMPOSSIBLE = {
    **dict.fromkeys(("batch", "accumulate", "keep", "log_every", "checkpoint_every"), (*BELOW, *NO_WHOLE)),
    **dict.fromkeys(("steps", "warmup", "seed"), (*NEGATIVE, *NO_WHOLE)),
    **dict.fromkeys(("precision", "parallel", "schedule", "draws"), ("x", "1", "null", "[fp32]")),
    **dict.fromkeys(("compile", "activation_checkpointing", "offload", "check_freezing"), ("on", "1", "x", "null")),
    **dict.fromkeys(("loss_limit", "growth_limit"), (*BELOW, *NO_NUMBER)),
    **dict.fromkeys(("optim", "optim.all"), ("x", "1", "[1]")),
    **dict.fromkeys(
        ("optim.all.lr", "optim.generator.weight_decay", "optim.critic.clip_norm", "optim.all.clip_value"),
        (*NEGATIVE, *NO_NUMBER, *ENDLESS),
    ),
    "optim.all.nan_to_num": (*NEGATIVE, *NO_NUMBER, *ENDLESS),
    "optim.critic.until": (*NEGATIVE, *NO_NUMBER, *ENDLESS, "1.5"),
    "optim.all.eps": (*BELOW, *NO_NUMBER, *ENDLESS),
    "optim.all.betas": ("0.9", "[0.9]", "[0.9, 0.99, 1]", "[0.9, 1]", "[-0.1, 0.9]", "[x, 0.9]", "[.nan, 0.9]", "null"),
    "optim.all.name": ("adamm", "1", "null", "[adam]"),
    "ema": ("x", "1", "[x]", "[{}]", "[{decay: 1}]", "[{decay: -0.1}]", "[{decay: x}]", "[{half_life: 0}]",
            "[{half_life: .inf}]", "[{decay: 0.9, ramp: -1}]", "[{decay: 0.9, of: teacher}]",
            "[{decay: 0.9, name: student}]"),
}  # fmt: skip


@pytest.mark.parametrize("key", IMPOSSIBLE)
def test_every_impossible_value_of_the_engine_is_refused_by_name(key: str) -> None:
    for value in IMPOSSIBLE[key]:
        with pytest.raises(UserError) as caught:
            Recipe.load("dmd2", [f"engine.{key}={value}"])
        assert f"engine.{key}" in str(caught.value), value
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lora.fake.rank=0", "'lora.fake.rank' must be a whole number, at least 1, got 0"),
        ("options.t_init=1.5", "'options.t_init' must be a number, above 0 and at most 1, got 1.5"),
        ("options.student_steps=0", "'options.student_steps' must be a whole number, at least 1, got 0"),
        ("lora.fake.alpha=0", "'lora.fake.alpha' must be a number or null, above 0, got 0"),
        ("lora.fake.targets=[]", "'lora.fake.targets' must be a list (each text), with at least one value, got []"),
        ("lora.fake.targets=to_q", "'lora.fake.targets' must be a list"),
        ("lora.fke.rank=8", "did you mean 'lora.fake'"),
        ("evaluate.seed=1e30", "'evaluate.seed' must be a whole number from 0 to"),
        ("options.guidance=.inf", "'options.guidance' must be a number"),
    ],
)
def test_an_impossible_value_is_told_what_is_legal(override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        Recipe.load("dmd2", [override])
    assert words in str(caught.value)


def test_plain_values_are_read_as_yaml_1_2_says() -> None:
    overrides = [
        "engine.steps=010",
        "engine.keep=0o10",
        "engine.optim.all.lr=1e-4",
        "student=on",
        "data=1e4",
    ]
    recipe = Recipe.load("dmd2", overrides)
    assert (recipe.engine.steps, recipe.engine.keep, recipe.engine.optim["all"]["lr"]) == (10, 8, 1e-4)
    with pytest.raises(UserError, match=r"'options.backward_simulation' must be true or false, got 'on'"):
        Recipe.load("dmd2", ["options.backward_simulation=on"])
    for text in ("1:30", "1_000", "2026-11-29"):
        with pytest.raises(UserError, match=f"'engine.steps' must be a whole number, at least 0, got '{text}'"):
            Recipe.load("dmd2", [f"engine.steps={text}"])


def test_a_name_of_digits_stays_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "digits.yaml"
    path.write_text("base: sim\nname: 007\nengine: {steps: 0010}\n")
    recipe = Recipe.load(path)
    assert recipe.name == "007"
    assert recipe.engine.steps == 10
    path.write_text(recipe.to_yaml())
    assert Recipe.load(path).to_dict() == recipe.to_dict()


@pytest.mark.parametrize("text", ["1e4", "0o10", "010", "on", "1:30", "2026-11-29", "null", "~", "<<", ".5", "1_000"])
def test_a_text_that_looks_like_something_else_survives_the_round_trip(text: str, tmp_path: Path) -> None:
    recipe = Recipe.load("dmd2", [f"data={text}", f"student={text}"])
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe
    assert yaml.safe_load(recipe.to_yaml())["data"] == text


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


def test_a_turn_that_is_switched_off_keeps_its_settings() -> None:
    """The shipped recipe sets the critic's optimizer: without a critic it is as good as before."""
    recipe = Recipe.load("sana-sprint", ["options.gan_weight=0"])
    assert "critic" in recipe.engine.optim
    assert "discriminator" not in recipe.trained()
    with pytest.raises(UserError, match=r"did you mean 'engine\.optim\.critic'"):
        Recipe.load("sana-sprint", ["options.gan_weight=0", "engine.optim.critc.lr=1"])
