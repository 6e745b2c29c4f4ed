"""Write the generated parts of README.md and docs/ from the catalogue, the method classes and results/ (docgen/).

python tools/generate_docs.py            rewrite
python tools/generate_docs.py --check    exit 1 if a file does not say what the results say
"""

from __future__ import annotations

import argparse
from pathlib import Path

from docgen.documents import documents
from docgen.sources import DocsError, Sources

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a file is out of date")
    check = parser.parse_args(arguments).check
    stale = []
    try:
        texts = documents(Sources(root))
    except DocsError as error:
        print(error)
        return 1
    for path, text in texts.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.relative_to(root).as_posix())
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    for name in stale:
        print(f"{name}: {'does not say what the results say; run `make docs`' if check else 'rewritten'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
