"""Time and memory of every phase of a whole run, from reading the teacher to the report, against its plan.

    python benchmarks/whole_run.py [middle|sd15]

The teacher is a text-to-image pipeline of random weights, made from its config: ``middle`` has some 0.3 GB, ``sd15`` is
of Stable Diffusion 1.5's own sizes, 4.3 GB, at 256x256 pixels. DMD2 trains two adapters on its network for two steps.
The run has a process of its own, on the CPU; a thread reads its resident memory. What the interpreter and its libraries
take is left out: a tiny run comes first and loads them. Without an argument ``middle`` is run and not recorded.
"""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import Row, record

from stillroom import ending, planning, run
from stillroom.recipe import Recipe
from stillroom.tasks.pipelines import task as pipelines

LIMIT = 0.15
SIDES = {"tiny": 64, "middle": 128, "sd15": 256}
WORDS = ("a", "photo", "of", "the", "red", "blue", "cat", "dog", "house", "boat")
CHANGES = (
    "engine.steps=2", "engine.batch=2", "engine.warmup=0", "engine.device=cpu", "options.gan_weight=0",
    "options.t_init=1.0", "lora.student={rank: 8}", "lora.fake={rank: 8}", "evaluate.n=0", "evaluate.samples=4",
)  # fmt: skip


# --- the teacher ------------------------------------------------------------------------------------------------------
def make(size: str, folder: Path) -> None:
    """A pipeline of Stable Diffusion's classes with random weights."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    big = size == "sd15"
    wide, text = {"tiny": (32, 32), "middle": (160, 256), "sd15": (320, 768)}[size]
    blocks = (wide, 2 * wide, 4 * wide, 4 * wide)[: 4 if big else 3]
    cross = ["CrossAttnDownBlock2D"] * (len(blocks) - 1)
    network = UNet2DConditionModel(
        sample_size=SIDES[size] // 8, block_out_channels=blocks, layers_per_block=2 if big else 1,
        attention_head_dim=8, cross_attention_dim=text, down_block_types=(*cross, "DownBlock2D"),
        up_block_types=("UpBlock2D", *(name.replace("Down", "Up") for name in cross)),
    )  # fmt: skip
    codec = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512) if big else (32, 64, 64, 64), latent_channels=4,
        layers_per_block=2 if big else 1, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, sample_size=SIDES[size],
    )  # fmt: skip
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408 if big else 20, hidden_size=text, intermediate_size=4 * text, pad_token_id=0,
            num_hidden_layers=12 if big else 2, num_attention_heads=text // 64 or 1, max_position_embeddings=77,
            bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    noise: Any = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    StableDiffusionPipeline(
        vae=codec, text_encoder=encoder, tokenizer=tokenizer(), unet=network,
        scheduler=PNDMScheduler(**noise, steps_offset=1, skip_prk_steps=True), safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None, requires_safety_checker=False,  # type: ignore[arg-type]
    ).save_pretrained(folder)  # fmt: skip


def tokenizer() -> Any:
    """Words to numbers, padded to 77."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ("<pad>", "<s>", "</s>", "<unk>", *WORDS)
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, "<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=fast, model_max_length=77, padding_side="right", **special)


def recipe(size: str, home: Path) -> Recipe:
    prompts = home / "prompts.txt"
    prompts.write_text("a red cat\na blue dog\n")
    return Recipe.load("dmd2", CHANGES, teacher=f"{home / size}@{SIDES[size]}", data=str(prompts))


# --- measured ---------------------------------------------------------------------------------------------------------
class Watched:
    """The most resident memory, in bytes, and the seconds of each phase."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.phase = ""
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), resident())
            time.sleep(0.005)

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        outer, self.phase, began = self.phase, phase, time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began
            self.phase = outer

    def around(self, place: Any, name: str, phase: str) -> None:
        act: Callable[..., Any] = getattr(place, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.during(phase):
                return act(*args, **kwargs)

        setattr(place, name, watched)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def measure(size: str, home: Path) -> dict[str, Any]:
    """What the child does: a tiny run, then the one that is measured."""
    make("tiny", home / "tiny")
    run.run(recipe("tiny", home), home / "first")
    gc.collect()
    base, watched = resident(), Watched()
    watched.around(pipelines.Pipelines, "load", "load")
    watched.around(run, "build_method", "build")
    watched.around(ending, "try_out", "trial")
    watched.around(run, "train", "train")
    watched.around(ending, "save", "save")
    watched.around(pipelines.Pipelines, "rows", "draw")
    watched.around(ending, "complete", "report")
    run.run(recipe(size, home), home / "run")
    peaks = {phase: watched.peaks.get(phase, 0) - base for phase in watched.seconds}
    return {"base": base, "peaks": peaks, "seconds": watched.seconds}


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(sys.argv[2], Path(sys.argv[3]))))
        return
    size = sys.argv[1] if len(sys.argv) > 1 else "middle"
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        make(size, home / size)
        planned = planning.plan(recipe(size, home))
        gc.collect()
        child = [sys.executable, __file__, "--child", size, str(home)]
        found = json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    said = {phase.name: phase.process for phase in planned.phases}
    rows: list[Row] = []
    for phase, seconds in found["seconds"].items():
        row: Row = {"phase": phase, "seconds": seconds, "measured, MB": found["peaks"][phase] / 1e6}
        rows.append(row | ({"planned, MB": said[phase] / 1e6} if phase in said else {}))
    most = max(found["peaks"].values())
    error = planned.process / most - 1
    rows.append({"phase": "all", "seconds": sum(found["seconds"].values()), "measured, MB": most / 1e6,
                 "planned, MB": planned.process / 1e6})  # fmt: skip
    if len(sys.argv) == 1:
        print(json.dumps(rows, indent=1), f"error {error:.1%}")
        return
    record(
        "A whole run",
        f"`stillroom plan` predicts the most memory of a whole run, loading, saving and drawing included, within "
        f"{LIMIT:.0%} (DMD2 with adapters on a pipeline of random weights, {size}, {SIDES[size]} pixels, two steps of "
        f"batch 2 on the CPU; resident memory less that of interpreter and libraries, {found['base'] / 1e6:.0f} MB; "
        f"error {error:+.1%}).",
        f"python benchmarks/whole_run.py {size}",
        rows,
        abs(error) <= LIMIT,
    )


if __name__ == "__main__":
    main()
