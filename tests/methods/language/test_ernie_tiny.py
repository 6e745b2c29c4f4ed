"""ERNIE-Tiny: each loss by hand, masks, layer maps, what each stage reads and trains, and what goes on between them."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillroom.draws import Draws
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.method import Stage
from stillroom.methods.language.ernie_tiny import TABLE, ERNIETiny, mean_map
from stillroom.recipe import Recipe
from tiny_text import data, encoder

QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def teachers() -> tuple[nn.Module, nn.Module]:
    return encoder(4, 12, seed=1), encoder(4, 12, seed=2)


def built(stage: str = "TSD", student: nn.Module | None = None, **options: Any) -> ERNIETiny:
    method = ERNIETiny(ERNIETiny.Options(**options))
    torch.manual_seed(3)
    method.build(student or encoder(2, 8, **QUIET), teachers())
    method.draw, method.stage = Draws(torch.Generator().manual_seed(0), slice(0, 5), 5), Stage(stage)
    return method


def plan(*names: str, **changes: Any) -> list[dict[str, Any]]:
    return [{**row, **changes} for name in names for row in TABLE if row["name"] == name]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def states(network: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
    found = network(batch["input_ids"], batch["attention_mask"].long(), output_hidden_states=True)
    return found.logits, found.hidden_states


def scores(network: Any, batch: dict[str, Any], layer: int, heads: int = 2) -> list[Tensor]:
    """``q k' / sqrt(d)`` of block ``layer`` (from 1), one ``[B, L, L]`` for each head, by the weights alone."""
    inside = network.bert.encoder.layer[layer - 1].attention.self
    x = states(network, batch)[1][layer - 1]
    q, k = (x @ part.weight.T + part.bias for part in (inside.query, inside.key))
    d = q.shape[-1] // heads
    return [q[..., h * d : h * d + d] @ k[..., h * d : h * d + d].transpose(1, 2) / math.sqrt(d) for h in range(heads)]


# --- losses -----------------------------------------------------------------------------------------------------------
def test_the_latent_loss_is_the_sum_over_mapped_layers_of_real_tokens_only() -> None:
    method, batch = built("GED"), data().batch(0, 0, 5)
    assert not bool(batch["attention_mask"].all())
    terms = {name: value.detach() for name, value in method.distil(batch).items()}
    assert set(terms) == {"hidden", "attention"}
    mask = batch["attention_mask"]
    _, mine = states(method.student, batch)
    _, theirs = states(method.tuned, batch)
    expected = 0.0
    for j, g in enumerate((0, 2, 4)):
        projector: Any = method.projectors[f"h{j}"]
        gap = (mine[j] @ projector.weight.T + projector.bias - theirs[g]) ** 2
        values = [float(gap[b, i].detach().mean()) for b in range(5) for i in range(mask.shape[1]) if mask[b, i]]
        expected += sum(values) / len(values)
    assert float(terms["hidden"]) == pytest.approx(expected, rel=1e-4)
    expected = 0.0
    for j, g in ((1, 2), (2, 4)):
        values = []
        for a, b in zip(scores(method.student, batch, j), scores(method.tuned, batch, g), strict=True):
            gap = (a - b) ** 2
            for row in range(5):
                real = int(mask[row].sum())
                values += gap[row, :real, :real].flatten().tolist()
        expected += sum(values) / len(values)
    assert float(terms["attention"]) == pytest.approx(expected, rel=1e-4)


def test_padding_changes_nothing() -> None:
    method, batch = built("TAD"), data().batch(0, 0, 5)
    short = {key: batch[key] for key in ("input_ids", "attention_mask")}
    long = {key: nn.functional.pad(value, (0, 3)) for key, value in short.items()}
    long["input_ids"][:, -3:] = 7  # whatever stands there
    for name, value in method.distil(short).items():
        torch.testing.assert_close(method.distil(long)[name], value, rtol=1e-4, atol=1e-6)


def test_the_last_stage_adds_soft_and_hard_labels_with_their_weights() -> None:
    method = built("TSD", temperature=2.0, soft_weight=0.7, hard_weight=0.3, latent_weight=0.5)
    batch = data().batch(0, 0, 5)
    terms = {name: value.detach() for name, value in method.distil(batch).items()}
    assert set(terms) == {"hidden", "attention", "soft", "hard"}
    mine, theirs = states(method.student, batch)[0], states(method.tuned, batch)[0]
    log_p = mine.log_softmax(-1)
    p = (theirs / 2).softmax(-1)
    soft = -(p * (mine / 2).log_softmax(-1)).sum(-1).mean()
    hard = -log_p[torch.arange(5), batch["cond"]["label"]].mean()
    torch.testing.assert_close(terms["soft"], 0.7 * soft)
    torch.testing.assert_close(terms["hard"], 0.3 * hard)
    whole = built("TSD")
    torch.testing.assert_close(terms["hidden"], 0.5 * whole.distil(batch)["hidden"])


def test_the_teacher_of_a_stage_is_the_one_in_its_row() -> None:
    batch = data().batch(0, 0, 5)
    general, enhanced = built("GD"), built("GED")
    assert float(general.distil(batch)["hidden"]) != pytest.approx(float(enhanced.distil(batch)["hidden"]))
    general.readers["pretrained"] = general.readers["tuned"]
    torch.testing.assert_close(general.distil(batch), enhanced.distil(batch))


def test_gradients_reach_student_and_projectors_only_and_no_head_before_the_last_stage() -> None:
    batch = data().batch(0, 0, 5)
    for stage in ("GD", "GED", "TAD", "TSD"):
        method = built(stage)
        sum(method.distil(batch).values()).backward()
        assert all(p.grad is None for name in ("pretrained", "tuned") for p in method.role(name).parameters())
        assert all(p.grad is not None for p in method.projectors.parameters())
        student: Any = method.student
        assert (student.classifier.weight.grad is not None) == (stage == "TSD")
        assert student.bert.encoder.layer[0].output.dense.weight.grad is not None


def test_attention_is_scores_maps_or_left_out() -> None:
    batch = data().batch(0, 0, 5)
    assert set(built("GD", attention="none").distil(batch)) == {"hidden"}
    other = encoder(2, 8, heads=4)
    with pytest.raises(UserError, match="student has 4 attention heads, the teacher 2"):
        built("GD", student=other)
    method = built("GD", student=other, attention="maps")
    maps = mean_map(method.readers["pretrained"](batch).scores[4], batch["attention_mask"])
    rows = batch["attention_mask"]
    assert maps.shape == (5, 1, rows.shape[1], rows.shape[1])
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps.sum(-1)))
    assert float(maps[~rows[:, None, None, :].expand_as(maps)].abs().max()) == 0
    found = method.distil(batch)["attention"]
    expected = 0.0
    for j, g in ((1, 2), (2, 4)):
        a, b = (
            torch.stack(scores(n, batch, layer, heads)).masked_fill(~rows[None, :, None, :], -1e9).softmax(-1).mean(0)
            for n, layer, heads in ((method.student, j, 4), (method.pretrained, g, 2))
        )
        both = rows[:, :, None] & rows[:, None, :]
        expected += float(((a - b) ** 2)[both].mean())
    assert float(found) == pytest.approx(expected, rel=1e-4)


# --- the layer map and the projectors ---------------------------------------------------------------------------------
def test_the_last_layer_learns_from_the_last() -> None:
    assert [built(layer_map=kind).target for kind in ("uniform", "skip", "last")] == [(0, 2, 4), (0, 2, 4), (0, 3, 4)]
    assert built(layers=[0, 2]).target == (0, 1, 3)
    for wrong in ([0], [0, 4]):
        with pytest.raises(UserError, match=r"options\.layers"):
            built(layers=wrong)


def test_projectors_are_per_layer_or_shared() -> None:
    assert list(built().projectors) == ["h0", "h1", "h2"]
    shared = built("GD", projectors="shared")
    assert list(shared.projectors) == ["h0", "h1"]
    assert math.isfinite(float(shared.distil(data().batch(0, 0, 5))["hidden"].detach()))


def test_a_student_may_start_from_the_teachers_layers() -> None:
    method = built(student=encoder(2, 12), start="teacher")
    student, teacher = method.student, method.pretrained
    for mine, theirs in ((0, 1), (1, 3)):
        assert same(student.bert.encoder.layer[mine], teacher.bert.encoder.layer[theirs])  # type: ignore[union-attr]
    assert same(student.bert.embeddings, teacher.bert.embeddings)  # type: ignore[union-attr]
    with pytest.raises(UserError, match="cannot start from the teacher's layers"):
        built(student=encoder(2, 8), start="teacher")


# --- stages -----------------------------------------------------------------------------------------------------------
def trainer(*given: nn.Module, folder: Path | None = None, resume: bool = False, **options: Any) -> Trainer:
    callbacks = options.pop("callbacks", ())
    options.setdefault("stages", [{**row, "share": 1.0} for row in TABLE])
    method = ERNIETiny(ERNIETiny.Options(**options))
    torch.manual_seed(5)
    method.build(encoder(2, 8), given)
    config = EngineConfig(
        steps=8, batch=5, checkpoint_every=1, log_every=1, check_freezing=True, optim={"all": {"lr": 1e-2}}
    )
    return Trainer(method, data(), config, folder, resume, callbacks=callbacks, show=False)


def watched(*given: nn.Module, **options: Any) -> list[tuple[str, set[str]]]:
    seen: list[tuple[str, set[str]]] = []
    last: dict[str, nn.Module] = {}

    def watch(run: Trainer, done: int) -> None:
        now = {**dict(run.method.named_children()), "head": run.method.student.classifier}  # type: ignore[union-attr]
        seen.append((run.method.stage.name, {n for n, part in now.items() if not same(part, last[n])}))
        last.update({name: copy.deepcopy(part) for name, part in now.items()})

    run = trainer(*given, callbacks=[watch], **options)
    children = {**dict(run.method.named_children()), "head": run.method.student.classifier}  # type: ignore[union-attr]
    last.update({name: copy.deepcopy(part) for name, part in children.items()})
    run.fit()
    return seen


def test_each_stage_trains_what_it_should() -> None:
    both = {"student", "projectors"}
    found = watched(*teachers())
    assert found == [(name, both) for name in ("GD", "GED", "TAD") for _ in range(2)] + [("TSD", {*both, "head"})] * 2


def test_a_missing_fine_tuned_teacher_is_made_first() -> None:
    found = watched(teachers()[0], tune_share=4.0)
    assert found[:4] == [("tune", {"tuned"})] * 4
    assert [name for name, _ in found[4:]] == ["GD", "GED", "TAD", "TSD"]
    with pytest.raises(UserError, match="no fine-tuned teacher"):
        trainer(teachers()[0], tune_share=0.0)


def test_general_stages_read_text_without_labels_and_optimizers_start_anew() -> None:
    run = trainer(*teachers())
    spans = {span.stage.name: span for span in run.spans}
    assert [len(spans[name].data.texts) for name in ("GD", "GED", "TAD", "TSD")] == [12, 12, 30, 30]
    assert "label" not in spans["GED"].data.batch(0, 0, 4)["cond"]
    assert all(span.stage.fresh_optimizer and span.stage.own_schedule for span in run.spans)
    run.fit()
    rates = [row["lr/distil"] for row in run.history]
    assert rates[-1] == pytest.approx(0.6 * rates[0])


def test_projectors_go_on_between_stages_unless_told_otherwise() -> None:
    def jump(keep: bool) -> float:
        before: list[Tensor] = []
        after: list[Tensor] = []

        def watch(run: Trainer, done: int) -> None:
            weight: Any = run.method.projectors["h1"].weight  # type: ignore[index]
            (before if done == 2 else after).append(weight.detach().clone())

        trainer(*teachers(), keep_projectors=keep, callbacks=[watch]).fit()
        return float((after[1] - before[0]).abs().max())

    assert jump(True) < 0.05  # one step of Adam at 0.01
    assert jump(False) > 0.1


@pytest.mark.parametrize(
    ("stages", "names"),
    [
        (plan("GD", "TAD", "TSD"), ["GD", "TAD", "TSD"]),  # no general-enhanced stage
        (plan("TAD", "GED", "GD", "TSD"), ["TAD", "GED", "GD", "TSD"]),  # another order
        (plan("GD") + plan("TSD", losses=["soft", "hard"]), ["GD", "TSD"]),  # no states at the end
        (plan("TSD", losses=["hard"]), ["TSD"]),  # labels alone
    ],
)
def test_the_ablations_are_lists_of_records(stages: list[dict[str, Any]], names: list[str]) -> None:
    run = trainer(*teachers(), stages=stages)
    assert [span.stage.name for span in run.spans] == names
    run.fit()
    wanted = set(stages[-1]["losses"])
    terms = {key.split("/")[-1] for key in run.history[-1] if key.startswith("loss/")}
    assert terms == (wanted - {"latent"}) | ({"hidden", "attention"} if "latent" in wanted else set())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"teacher": "big"}, r"stages\[0\]\.teacher"),
        ({"losses": ["latent", "hard"]}, "labels of general text"),
        ({"losses": ["soft"]}, "no head"),
        ({"losses": ["warm"]}, r"stages\[0\]\.losses"),
        ({"share": 0}, r"stages\[0\]\.share"),
        ({"datas": "task"}, "did you mean 'data'"),
        ({"name": "tune"}, "is taken"),
    ],
)
def test_records_are_checked(change: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        ERNIETiny(ERNIETiny.Options(stages=plan("GD", **change)))
    with pytest.raises(UserError, match="is empty"):
        ERNIETiny(ERNIETiny.Options(stages=[]))


def test_the_recipe_reads_and_a_wrong_record_is_refused_there() -> None:
    assert [row["name"] for row in Recipe.load("ernie-tiny").options["stages"]] == ["GD", "GED", "TAD", "TSD"]
    with pytest.raises(UserError, match="lacks 'teacher'"):
        Recipe.load("ernie-tiny", ["options.stages=[{name: GD, data: task}]"])


def test_teachers_answer_without_dropout_and_the_student_with_it() -> None:
    run = trainer(*teachers())
    run.fit()
    player = run.players["distil"]
    method: Any = run.method
    assert player.modes[method.student.bert.encoder.layer[0]]
    assert not any(player.modes[part] for part in (*method.pretrained.modules(), *method.tuned.modules()))


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(run: Trainer, done: int) -> None:
        if done == 5:
            raise Stop

    straight = trainer(*teachers(), folder=tmp_path / "straight", keep_projectors=False)
    straight.fit()
    with pytest.raises(Stop):
        trainer(*teachers(), folder=tmp_path / "run", keep_projectors=False, callbacks=[stop]).fit()
    resumed = trainer(*teachers(), folder=tmp_path / "run", resume=True, keep_projectors=False)
    resumed.fit()
    assert same(resumed.method, straight.method)


def losses(accumulate: int = 1, attention: Any = "scores") -> list[float]:
    """The terms of three steps on texts of unequal lengths."""
    method = ERNIETiny(ERNIETiny.Options(stages=plan("GD"), attention=attention))
    torch.manual_seed(3)
    method.build(encoder(2, 8, **QUIET), teachers())
    optim = {"all": {"name": "sgd", "lr": 0.01, "betas": (0.9, 0.0)}}
    config = EngineConfig(steps=3, batch=8, accumulate=accumulate, log_every=1, optim=optim, device="cpu")
    run = Trainer(method, data(), config, show=False)
    run.fit()
    return [row[f"loss/distil/{term}"] for row in run.history for term in ("hidden", "attention")]


@pytest.mark.parametrize("attention", ["scores", "maps"])
def test_a_batch_in_parts_is_the_batch(attention: str) -> None:
    whole = losses(attention=attention)
    assert losses(2, attention) == pytest.approx(whole, rel=1e-5)
    assert losses(4, attention) == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    from test_distiller import losses as distiller_losses

    worker = Path(__file__).parents[2] / "workers" / "texts.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", worker]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*command, tmp_path / "found"], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found").read_text())
    assert found["ernie-tiny"] == pytest.approx(losses(), rel=1e-5)
    assert found["distiller"] == pytest.approx(distiller_losses({"augmentation": "edits"}), rel=1e-5)
