"""LightGen, turn by turn and stage by stage: what is minimised, who moves, what the pairs are, that a run resumes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gaussians import draws, moved, play
from stillroom.diffusion.masking import TEXT, MaskedSampler, MaskRatio
from stillroom.engine.config import EngineConfig
from stillroom.engine.distributed import full
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.evaluation import filters
from stillroom.method import get_method
from stillroom.methods.masked.lightgen import LightGen
from stillroom.networks.mar import MARSettings
from tiny_mar import SIZES, Captioned, make_mar, space

NETWORK: dict[str, Any] = {**SIZES, "dropout": 0.2, "attention_dropout": 0.2}
B = 6


def build(network: dict[str, Any] | None = None, **options: Any) -> LightGen:
    """A method some way into its training; samples cost little."""
    sizes = MARSettings(**{**NETWORK, **(network or {})})
    fast = {"steps": 3, "head_steps": 2, "guidance": 2.0, "clip": 1.5}
    method = LightGen(LightGen.Options(**{"network": sizes, **fast, **options}))
    torch.manual_seed(0)
    method.build(space())
    method.student.load_state_dict(make_mar(**(network or {})).state_dict())
    return method


def entered(data: Captioned | None = None, seed: int = 0, **options: Any) -> tuple[LightGen, Captioned]:
    """A method that has just begun its last stage, with the data of that stage, what it has made of them too."""
    method, data = build(**options), data or Captioned()
    method.draw = draws(B, seed)
    data.made = method.enter(method.stages()[-1], data, resumed=False) or {}
    return method, data


def batch(data: Captioned, n: int = B) -> dict[str, Any]:
    return rows_of(data, torch.arange(n))


def rows_of(data: Captioned, index: Tensor) -> dict[str, Any]:
    """As the engine reads a stage's data."""
    return data.rows(index) | {name: column[index] for name, column in data.made.items()}


def nudge(method: LightGen, seed: int = 9) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in method.student.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)


# --- stages -----------------------------------------------------------------------------------------------------------
def staged(parts: Any = (), **options: Any) -> list[tuple[str, tuple[str, ...] | None, str, float]]:
    method = build(**options)
    method.prepare(Captioned(parts=dict.fromkeys(parts)))
    assert all(stage.own_schedule for stage in method.stages())
    return [(stage.name, stage.turns, stage.data, stage.lr) for stage in method.stages()]


def test_stages_follow_the_paper() -> None:
    assert staged(parts=("small", "pairs")) == [
        ("pretrain", ("masked",), "small", 1.0),
        ("adapt", ("masked",), "", 0.1),
        ("dpo", ("prefer",), "pairs", 1.0),
    ]


def test_without_small_images_the_full_ones_are_used() -> None:
    assert staged(parts=("pairs",))[0] == ("pretrain", ("masked",), "", 1.0)


def test_a_share_of_zero_leaves_a_stage_out() -> None:
    assert [name for name, *_ in staged(adapt_share=0.0, dpo_share=0.0)] == ["pretrain"]
    assert not hasattr(build(dpo_share=0.0), "reference")
    with pytest.raises(UserError, match="share 0"):
        build(pretrain_share=0.0, adapt_share=0.0, dpo_share=0.0)


def test_the_control_trains_on_winners_in_the_last_stage() -> None:
    assert staged(parts=("pairs",), preference="sft")[-1] == ("sft", ("finetune",), "pairs", 1.0)


def test_rounds_share_the_last_stage_among_them() -> None:
    rounds = [f"dpo {number}" for number in range(3)]
    found = build(dpo_share=0.3, dpo_rounds=3).stages()[2:]
    assert [stage.name for stage in found] == rounds
    assert [(stage.kind, stage.data, stage.round) for stage in found] == [("dpo", "pairs", n) for n in range(3)]
    assert sum(stage.share for stage in found) == pytest.approx(0.3)
    assert staged(parts=("pairs",), dpo_rounds=2, preference="sft")[-1] == ("sft 1", ("finetune",), "pairs", 1.0)


def test_pairs_that_are_missing_are_asked_for() -> None:
    with pytest.raises(UserError, match="part 'pairs'"):
        Trainer(build(), Captioned(), EngineConfig(steps=10, batch=2), show=False)


# --- building ---------------------------------------------------------------------------------------------------------
def test_the_student_fits_the_space() -> None:
    student = build().student
    assert (student.channels, student.grid, student.config["text_width"]) == (2, (4, 4), 5)


def test_latents_that_patches_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="patch=3 does not divide"):
        build(network={"patch": 3})


def test_data_of_another_codec_are_refused() -> None:
    data = Captioned()
    data.shape = (4, 8, 8)
    with pytest.raises(UserError, match="4 channels"):
        build().prepare(data)


def test_the_sampler_carries_the_options() -> None:
    options = {
        "steps": 7,
        "guidance": 2.5,
        "guidance_schedule": "linear",
        "temperature": 0.9,
        "head_steps": 11,
        "clip": 2.0,
    }
    assert build(**options).sampler() == MaskedSampler(**options)  # type: ignore[arg-type]


def test_the_papers_values_are_the_defaults() -> None:
    o = LightGen.Options()
    assert (o.network.preset, o.mask_ratio, o.repeats, o.text_drop) == ("large", MaskRatio(), 4, 0.1)
    assert (o.beta, o.anchor, o.steps, o.guidance, o.guidance_schedule, o.head_steps) == (
        5000,
        0,
        64,
        4,
        "constant",
        100,
    )
    turns = {turn.name: turn.optim for turn in LightGen().turns()}
    assert (turns["masked"].lr, turns["prefer"].lr) == (1e-4, 1e-8)
    assert {(t.betas, t.weight_decay, t.clip_norm) for t in turns.values()} == {((0.9, 0.99), 0.02, 3.0)}
    assert get_method("lightgen") is LightGen
    assert LightGen.wing == "masked"


def test_weight_decay_spares_vectors_and_the_head() -> None:
    trainer = Trainer(build(dpo_share=0.0), Captioned(), EngineConfig(steps=1, batch=2), show=False)
    player = trainer.players["masked"]
    spared, decayed = sorted(player.optimizer.param_groups, key=lambda group: group["weight_decay"])
    assert (spared["weight_decay"], decayed["weight_decay"]) == (0.0, 0.02)
    ids = {id(p): name for name, p in player.parameters.items()}
    assert len(spared["params"]) + len(decayed["params"]) == len(player.trained)
    for p in spared["params"]:
        assert p.ndim == 1 or ids[id(p)].startswith("student.head.")
    for p in decayed["params"]:
        assert p.ndim > 1
        assert not ids[id(p)].startswith("student.head.")


# --- masked training --------------------------------------------------------------------------------------------------
def test_the_masked_loss_is_the_mean_over_all_masked_tokens_and_draws() -> None:
    method, data = build(text_drop=0.0), Captioned()
    terms = play(method, "masked", batch(data), seed=5)
    method.draw = draws(B, 5)
    x = method.latents(batch(data))
    method.draw.uniform(B)
    parts = method.randomness(x)
    assert parts["t"].shape == (B, 4, parts["masked"])
    loss = method.student(x, batch(data)["cond"][TEXT], **parts)
    assert float(terms["mse"]) == pytest.approx(float(loss.mse.mean()))
    assert float(terms["vb"]) == pytest.approx(float(loss.vb.mean()))
    assert moved(method) == {"student"}


def test_fixed_variance_leaves_the_bound_out() -> None:
    method = build(network={"learned_variance": False}, dpo_share=0.0)
    assert set(play(method, "masked", batch(Captioned()))) == {"mse"}


def test_the_posterior_is_sampled_afresh() -> None:
    method, given = build(), batch(Captioned())
    method.draw = draws(B, 1)
    away = (method.latents(given) - given["x"]) / given["std"]
    assert torch.allclose(away, torch.randn(away.shape, generator=torch.Generator().manual_seed(1)), atol=1e-4)
    del given["std"]
    assert torch.equal(method.latents(given), given["x"])


@pytest.mark.parametrize("mirror", [0.0, 0.5, 1.0])
def test_mirrored_images_are_picked_with_their_probability(mirror: float) -> None:
    method, data = build(), Captioned(n=200, mirror=True)
    given = {**batch(data, 200), "std": torch.zeros(200, 2, 8, 8), "mirrored_std": torch.zeros(200, 2, 8, 8)}
    method.draw = draws(200)
    x = method.latents(given, mirror)
    flipped = (x == given["mirrored"]).flatten(1).all(1)
    assert bool((flipped | (x == given["x"]).flatten(1).all(1)).all())
    assert float(flipped.float().mean()) == pytest.approx(mirror, abs=0.08)


def test_mirroring_without_mirrored_images_is_refused() -> None:
    with pytest.raises(UserError, match="mirrored images"):
        play(build(mirror=0.5), "masked", batch(Captioned()))


def test_the_text_is_dropped_with_its_probability() -> None:
    """With every text dropped, the text does not matter; with none, the null text gets no gradient."""
    given = batch(Captioned())
    other = {**given, "cond": {TEXT: given["cond"][TEXT] + 1}}
    always = build(text_drop=1.0)
    assert float(play(always, "masked", given)["mse"]) == float(play(always, "masked", other)["mse"])
    never = build(text_drop=0.0)
    play(never, "masked", given)
    assert float(never.student.null_text.grad.abs().max()) == 0.0  # type: ignore[union-attr]


# --- preferences ------------------------------------------------------------------------------------------------------
def test_at_the_start_nothing_is_preferred() -> None:
    """Student and reference are one network and share mask, order, times and noise: the logit is exactly 0."""
    method, data = entered()
    terms = play(method, "prefer", batch(data))
    assert float(terms["dpo"]) == pytest.approx(math.log(2), abs=1e-7)
    assert set(terms) == {"dpo"}
    for name, value in {"winner_drift": 0.0, "loser_drift": 0.0, "preference_accuracy": 0.5}.items():
        assert float(method.notes[name]) == value


def test_dropout_is_off_even_in_training_mode() -> None:
    method, data = entered()
    method.train()
    method.draw = draws(B)
    assert float(method.prefer(batch(data))["dpo"]) == pytest.approx(math.log(2), abs=1e-7)


def test_only_the_student_moves() -> None:
    method, data = entered()
    nudge(method)
    play(method, "prefer", batch(data), train_all=True)
    assert moved(method) == {"student"}


def test_the_preference_loss_by_four_separate_passes() -> None:
    method, data = entered(beta=50.0, anchor=2.0)
    nudge(method)
    terms = play(method, "prefer", batch(data), seed=3)
    method.draw = draws(B, 3)
    given = batch(data)
    noise = method.draw.normal_like(given["x"])
    win = given["x"] + given["std"] * noise
    lose = given["loser"].float() + given["loser_std"].float() * noise
    parts, text = method.randomness(win), given["cond"][TEXT]
    policy = [method.student(x, text, **parts).mse for x in (win, lose)]
    ref = [method.reference(x, text, **parts).mse for x in (win, lose)]
    delta = (policy[0] - ref[0]) - (policy[1] - ref[1])
    assert float(terms["dpo"]) == pytest.approx(float(-torch.log(torch.sigmoid(-25 * delta)).mean()), rel=1e-4)
    assert float(terms["anchor"]) == pytest.approx(2.0 * float(policy[0].mean()), rel=1e-4)
    assert float(method.notes["winner_drift"]) == pytest.approx(float((policy[0] - ref[0]).mean()), rel=1e-3, abs=1e-6)


def gradient(method: LightGen, data: Captioned) -> Tensor:
    play(method, "prefer", batch(data))
    return torch.cat([p.grad.flatten() for p in method.student.parameters() if p.grad is not None])


def test_swapped_labels_turn_the_gradient_round() -> None:
    right, wrong = (gradient(*entered(swap_labels=share)) for share in (0.0, 1.0))
    assert torch.allclose(right, -wrong, rtol=1e-3, atol=1e-4 * float(right.abs().max()))
    assert float(right.abs().max()) > 0


def test_a_share_of_the_labels_is_swapped_once_and_for_all() -> None:
    _, data = entered(Captioned(n=400), swap_labels=0.25, losers="mirrored")
    assert float(data.made["swapped"].float().mean()) == pytest.approx(0.25, abs=0.06)


# --- the pairs --------------------------------------------------------------------------------------------------------
def test_the_reference_is_the_student_as_it_stands_and_stays() -> None:
    method, _ = entered()
    before = [p.clone() for p in method.student.parameters()]
    nudge(method)
    assert all(torch.equal(a, b) for a, b in zip(before, method.reference.parameters(), strict=True))
    method.draw = draws(B)
    method.enter(method.stages()[-1], Captioned(), resumed=True)  # its weights came from the checkpoint
    assert all(torch.equal(a, b) for a, b in zip(before, method.reference.parameters(), strict=True))


def test_losers_are_the_references_own_samples_for_the_winners_captions() -> None:
    method, data = entered(loser_round_trip=False)
    g = torch.Generator().manual_seed(0)
    torch.rand(data.n, generator=g)
    noise = torch.randn(data.n, *data.shape, generator=g)
    expected = method.sampler().sample(method.reference, noise, {TEXT: data.text[TEXT][data.which]}, g)
    assert torch.equal(data.made["loser"], expected.half())
    assert float(data.made["loser_std"].abs().max()) == 0.0


def test_losers_become_pictures_and_are_encoded_again() -> None:
    _, plain = entered(loser_round_trip=False)
    _, data = entered()
    expected = ((plain.made["loser"].float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    assert float((data.made["loser"].float() - expected).abs().max()) < 2 / 255
    assert float(data.made["loser"].float().abs().max()) <= 1.0
    assert torch.allclose(data.made["loser_std"].float(), torch.tensor(0.1), atol=1e-3)


def test_losers_may_be_the_winners_mirror_images() -> None:
    _, data = entered(losers="mirrored")
    expected = data.mean.float().clamp(-1, 1).flip(-1)
    assert float((data.made["loser"].float() - expected).abs().max()) < 2 / 255


def test_every_round_draws_by_the_student_as_it_stands() -> None:
    method, data = entered(dpo_rounds=2)
    first = data.made["loser"]
    nudge(method)
    method.draw = draws(B)  # what differs is the network that draws
    again = method.enter(method.stages()[-1], data, resumed=False)
    assert all(
        torch.equal(a, b) for a, b in zip(method.student.parameters(), method.reference.parameters(), strict=True)
    )
    assert again is not None
    assert not torch.equal(again["loser"], first)


@pytest.fixture
def bright(monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that keeps bright pictures and has nothing to say about caption 4."""
    monkeypatch.setattr(filters._FILTERS, "found", dict(filters._FILTERS.found))

    @filters.register_filter("bright")
    def rule(images: Tensor, captions: Any) -> Any:
        means = images.mean((1, 2, 3)).tolist()
        return [None if text == "caption 4" else float(mean > 0) for mean, text in zip(means, captions, strict=True)]


def brightness(means: Tensor) -> Tensor:
    """Of the pictures that latents decode to, which is the latents themselves here."""
    return means.float().mean((1, 2, 3))


@pytest.mark.usefixtures("bright")
def test_own_winners_are_kept_and_own_losers_rejected() -> None:
    _, data = entered(winners="own", judge="bright", tries=6)
    same = (data.made["winner"] == data.made["loser"]).flatten(1).all(1)
    assert 0 < int((~same).sum()) < data.n
    assert float(brightness(data.made["winner"][~same]).min()) > -1e-3
    assert float(brightness(data.made["loser"][~same]).max()) < 1e-3
    assert bool(same[data.which == 4].all())  # never rejected
    assert torch.allclose(data.made["winner_std"].float(), torch.tensor(0.1), atol=1e-3)


@pytest.mark.usefixtures("bright")
def test_a_pair_that_the_judge_cannot_tell_apart_prefers_nothing() -> None:
    method, data = entered(winners="own", judge="bright", tries=6, beta=1.0)
    nudge(method)
    same = (data.made["winner"] == data.made["loser"]).flatten(1).all(1)
    largest = []
    for rows in (same, ~same):
        method.zero_grad()
        play(method, "prefer", rows_of(data, rows.nonzero().flatten()))
        largest.append(max(float(p.grad.abs().max()) for p in method.student.parameters() if p.grad is not None))
    assert largest[0] < 1e-4 * largest[1]


@pytest.mark.usefixtures("bright")
def test_without_a_kept_sample_the_real_picture_stands_on_both_sides() -> None:
    _, data = entered(winners="own", judge="bright", tries=6)
    twins = (data.made["winner"] == data.made["loser"]).flatten(1).all(1) & (data.which != 4)
    dark = twins & (brightness(data.made["winner"]) < 0)  # a sample there would have been rejected
    assert torch.equal(data.made["winner"][dark], data.mean[dark])


@pytest.mark.usefixtures("bright")
def test_the_control_may_train_on_the_own_samples_that_won() -> None:
    """As many steps on the winners that DPO would prefer: the same samples, drawn from the same numbers."""
    _, preferred = entered(winners="own", judge="bright", tries=6)
    method, data = entered(winners="own", judge="bright", tries=6, preference="sft", text_drop=0.0)
    assert set(data.made) == {"winner", "winner_std"}
    assert torch.equal(data.made["winner"], preferred.made["winner"])
    terms = play(method, "finetune", batch(data), seed=5)
    method.draw = draws(B, 5)
    winner, std = (data.made[name][:B].float() for name in ("winner", "winner_std"))
    x = winner + std * method.draw.normal_like(winner)
    method.draw.uniform(B)  # of the texts to be dropped
    loss = method.student(x, batch(data)["cond"][TEXT], **method.randomness(x))
    assert float(terms["mse"]) == pytest.approx(float(loss.mse.mean()), rel=1e-5)
    assert moved(method) == {"student"}


@pytest.mark.usefixtures("bright")
def test_a_judge_that_tells_nothing_apart_is_refused() -> None:
    with pytest.raises(UserError, match="of none of 12 captions the judge 'bright=-1'"):
        entered(winners="own", judge="bright=-1")
    with pytest.raises(UserError, match="unknown filter 'brigth'"):
        entered(winners="own", judge="brigth")
    with pytest.raises(UserError, match=r"options\.winners=own is for own losers, not for losers=mirrored"):
        build(winners="own", losers="mirrored")


@pytest.mark.usefixtures("bright")
@pytest.mark.parametrize("more", [{}, {"winners": "own", "judge": "bright"}])
def test_nothing_is_drawn_again_after_a_resumption(more: dict[str, Any]) -> None:
    one, data = entered(seed=4, **more)
    nudge(one)
    one.draw = draws(B, 4)
    assert one.enter(one.stages()[-1], data, resumed=True) is None


def test_other_stages_draw_no_losers() -> None:
    method = build()
    assert method.enter(method.stages()[0], Captioned(), resumed=False) is None


def test_the_control_does_not_mirror_and_needs_no_losers() -> None:
    method, data = entered(preference="sft", mirror=1.0)
    assert not data.made
    terms = play(method, "finetune", batch(data))  # would be refused if it mirrored
    assert set(terms) == {"mse", "vb"}
    assert moved(method) == {"student"}


# --- whole runs -------------------------------------------------------------------------------------------------------
class Stop(Exception):
    """Raised to leave a run as a crash would."""


def trainer(
    folder: Path,
    resume: bool = False,
    stop: int | None = None,
    parallel: str = "ddp",
    smooth: bool = False,
    **options: Any,
) -> Trainer:
    """Ten steps: four at low resolution, two at the full one, four of preferences."""
    settings: dict[str, Any] = {"all": {"lr": 1e-2}, "prefer": {"lr": 1e-3}}
    if smooth:
        settings = {"all": {"lr": 0.5, "eps": 1.0}, "prefer": {"lr": 0.05}}
    config = EngineConfig(
        steps=10, batch=4, checkpoint_every=2, log_every=1, optim=settings, check_freezing=True, device="cpu",
        ema=[{"name": "ema", "of": "student", "decay": 0.9}], export="ema", parallel=parallel,
    )  # fmt: skip
    data = Captioned(parts={"small": Captioned(side=4), "pairs": Captioned(seed=7)})
    shares = {"pretrain_share": 4.0, "adapt_share": 2.0, "dpo_share": 4.0, "beta": 100.0}
    run = Trainer(build(**{**shares, **options}), data, config, folder, resume, show=False)

    def leave(_: Trainer, done: int) -> None:
        if done == stop:
            raise Stop

    run.callbacks.append(leave)
    return run


def weights(run: Trainer) -> dict[str, Tensor]:
    """All networks, whole, and the exported one. Collective for a sharded method."""
    own = {name: full(p.detach()).clone() for name, p in run.method.named_parameters()}
    return own | {f"export.{name}": p for name, p in run.export_role().state_dict().items()}


def test_a_run_goes_through_its_stages_and_resumes_in_any_of_them(tmp_path: Path) -> None:
    run = trainer(tmp_path / "straight")
    run.fit()
    straight = weights(run)
    rows = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["pretrain"] * 4 + ["adapt"] * 2 + ["dpo"] * 4
    assert rows[4]["lr/masked"] == pytest.approx(1e-3)
    assert rows[6]["loss/prefer/dpo"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[9]["loss/prefer/dpo"] < math.log(2)
    assert any(not torch.equal(straight[f"student.{name}"], p) for name, p in run.method.reference.named_parameters())
    for stop in (3, 6, 9):  # resumes inside the first stage, where the last begins, inside the last
        with pytest.raises(Stop):
            trainer(tmp_path / str(stop), stop=stop).fit()
        again = trainer(tmp_path / str(stop), resume=True)
        again.fit()
        found = weights(again)
        assert all(torch.equal(found[name], value) for name, value in straight.items()), stop


def test_rounds_resume_where_they_stopped(tmp_path: Path) -> None:
    run = trainer(tmp_path / "straight", dpo_rounds=2)
    run.fit()
    rows = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows][-4:] == ["dpo 0"] * 2 + ["dpo 1"] * 2
    assert rows[8]["loss/prefer/dpo"] == pytest.approx(math.log(2), abs=1e-6)  # a new reference
    for stop in (8, 9):  # where the second round begins, inside it
        with pytest.raises(Stop):
            trainer(tmp_path / str(stop), stop=stop, dpo_rounds=2).fit()
        again = trainer(tmp_path / str(stop), resume=True, dpo_rounds=2)
        again.fit()
        found = weights(again)
        assert all(torch.equal(found[name], value) for name, value in weights(run).items()), stop


@pytest.mark.slow
def test_two_processes_compute_what_one_does_whole_or_sharded(tmp_path: Path) -> None:
    from workers.masked import PLAIN

    worker = Path(__file__).parents[2] / "workers" / "masked.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", worker, tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    run = trainer(tmp_path / "alone", **PLAIN)
    run.fit()
    alone = weights(run)
    assert any(float((alone[f"student.{name}"] - p).abs().max()) > 0.01 for name, p in make_mar().named_parameters())
    assert alone.keys() == load_file(tmp_path / "ddp.safetensors").keys()
    for name in ("ddp", "fsdp", "fsdp-resumed"):
        found = load_file(tmp_path / f"{name}.safetensors")
        worst = max((float((found[key] - alone[key]).abs().max()), key) for key in alone)
        assert worst[0] < 1e-5, f"{name}: {worst[1]} differs by {worst[0]:.1e}"


def test_preferences_are_learnt() -> None:
    """A dozen steps on the same pairs: the winners' errors fall below the losers', relative to the reference."""
    method, data = entered(beta=200.0, anchor=1.0)
    optimizer = torch.optim.Adam(method.student.parameters(), 1e-3)
    for step in range(12):
        play(method, "prefer", batch(data), seed=step)
        optimizer.step()
    play(method, "prefer", batch(data), seed=99)
    assert float(method.notes["preference_accuracy"]) > 0.8
    assert float(method.notes["margin"]) > 0.5
