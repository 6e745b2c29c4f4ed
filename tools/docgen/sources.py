"""What the documents are made from."""

from __future__ import annotations

import inspect
import json
import os
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

LEVELS = ("image", "text", "mechanism")


class DocsError(Exception):
    """A document asks for what is not there, or says what the results do not say."""


class Sources:
    """Catalogue, method classes and results of the repository at ``root``.

    pages: text of docs/methods/<slug>.md, by slug, as it will be written; the indexes take their lines from these.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pages: dict[str, str] = {}
        package = root / "src" / "stillroom"
        self.files = {
            path.stem.replace("_", "-"): path
            for path in sorted((package / "methods").glob("*/*.py"))
            if path.stem != "__init__"
        }
        self.catalogue: list[dict[str, Any]] = yaml.safe_load((package / "catalogue.yaml").read_text(encoding="utf-8"))
        uncatalogued = self.files.keys() - {entry["slug"] for entry in self.catalogue}
        self.catalogue += [self.entry_of(slug) for slug in sorted(uncatalogued)]
        self.results: dict[str, list[dict[str, Any]]] = {}
        for path in sorted((root / "results").glob("*.json")):
            result = json.loads(path.read_text(encoding="utf-8"))
            self.results.setdefault(result["method"], []).append(result)
        self.benchmarks = [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted((root / "results" / "benchmarks").glob("*.json"))
        ]

    @cached_property
    def classes(self) -> dict[str, Any]:
        """The class of every method, by slug."""
        sys.path.insert(0, str(self.root / "src"))
        from stillroom.method import methods

        return dict(methods())

    def entry_of(self, slug: str) -> dict[str, Any]:
        """A method that was never planned describes itself: the first sentence of its docstring."""
        cls = self.classes[slug]
        purpose = inspect.cleandoc(cls.__doc__ or "").split(". ")[0].rstrip(".")
        return {"slug": slug, "arxiv": cls.paper.arxiv, "wing": cls.wing, "purpose": purpose}

    def entry(self, slug: str) -> dict[str, Any]:
        found = next((entry for entry in self.catalogue if entry["slug"] == slug), None)
        if found is None:
            raise DocsError(f"there is no method {slug!r}")
        return found

    @property
    def implemented(self) -> list[str]:
        """Slugs of the methods that are here, in the order of the catalogue."""
        return [entry["slug"] for entry in self.catalogue if entry["slug"] in self.files]

    def claims(self, slug: str) -> list[dict[str, Any]]:
        """All claims of a method, those on a bench first, each with its ``floor`` and ``result``."""
        found = [
            claim | {"floor": (result.get("floor") or {}).get(claim["world"]) or {}, "result": result}
            for result in self.results.get(slug, [])
            for claim in result["claims"]
        ]
        return sorted(found, key=lambda claim: LEVELS.index(claim["level"]))

    def claim(self, slug: str, world: str, name: str) -> dict[str, Any]:
        for claim in self.claims(slug):
            if (claim["world"], claim["id"]) == (world, name):
                return claim
        raise DocsError(f"results of {slug} have no claim {name!r} in the world {world!r}")

    def arm(self, slug: str, world: str, name: str, key: str) -> dict[str, Any]:
        """The arm as a claim tells it whose metric is ``key``; of a cost, as any claim tells it."""
        here = [claim for claim in self.claims(slug) if claim["world"] == world and name in claim["arms"]]
        if not here:
            raise DocsError(f"results of {slug} have no arm {name!r} in the world {world!r}")
        return next((claim["arms"][name] for claim in here if claim["metric"] == key), here[0]["arms"][name])

    def value(self, slug: str, world: str, name: str, key: str) -> float:
        """The mean of an arm's metric or cost (``minutes`` is of seconds); with ``floor`` as name, of the bench's
        floor."""
        claims = [claim for claim in self.claims(slug) if claim["world"] == world]
        if name == "floor":
            known = claims[0]["floor"] if claims else {}
        else:
            arm = self.arm(slug, world, name, key)
            known = dict(arm.get("cost") or {})
            known |= {"minutes": known["seconds"] / 60} if "seconds" in known else {}
            known |= {c["metric"]: c["arms"][name]["mean"] for c in claims if name in c["arms"]}
        if known.get(key) is None:
            raise DocsError(f"{slug}, {world}, {name}: there is no {key!r}, but {', '.join(known)}")
        return known[key]


@dataclass
class Page:
    """A document: where it lies, and what it links to."""

    path: Path
    root: Path
    slug: str = field(init=False)  # of the method that the page is about; empty for others

    def __post_init__(self) -> None:
        self.slug = self.path.stem if self.path.parent == self.root / "docs" / "methods" else ""

    @property
    def name(self) -> str:
        return self.path.relative_to(self.root).as_posix()

    def link(self, target: str) -> str:
        """``target``, a path from the repository's root, as this page links to it."""
        return Path(os.path.relpath(self.root / target, self.path.parent)).as_posix()
