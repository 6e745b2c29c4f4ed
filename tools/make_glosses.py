"""Make the shipped sample of WordNet's glosses and its tokenizer from WordNet's dictionary files.

    python tools/make_glosses.py /usr/share/wordnet

44,000 definitions drawn at random (seed 0): 4,000 for the test, the rest to learn from.
"""

from __future__ import annotations

import csv
import gzip
import io
import sys
from pathlib import Path

import torch
from tokenizers import BertWordPieceTokenizer
from transformers import BertTokenizer

from stillroom.data.wordnet import LEXICOGRAPHER_CLASSES, definitions
from stillroom.folders.shipped import ASSETS

TRAIN, TEST, VOCABULARY = 40_000, 4_000, 4_096


def main(source: Path, out: Path = ASSETS / "glosses") -> None:
    rows = list(definitions(source))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: TRAIN + TEST].tolist()
    out.mkdir(parents=True, exist_ok=True)
    for split, chosen in (("test", order[:TEST]), ("train", order[TEST:])):
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(("text", "label"))
        writer.writerows((rows[i][0], LEXICOGRAPHER_CLASSES[rows[i][1]]) for i in chosen)
        (out / f"{split}.csv.gz").write_bytes(gzip.compress(table.getvalue().encode(), 9, mtime=0))
    words = BertWordPieceTokenizer(lowercase=True)
    words.train_from_iterator((rows[i][0] for i in order[TEST:]), vocab_size=VOCABULARY, show_progress=False)
    tokenizer = BertTokenizer(tokenizer_object=words._tokenizer, model_max_length=64)
    tokenizer.save_pretrained(out / "tokenizer")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
