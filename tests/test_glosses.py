"""The glosses bench: splits by seed, teachers made once, scores, and the world of the proofs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from given import given as by_name
from stillroom.bench import glosses
from stillroom.bench.glosses import GlossesBench, logits_of
from stillroom.errors import UserError
from stillroom.folders.text_networks import load_tokenizer, make_encoder
from stillroom.methods.language.distiller import Distiller
from stillroom.methods.language.ernie_tiny import ERNIETiny
from stillroom.networks.recognition import ForwardPass
from stillroom.proofs.worlds import get_world


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The bench on a hundred texts, its teachers after three steps, in a cache of its own."""
    whole = glosses.load_texts
    tokenizer = load_tokenizer(glosses.NAMED["glosses"])
    parts = tuple(
        whole("glosses", split).take(torch.arange(100)).tokenised(tokenizer, 32) for split in ("train", "test")
    )
    monkeypatch.setattr(glosses, "tokenised", lambda: parts)
    monkeypatch.setattr(glosses, "PRETRAINING", {"steps": 3, "batch": 4, "lr": 1e-3})
    monkeypatch.setattr(glosses, "TUNING", {"steps": 3, "batch": 4, "lr": 1e-3})
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path))
    return tmp_path


def test_the_seed_chooses_which_texts_are_labelled(quick: Path) -> None:
    first, again, other = (GlossesBench(seed).data(20) for seed in (1, 1, 2))
    assert first.texts == again.texts
    assert set(first.texts) != set(other.texts)
    assert first.n == 20
    assert first.parts["general"].n == 100
    assert "label" not in first.parts["general"].cond
    with pytest.raises(UserError, match="there are 100 texts, not 101"):
        GlossesBench().data(101)


def test_logits_come_back_in_order(quick: Path) -> None:
    bench = GlossesBench()
    network = make_encoder("bert-2x64", bench.vocabulary, 45).eval()
    found = bench.logits(network)
    for row in (0, 17, 99):
        length = int(bench.test.lengths[row])
        ids = bench.test.array[row : row + 1, :length]
        alone = network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].detach()
        torch.testing.assert_close(found[row], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits_of(network, bench.test, batch=7), found, rtol=1e-4, atol=1e-5)


def test_teachers_are_made_once_and_do_not_touch_the_random_state(quick: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    bench = GlossesBench(1)
    tuned = bench.tuned(20).state_dict()
    torch.testing.assert_close(torch.rand(2), expected)
    files = {file.name: file.stat().st_mtime_ns for file in (quick / "glosses").glob("*.safetensors")}
    assert len(files) == 2
    again = GlossesBench(1).tuned(20).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in tuned.items())
    assert files == {file.name: file.stat().st_mtime_ns for file in (quick / "glosses").glob("*.safetensors")}
    pretrained, fresh = bench.pretrained.state_dict(), bench.network("bert-4x128").state_dict()
    body = "bert.encoder.layer.3.output.dense.weight"
    assert not torch.equal(pretrained[body], fresh[body])
    assert not torch.equal(pretrained[body], tuned[body])
    assert not torch.equal(GlossesBench(2).tuned(20).state_dict()[body], tuned[body])


def test_the_worlds_build_both_methods_and_spoil_their_teachers(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, cls in (("glosses", ERNIETiny), ("glosses-task", Distiller)):
        world = get_world(name).at(3)
        monkeypatch.setattr(GlossesBench, "tuned", lambda self: GlossesBench.network(self, "bert-4x128").eval())
        method = cls(cls.Options())
        method.build_from(by_name(world.teacher()))
        reader = method.readers["tuned"] if isinstance(method, ERNIETiny) else method.theirs
        batch = world.data(labelled=20).batch(0, 0, 4)
        before = reader(batch).logits
        world.mislead(method, world.data(labelled=20))
        turned = {key: batch[key].roll(1, 0) for key in ("input_ids", "attention_mask")}
        torch.testing.assert_close(reader(batch).logits, before.roll(1, 0), rtol=1e-4, atol=1e-5)
        assert torch.equal(turned["input_ids"][1], batch["input_ids"][0])
        scores = world.score(world.generator(method.student.eval(), ForwardPass()), 3)
        assert set(world.metrics) == set(scores)
        assert world.draw(method.student, 2).shape == (2, 45)
        assert world.worst("accuracy") == 0
        assert world.worst("kl") == float("inf")
