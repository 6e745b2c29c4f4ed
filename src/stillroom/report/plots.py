"""Curves as SVG that takes its colours and type from the page it stands in."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from stillroom.report.log import series

POINTS = 400
"""A curve is thinned to at most this many points: more cannot be seen and only make the file heavy."""

# Matplotlib wants fixed colours; these stand for the page's own and are replaced in the SVG.
_COLOURS = {"#010101": "var(--soft)", "#020202": "var(--line)", "#030303": "var(--accent)", "#040404": "var(--faint)"}
_SOFT, _LINE, _ACCENT, _FAINT = _COLOURS


def figures(rows: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups of plots: ``{"title", "plots": [{"title", "svg"}]}``. Empty groups are left out."""
    from stillroom.report.doctor import expected_bands

    bands = expected_bands(str(recipe.get("method")))
    groups = []
    for title, prefix in (("Health", "health/"), ("Losses", "loss/"), ("Gradient norms", "grad_norm/")):
        plots = [
            {"title": _words(name), "svg": curve(steps, values, bands.get(name) if prefix == "health/" else None)}
            for name, (steps, values) in series(rows, prefix).items()
            if sum(map(math.isfinite, values)) > 1
        ]
        if plots:
            groups.append({"title": title, "plots": plots})
    return groups


def _words(name: str) -> str:
    return name.replace("_", " ").replace("/", " · ")


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Exponential average over both directions, so that it does not lag; gaps (NaN) are passed over."""

    def sums(ordered: Sequence[float]) -> list[tuple[float, float]]:
        out, total, norm = [], 0.0, 0.0
        for value in ordered:
            total, norm = weight * total, weight * norm
            if math.isfinite(value):
                total, norm = total + value, norm + 1
            out.append((total, norm))
        return out

    both = zip(values, sums(values), sums(values[::-1])[::-1], strict=True)
    out = []
    for value, (left, left_norm), (right, right_norm) in both:
        here = (value, 1.0) if math.isfinite(value) else (0.0, 0.0)  # counted by both directions
        norm = left_norm + right_norm - here[1]
        out.append((left + right - here[0]) / norm if norm else math.nan)
    return out


def curve(steps: Sequence[int], values: Sequence[float], band: tuple[float, float] | None = None) -> str:
    """One curve over the steps: the raw numbers faint, their average strong, the expected band behind. Logarithmic
    where all values are positive and span more than a factor of 50."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    stride = math.ceil(len(steps) / POINTS)
    average = smooth(values, 0.5 ** (1 / max(len(values) / 40, 1e-9)))[::stride]
    xs, raw = list(steps[::stride]), [v if math.isfinite(v) else math.nan for v in values[::stride]]
    finite = [v for v in values if math.isfinite(v)]
    salt = f"{len(steps)}{finite[:3]}{finite[-3:]}"
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9}):
        figure = Figure(figsize=(4.2, 2.1))
        axes = figure.add_axes((0.13, 0.13, 0.85, 0.83))
        if band is not None:
            axes.axhspan(*band, color=_LINE, lw=0, zorder=0)
        if len(xs) > 30:
            axes.plot(xs, raw, color=_FAINT, lw=0.9)
            axes.plot(xs, average, color=_ACCENT, lw=1.7, solid_capstyle="round")
        else:
            axes.plot(xs, raw, color=_ACCENT, lw=1.7, solid_capstyle="round")
        if min(finite) > 0 and max(finite) > 50 * min(finite):
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}".replace("e-0", "e-")))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 1000:g}k" if abs(v) >= 1000 else f"{v:g}"))
        axes.margins(x=0.01, y=0.08)
        axes.grid(axis="y", color=_LINE, lw=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", length=0, colors=_SOFT, pad=4)
        for name, spine in axes.spines.items():
            spine.set_visible(name == "bottom")
            spine.set_color(_LINE)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue())


def _for_page(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    for fixed, variable in _COLOURS.items():
        svg = svg.replace(fixed, variable)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 role="img"', svg, count=1)
    return re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font-size: \1px", svg)
