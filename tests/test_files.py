"""Files are written whole or not at all, and held by one process at a time."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from stillroom.errors import UserError
from stillroom.files import held, in_use, locked, make_folder, refusal, write, writing


@pytest.mark.parametrize(
    "content", ["grüße", "grüße".encode(), lambda aside: aside.write_text("grüße", encoding="utf-8")]
)
def test_text_bytes_or_what_a_function_writes_replace_a_file(tmp_path: Path, content: Any) -> None:
    (tmp_path / "a").write_text("old")
    write(tmp_path / "a", content)
    assert (tmp_path / "a").read_text(encoding="utf-8") == "grüße"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("fails", ["os.fsync", "os.replace"])
@pytest.mark.parametrize(
    ("number", "says"), [(errno.ENOSPC, "no space left on the disk while writing .*a;"), (errno.EACCES, "cannot write")]
)
def test_a_file_that_cannot_be_written_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, number: int, says: str
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, "refused")

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(fails, refuse)
    with pytest.raises(UserError, match=says):
        write(tmp_path / "a", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_what_the_content_itself_does_wrong_passes(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "a", lambda aside: 1 / 0)
    with pytest.raises(PermissionError), writing(tmp_path, full_disk_only=True):
        raise PermissionError


def test_a_folder_that_this_process_holds_is_in_use_until_it_lets_go(tmp_path: Path) -> None:
    assert not in_use(tmp_path)
    with held(tmp_path):
        with held(tmp_path):
            pass
        assert in_use(tmp_path)
    assert not in_use(tmp_path)


@pytest.mark.parametrize(
    "how", [make_folder, lambda place: locked(place).__enter__(), lambda place: held(place).__enter__()]
)
def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path, how: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/sub.*Not a directory; choose a folder of your own"):
        how(tmp_path / "file" / "sub" / "folder")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "cannot write a/b: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "a"), "cannot write a: Read-only file system"),
        (
            RuntimeError("Error while serializing: I/O error: Read-only file system (os error 30)"),
            "cannot write a file",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a"), "no space left on the disk while writing a"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a"), ""),
        (ValueError("no such value"), ""),
    ],
)
def test_what_the_system_refuses_is_told_from_other_errors(error: Exception, says: str) -> None:
    found = refusal(error)
    assert (found is None) if not says else says in str(found)
