"""MEAL V2: the soft labels' gradient, the ensemble's means, the discriminator's step, and what each stage trains."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stillroom.augment.images import cutmix, random_flip, random_shift
from stillroom.data.source import ArrayData
from stillroom.draws import Draws
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.losses.adversarial import logit_discrimination
from stillroom.losses.soft_labels import soft_cross_entropy
from stillroom.method import Stage
from stillroom.methods.classifier.meal_v2 import MEALV2
from stillroom.networks.critics import LogitDiscriminator
from stillroom.recipe import Recipe


def draws(seed: int = 0, size: int = 6) -> Draws:
    return Draws(torch.Generator().manual_seed(seed), slice(0, size), size)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def data(n: int = 30) -> ArrayData:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 1, 4, 4, generator=generator)
    return ArrayData(images, {"label": torch.randint(3, (n,), generator=generator)})


def built(*teachers: nn.Module, **options: Any) -> MEALV2:
    method = MEALV2(MEALV2.Options(**options))
    method.build(network(), teachers)
    method.prepare(data())
    method.draw, method.stage = draws(), Stage("distil")
    return method.eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


# --- soft labels ------------------------------------------------------------------------------------------------------
def test_soft_cross_entropy_is_a_kl_plus_an_entropy_with_the_known_gradient() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    p = torch.rand(5, 4, generator=torch.Generator().manual_seed(2))
    p = p / p.sum(1, keepdim=True)
    loss = soft_cross_entropy(logits, p)
    q = logits.detach().softmax(1)
    kl = sum(float(p[i, c] * (p[i, c] / q[i, c]).log()) for i in range(5) for c in range(4)) / 5
    entropy = -sum(float(p[i, c] * p[i, c].log()) for i in range(5) for c in range(4)) / 5
    assert float(loss) == pytest.approx(kl + entropy, rel=1e-5)
    loss.backward()
    torch.testing.assert_close(logits.grad, (q - p) / 5)
    assert float(soft_cross_entropy(p.log(), p)) == pytest.approx(entropy, rel=1e-5)


def test_the_target_is_a_mean_of_probabilities_and_not_of_logits() -> None:
    teachers = [network(1), network(2), network(3)]
    method, images = built(*teachers), data().images(slice(6))
    target, logits = method.taught(images)
    each = [teacher.eval()(images).detach() for teacher in teachers]
    torch.testing.assert_close(target, sum(z.softmax(1) for z in each) / 3)
    torch.testing.assert_close(logits, sum(each) / 3)
    torch.testing.assert_close(target.sum(1), torch.ones(6))
    assert (target - logits.softmax(1)).abs().max() > 1e-3


def test_one_teacher_at_random_is_one_of_them() -> None:
    teachers = [network(1), network(2), network(3)]
    method, images = built(*teachers, ensemble="random"), data().images(slice(6))
    each = [teacher.eval()(images).detach().softmax(1) for teacher in teachers]
    seen = set()
    for _ in range(30):
        target, logits = method.taught(images)
        torch.testing.assert_close(target, logits.softmax(1))
        seen |= {k for k, p in enumerate(each) if torch.allclose(p, target)}
    assert seen == {0, 1, 2}


def test_the_students_loss_is_soft_labels_and_the_discriminators_loss_with_its_own_sign() -> None:
    method, batch = built(network(1), network(2), discriminator=0.7), data().batch(0, 0, 6)
    terms = method.distil(batch)
    assert set(terms) == {"soft", "discriminator"}
    sum(terms.values()).backward()
    found = {name: p.grad.clone() for name, p in method.student.named_parameters()}
    method.student.zero_grad()
    images = batch["x"]
    each = torch.stack([teacher(images) for teacher in method.ensemble]).detach()
    logits = method.student(images)
    ours, theirs = method.discriminator(logits), method.discriminator(each.mean(0))
    log_sigmoid = nn.functional.logsigmoid
    right = [log_sigmoid(ours[:, 0]), log_sigmoid(-ours[:, 1]), log_sigmoid(-theirs[:, 0]), log_sigmoid(theirs[:, 1])]
    told = -torch.stack(right).mean()
    soft = -(each.softmax(-1).mean(0) * logits.log_softmax(-1)).sum() / 6
    (soft + 0.7 * told).backward()
    for name, p in method.student.named_parameters():
        torch.testing.assert_close(found[name], p.grad)
    assert all(p.grad is None for p in method.ensemble.parameters())
    torch.testing.assert_close(terms["discriminator"] / 0.7, told)
    alone = method.judge(batch)["discriminator"]  # from the very logits that the student had
    torch.testing.assert_close(alone, told)
    method.zero_grad()
    alone.backward()
    assert all(p.grad is None for p in method.student.parameters())
    assert all(p.grad is not None for p in method.discriminator.parameters())


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_labels_enter_by_their_weight(weight: float) -> None:
    method, batch = built(network(1), gt_weight=weight, discriminator=0.0), data().batch(0, 0, 6)
    terms = method.distil(batch)
    q = method.student(batch["x"]).log_softmax(-1)
    label = -q[torch.arange(6), batch["cond"]["label"]].mean()
    torch.testing.assert_close(terms["label"], weight * label)
    soft = soft_cross_entropy(q, method.taught(batch["x"])[0])
    torch.testing.assert_close(terms["soft"], (1 - weight) * soft)


# --- the discriminator ------------------------------------------------------------------------------------------------
def test_the_discriminator_has_the_papers_widths() -> None:
    def widths(classes: int) -> list[int]:
        return [p.shape[0] for p in LogitDiscriminator(classes).parameters() if p.ndim == 2]

    assert widths(1000) == [125, 15, 2]
    assert widths(10) == [16, 16, 2]


def test_a_final_relu_bounds_the_loss_from_below() -> None:
    method = built(network(1), final_relu=True)
    for scale in (1.0, 100.0):
        logits = scale * torch.randn(200, 3, generator=torch.Generator().manual_seed(3))
        assert float(logit_discrimination(method.discriminator, logits, -logits)) >= math.log(2) / 2
    free = built(network(1))
    for p in free.discriminator.parameters():
        p.data.zero_()
    head: Any = free.discriminator.body[-1]
    head.bias.data = torch.tensor([30.0, -30.0])  # every row is the student's
    assert float(logit_discrimination(free.discriminator, logits, logits)) == pytest.approx(15.0)


# --- stages -----------------------------------------------------------------------------------------------------------
def trainer(*teachers: nn.Module, folder: Path | None = None, resume: bool = False, **given: Any) -> Trainer:
    callbacks = given.pop("callbacks", ())
    method = MEALV2(MEALV2.Options(**given))
    torch.manual_seed(5)
    method.build(network(), teachers)
    config = EngineConfig(steps=12, batch=6, checkpoint_every=1, log_every=1, check_freezing=True)
    return Trainer(method, data(), config, folder, resume, callbacks=callbacks, show=False)


def test_each_stage_trains_what_it_should() -> None:
    seen: list[tuple[str, set[str]]] = []
    last: dict[str, nn.Module] = {}

    def watch(run: Trainer, done: int) -> None:
        now = dict(run.method.named_children())
        moved = {name for name, part in now.items() if not same(part, last[name])}
        seen.append((run.method.stage.name, moved))
        last.update({name: copy.deepcopy(part) for name, part in now.items()})

    run = trainer(settle=0.5, callbacks=[watch])
    last = {name: copy.deepcopy(part) for name, part in run.method.named_children()}
    run.fit()
    both = {"student", "discriminator"}
    parts = {"teach": (4, {"ensemble"}), "init": (4, {"student"}), "distil": (2, both), "settle": (2, both)}
    assert seen == [(stage, moved) for stage, (n, moved) in parts.items() for _ in range(n)]
    rates = [row["lr/distil"] for row in run.history]
    assert rates[-1] == pytest.approx(0.1 * rates[-3])
    assert run.history[-1]["lr/judge"] == pytest.approx(0.1 * rates[-1])


def test_teachers_that_are_given_stay_as_they_are() -> None:
    teachers = [network(1), network(2)]
    run = trainer(*teachers, init_share=0.0)
    assert [t.name for t in run.method.turns()] == ["distil", "judge"]
    assert [s.name for s in run.method.stages()] == ["distil", "settle"]
    run.fit()
    kept: Any = run.method.ensemble
    assert all(same(mine, theirs) for mine, theirs in zip(kept, teachers, strict=True))
    run.method.train()
    assert not any(part.training for part in kept.modules() if part is not kept)


def test_teachers_that_are_made_differ() -> None:
    method = built(teachers=3)
    first, second, third = method.ensemble
    assert not same(first, second)
    assert not same(second, third)
    assert not same(first, method.student)


def test_without_a_discriminator_nothing_of_it_is_left() -> None:
    run = trainer(discriminator=0.0)
    assert not hasattr(run.method, "discriminator")
    assert "judge" not in run.players
    run.fit()


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(run: Trainer, done: int) -> None:
        if done == 9:
            raise Stop

    straight = trainer(folder=tmp_path / "straight")
    straight.fit()
    with pytest.raises(Stop):
        trainer(folder=tmp_path / "run", callbacks=[stop]).fit()
    resumed = trainer(folder=tmp_path / "run", resume=True)
    resumed.fit()
    assert same(resumed.method, straight.method)


def test_options_that_leave_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="share 0"):
        built(network(1), init_share=0.0, distil_share=0.0)
    with pytest.raises(UserError, match="no teachers"):
        built(teach_share=0.0)
    with pytest.raises(UserError, match=r"options\.ensemble"):
        Recipe.load("meal-v2", ["options.ensemble=mean"])


# --- augmentation -----------------------------------------------------------------------------------------------------
def test_shifts_are_all_crops_of_the_padded_image() -> None:
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    moved = random_shift(image.expand(400, 1, 4, 4), draws(size=400), 1)
    padded = nn.functional.pad(image, (1, 1, 1, 1), value=-1.0)[0, 0]
    crops = {tuple(padded[y : y + 4, x : x + 4].flatten().tolist()) for y in range(3) for x in range(3)}
    assert {tuple(one.flatten().tolist()) for one in moved} == crops
    assert random_shift(image, draws(size=1), 0) is image


def test_flips_come_at_their_rate() -> None:
    image = torch.arange(16.0).reshape(1, 1, 4, 4).expand(1000, 1, 4, 4)
    flipped = (random_flip(image, draws(size=1000), 0.3) == image.flip(-1)).all(-1).all(-1)[:, 0]
    assert float(flipped.float().mean()) == pytest.approx(0.3, abs=0.05)
    assert random_flip(image, draws(), 0.0) is image


def test_cutmix_takes_a_rectangle_from_the_neighbour() -> None:
    images = torch.arange(50.0)[:, None, None, None].expand(50, 2, 8, 8)
    shares, applied = [], 0
    for seed in range(200):
        mixed = cutmix(images, draws(seed, 50), 0.5)
        taken = mixed != images
        applied += bool(taken.any())
        assert torch.equal(mixed[taken], images.roll(1, 0)[taken])
        assert torch.equal(taken[:, 0], taken[:, 1])
        rows, columns = taken[:, 0].any(2), taken[:, 0].any(1)
        assert torch.equal(taken[:, 0], rows[:, :, None] & columns[:, None])
        shares.append(float(taken.float().mean()))
    assert applied == pytest.approx(100, abs=25)
    assert 0.2 < max(shares) < 0.9
    assert cutmix(images, draws(), 0.0) is images
