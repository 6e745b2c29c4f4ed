"""Text-to-image models: a network on latents between a frozen text encoder and a frozen autoencoder, in the folder
layout of diffusers' pipelines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.data.scenes.captions import sample_captions
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.masking import TEXT, MaskedSampler
from stillroom.diffusion.sampling import ODESampler, Sampler, sampler_from_dict
from stillroom.draws import mix
from stillroom.engine.progress import Parts
from stillroom.errors import UserError
from stillroom.folders.denoisers import SIDE_FILE, load_denoiser, load_network, network_folder, save_network
from stillroom.folders.diffusers_networks import accepts
from stillroom.networks.mar import MAR
from stillroom.networks.text_encoder import CONDITIONS, TEXT_ENCODER
from stillroom.networks.text_image_space import TextImageSpace
from stillroom.parsing import read_json
from stillroom.pictures import PictureGenerator
from stillroom.surgery.modules import device_of
from stillroom.task import COLUMNS, Part, Rows
from stillroom.tasks.class_images.model import ImageGenerator

EXAMPLES = {
    "single": "a photo of a seven",
    "two": "a two and a five",
    "counting": "three fours",
    "colours": "a red eight",
    "position": "a three to the left of a nine",
    "attribution": "a green one and a purple six",
}
"""One caption of each kind of the scenes world, for sample grids."""
TEXT_WIDTHS = ("joint_attention_dim", "caption_channels", "encoder_hid_dim", "cross_attention_dim", "text_width")
"""Keys under which networks' configs state the width of the text features that they read, the most specific first."""


class TextImageGenerator(PictureGenerator):
    """A network on latents, how it is sampled, and the space that it lives in; what ``stillroom.load`` returns for a
    text-to-image model.

    network: a :class:`Denoiser` conditioned on text, or a masked generator (:class:`MAR`). A denoiser without
    unconditional values of its own gets those of the empty caption.
    Raises UserError when network and space do not fit.
    """

    noun = "a text-to-image model"
    does, usage, asked_by = "draws captions", "stillroom.load(DIR).sample(captions)", "captions"

    def __init__(self, network: nn.Module, sampler: Sampler, space: TextImageSpace) -> None:
        check_fit(network, space)
        self.network, self.sampler, self.space = network.eval(), sampler, space
        if isinstance(network, Denoiser) and not network.null:
            network.null = space.null(network.network)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of its pictures, in pixels."""
        height, width = self.space.size
        return height, width

    def rows(self, asked: Sequence[str] = (), n: int = COLUMNS, seed: int = 0) -> Rows:
        """``n`` samples for each caption, by default one of each kind of the scenes world."""
        chosen = list(asked) or list(EXAMPLES.values())
        images = self.sample([caption for caption in chosen for _ in range(n)], seed=seed)
        return Rows(chosen, images.unflatten(0, (len(chosen), n)))

    # --- sampling -------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def sample(
        self,
        captions: Sequence[str] | str,
        seed: int | Sequence[int] = 0,
        batch: int = 0,
        size: tuple[int, int] | None = None,
        **changes: Any,
    ) -> Tensor:
        """Images ``[N, 3, H, W]`` float32 in [-1, 1], one per caption, on the CPU.

        seed: of the whole call, or one for each caption. Image i starts from noise that depends on the seed and i (or
        on its own seed) alone; samplers that draw more noise on the way draw it for a batch at a time. batch: images at
        once; 0: 64, or as many as :attr:`at_once` allows.
        size: (height, width) in pixels, by default the space's. changes: settings of the sampler, e.g. ``guidance=3``.
        Raises UserError for captions that the text encoder refuses, unknown settings and sizes that do not fit.
        """
        return self._drawn(captions, seed, batch, size, changes)

    @torch.no_grad()
    def inpaint(
        self,
        captions: Sequence[str] | str,
        images: Tensor,
        hole: Tensor,
        seed: int | Sequence[int] = 0,
        batch: int = 0,
        **changes: Any,
    ) -> Tensor:
        """``images [N, 3, H, W]`` in [-1, 1] with their ``hole`` (bool ``[H, W]`` or ``[N, H, W]``, True = to be
        filled) drawn anew to fit the captions; outside the hole they come back unchanged.

        Needs a masked generator. Raises UserError else, and as :meth:`sample` does.
        """
        if not isinstance(self.network, MAR):
            raise UserError(
                f"a {type(self.network).__name__} cannot fill holes", cure="in-paint with a masked generator (MAR)"
            )
        rows = 1 if isinstance(captions, str) else len(captions)
        if len(images) != rows or hole.shape not in (images.shape[2:], (rows, *images.shape[2:])):
            raise UserError(
                f"{rows} captions, images {list(images.shape)} and hole {list(hole.shape)} do not fit each other",
                cure="give images [N, 3, H, W] and a hole [H, W] or [N, H, W] for N captions",
            )
        hole = hole.bool().expand(rows, *images.shape[2:])
        latents = self.space.codec.encode(images)
        cells = F.max_pool2d(hole[:, None].float(), self.space.codec.factor)[:, 0] > 0
        size = (images.shape[2], images.shape[3])
        drawn = self._drawn(captions, seed, batch, size, changes, known=latents, hole=cells)
        return torch.where(hole[:, None].to(drawn.device), drawn, images.float().cpu())

    def _drawn(
        self,
        captions: Sequence[str] | str,
        seed: int | Sequence[int],
        batch: int,
        size: tuple[int, int] | None,
        changes: dict[str, Any],
        **paint: Tensor,
    ) -> Tensor:
        texts = [captions] if isinstance(captions, str) else list(captions)
        if not texts:
            raise UserError("no samples were asked for", cure="give at least one caption")
        for text in {id(text): text for text in texts}.values():
            self.space.text.check(text)
        seeds = _row_seeds(seed, len(texts))
        sampler = self.changed(**changes)
        shape = (self.space.codec.channels, *self.space.codec.grid(size or self.space.size))
        self._check_patches(shape, size or self.space.size)
        device, out = device_of(self.network), []
        batch = batch or self.at_once
        for start in Parts(len(texts), batch):
            rows = slice(start, start + batch)
            noise = torch.stack(
                [torch.randn(shape, generator=torch.Generator().manual_seed(row)) for row in seeds[rows]]
            )
            # Noise on the way must not repeat the noise at the start.
            generator = torch.Generator().manual_seed(mix(*seeds[rows]))
            part = {key: value[rows].to(device) for key, value in paint.items()}
            with self.steered():
                latents = sampler.sample(self.network, noise.to(device), self.cond(texts[rows]), generator, **part)  # type: ignore[arg-type]
            out.append(self.space.codec.decode(latents).float().cpu())
        return torch.cat(out)

    def said(self, text: str) -> dict[str, Tensor]:
        return self.cond([text])

    def cond(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The conditions ``[B, ...]`` that the network reads, on its device. A caption that is asked for several times
        is encoded once."""
        places = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        features, device = self.space.text.encode(list(places)), device_of(self.network)
        names = tuple(self.network.null) if isinstance(self.network, Denoiser) else (TEXT,)
        rows = torch.tensor([places[caption] for caption in captions])
        return {name: features[name][rows.to(features[name].device)].to(device) for name in names}

    def _check_patches(self, shape: tuple[int, int, int], size: tuple[int, int]) -> None:
        network = self.network.network if isinstance(self.network, Denoiser) else self.network
        config: Any = getattr(network, "config", {})
        patch = int(config.get("patch_size") or config.get("patch") or 1)
        if shape[1] % patch or shape[2] % patch:
            raise UserError(
                f"images of {size[0]}x{size[1]} pixels make latents of {shape[1]}x{shape[2]}, which do not divide by "
                f"the network's patches of {patch}",
                cure=f"choose multiples of {patch * self.space.codec.factor} pixels",
            )

    # --- wishes ---------------------------------------------------------------------------------------------------
    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"network": self.network, "text": self.space.text, "codec": self.space.codec}

    @property
    def image_size(self) -> tuple[int, int]:
        return self.space.size

    def check(self, wish: str) -> None:
        self.space.text.check(wish)

    def knows(self, caption: str) -> bool:
        """Whether the text encoder has seen all of its words."""
        try:
            self.check(caption)
        except UserError:
            return False
        return True

    def examples(self) -> list[str]:
        """Those of :data:`EXAMPLES` of which it knows every word."""
        return [caption for caption in EXAMPLES.values() if self.knows(caption)]

    def surprise(self, generator: torch.Generator) -> str:
        """Any caption of the scenes world, combinations that were held out included."""
        split = ("train", "train", "heldout")[int(torch.randint(3, (), generator=generator))]
        caption = sample_captions(1, generator, split)[0].text
        return caption if self.examples() and self.knows(caption) else super().surprise(generator)

    def draw(self, wish: str, n: int, seed: int, **changes: Any) -> Tensor:
        return self.sample([wish] * n, seed=seed, **changes)

    @property
    def fills(self) -> bool:
        return isinstance(self.network, MAR)

    @property
    def cell(self) -> int:
        config: Any = getattr(self.network, "config", {})
        return self.space.codec.factor * int(config.get("patch", 1))

    def fill(self, wish: str, image: Tensor, hole: Tensor, n: int, seed: int, **changes: Any) -> Tensor:
        return self.inpaint([wish] * n, image.expand(n, *image.shape), hole, seed=seed, **changes)

    # --- other runtimes -------------------------------------------------------------------------------------------
    def parts(self, whole: bool = False, size: tuple[int, int] | None = None) -> dict[str, Part]:
        from stillroom.tasks.text_images import export

        return export.parts(self, whole)

    def export_facts(self) -> dict[str, Any]:
        from stillroom.tasks.text_images import export

        return export.facts(self)

    def export_extras(self, folder: Path) -> None:
        from stillroom.tasks.text_images import export

        export.extras(self, folder)

    # --- folders --------------------------------------------------------------------------------------------------
    def save(self, folder: str | Path, components: str = "", dtype: torch.dtype | None = None, **extra: Any) -> None:
        """Write ``transformer/`` (or ``network/``), ``scheduler/``, the space's parts and ``stillroom.json``.

        components: where the space's parts lie, relative to ``folder``; then they are not written again.
        dtype: of the network's weights in the file (default: as they are). ``extra`` entries go to ``stillroom.json``.
        """
        folder, facts = Path(folder), {**self.space.facts(), **extra}
        if components:
            facts["components"] = components
        if isinstance(self.network, Denoiser):
            ImageGenerator(self.network, self.sampler).save(folder, dtype=dtype, **facts)
        else:
            save_network(self.network, folder, dtype)
            side = {"sampler": self.sampler.to_dict(), **facts}
            (folder / SIDE_FILE).write_text(json.dumps(side, indent=2) + "\n")
        if not components:
            self.space.save_parts(folder)

    @classmethod
    def holds(cls, folder: Path) -> bool:
        """A model that is asked in words, but no pipeline: it has a text encoder, or says where one lies."""
        side = folder / SIDE_FILE
        words = (folder / TEXT_ENCODER).is_dir() or (side.exists() and "components" in read_json(side))
        return words and not (folder / "model_index.json").is_file()

    @classmethod
    def load(cls, folder: str | Path) -> TextImageGenerator:
        """Read a folder written by :meth:`save`, or a diffusers pipeline of an ``AutoencoderKL``, a T5 encoder and a
        network that needs no other text encoder (then sampled by 25 Heun steps).

        Raises UserError for a missing, incomplete or corrupt folder, and for parts that do not fit each other.
        """
        folder = Path(folder)
        side = read_json(folder / SIDE_FILE) if (folder / SIDE_FILE).exists() else {}
        sampler = sampler_from_dict(side["sampler"]) if "sampler" in side else None
        if read_json(network_folder(folder) / "config.json").get("_class_name") == "MAR":
            network: nn.Module = load_network(folder)
        else:
            network = load_denoiser(folder)
        home = folder
        if "components" in side:
            home = (folder / side["components"]).resolve()
            if not home.is_dir():
                raise UserError(
                    f"{folder / SIDE_FILE} looks for its text encoder and autoencoder in {home}, which is not there",
                    cure="copy that folder too",
                )
        size = tuple(side["size"]) if "size" in side else None
        space = TextImageSpace.load(home, size)
        if size is None and isinstance(network, Denoiser):
            space.size = (network.shape[1] * space.codec.factor, network.shape[2] * space.codec.factor)
        return cls(network, sampler or (MaskedSampler() if isinstance(network, MAR) else ODESampler()), space)


def check_fit(network: nn.Module, space: TextImageSpace) -> None:
    """Raises UserError where the network's latents or text features are not those of the space, naming both sides."""
    inner = network.network if isinstance(network, Denoiser) else network
    name, config = type(inner).__name__, dict(getattr(inner, "config", {}))
    channels = network.shape[0] if isinstance(network, Denoiser) else config.get("channels", space.codec.channels)
    if channels != space.codec.channels:
        raise UserError(
            f"{name} works on latents of {channels} channels, the autoencoder makes {space.codec.channels}",
            cure="use the vae/ that the network was trained with",
        )
    widths = {key: config[key] for key in TEXT_WIDTHS if config.get(key) is not None}
    if not widths and not any(accepts(inner, condition) for condition in CONDITIONS):
        raise UserError(f"{name} reads no text", cure="load it with ImageGenerator, or give a text-to-image network")
    # "text_proj" UNets project from encoder_hid_dim; in PixArt cross_attention_dim is the width behind the projection
    key = next(iter(widths), "")
    checks = {key: widths[key]} if key else {}
    if pooled := config.get("pooled_projection_dim"):
        checks["pooled_projection_dim"] = pooled
    for key, width in checks.items():
        if width != space.text.width:
            raise UserError(
                f"{name} reads text features of width {width} ({key}), the text encoder makes {space.text.width}",
                cure="use the text_encoder/ that the network was trained with",
            )


def _row_seeds(seed: int | Sequence[int], rows: int) -> list[int]:
    if isinstance(seed, int):
        return [mix(seed, i) for i in range(rows)]
    if len(seed) != rows:
        raise UserError(f"{len(seed)} seeds for {rows} captions", cure="give one seed, or one for each caption")
    return [mix(one) for one in seed]
