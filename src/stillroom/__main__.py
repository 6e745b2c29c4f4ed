"""``python -m stillroom``, and with it ``torchrun -m stillroom``."""

from __future__ import annotations

import sys

from stillroom.cli import main

if __name__ == "__main__":
    sys.exit(main())
