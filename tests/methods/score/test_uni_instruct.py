"""Uni-Instruct: what it is for the reverse KL, and its stages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from points import FLOW, B, batch, build

from gaussians import draws, play
from stillroom.draws import Draws
from stillroom.method import Batch


def test_uni_instruct_with_reverse_kl_and_no_gan_is_sid_at_alpha_one() -> None:
    uni = build("uni-instruct", divergence="reverse_kl", gan_weight=0.0)
    o = uni.options
    shared = {name: getattr(o, name) for name in ("t_init", "generator_times", "critic_times", "fake_loss")}
    sid = build("sid-lsg", alpha=1.0, gan_weight=0.0, **shared)
    assert uni.stage.name == "divergence"
    for name in ("critic", "generator"):
        ours, theirs = play(uni, name, batch(), 5), play(sid, name, batch(), 5)
        torch.testing.assert_close(*(torch.stack(list(terms.values())) for terms in (ours, theirs)))
        role = "student" if name == "generator" else "fake"
        for a, b in zip(uni.role(role).parameters(), sid.role(role).parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_uni_instruct_s_stages_start_with_the_critics_alone() -> None:
    method = build("uni-instruct", critic_share=0.1, warmup_share=0.2)
    plan = method.stages()
    assert [(s.name, s.turns) for s in plan] == [("critics", ("critic",)), ("warm-up", None), ("divergence", None)]
    assert [s.share for s in plan] == pytest.approx([0.1, 0.2, 0.7])
    bare = build("uni-instruct", critic_share=0.0, warmup_share=0.0)
    assert [s.name for s in bare.stages()] == ["divergence"]


def test_uni_instruct_warms_up_as_reverse_kl_without_a_gan() -> None:
    method, plain = (
        build("uni-instruct", divergence="js"),
        build("uni-instruct", divergence="reverse_kl", gan_weight=0.0),
    )
    method.stage = method.stages()[1]
    warm = play(method, "generator", batch())
    assert warm.keys() == {"score"}
    torch.testing.assert_close(warm, play(plain, "generator", batch()))
    method.stage = method.stages()[2]
    full = play(method, "generator", batch())
    assert full.keys() == {"score", "gan"}
    assert float(full["score"]) != pytest.approx(float(warm["score"]))


@pytest.mark.parametrize("slug", ["uni-instruct", "sid-lsg"])
def test_the_critic_s_gan_term_may_weigh_times_as_edm_does(slug: str) -> None:
    """``mean (r^2 + sd^2) / (r sd)^2 [softplus(l_fake) + softplus(-l_real)] / 2`` at r = sigma / alpha, sd = 0.5."""
    method = build(slug, gan_weight=0.1, gan_time_weight="edm", critic_gan_weight=3.0)
    o, data, twin = method.options, batch(), draws(B)
    term = play(method, "critic", data)["gan"]
    x0 = method.student(torch.tensor(o.t_init) * twin.normal(B, 2), torch.tensor(o.t_init), data["cond"]).x0
    t, eps = o.critic_times.sample(twin, FLOW), twin.normal(B, 2)
    logits = []
    for x in (x0, data["x"]):
        x_t = (1 - t)[:, None] * x + t[:, None] * eps
        logits.append(method.discriminator(method.fake, x_t, t, data["cond"])[1].reshape(B, -1))
    ratio = t / (1 - t)
    each = (F.softplus(logits[0]) + F.softplus(-logits[1])).mean(1)
    torch.testing.assert_close(term, 3 * ((ratio**2 + 0.25) / (0.5 * ratio) ** 2 * each / 2).mean())


def test_ratios_normalised_over_the_batch_are_the_same_in_micro_batches() -> None:
    """As the engine splits a batch: counts first, then each part with its share as weight."""
    method = build("uni-instruct", divergence="chi2", gan_weight=0.1, normalise_ratio=True)

    def played(parts: int) -> tuple[torch.Tensor, torch.Tensor]:
        whole, size = batch(), B // parts
        splits = [slice(k * size, (k + 1) * size) for k in range(parts)]
        rows: list[Batch] = [{"x": whole["x"][s], "cond": {"label": whole["cond"]["label"][s]}} for s in splits]

        def draw(s: slice) -> Draws:
            return Draws(torch.Generator().manual_seed(0), s, B)

        counted = []
        for s, row in zip(splits, rows, strict=True):
            method.draw = draw(s)
            counted.append(method.counts(row)["ratio"])
        total, gradients = torch.zeros(()), []
        for s, row, own in zip(splits, rows, counted, strict=True):
            method.draw, method.weights = draw(s), {"ratio": own / torch.stack(counted).mean()} if parts > 1 else {}
            method.zero_grad()
            loss = sum(method.generator(row).values()) / parts
            loss.backward()
            total = total + loss.detach()
            gradients.append(torch.cat([p.grad.flatten() for p in method.student.parameters()]))
        method.weights = {}
        return total, torch.stack(gradients).sum(0)

    torch.testing.assert_close(played(4), played(1), rtol=1e-4, atol=1e-5)


def test_without_normalised_ratios_nothing_is_counted() -> None:
    assert build("uni-instruct").counts(batch()) == {}
