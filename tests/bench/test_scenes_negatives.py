"""Captions that leave a colour open: what is counted, how a model is kept from a colour, a teacher that misleads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stillroom.bench import get_bench
from stillroom.bench.scenes_negatives.bench import COLOURS, EACH, against, exchange
from stillroom.data.scenes.captions import Scene, Thing, parse_caption
from stillroom.diffusion.sampling import FewStepSampler, SteeredSampler
from stillroom.proofs import get_proofs


class Parser:
    """Says what the pictures' first pixel says: ``10 * colour + digit``, in a picture of one digit."""

    def read(self, images: torch.Tensor) -> Any:
        codes = images[:, 0, 0, 0].tolist()
        self.found = [Scene((Thing(0, code % 10, code // 10),), 0) for code in codes]
        return self

    def scenes(self) -> list[Scene]:
        return self.found


class Model:
    """Draws every digit red; away from red, green with the digit one off; away from another colour, red as before."""

    sampler = SteeredSampler((1.0,), negative_scale=0.5)

    def __init__(self, negative: str = "") -> None:
        self.negative = negative

    def away(self, negative: str) -> Model:
        return Model(negative)

    def sample(self, captions: list[str], seed: list[int]) -> torch.Tensor:
        assert len(set(seed)) == len(captions)
        codes = []
        for text in captions:
            digit = parse_caption(text).wants[0].digit
            codes.append((10 + (digit + 1) % 10) if self.negative == "red" else digit)
        return torch.tensor(codes, dtype=torch.float)[:, None, None, None].expand(-1, 3, 32, 32) / 127.5 - 1


def test_scores_are_counted_by_hand() -> None:
    bench: Any = get_bench("scenes-negatives")
    bench.__dict__["parser"] = Parser()
    found = bench.score(Model(), 0)
    assert found["unwanted"] == 0
    assert found["removed"] == 1
    assert found["digit"] == pytest.approx(5 / 6)  # red is the unwanted colour of a sixth of the pictures
    assert found["clean"] == pytest.approx(5 / 6)
    assert found["digit_plain"] == 1
    assert found["unwanted_other"] == pytest.approx(1 / 6)
    assert EACH * 10 * len(COLOURS) == 600


def test_a_guided_student_is_guided_away_from_the_text_and_a_steered_one_is_not() -> None:
    bench: Any = get_bench("scenes-negatives")
    teacher = bench.network()
    guided = against(bench.model(teacher, FewStepSampler((1.0,), guidance=2.0)), "red")
    said = guided.said("red")
    assert all(torch.equal(guided.network.null[name], value[0]) for name, value in said.items())
    assert guided.network.network is teacher.network
    assert guided.steering is None
    steered = against(bench.model(teacher, SteeredSampler((1.0,), negative_scale=0.2)), "red")
    assert steered.steering[1] == 0.2
    asked = ["a photo of a three"] * 2
    plain, own, other = (m.sample(asked, seed=0) for m in (bench.model(teacher, FewStepSampler()), guided, steered))
    assert not torch.allclose(plain, own, atol=1e-3)
    assert not torch.allclose(plain, other, atol=1e-3)


@torch.no_grad()
def test_a_misleading_teacher_answers_for_the_next_caption_and_for_none_as_ever() -> None:
    bench: Any = get_bench("scenes-negatives")
    right, wrong = bench.network(), bench.network()
    exchange(wrong)
    model = bench.model(right, FewStepSampler())
    cond = model.cond(["a three", "a red one", "a seven"])
    x, t = torch.randn(3, *right.shape), torch.tensor(500.0)
    expected = right(x, t, {name: value.roll(-1, 0) for name, value in cond.items()}).value
    torch.testing.assert_close(wrong(x, t, cond).value, expected)
    null = right.null_cond(cond)
    torch.testing.assert_close(wrong(x, t, null).value, right(x, t, null).value)
    two = wrong(x, t, cond, 2.0).value
    torch.testing.assert_close(two, 2 * expected - right(x, t, null).value, rtol=1e-4, atol=1e-4)


def test_the_arms_that_are_only_sampled_otherwise_share_one_training() -> None:
    proof = next(p for p in get_proofs("snoopi") if p.bench == "scenes-negatives")
    after = {arm.name for arm in proof.arms if arm.after is not None}
    assert after == {"plain", "away 0.2", "away 1", "guided 2.5"}
    assert {arm.after.key("scenes-negatives", 0) for arm in proof.arms if arm.after is not None} == {
        proof.arms[0].key("scenes-negatives", 0)
    }
