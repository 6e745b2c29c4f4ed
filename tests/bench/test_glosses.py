"""The glosses bench: splits by seed, teachers made once, scores, and what the proofs ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.bench import get_bench
from stillroom.bench.glosses import bench as glosses
from stillroom.bench.glosses import teachers
from stillroom.bench.glosses.bench import GlossesBench, logits_of
from stillroom.errors import UserError
from stillroom.folders.text_networks import load_tokenizer, make_encoder
from stillroom.methods.language.distiller import Distiller
from stillroom.methods.language.ernie_tiny import ERNIETiny
from stillroom.networks.recognition import ForwardPass


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The bench on a hundred texts, its teachers after three steps, in a cache of its own."""
    whole = glosses.load_texts
    tokenizer = load_tokenizer(glosses.NAMED["glosses"])
    parts = tuple(
        whole("glosses", split).take(torch.arange(100)).tokenised(tokenizer, 32) for split in ("train", "test")
    )
    monkeypatch.setattr(glosses, "tokenised", lambda: parts)
    monkeypatch.setattr(teachers, "PRETRAINING", {"steps": 3, "batch": 4, "lr": 1e-3})
    monkeypatch.setattr(teachers, "TUNING", {"steps": 3, "batch": 4, "lr": 1e-3})
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
    pretrained, fresh = bench.pretrained.state_dict(), bench.encoder("bert-4x128").state_dict()
    body = "bert.encoder.layer.3.output.dense.weight"
    assert not torch.equal(pretrained[body], fresh[body])
    assert not torch.equal(pretrained[body], tuned[body])
    assert not torch.equal(GlossesBench(2).tuned(20).state_dict()[body], tuned[body])


def test_a_teacher_of_few_labels_is_another(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def tuned(self: Any, labelled: int = 99) -> Any:
        asked.append(labelled)
        return self.encoder("bert-4x128").eval()

    monkeypatch.setattr(GlossesBench, "tuned", tuned)
    bench: Any = get_bench("glosses-task", 3)
    bench.given()
    bench.given(teacher="few")
    assert asked == [99, glosses.FEW]
    with pytest.raises(UserError, match="no teacher 'fewer'"):
        bench.given(teacher="fewer")


def test_the_benches_build_both_methods_and_spoil_their_teachers(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, cls in (("glosses", ERNIETiny), ("glosses-task", Distiller)):
        bench: Any = get_bench(name, 3)
        monkeypatch.setattr(GlossesBench, "tuned", lambda self: GlossesBench.encoder(self, "bert-4x128").eval())
        method = cls(cls.Options())
        method.build_from(bench.given())
        reader = method.readers["tuned"] if isinstance(method, ERNIETiny) else method.theirs
        batch = bench.data(labelled=20).batch(0, 0, 4)
        before = reader(batch).logits
        bench.mislead(method, bench.data(labelled=20))
        turned = {key: batch[key].roll(1, 0) for key in ("input_ids", "attention_mask")}
        torch.testing.assert_close(reader(batch).logits, before.roll(1, 0), rtol=1e-4, atol=1e-5)
        assert torch.equal(turned["input_ids"][1], batch["input_ids"][0])
        model = bench.model(method.student.eval(), ForwardPass())
        lost = {score.key: score.lost for score in bench.scores}
        assert set(lost) == set(bench.score(model, 3))
        assert bench.draw(model, 2).shape == (2, 45)
        assert lost["accuracy"] == 0
        assert lost["kl"] == float("inf")
