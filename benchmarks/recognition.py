"""Whether a masked generator knows which digit is drawn already: linear probes of what its decoder says.

    python benchmarks/recognition.py [MODEL ...] [--n 2400]

Real pictures of two digits. The cell of the first is visible, all else is hidden, and the network is asked at the
visible cell and at the cell of the other digit, which it should not draw twice. A linear classifier, fitted on two
thirds of the pictures, names the visible digit and its colour from what the decoder says there; its share of right
answers on the last third is recorded. Chance is 0.1 of digits. The text has no part in it.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import Row, record
from torch import Tensor
from torch.nn import functional as F

from stillroom.bench.scenes.bench import ScenesBench
from stillroom.data.scenes.captions import CELLS, COLOURS, all_captions, draw_scenes, seeded
from stillroom.data.scenes.pictures import SHAPE, render
from stillroom.evaluation.judges import scaled
from stillroom.networks.mar import MAR, take
from stillroom.pictures import load_generator

MODELS, WHY = ("lightgen-four", "lightgen"), "recognition"


def places(network: MAR, cell: int) -> list[int]:
    """The tokens of a cell of the picture."""
    rows, columns = (side // (CELLS // 2) for side in network.grid)
    top, left = rows * (cell // (CELLS // 2)), columns * (cell % (CELLS // 2))
    return [(top + i) * network.grid[1] + left + j for i in range(rows) for j in range(columns)]


def right(features: Tensor, labels: Tensor, classes: int) -> float:
    """The share of the last third of ``features [N, ...]`` that a linear classifier of the rest names right."""
    x, fitted = features.flatten(1), 2 * len(labels) // 3
    x = (x - x[:fitted].mean(0)) / (x[:fitted].std(0) + 1e-6)
    weight, bias = torch.zeros(x.shape[1], classes, requires_grad=True), torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=30, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x[:fitted] @ weight + bias, labels[:fitted]) + 3e-3 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    return float(((x[fitted:] @ weight + bias).argmax(1) == labels[fitted:]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--n", type=int, default=2400, help="pictures")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    pool, draws = all_captions("two"), seeded(WHY)
    captions = [pool[i] for i in torch.randint(len(pool), (chosen.n,), generator=draws).tolist()]
    scenes = draw_scenes(captions, draws)
    pictures = scaled(render(scenes, "train", draws), SHAPE, "the benchmark")
    digits = torch.tensor([scene.things[0].digit for scene in scenes])
    colours = torch.tensor([scene.things[0].colour for scene in scenes])
    codec, rows = ScenesBench().space.codec, []
    with torch.no_grad():
        latents = torch.cat([codec.encode(part) for part in pictures.split(200)])
    for name in chosen.models:
        network: Any = load_generator(name).network
        shown, other = (torch.tensor([places(network, scene.things[i].cell) for scene in scenes]) for i in (0, 1))
        with torch.no_grad():
            tokens = network.tokens(latents)
            said = torch.cat(
                [network.decode(*part, network.grid) for part in zip(tokens.split(200), shown.split(200), strict=True)]
            )
        asked = {
            "the visible tokens": take(tokens, shown),
            "the decoder, where they are": take(said, shown),
            "the decoder, where the other digit is to be": take(said, other),
        }
        for where, features in asked.items():
            row: Row = {"model": name, "read from": where, "pictures": chosen.n}
            row["digit"] = right(features, digits, 10)
            row["colour"] = right(features, colours, len(COLOURS))
            rows.append(row)
            print(*row.values(), flush=True)
    record(
        "What a masked generator knows of a drawn digit",
        "The share of real pictures of which a linear probe names the visible digit, and its colour, from what the "
        "network says; chance is 0.1 of digits.",
        f"python benchmarks/recognition.py {' '.join(chosen.models)}",
        rows,
    )


if __name__ == "__main__":
    main()
