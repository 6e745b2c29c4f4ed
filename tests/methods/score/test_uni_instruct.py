"""Uni-Instruct: what it is for the reverse KL, and its stages."""

from __future__ import annotations

import pytest
import torch
from points import batch, build

from gaussians import play


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
