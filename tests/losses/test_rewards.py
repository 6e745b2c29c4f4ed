"""What follows a reward, and rewards of the user's own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from stillroom.errors import UserError
from stillroom.losses.rewards import hinge, named_reward


def test_the_hinge_leaves_what_is_good_enough_alone() -> None:
    scores = torch.tensor([0.0, 2.0, 5.0], requires_grad=True)
    loss = hinge(scores, 3.0)
    loss.backward()
    assert loss.item() == pytest.approx((3 + 1 + 0) / 3)
    assert scores.grad is not None
    assert scores.grad.tolist() == pytest.approx([-1 / 3, -1 / 3, 0.0])


def test_a_reward_is_found_by_its_place_and_its_answer_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_own_rewards.py").write_text(
        "def bright(images, conditions):\n    return images.mean((1, 2, 3))\n\n\n"
        "def whole(images, conditions):\n    return images.mean()\n\n\nnumber = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    images = torch.arange(8.0).reshape(2, 1, 2, 2)
    assert named_reward("my_own_rewards:bright")(images, {}).tolist() == [1.5, 5.5]
    with pytest.raises(UserError, match=r"gave \[\] for 2 samples"):
        named_reward("my_own_rewards:whole")(images, {})
    for entry, said in (("my_own_rewards:dark", "is not there"), ("my_own_rewards:number", "names no function")):
        with pytest.raises(UserError, match=said):
            named_reward(entry)
    sys.modules.pop("my_own_rewards", None)
