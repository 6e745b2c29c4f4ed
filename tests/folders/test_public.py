"""Public models by their sizes: the folders that are written hold networks of the published number of weights."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import transformers
from torch import nn

from stillroom.folders.public import described, public_models, write_sizes
from stillroom.surgery.skeleton import from_config, weights_unread

COUNTED = [(name, part) for name in public_models() for part in described(name).get("parameters", {})]


@pytest.mark.parametrize(("name", "part"), COUNTED)
def test_a_network_has_the_published_number_of_weights(tmp_path: Path, name: str, part: str) -> None:
    about = described(name)
    write_sizes(name, tmp_path)
    library, _, kind = about["parts"][part]["class"].partition(".")
    with weights_unread():
        cls = getattr({"diffusers": diffusers, "transformers": transformers}[library], kind)
        network = from_config(cls, tmp_path / part)
    assert isinstance(network, nn.Module)
    count = sum(p.numel() for p in network.parameters())
    assert count == pytest.approx(
        about["parameters"][part], rel=1e-3
    )  # one is published rounded; DiT's by its file, where each block has an embedding of its own


@pytest.mark.parametrize("name", public_models())
def test_a_model_says_where_its_weights_are(name: str) -> None:
    about = described(name)
    assert about["repository"]
    assert set(about) <= {"repository", "pipeline", "kept", "parts", "parameters", "files"}


def test_a_tokenizer_has_the_models_number_of_words_and_reads_text(tmp_path: Path) -> None:
    write_sizes("tinybert-4", tmp_path)
    made = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(made) == 30522
    assert made("word a", padding="max_length", max_length=6)["input_ids"] == [1, 4, 5, 2, 0, 0]
