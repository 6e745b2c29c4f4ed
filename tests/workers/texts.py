"""Run under torchrun by methods/language/test_ernie_tiny.py: ``texts.py FILE`` trains ERNIE-Tiny and Distiller on texts
of unequal lengths and leaves their loss terms, ``{method: [value]}``, in FILE."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "methods" / "language"))

from test_distiller import losses as distiller_losses
from test_ernie_tiny import losses as ernie_losses

from stillroom.engine.distributed import World


def main(file: Path) -> None:
    found = {"ernie-tiny": ernie_losses(), "distiller": distiller_losses({"augmentation": "edits"})}
    world = World.join("cpu")
    if world.first:
        file.write_text(json.dumps(found))
    world.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
