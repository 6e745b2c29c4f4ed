"""Distiller: each intermediate loss by hand, the plan of the layers, augmentations, who learns what, and whole runs."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM
from transformers.modeling_outputs import MaskedLMOutput

from stillroom.augment.texts import contextual_replacement, mixup_weights, nearest_tokens, random_edits
from stillroom.draws import Draws
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.losses.mutual_information import i_alpha
from stillroom.methods.language.distiller import Distiller
from stillroom.recipe import Recipe
from tiny_text import WORDS, data, encoder, tokenizer

QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL = {"critic_width": 8, "critic_heads": 2}


def draws(seed: int = 0, size: int = 6) -> Draws:
    return Draws(torch.Generator().manual_seed(seed), slice(0, size), size)


def built(**options: Any) -> Distiller:
    method = Distiller(Distiller.Options(**{**SMALL, **options}))
    torch.manual_seed(3)
    method.build(encoder(2, 8, **QUIET), encoder(4, 12, seed=1))
    method.prepare(data())
    method.draw = draws()
    return method


def states(network: nn.Module, batch: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    found = network(batch["input_ids"], batch["attention_mask"].long(), output_hidden_states=True)
    return found.logits, found.hidden_states


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


# --- intermediate losses ----------------------------------------------------------------------------------------------
def by_hand(kind: str, s: Tensor, t: Tensor) -> float:
    if kind == "ce":
        p, q = (x.exp() / x.exp().sum() for x in (t, s))
        return float(-(p * q.log()).sum())
    if kind == "mse":
        return float(((s - t) ** 2).sum() / len(s))
    if kind == "l2":
        return float(((s - t) ** 2).sum())
    if kind == "pkd":
        return float(((s / (s**2).sum().sqrt() - t / (t**2).sum().sqrt()) ** 2).sum())
    return 1 - float((s * t).sum() / (s**2).sum().sqrt() / (t**2).sum().sqrt())


@pytest.mark.parametrize("kind", ["ce", "mse", "l2", "cosine", "pkd"])
@pytest.mark.parametrize(("map_", "pairs"), [("skip", [(1, 0), (3, 1)]), ("last", [(2, 0), (3, 1)])])
def test_distances_are_summed_over_mapped_layers_and_averaged_over_real_tokens(
    kind: str, map_: str, pairs: list[tuple[int, int]]
) -> None:
    method, batch = built(intermediate=kind, layer_map=map_, intermediate_weight=0.5), data().batch(0, 0, 6)
    term = method.distil(batch)["intermediate"]
    mine, theirs = states(method.student, batch)[1], states(method.teacher, batch)[1]
    mask, expected = batch["attention_mask"], 0.0
    assert not bool(mask.all())
    for i, j in pairs:
        adapter: Any = method.adapters[f"h{j + 1}"]
        s, t = (mine[j + 1] @ adapter.weight.T + adapter.bias).detach(), theirs[i + 1].detach()
        values = [by_hand(kind, s[b, k], t[b, k]) for b in range(6) for k in range(mask.shape[1]) if mask[b, k]]
        expected += sum(values) / len(values)
    assert float(term.detach()) == pytest.approx(0.5 * expected, rel=1e-4)


@pytest.mark.parametrize("anchor", ["student", "teacher"])
def test_mutual_information_is_minus_the_bound_of_each_pair_and_the_anchor_holds_the_baseline(anchor: str) -> None:
    method, batch = built(anchor=anchor, alpha=0.3), data().batch(0, 0, 6)
    torch.manual_seed(0)
    for critic in method.critics.values():
        nn.init.normal_(critic.log_q.weight)  # type: ignore[union-attr, arg-type]
    term = method.distil(batch)["intermediate"]
    mine, theirs, keep = states(method.student, batch)[1], states(method.teacher, batch)[1], batch["attention_mask"]
    total = torch.zeros(())
    for i, j in ((1, 0), (3, 1)):
        critic: Any = method.critics[f"{i}-{j}"]
        x, y = theirs[i + 1], mine[j + 1]
        if anchor == "teacher":
            x, y = y, x
        keys, anchors = critic.g(x, keep), critic.h(y, keep)
        scores = torch.stack([torch.stack([(a * b).sum() / 8**0.5 for b in anchors]) for a in keys])
        log_q = critic.log_q(critic.baseline(y, keep)).squeeze(-1)
        total = total - i_alpha(scores, log_q, 0.3)
    torch.testing.assert_close(term, total, rtol=1e-4, atol=1e-5)


def test_equal_texts_are_no_negatives() -> None:
    method, batch = built(intermediate="mi"), data().batch(0, 0, 6)
    batch["input_ids"][5], batch["attention_mask"][5] = batch["input_ids"][2], batch["attention_mask"][2]
    seen = method.look(batch)
    assert [(i, j) for i in range(6) for j in range(6) if not seen.distinct[i, j] and i != j] == [(2, 5), (5, 2)]


def test_one_critic_may_serve_all_pairs() -> None:
    assert list(built().critics) == ["1-0", "3-1"]
    assert list(built(critics="shared", layer_map="emd").critics) == ["shared"]
    assert len(built(layer_map="emd").critics) == 8


@pytest.mark.parametrize("kind", ["mse", "mi"])
def test_the_transport_plan_is_optimal_and_carries_no_gradient(kind: str) -> None:
    from scipy.optimize import linprog

    method, batch = built(intermediate=kind, layer_map="emd", critics="shared"), data().batch(0, 0, 6)
    seen = method.look(batch)
    total, _ = method.intermediate(seen)
    cost = method.losses(seen)
    plan = method.plan(cost)
    assert not plan.requires_grad
    torch.testing.assert_close(plan.sum(1), torch.full((4,), 0.25))
    torch.testing.assert_close(plan.sum(0), torch.full((2,), 0.5))
    sums = [[float(i // 2 == row) for i in range(8)] for row in range(4)]
    sums += [[float(i % 2 == column) for i in range(8)] for column in range(2)]
    best = linprog(cost.detach().flatten().numpy(), A_eq=sums, b_eq=[0.25] * 4 + [0.5] * 2)
    assert float(total.detach()) == pytest.approx(best.fun, rel=1e-4)
    found = torch.autograd.grad(total, list(method.student.parameters()), allow_unused=True, retain_graph=True)
    fixed = torch.autograd.grad((plan * cost).sum(), list(method.student.parameters()), allow_unused=True)
    for a, b in zip(found, fixed, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)


# --- predictions and labels -------------------------------------------------------------------------------------------
def test_predictions_and_labels_by_their_weights() -> None:
    batch = data().batch(0, 0, 6)
    method = built(intermediate="none", temperature=2.0, prediction_weight=0.7, label_weight=0.2)
    terms = method.distil(batch)
    z, t = states(method.student, batch)[0], states(method.teacher, batch)[0]
    soft = -((t / 2).softmax(-1) * (z / 2).log_softmax(-1)).sum() / 6
    torch.testing.assert_close(terms["prediction"], 0.7 * soft)
    label = -z.log_softmax(-1)[torch.arange(6), batch["cond"]["label"]].mean()
    torch.testing.assert_close(terms["label"], 0.2 * label)
    mse = built(intermediate="none", prediction="mse").distil(batch)["prediction"]
    assert float(mse) == pytest.approx(float(((z - t) ** 2).sum()) / 18, rel=1e-5)
    assert set(built(intermediate="mse", prediction="none", label_weight=0.0).distil(batch)) == {"intermediate"}


# --- who learns -------------------------------------------------------------------------------------------------------
def test_student_and_critics_climb_the_same_bound_in_one_step() -> None:
    method, batch = built(prediction="none", label_weight=0.0), data().batch(0, 0, 6)
    bound = -float(method.distil(batch)["intermediate"])
    method.distil(batch)["intermediate"].backward()
    student: Any = method.student
    assert student.bert.encoder.layer[0].output.dense.weight.grad is not None
    assert all(p.grad is None for p in method.teacher.parameters())
    with torch.no_grad():  # each side alone raises the bound along its own gradient
        for part in (method.critics, method.student):
            before = [p.clone() for p in part.parameters()]
            for p in part.parameters():
                if p.grad is not None:
                    p -= 1e-3 * p.grad
            assert -float(method.distil(batch)["intermediate"]) > bound
            for p, old in zip(part.parameters(), before, strict=True):
                p.copy_(old)


def test_critics_learn_at_a_rate_of_their_own() -> None:
    player = trainer(critic_rate=3.0).players["distil"]
    critics = {id(p) for name, p in player.parameters.items() if name.startswith("critics.")}
    assert critics
    rates = {(id(p) in critics, group["rate"]) for group in player.optimizer.param_groups for p in group["params"]}
    assert rates == {(True, 3.0), (False, 1.0)}


def test_the_baseline_carries_a_gradient_to_an_anchored_student() -> None:
    batch = data().batch(0, 0, 6)
    method = built(prediction="none", label_weight=0.0, alpha=0.0)
    for critic in method.critics.values():
        critic.g.requires_grad_(False)  # type: ignore[union-attr]
        for p in critic.h.parameters():  # type: ignore[union-attr]
            nn.init.zeros_(p)  # scores are 0 whatever the student does
        nn.init.normal_(critic.log_q.weight)  # type: ignore[union-attr, arg-type]
    method.distil(batch)["intermediate"].backward()
    student: Any = method.student
    assert float(student.bert.encoder.layer[0].output.dense.weight.grad.abs().max()) > 1e-6


# --- augmentation -----------------------------------------------------------------------------------------------------
def test_edits_come_at_their_rate_and_leave_special_tokens_alone() -> None:
    ids = torch.tensor([[2, *range(5, 15), 3]]).repeat(2000, 1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    neighbours = torch.full((17, 4), 16)
    same_ids, same_mask = random_edits(ids, mask, draws(0, 2000), 0.0, neighbours, {0, 1, 2, 3, 4}, 0)
    assert torch.equal(same_ids, ids)
    assert torch.equal(same_mask, mask)
    found, kept = random_edits(ids, mask, draws(0, 2000), 0.2, neighbours, {0, 1, 2, 3, 4}, 0)
    counts = {"replace": 0, "insert": 0, "delete": 0, "swap": 0}
    for row, keep in zip(found, kept, strict=True):
        tokens = row[keep].tolist()
        assert tokens[0] == 2
        assert tokens[-1] == 3
        assert row[~keep].eq(0).all()
        inner = tokens[1:-1]
        old = [token for token in inner if token != 16]
        counts["delete" if len(inner) < 10 else "insert" if len(inner) > 10 else "replace"] += old != list(range(5, 15))
        counts["swap"] += sorted(old) != old
    lengths = kept.sum(1).float() - 12
    assert float(lengths.mean()) == pytest.approx(0, abs=0.1)  # as many inserted as deleted
    assert min(counts.values()) > 100
    every = torch.tensor([[2, 5, 3]]).repeat(300, 1)
    left, kept = random_edits(every, torch.ones_like(every).bool(), draws(1, 300), 1.0, neighbours, {2, 3}, 0)
    assert int(kept.sum(1).min()) >= 3  # the last ordinary token stays
    assert {5, 16} <= set(left.flatten().tolist())


def test_edits_keep_within_the_longest_text_that_a_network_reads() -> None:
    ids = torch.tensor([[2, *range(5, 11), 3]]).repeat(500, 1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    neighbours = torch.full((17, 4), 16)
    _, free_mask = random_edits(ids, mask, draws(0, 500), 0.9, neighbours, {2, 3}, 0)
    found, kept = random_edits(ids, mask, draws(0, 500), 0.9, neighbours, {2, 3}, 0, longest=8)
    assert free_mask.sum(1).max() > 8
    assert kept.sum(1).max() == 8
    assert all(row[keep][-1] == 3 for row, keep in zip(found, kept, strict=True))


def test_edits_do_not_depend_on_the_number_of_processes() -> None:
    ids, mask = data().array[:6], data().mask[:6]
    neighbours = torch.arange(17)[:, None].roll(1, 0)
    whole, kept = random_edits(ids, mask, draws(4), 0.5, neighbours, {0, 2, 3}, 0)
    half = Draws(torch.Generator().manual_seed(4), slice(3, 6), 6)
    part, part_kept = random_edits(ids[3:], mask[3:], half, 0.5, neighbours, {0, 2, 3}, 0)
    for a, ka, b, kb in zip(whole[3:], kept[3:], part, part_kept, strict=True):
        assert a[ka].tolist() == b[kb].tolist()


def test_the_nearest_tokens_are_those_of_the_largest_cosine() -> None:
    table = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    found = nearest_tokens(table, {0, 7}, count=3, block=4)
    for token in range(30):
        cosine = {
            other: float(torch.cosine_similarity(table[token], table[other], dim=0))
            for other in range(30)
            if other not in (token, 0, 7)
        }
        assert found[token].tolist() == sorted(cosine, key=lambda other: -cosine[other])[:3]


def test_mixup_weights_are_beta_distributed_and_the_same_on_each_process() -> None:
    weights = mixup_weights(20_000, draws(0, 20_000), 0.4)
    assert float(weights.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(weights.var()) == pytest.approx(1 / (4 * 1.8), abs=0.005)  # a^2 / ((2a)^2 (2a + 1))
    part = mixup_weights(3, Draws(torch.Generator().manual_seed(2), slice(3, 6), 6), 0.4)
    torch.testing.assert_close(part, mixup_weights(6, draws(2), 0.4)[3:])


def test_mixup_shows_both_networks_the_same_mixture_and_no_label() -> None:
    method, batch = built(intermediate="none", augmentation="mixup", augmented_weight=0.5), data().batch(0, 0, 6)
    terms = method.distil(batch)
    assert set(terms) == {"prediction", "label", "augmented_prediction"}
    weight = mixup_weights(6, draws(), 0.4)[:, None, None]
    mask = batch["attention_mask"] | batch["attention_mask"].roll(1, 0)
    logits = []
    for network in (method.student, method.teacher):
        table = network.bert.embeddings.word_embeddings(batch["input_ids"])  # type: ignore[union-attr, operator]
        mixed = weight * table + (1 - weight) * table.roll(1, 0)
        logits.append(network(inputs_embeds=mixed, attention_mask=mask.long()).logits)
    soft = -(logits[1].softmax(-1) * logits[0].log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(terms["augmented_prediction"], 0.5 * soft)


def test_edited_copies_are_answered_by_the_teacher_and_have_no_label() -> None:
    method, batch = built(intermediate="mi", augmentation="edits", edit_rate=0.5), data().batch(0, 0, 6)
    terms = method.distil(batch)
    assert set(terms) == {"intermediate", "prediction", "label", "augmented_intermediate", "augmented_prediction"}
    torch.testing.assert_close(terms["label"], built(intermediate="mi").distil(batch)["label"])
    special = set(tokenizer().all_special_ids)
    ids, keep = random_edits(batch["input_ids"], batch["attention_mask"], draws(), 0.5, method.neighbours, special, 0)
    edited = {"input_ids": ids, "attention_mask": keep}
    z, t = states(method.student, edited)[0], states(method.teacher, edited)[0]
    torch.testing.assert_close(terms["augmented_prediction"], -(t.softmax(-1) * z.log_softmax(-1)).sum() / 6)
    seen = method.look(edited)
    torch.testing.assert_close(terms["augmented_intermediate"], method.intermediate(seen)[0])
    own = method.intermediate(method.look(batch))[1]
    torch.testing.assert_close(method.notes["mutual_information"], own.detach())


class Certain(nn.Module):
    """A masked language model that answers every place with one token's odds, and keeps what it was asked."""

    def __init__(self, odds: dict[int, float]) -> None:
        super().__init__()
        self.odds = torch.zeros(17)
        for token, share in odds.items():
            self.odds[token] = share

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        self.asked = input_ids
        return MaskedLMOutput(logits=self.odds.log().expand(*input_ids.shape, 17))


def test_replacements_are_drawn_from_the_masked_language_model() -> None:
    ids = torch.tensor([[2, 5, 6, 7, 8, 9, 10, 3], [2, 11, 12, 3, 0, 0, 0, 0]]).repeat(500, 1)
    mask, special = ids != 0, {0, 1, 2, 3, 4}
    words = mask & (ids > 4)
    teller = Certain({13: 0.75, 14: 0.25, 2: 5.0})  # what it thinks of special tokens does not count
    assert torch.equal(contextual_replacement(ids, mask, draws(0, 1000), 0.0, teller, 4, special), ids)
    found = contextual_replacement(ids, mask, draws(0, 1000), 0.4, teller, 4, special)
    hidden = teller.asked == 4
    assert torch.equal(found[~hidden], ids[~hidden])
    assert not hidden[~words].any()
    assert set(found[hidden].tolist()) == {13, 14}
    assert float(hidden[words].float().mean()) == pytest.approx(0.4, abs=0.03)  # 4,000 words: sd 0.008
    assert float((found[hidden] == 13).float().mean()) == pytest.approx(0.75, abs=0.04)  # sd 0.011
    half = Draws(torch.Generator().manual_seed(0), slice(500, 1000), 1000)
    part = contextual_replacement(ids[500:], mask[500:], half, 0.4, teller, 4, special)
    assert torch.equal(part, found[500:])


def masked_lm(folder: Path, words: tuple[str, ...] = WORDS) -> str:
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=5 + len(words), **shape)).save_pretrained(folder)
    tokenizer(words).save_pretrained(folder)
    return str(folder)


def test_replaced_copies_are_answered_by_the_teacher(tmp_path: Path) -> None:
    options = {"augmentation": "contextual", "masked_lm": masked_lm(tmp_path), "intermediate": "none"}
    method, batch = built(**options, edit_rate=1.0), data().batch(0, 0, 6)
    terms = method.distil(batch)
    assert set(terms) == {"prediction", "label", "augmented_prediction"}
    words = batch["attention_mask"].bool() & (batch["input_ids"] > 4)
    network, special = method.masked_lm, set(tokenizer().all_special_ids)
    assert network is not None
    assert not any(parameter.requires_grad for parameter in network.parameters())
    ids = contextual_replacement(batch["input_ids"], words, draws(), 1.0, network, 4, special)
    changed = {"input_ids": ids, "attention_mask": batch["attention_mask"].bool()}
    z, t = states(method.student, changed)[0], states(method.teacher, changed)[0]
    assert float((ids != batch["input_ids"])[words].float().mean()) > 0.5
    torch.testing.assert_close(terms["augmented_prediction"], -(t.softmax(-1) * z.log_softmax(-1)).sum() / 6)


def test_a_masked_language_model_must_be_one_and_read_the_same_tokens(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs a masked language model; give its folder as options.masked_lm"):
        built(augmentation="contextual")
    encoder(2, 8).save_pretrained(tmp_path / "other")  # type: ignore[operator]
    tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"other is no masked language model .*BertForSequenceClassification"):
        built(augmentation="contextual", masked_lm=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"'the student' and .* have different vocabularies .17 tokens.* 16"):
        built(augmentation="contextual", masked_lm=masked_lm(tmp_path / "fewer", WORDS[:-1]))


# --- runs -------------------------------------------------------------------------------------------------------------
def trainer(folder: Path | None = None, resume: bool = False, **options: Any) -> Trainer:
    callbacks = options.pop("callbacks", ())
    method = Distiller(Distiller.Options(**{**SMALL, **options}))
    torch.manual_seed(5)
    method.build(encoder(2, 8), encoder(4, 12, seed=1))
    config = EngineConfig(
        steps=6, batch=6, checkpoint_every=1, log_every=1, check_freezing=True, optim={"all": {"lr": 1e-2}}
    )
    return Trainer(method, data(), config, folder, resume, callbacks=callbacks, show=False)


@pytest.mark.parametrize(
    ("options", "moved"),
    [
        ({}, {"student", "critics"}),
        ({"critic": "mlp", "layer_map": "emd"}, {"student", "critics"}),
        ({"intermediate": "mse", "augmentation": "edits"}, {"student", "adapters"}),
        ({"intermediate": "none", "augmentation": "mixup", "prediction": "mse"}, {"student"}),
    ],
)
def test_a_pipeline_trains_its_own_networks(options: dict[str, Any], moved: set[str]) -> None:
    run = trainer(**options)
    before = {name: copy.deepcopy(part) for name, part in run.method.named_children()}
    run.fit()
    assert {name for name, part in run.method.named_children() if not same(part, before[name])} == moved
    assert all(math.isfinite(value) for key, value in run.history[-1].items() if key.startswith("loss/"))


def test_a_teacher_that_is_not_fine_tuned_is_made_so_first() -> None:
    seen: list[tuple[str, bool]] = []
    start: dict[str, Any] = {}

    def watch(run: Trainer, done: int) -> None:
        seen.append((run.method.stage.name, same(run.method.teacher, start["teacher"])))  # type: ignore[arg-type]
        start["teacher"] = copy.deepcopy(run.method.teacher)

    run = trainer(tune_share=0.5, callbacks=[watch])
    start["teacher"] = copy.deepcopy(run.method.teacher)
    run.fit()
    assert seen == [("tune", False)] * 2 + [("distil", True)] * 4


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(run: Trainer, done: int) -> None:
        if done == 3:
            raise Stop

    straight = trainer(tmp_path / "straight", augmentation="edits")
    straight.fit()
    with pytest.raises(Stop):
        trainer(tmp_path / "run", augmentation="edits", callbacks=[stop]).fit()
    resumed = trainer(tmp_path / "run", resume=True, augmentation="edits")
    resumed.fit()
    assert same(resumed.method, straight.method)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="nothing to learn from"):
        built(intermediate="none", prediction="none", label_weight=0.0)
    with pytest.raises(UserError, match="does not divide into 3 heads"):
        built(critic_heads=3)
    method = Distiller(Distiller.Options())
    with pytest.raises(UserError, match="one teacher, 2 were given"):
        method.build_from({"student": encoder(), "teachers": [encoder(), encoder()]})
    with pytest.raises(UserError, match=r"options\.intermediate"):
        Recipe.load("distiller", ["options.intermediate=mi-alpha"])


def losses(options: dict[str, Any], accumulate: int = 1) -> list[float]:
    """The terms of three steps on texts of unequal lengths."""
    method = Distiller(Distiller.Options(**{"intermediate": "mse", **options}))
    torch.manual_seed(3)
    method.build(encoder(2, 8, **QUIET), encoder(4, 12, seed=1))
    optim = {"all": {"name": "sgd", "lr": 0.01, "betas": (0.9, 0.0)}}
    config = EngineConfig(steps=3, batch=8, accumulate=accumulate, log_every=1, optim=optim, device="cpu")
    run = Trainer(method, data(), config, show=False)
    run.fit()
    return [value for row in run.history for key, value in row.items() if key.startswith("loss/")]


@pytest.mark.parametrize("options", [{}, {"augmentation": "edits"}, {"intermediate": "pkd"}, {"intermediate": "ce"}])
def test_a_batch_in_parts_is_the_batch(options: dict[str, Any]) -> None:
    whole = losses(options)
    assert losses(options, 2) == pytest.approx(whole, rel=1e-5)
    assert losses(options, 4) == pytest.approx(whole, rel=1e-5)
