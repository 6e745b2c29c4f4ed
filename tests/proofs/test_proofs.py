"""Proofs: verdicts are the stated inequality over all seeds, equal arms share a run, shipped proofs are sound."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stillroom.bench import benches, get_bench
from stillroom.bench.classes import shuffle
from stillroom.errors import UserError
from stillroom.method import get_method
from stillroom.proofs import get_proofs, proofs, runner
from stillroom.proofs.base import Arm, Claim, Proof, merge
from stillroom.proofs.runner import (
    arm_file,
    prove,
    read_arm,
    recipe_of,
    run_arm,
    table,
    to_json,
    value_text,
    write_result,
)

RESULTS = Path(__file__).parents[2] / "results"
LESS = Claim("less", "left is at most half of right", "", "ced", "a", "<=", 0.5, "b")


@pytest.mark.parametrize(
    ("lefts", "rights", "verdict"),
    [
        ([1.0, 1.0, 1.0], [2.0, 3.0, 2.5], "holds"),
        ([1.0, 1.0, 1.0], [2.0, 1.9, 2.5], "unresolved"),
        ([1.0, 1.0, 1.0], [1.9, 1.9, 1.0], "fails"),
        ([1.0], [math.inf], "holds"),  # a diverged baseline is beaten
        ([math.inf], [1.0], "fails"),
    ],
)
def test_a_claim_holds_only_if_every_seed_shows_it(lefts: list[float], rights: list[Any], verdict: str) -> None:
    assert LESS.verdict(lefts, rights) == verdict


def test_a_claim_against_a_bound_needs_no_second_arm() -> None:
    claim = Claim("accurate", "accuracy is at least 0.9", "", "accuracy", "a", ">=", bound=0.9)
    assert claim.verdict([0.95, 0.9], [None, None]) == "holds"
    assert claim.margin == "a >= 0.9"


def test_a_claim_may_ask_for_a_difference() -> None:
    more = Claim("more", "left is above right by 0.3", "", "all", "a", ">=", right="b", offset=0.3)
    assert more.verdict([0.8, 0.5], [0.4, 0.2]) == "holds"
    assert more.verdict([0.8, 0.45], [0.4, 0.2]) == "unresolved"
    assert more.margin == "a >= b + 0.3"
    both = Claim("both", "twice, less a bit", "", "all", "a", "<=", 2.0, "b", offset=-0.1)
    assert both.holds(0.7, 0.4)
    assert not both.holds(0.71, 0.4)
    assert both.margin == "a <= 2 x b - 0.1"
    assert LESS.margin == "a <= 0.5 x b"
    assert Claim("same", "", "", "all", "a", "<=", right="b").margin == "a <= 1 x b"


def test_a_claim_about_an_unknown_arm_is_refused() -> None:
    with pytest.raises(ValueError, match="no arm 'b'"):
        Proof("x", "mechanism", "ring", (Arm("a"),), (LESS,))


def test_variations_merge_and_equal_arms_share_a_key() -> None:
    base = Arm("a", "sim", options={"c": 0.1, "t_init": 1.0}, engine={"optim": {"critic": {"lr": 1e-3, "eps": 1e-8}}})
    other = base.with_("b", options={"c": 0.2}, engine={"optim": {"critic": {"lr": 0.0}}})
    assert other.options == {"c": 0.2, "t_init": 1.0}
    assert other.engine["optim"]["critic"] == {"lr": 0.0, "eps": 1e-8}
    assert base.options["c"] == 0.1
    assert base.with_("another name").key("ring", 0) == base.key("ring", 0)
    assert len({base.key("ring", 0), base.key("ring", 1), base.key("pair", 0), other.key("ring", 0)}) == 4
    assert merge({"x": {"y": 1}}, {"x": {"z": 2}}) == {"x": {"y": 1, "z": 2}}


@pytest.mark.parametrize("slug", sorted(proofs()))
def test_shipped_proofs_have_both_levels_controls_and_valid_options(slug: str) -> None:
    levels: dict[str, set[str]] = {}
    for proof in get_proofs(slug):
        keys = {score.key for score in benches()[proof.bench].scores}
        levels.setdefault(proof.level, set()).update(arm.name for arm in proof.arms)
        levels[proof.level] |= {arm.teacher for arm in proof.arms}
        for arm in proof.arms:
            if arm.method:
                assert recipe_of(arm, proof.bench, 3).engine.seed == 3
        for claim in proof.claims:
            assert claim.metric.startswith(("health/", "last/")) or claim.metric in keys
    assert set(levels) == {"mechanism", "text" if get_method(slug).wing == "language" else "image"}
    start = {"untouched", "teacher-1"}  # the same where a student begins as its teacher
    assert all(start & names for names in levels.values())
    assert all("shuffled" in names for level, names in levels.items() if level != "image")


def test_no_arm_trains_at_a_rate_of_0() -> None:
    """A fake score that never learns is the teacher, and its difference from the teacher moves nothing: such a control
    tells the same as the untouched student."""
    for known in proofs().values():
        for arm in (arm for proof in known for arm in proof.arms):
            for name, settings in arm.engine.get("optim", {}).items():
                assert min(settings.get("lr", 1.0), settings.get("until", 1.0)) > 0, (arm.name, name)


def test_an_unknown_method_has_no_proof() -> None:
    with pytest.raises(UserError, match="did you mean 'dmd2'"):
        get_proofs("dmd")


def test_a_shuffled_teacher_answers_for_the_next_class_and_leaves_null_alone() -> None:
    bench = get_bench("ring")
    right, wrong = bench.given()["teacher"], bench.given()["teacher"]
    shuffle(wrong)
    x, t = torch.randn(4, 2), torch.full((4,), 0.5)
    asked, meant = torch.tensor([0, 3, 7, 8]), torch.tensor([1, 4, 0, 8])
    torch.testing.assert_close(wrong(x, t, {"label": asked}).x0, right(x, t, {"label": meant}).x0)


@pytest.fixture
def short() -> Arm:
    return next(arm for arm in get_proofs("sim")[1].arms if arm.name == "sim").with_("sim", engine={"steps": 6})


def test_an_arm_is_reproducible_and_reports_its_cost(short: Arm) -> None:
    first, second = (run_arm(short, get_bench("ring", 3)) for _ in range(2))
    assert first["scores"] == second["scores"]
    assert first["scores"] != run_arm(short, get_bench("ring", 4))["scores"]
    assert first["cost"]["steps"] == 6
    assert first["cost"]["nfe"] == 1


def test_a_diverged_training_is_a_result(short: Arm) -> None:
    broken = short.with_("broken", engine={"optim": {"critic": {"lr": 1e12}}})
    result = run_arm(broken, get_bench("ring"))
    assert "diverged" in result
    assert result["scores"]["ced"] == math.inf
    assert result["scores"]["in_mode"] == 0
    assert math.isnan(result["scores"]["std"])  # neither way is better


def test_results_are_put_together_from_measured_arms_only(tmp_path: Path) -> None:
    _, proof = get_proofs("sim")
    for name, value in (("sim", 0.01), ("untouched", 0.1)):
        arm = next(a for a in proof.arms if a.name == name)
        for seed in (0, 1):
            file = arm_file(tmp_path, proof, arm, seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            scores = dict.fromkeys((score.key for score in benches()["ring"].scores), value)
            run = {"scores": scores, "cost": {"seconds": 1.0}, "health": {}, "commit": "c", "machine": "m"}
            file.write_text(json.dumps(run))
    result = write_result("sim", (0, 1), tmp_path)
    judged = [claim for claim in result["claims"] if claim["verdict"] != "not measured"]
    assert [claim["id"] for claim in judged] == ["learns"]
    assert judged[0]["verdict"] == "holds"
    assert judged[0]["arms"]["sim"]["mean"] == pytest.approx(0.01)
    assert "unmeasured" not in judged[0]
    assert json.loads((tmp_path / "sim.json").read_text()) == result


def test_arms_of_some_seeds_are_told_apart_and_judge_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stillroom.proofs.runner.get_bench", lambda name: SimpleNamespace(floor=dict))
    image, mechanism = get_proofs("sim")
    for proof in (image, mechanism):
        file = arm_file(tmp_path, proof, proof.arms[0], 1)
        file.parent.mkdir(parents=True, exist_ok=True)
        scores = dict.fromkeys((score.key for score in benches()[proof.bench].scores), 0.5)
        facts = {"cost": {"seconds": 2.0}, "health": {"health/sample_std": [1.0, 2.0]}, "commit": "c", "machine": "m"}
        file.write_text(json.dumps({"scores": scores, "seed": 1, **facts}))
    result = write_result("sim", (0, 1), tmp_path)
    assert {claim["verdict"] for claim in result["claims"]} == {"not measured"}
    assert list(result["partly"]) == ["fashion"]
    arm = result["partly"]["fashion"][image.arms[0].name]
    assert arm["seeds"] == [1]
    assert arm["fd"]["mean"] == 0.5
    assert arm["fd"]["cost"] == {"seconds": 2.0}
    assert result["health"] == {"health/sample_std": [1.0, 2.0]}
    assert result["commit"] == ["c"]


def test_a_claim_without_its_arms_is_listed_as_not_measured(tmp_path: Path) -> None:
    result = write_result("sim", (0,), tmp_path)
    assert [claim["id"] for claim in result["claims"]] == [claim.id for p in get_proofs("sim") for claim in p.claims]
    assert {claim["verdict"] for claim in result["claims"]} == {"not measured"}
    robust = next(claim for claim in result["claims"] if claim["id"] == "robust" and claim["level"] == "image")
    assert robust["unmeasured"] == ["huber-5x-lr", "l2-5x-lr"]
    assert result["floor"] == {}  # which no bench is asked for
    rows = table(result)
    assert ("robust", "huber-5x-lr", "fd not measured", "", "not measured: huber-5x-lr <= 0.8 x l2-5x-lr") in rows


@pytest.mark.parametrize(
    ("arm", "told"),
    [
        (None, "not measured"),
        ({"values": [None], "mean": None, "sd": None}, "–"),  # not trained: it has no number of the training's log
        ({"values": [None] * 3, "mean": None, "sd": None, "cost": {"steps": 9}}, "–"),  # nor does every method log it
        ({"values": [None] * 3, "mean": None, "sd": None, "diverged": 3}, "diverged"),
        ({"values": [0.0] * 3, "mean": 0.0, "sd": 0.0, "diverged": 3}, "diverged"),  # the worst share is a number
        ({"values": [1.0, None], "mean": None, "sd": None, "diverged": 1}, "diverged at 1 of 2 seeds"),
        ({"values": [1.0, 0.0], "mean": 0.5, "sd": 0.5, "diverged": 1}, "0.5 ± 0.5, diverged at 1 of 2 seeds"),
        ({"values": [1.0, 2.0], "mean": 1.5, "sd": 0.5}, "1.5 ± 0.5"),
    ],
)
def test_an_arm_diverged_only_where_its_record_says_so(arm: dict[str, Any] | None, told: str) -> None:
    assert value_text(arm) == told


def test_recorded_results_hold_every_claim_and_say_diverged_as_their_arms_do() -> None:
    for slug, known in proofs().items():
        if not (RESULTS / f"{slug}.json").exists():  # its page says so
            continue
        result = json.loads((RESULTS / f"{slug}.json").read_text())
        assert [c["id"] for c in result["claims"]] == [claim.id for proof in known for claim in proof.claims], slug
        arms = {(proof.bench, arm.name): (proof, arm) for proof in known for arm in proof.arms}
        for claim in result["claims"]:
            for name, told in claim["arms"].items():
                files = [arm_file(RESULTS, *arms[claim["world"], name], seed) for seed in result["seeds"]]
                assert told.get("diverged", 0) == sum('"diverged"' in file.read_text() for file in files), (slug, name)


def test_results_are_strict_json_and_a_diverged_arm_reads_back_as_the_worst(tmp_path: Path) -> None:
    file = tmp_path / "arm.json"
    file.write_text(to_json({"scores": {"ced": math.inf, "std": math.nan}, "cost": {"steps": 3}}))
    assert "Infinity" not in file.read_text()
    found = read_arm(file, benches()["ring"].scores)["scores"]
    assert found["ced"] == math.inf
    assert math.isnan(found["std"])


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown level"):
        prove(["sim"], level="pictures", results=tmp_path)
    with pytest.raises(UserError, match="distinct seeds"):
        prove(["sim"], seeds=(1, 1), results=tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_arm_starts_from_what_another_ended_with(
    short: Arm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path))
    bench = get_bench("ring", 1)
    still = short.with_("still", engine={"steps": 0}, after=short)
    assert run_arm(still, bench)["scores"] == run_arm(short, bench)["scores"]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    longer = short.with_("longer", after=short)
    assert run_arm(longer, bench)["scores"] != run_arm(still, bench)["scores"]
    assert longer.key("ring", 1) != short.key("ring", 1)
    renamed = short.with_("longer", after=short.with_("another name"))
    assert renamed.key("ring", 1) == longer.key("ring", 1)


def test_an_arm_that_others_start_from_keeps_its_weights(
    short: Arm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path))
    bench, trained = get_bench("ring", 1), list[str]()
    train = runner.train
    monkeypatch.setattr(runner, "train", lambda trainer: trained.append("") or train(trainer))
    first = run_arm(short, bench, keep=True)
    still = run_arm(short.with_("still", engine={"steps": 0}, after=short), bench)
    assert len(trained) == 1
    assert still["scores"] == first["scores"]


def test_a_bench_with_one_set_of_data_refuses_others(short: Arm) -> None:
    with pytest.raises(UserError, match="not images"):
        run_arm(short.with_("other", data={"images": 5}), get_bench("ring"))


@pytest.mark.parametrize("slug", sorted(path.stem for path in RESULTS.glob("*.json")))
def test_recorded_arms_are_found_again(slug: str) -> None:
    """Else a change (of a recipe, of options) has made recorded results those of arms that no longer exist, and the
    proof would train them all anew."""
    result = json.loads((RESULTS / f"{slug}.json").read_text())
    shown = {(claim["level"], claim["world"], name) for claim in result["claims"] for name in claim["arms"]}
    lost = [
        (proof.level, arm.name, seed)
        for proof in get_proofs(slug)
        for arm in proof.arms
        if (proof.level, proof.bench, arm.name) in shown
        for seed in result["seeds"]
        if not arm_file(RESULTS, proof, arm, seed).exists()
    ]
    assert shown
    assert lost == []


def commits(record: Any) -> set[str]:
    """What stands under ``commit`` anywhere in a record."""
    if isinstance(record, list):
        return set().union(*map(commits, record))
    if not isinstance(record, dict):
        return set()
    own = record.get("commit", [])
    return set().union([own] if isinstance(own, str) else own, *map(commits, record.values()))


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_record_names_a_commit_of_this_history() -> None:
    """A commit that was left behind by a rebase is nobody's to look up."""
    log = ["git", "-C", str(RESULTS.parent), "rev-list", "HEAD"]
    found = subprocess.run(log, capture_output=True, text=True, check=False)
    if found.returncode or (RESULTS.parent / ".git" / "shallow").exists():
        pytest.skip("no whole history here")
    known = {commit[:12] for commit in found.stdout.split()}
    named = {c: path for path in RESULTS.rglob("*.json") for c in commits(json.loads(path.read_text()))}
    assert named
    assert {commit: path.name for commit, path in named.items() if commit[:12] not in known} == {}
