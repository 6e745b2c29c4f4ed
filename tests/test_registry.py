"""What is known by name: its own modules, other packages, and what goes wrong there."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillroom import cli
from stillroom.errors import UserError
from stillroom.registry import Registry


def test_modules_are_walked_or_the_rooms_that_have_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "kept/room").mkdir(parents=True)
    (tmp_path / "kept/__init__.py").write_text("seen = []\n")
    (tmp_path / "kept/room/__init__.py").write_text("")
    for name in ("kept/room/gem.py", "kept/loose.py"):
        (tmp_path / name).write_text("import kept\nkept.seen.append(__name__)\n")
    import kept  # type: ignore[import-not-found]

    Registry("gem", "gems", "kept", inside="gem").known()
    assert kept.seen == ["kept.room.gem"]
    Registry("gem", "gems", "kept").known()
    assert kept.seen == ["kept.room.gem", "kept.loose"]


def test_names_are_sorted_and_unknown_ones_name_the_nearest() -> None:
    gems: Registry[type] = Registry("gem", "gems")
    opal = gems.add("opal", type("Opal", (), {}))
    gems.add("jade", type("Jade", (), {}))
    assert list(gems.known()) == ["jade", "opal"]
    assert gems.get("opal") is opal
    with pytest.raises(UserError, match=r"^unknown gem 'opla' \(did you mean 'opal'\?\); known: jade, opal$"):
        gems.get("opla")


def test_a_name_is_claimed_once() -> None:
    gems: Registry[type] = Registry("gem", "gems")
    gems.add("opal", type("Opal", (), {}))
    again = gems.add("opal", type("Opal", (), {}))  # its module was imported twice
    assert gems.known() == {"opal": again}
    with pytest.raises(ValueError, match="two gems claim the name 'opal'"):
        gems.add("opal", type("Jade", (), {}))


def test_a_package_whose_import_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info = tmp_path / "cracked-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cracked\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[stillroom.tasks]\ngems = cracked_gems\n")
    (tmp_path / "cracked_gems.py").write_text("import no_such_thing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cli.main(["plan", "dmd2"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "stillroom: package 'cracked' offers 'gems' to stillroom.tasks, but its import fails (ModuleNotFoundError: No "
        "module named 'no_such_thing'); mend cracked_gems, or uninstall cracked"
    ]
