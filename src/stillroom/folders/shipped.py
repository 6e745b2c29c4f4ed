"""Models that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

from stillroom.errors import UserError, nearest

ASSETS = Path(__file__).resolve().parents[1] / "assets"
SHIPPED = {
    "fashion": "fashion-teacher",
    "fashion-clip": "fashion-clip",
    "scenes-sd3": "scenes-sd3",
    "scenes-sd3-large": "scenes-sd3-large",
    "scenes-pixart": "scenes-pixart",
    "lightgen": "lightgen",
    "lightgen-four": "lightgen-four",
}
"""Name -> folder under assets/."""


def model_folder(name: str | Path) -> Path:
    """The folder of a model: a shipped one by name, or the path itself. Raises UserError for a name that is neither."""
    name = str(name)
    if name in SHIPPED and not Path(name).is_dir():
        return ASSETS / SHIPPED[name]
    if "/" not in name and not any(Path(one).exists() for one in (name, name.rpartition("@")[0] or name)):
        raise UserError(
            f"no model {name!r}{nearest(name, SHIPPED)}", cure=f"give a model's folder, or one of: {', '.join(SHIPPED)}"
        )
    return Path(name).expanduser()
