"""Small frozen networks that judge images: saved with a card, and named by the hash of their weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from stillroom.errors import UserError
from stillroom.files import write
from stillroom.surgery.freezing import frozen

FEATURES = 64


class Card(Protocol):
    """What is known of a judge: a dataclass that names the data it has learnt from and the SHA-256 of
    :func:`saved_hash`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def data(self) -> str: ...

    @property
    def sha256(self) -> str: ...


_Card = TypeVar("_Card", bound=Card)


class Judge(nn.Module, Generic[_Card]):
    """``name`` (``fashion@1a2b3c4d``) holds the first eight hex digits of the weights' SHA-256; every score states
    it."""

    def __init__(self, net: nn.Module, card: _Card) -> None:
        super().__init__()
        self.net: Any = frozen(net)
        self.card = card

    @property
    def name(self) -> str:
        return f"{self.card.data}@{self.card.sha256[:8]}"

    def save(self, folder: Path) -> None:
        """``model.safetensors`` and ``config.json`` (the card) in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "model.safetensors", _weights(self.net))
        write(folder / "config.json", json.dumps(dataclasses.asdict(self.card), indent=2) + "\n")


def scaled(images: Tensor, shape: tuple[int, ...], who: str) -> Tensor:
    """uint8 images ``[N, C, H, W]`` in [-1, 1]. Raises UserError for anything but images of this shape ``(C, H, W)``,
    which ``who`` reads."""
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != tuple(shape):
        raise UserError(
            f"the {who} reads uint8 images [N, {', '.join(map(str, shape))}], not {images.dtype} {list(images.shape)}",
            cure="use a bench made for images of this size",
        )
    return images.float().div_(127.5).sub_(1.0)


# --- on disk ----------------------------------------------------------------------------------------------------------
def _weights(net: nn.Module) -> bytes:
    from safetensors.torch import save

    return save({key: value.contiguous() for key, value in net.state_dict().items()})


def saved_hash(net: nn.Module) -> str:
    """SHA-256 of the file of weights that :meth:`Judge.save` writes."""
    return hashlib.sha256(_weights(net)).hexdigest()


def load_judge(folder: Path, kind: type[_Card], what: str) -> tuple[_Card, dict[str, Tensor]]:
    """Card and weights of :meth:`Judge.save`. Raises UserError if ``folder`` holds no ``what`` (the word for it in the
    message), or if the weights are not those that the card describes."""
    from safetensors.torch import load

    try:
        stored: dict[str, Any] = json.loads((folder / "config.json").read_text())
        card = kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()})
        raw = (folder / "model.safetensors").read_bytes()
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise UserError(f"no {what} in {folder}: {problem}", cure="train one again or reinstall stillroom") from None
    found = hashlib.sha256(raw).hexdigest()
    if found != card.sha256:
        raise UserError(
            f"{folder}/model.safetensors is not the file its config.json describes (SHA-256 {found[:8]})",
            cure="delete the folder if it lies in the cache (it is made again), else reinstall stillroom",
        )
    return card, load(raw)
