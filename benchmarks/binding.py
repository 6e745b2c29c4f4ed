"""What a masked generator lacks where a caption asks for two digits: a student of which a digit is one token of four,
`lightgen-four`, trained on with such captions alone, as it is and with text in more places.

    python benchmarks/binding.py [WORD ...] [--steps 500] [--n 150]

The released network reads the text last: encoder and decoder say what is drawn already, then places that do not see
each other attend to the text, then the diffusion head draws a token from one vector. Two additions are tried. They add
nothing before they are trained, so that all forms begin as that student, and all see the same batches:

- text in every block: encoder and decoder blocks are preceded by an attention to the text, so that a digit that is
  drawn can tell which of the caption's digits it is;
- a head that reads: the head's blocks are preceded by an attention to the text, so that a noisy token whose colour can
  be seen can look up which digit has that colour.

With words given, only forms whose name holds one of them are trained; the rows of the others stay as recorded.
"""

from __future__ import annotations

import argparse
import copy
import json
from typing import Any

import torch
from common import OUT, Row, record
from torch import Tensor, nn
from torch.nn import functional as F

from stillroom.bench.scenes.bench import ScenesBench
from stillroom.bench.scenes.judge import mistakes, scene_eval
from stillroom.bench.scenes.teach import teacher_data
from stillroom.diffusion.masking import MaskRatio
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.evaluation.metrics import to_uint8
from stillroom.methods.masked.lightgen import LightGen
from stillroom.networks.mar import MAR, MaskedLoss, take
from stillroom.networks.token_head import TokenDiffusionHead
from stillroom.pictures import load_generator
from stillroom.tasks.text_images.model import TextImageGenerator

IMAGES, SEED, BATCH, LR, INNER, HEADS = 8_000, 100, 64, 5e-4, 128, 4
FORMS = {
    "as it is": (False, False),
    "text in every block": (True, False),
    "a head that reads": (False, True),
    "both": (True, True),
}


class Reads(nn.Module):
    """``x + attention(x, text)``, zero at the start: x ``[B, ..., width]``, text ``[B, T, text_width]``."""

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.norm, self.q = nn.LayerNorm(width), nn.Linear(width, INNER)
        self.kv, self.out = nn.Linear(text_width, 2 * INNER), nn.Linear(INNER, width)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.reshape(len(text), -1, HEADS, INNER // HEADS).transpose(1, 2)

        keys, values = map(split, self.kv(text).chunk(2, -1))
        y = F.scaled_dot_product_attention(split(self.q(self.norm(x))), keys, values)
        return x + self.out(y.transpose(1, 2).reshape(*x.shape[:-1], INNER))


class Told(nn.Module):
    """A block behind an attention to the text that the network reads at present."""

    def __init__(self, block: nn.Module, reads: Reads, now: dict[str, Tensor]) -> None:
        super().__init__()
        self.block, self.reads, self.now = block, reads, now

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return self.block(self.reads(x, self.now["text"]), *more)


class Whole(MAR):
    """A MAR of which text can be read throughout: encoder and decoder run for the text and for the null text."""

    now: dict[str, Tensor]

    def forward(
        self, latents: Tensor, text: Tensor, order: Tensor, masked: int, t: Tensor, eps: Tensor,
        drop: Tensor | None = None,
    ) -> MaskedLoss:  # fmt: skip
        grid, tokens, aligned = self.grid_of(latents), self.tokens(latents), self.align(text)
        if drop is not None:
            aligned = torch.where(drop[:, None, None], self.null_text, aligned)
        self.now["text"], hidden = aligned, order[:, :masked]
        z = self.cross(self.decode(tokens, order[:, masked:], grid), hidden, self.keys_and_values(aligned), grid)
        errors, _ = self.head.errors(z, take(tokens, hidden), t, eps)
        self.now.clear()
        return MaskedLoss(errors.mean((1, 2)), None, z)

    def remember(self, text: Tensor, given: bool = True, null: bool = False) -> Any:
        rows = [self.align(text)] if given else []
        if null:
            rows.append(self.null_text.expand(len(text), text.shape[1], -1))
        self.now["text"] = torch.cat(rows)
        return self.keys_and_values(self.now["text"])

    def fill(self, tokens: Tensor, visible: Tensor, at: Tensor, memory: Any, noise: Tensor, plan: Any, grid: Any,
             **how: Any) -> Tensor:  # fmt: skip
        rows = len(self.now["text"]) // len(tokens)
        tokens, visible, at = (value.repeat(rows, *[1] * (value.ndim - 1)) for value in (tokens, visible, at))
        z = self.cross(self.decode(tokens, visible, grid), at, memory, grid)
        return self.head.sample(z.reshape(rows, *noise.shape[:2], self.width), noise, plan, **how)


class ReadingHead(TokenDiffusionHead):
    """A head whose blocks are preceded by attention to the text."""

    now: dict[str, Tensor]

    def modulated(self, x_t: Tensor, parts: Any) -> tuple[Tensor, None]:
        h = self.embed_x(x_t)
        h = h.expand(torch.broadcast_shapes(h.shape, parts[0].shape)).contiguous()
        for i, (block, reads) in enumerate(zip(self.blocks, self.reads, strict=True)):  # type: ignore[arg-type]
            h = block(reads(h, self.now["text"]), *parts[3 * i : 3 * i + 3])
        shift, scale = parts[-2:]
        return self.out(torch.addcmul(shift, F.layer_norm(h, (self.width,), eps=1e-6), 1 + scale)).float(), None


def form(student: MAR, in_blocks: bool, in_head: bool) -> MAR:
    """``student`` with these additions, which add nothing yet."""
    torch.manual_seed(SEED)
    network: Any = copy.deepcopy(student)
    network.__class__, network.now = Whole, {}
    if in_blocks:
        for blocks in (network.encoder_blocks, network.decoder_blocks):
            for i, block in enumerate(blocks):
                blocks[i] = Told(block, Reads(network.width, network.width), network.now)
    if in_head:
        head = network.head
        head.__class__, head.now = ReadingHead, network.now
        head.reads = nn.ModuleList(Reads(head.width, network.width) for _ in head.blocks)
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--n", type=int, default=150, help="captions of each kind")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    shipped: Any = load_generator("lightgen-four")
    bench, file = ScenesBench(), OUT / "binding.json"
    recorded: list[Row] = json.loads(file.read_text())["rows"] if file.is_file() else []
    data = teacher_data(IMAGES, SEED, shipped.space, {"two": 1, "attribution": 1})
    rows: list[Row] = []

    def judged(name: str, model: TextImageGenerator, steps: int, loss: float | None) -> None:
        for split in ("train", "heldout"):
            captions = [c for c in bench.captions(6 * chosen.n, split=split) if c.category in ("two", "attribution")]
            for kind in ("two", "attribution"):
                asked = [caption for caption in captions if caption.category == kind][: chosen.n]
                reading = bench.parser.read(to_uint8(model.sample([caption.text for caption in asked], seed=0)))
                row: Row = {"form": name, "steps": steps, "loss": loss, "captions": f"{kind}, {split}", "N": len(asked)}
                rows.append(row | {"right": scene_eval(asked, reading)["sceneeval"], **mistakes(asked, reading)})
                print(*rows[-1].values(), flush=True)

    for name, additions in {"before": None, **FORMS}.items():
        if chosen.words and not any(word in name for word in chosen.words):
            rows += [row for row in recorded if row["form"] == name]
            continue
        if additions is None:
            judged(name, shipped, 0, None)
            continue
        evenly = MaskRatio(mean=0.5, std=10.0, low=0.0)
        method = LightGen(LightGen.Options(mask_ratio=evenly, pretrain_share=1.0, adapt_share=0.0, dpo_share=0.0))
        method.space, method.parts, method.student = shipped.space, (), form(shipped.network, *additions)
        config = EngineConfig(
            steps=chosen.steps, batch=BATCH, seed=SEED, warmup=50, schedule="cosine", log_every=25,
            optim={"masked": {"lr": LR}}, ema=[{"name": "ema", "of": "student", "decay": 0.99}], export="ema",
        )  # fmt: skip
        trainer = Trainer(method, data, config)
        trainer.fit()
        losses = [row["loss/masked/mse"] for row in trainer.history][-4:]
        trained: Any = trainer.export_role()
        judged(
            name, TextImageGenerator(trained, shipped.sampler, shipped.space), chosen.steps, sum(losses) / len(losses)
        )
    record(
        "Which digit has which colour",
        f"The student of four tokens, lightgen-four, after {chosen.steps} more steps on real scenes of two digits, as "
        "it is and with text in more places, which add nothing at the start; one seed.",
        "python benchmarks/binding.py",
        rows,
    )


if __name__ == "__main__":
    main()
