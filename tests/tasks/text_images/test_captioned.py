"""Captioned latents in memory: what a batch holds, that it follows from (seed, step) alone, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stillroom.errors import UserError
from stillroom.tasks.text_images.data import CaptionedData, encode_images
from tiny_text_images import tiny_space

TEXTS = ["a red three", "a seven", "a red three", "a blue seven", "a seven"]


def pictures(n: int = 5) -> Tensor:
    return torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8)


@pytest.fixture(scope="module")
def encoded() -> CaptionedData:
    torch.manual_seed(0)
    return encode_images(pictures(), TEXTS, tiny_space(), mirror=True, name="tiny", batch=2)


def made(n: int = 6, **changes: Any) -> CaptionedData:
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "mean": torch.randn(n, 2, 4, 4), "captions": ["x", "y"], "which": torch.arange(n) % 2,
        "text": {"encoder_hidden_states": torch.randn(2, 3, 5), "encoder_attention_mask": torch.ones(2, 3).bool()},
    }  # fmt: skip
    return CaptionedData(**values | changes)


def test_captions_are_stored_once(encoded: CaptionedData) -> None:
    assert encoded.captions == ["a red three", "a seven", "a blue seven"]
    assert encoded.which.tolist() == [0, 1, 0, 2, 1]
    assert [encoded.caption_of(i) for i in range(5)] == TEXTS
    assert {key: len(value) for key, value in encoded.text.items()} == {
        "encoder_hidden_states": 3, "encoder_attention_mask": 3, "pooled_projections": 3
    }  # fmt: skip
    assert (encoded.n, encoded.shape, encoded.mean.dtype) == (5, (2, 4, 4), torch.float16)


def test_latents_are_those_of_the_codec_and_of_the_mirrored_image() -> None:
    space, images = tiny_space(), pictures()
    data = encode_images(images, TEXTS, space, mirror=True, batch=2)
    scaled = images.float() / 127.5 - 1
    for ours, pair in (((data.mean, data.std), scaled), ((data.mirrored, data.mirrored_std), scaled.flip(-1))):
        for mine, theirs in zip(ours, space.codec.moments(pair), strict=True):
            assert mine is not None
            torch.testing.assert_close(mine.float(), theirs, atol=2e-3, rtol=1e-2)
    assert encode_images(images, TEXTS, space).mirrored is None


def test_a_batch_pairs_each_image_with_its_caption(encoded: CaptionedData) -> None:
    batch = encoded.batch(seed=1, step=0, size=5)
    assert sorted(batch["index"].tolist()) == [0, 1, 2, 3, 4]
    assert batch["index"].dtype == torch.int64
    for row, index in enumerate(batch["index"].tolist()):
        for key, value in (("x", encoded.mean), ("std", encoded.std), ("mirrored", encoded.mirrored),
                           ("mirrored_std", encoded.mirrored_std)):  # fmt: skip
            assert value is not None
            assert batch[key].dtype == torch.float32
            assert torch.equal(batch[key][row], value[index].float())
        for key, value in encoded.text.items():
            assert torch.equal(batch["cond"][key][row], value[encoded.which[index]].to(batch["cond"][key].dtype))
    assert batch["cond"]["encoder_attention_mask"].dtype == torch.bool
    assert batch["cond"]["encoder_hidden_states"].dtype == torch.float32


def test_what_there_is_not_is_left_out() -> None:
    assert set(made().batch(0, 0, 2)) == {"x", "index", "cond"}


def test_batches_follow_from_seed_and_step_and_rows_are_parts_of_them() -> None:
    data, same = made(), made()
    for step in (0, 1, 7):
        whole, again = data.batch(3, step, 4), same.batch(3, step, 4)
        assert torch.equal(whole["index"], again["index"])
        parts = [data.batch(3, step, 4, slice(k, k + 2)) for k in (0, 2)]
        assert torch.equal(torch.cat([part["index"] for part in parts]), whole["index"])
        assert torch.equal(torch.cat([part["x"] for part in parts]), whole["x"])
        states = "encoder_hidden_states"
        assert torch.equal(torch.cat([part["cond"][states] for part in parts]), whole["cond"][states])
    orders = {tuple(data.batch(seed, 0, 6)["index"].tolist()) for seed in range(5)}
    assert len(orders) > 1
    epoch = torch.cat([data.batch(0, step, 2)["index"] for step in range(3)])
    assert sorted(epoch.tolist()) == list(range(6))


def test_parts_are_data_of_their_own() -> None:
    pairs = made(4, name="pairs")
    data = made(parts={"pairs": pairs})
    assert data.parts["pairs"].batch(0, 0, 4)["x"].shape == (4, 2, 4, 4)
    assert made().fingerprint != data.fingerprint


def test_the_fingerprint_tells_data_apart() -> None:
    data = made()
    assert data.fingerprint == made().fingerprint
    other = {"captions": ["x", "z"], "which": torch.zeros(6, dtype=torch.int64), "mean": torch.zeros(6, 2, 4, 4),
             "text": {}, "std": torch.ones(6, 2, 4, 4)}  # fmt: skip
    assert len({data.fingerprint, *(made(**{key: value}).fingerprint for key, value in other.items())}) == 6


def test_taking_rows_keeps_captions_with_images(encoded: CaptionedData) -> None:
    part = encoded.take(torch.tensor([3, 1]), origin="two of them")
    assert [part.caption_of(i) for i in range(2)] == ["a blue seven", "a seven"]
    assert len(part.captions) == 2
    assert torch.equal(part.mean, encoded.mean[[3, 1]])
    assert part.mirrored_std is not None
    states = part.text["encoder_hidden_states"]
    assert torch.equal(states[part.which], encoded.text["encoder_hidden_states"][encoded.which[[3, 1]]])
    assert part.origin == "two of them"


def test_a_file_gives_back_the_same_data(encoded: CaptionedData, tmp_path: Path) -> None:
    encoded.save(tmp_path / "cache" / "x.safetensors")
    back = CaptionedData.load(tmp_path / "cache" / "x.safetensors")
    assert back.fingerprint == encoded.fingerprint
    assert (back.captions, back.name, back.origin) == (encoded.captions, encoded.name, encoded.origin)


@pytest.mark.parametrize("content", [None, b"", b"\0" * 64])
def test_a_file_that_is_none_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="holds no captioned data"):
        CaptionedData.load(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"which": torch.arange(5) % 2}, "6 images but 5 values of 'which'"),
        ({"which": torch.full((6,), 2)}, r"caption 2 of 2.*0\.\.1"),
        ({"captions": ["x"], "which": torch.zeros(6).long()}, "1 captions but 2 rows"),
        ({"std": torch.zeros(6, 2, 4, 5)}, r"std of shape \[2, 4, 5\] but mean of \[2, 4, 4\]"),
        ({"std": torch.zeros(5, 2, 4, 4)}, "6 images but 5 values of 'std'"),
        ({"mean": torch.zeros(0, 2, 4, 4), "which": torch.zeros(0).long()}, "no images"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        made(**changes)


@pytest.mark.parametrize(
    ("images", "texts", "words"),
    [
        (pictures().float(), TEXTS, "give uint8 images"),
        (pictures()[0], TEXTS, "give uint8 images"),
        (pictures(), TEXTS[:4], "5 images have 4 captions"),
        (pictures(), [*TEXTS[:4], "a zebra"], "zebra"),
        (pictures()[:, :, :7], TEXTS, "factor 2"),
        (pictures()[:, :1], TEXTS, "reads images"),
    ],
)
def test_images_that_cannot_be_encoded_are_refused(images: Tensor, texts: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        encode_images(images, texts, tiny_space())


def test_labels_are_dropped_from_conditions_of_any_rank() -> None:
    """The teachers' training turn replaces whole conditions by their null values, each kind alike, sample by sample."""
    from stillroom.bench.teach import Denoising
    from stillroom.draws import Draws
    from tiny_text_images import pixart

    student, seen = pixart(), {}
    data = made(
        64, text={"encoder_hidden_states": torch.randn(2, 3, 8), "encoder_attention_mask": torch.ones(2, 3).bool()}
    )
    student.null = {
        "encoder_hidden_states": torch.zeros(3, 8),
        "encoder_attention_mask": torch.tensor([True, False, False]),
    }
    call = student.call
    student.call = lambda network, x, time, cond: seen.update(cond) or call(network, x, time, cond)
    method = Denoising(Denoising.Options(label_drop=0.5))
    method.build(student)
    method.draw = Draws(torch.Generator().manual_seed(0), slice(0, 64), 64)
    method.denoise(data.batch(0, 0, 64))
    no_text = (seen["encoder_hidden_states"] == 0).all(2).all(1)
    no_mask = seen["encoder_attention_mask"].sum(1) == 1
    assert 16 < int(no_text.sum()) < 48
    assert torch.equal(no_text, no_mask)
