"""The page's layout, in gradio."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillroom.demo.exhibits import MOST_IMAGES
from stillroom.demo.studio import LARGEST_SEED, Shown, Studio
from stillroom.errors import UserError

if TYPE_CHECKING:
    import gradio

HERE = Path(__file__).parent
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "draw", "concurrency_limit": 1, "show_progress": "hidden"}
"""Drawings wait for each other: two at once would spoil each other's times."""
RANGES: dict[str, tuple[float, float, float]] = {
    "guidance": (0, 10, 0.1),
    "steps": (1, 64, 1),
    "temperature": (0, 2, 0.05),
}
"""Lowest value, highest (or the model's own, where that is higher), step."""
FONTS = ("Inter", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")


def import_gradio() -> Any:
    """gradio, told to report to nobody. Raises UserError where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        raise UserError("the demo needs gradio", cure="pip install 'stillroom[demo]'") from None
    return gradio


def layout(studio: Studio) -> gradio.Blocks:
    """The whole page."""
    gr = import_gradio()
    with gr.Blocks(title="stillroom demo", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(_header(studio))
        shelf = gr.State([])
        with gr.Tabs():
            with gr.Tab("Draw"):
                drawn = _draw_tab(gr, studio)
            if studio.student.model.fills:
                with gr.Tab("Fill in"):
                    _fill_tab(gr, studio, shelf, drawn)
            else:
                _on_draw(gr, studio, shelf, drawn, [])
    return page


def _header(studio: Studio) -> str:
    names = [f"<span>{escape(model.name)}</span>" for model in studio.teachers]
    beside = f" beside {' and '.join(names)}" if names else ""
    what = "Pick a class" if studio.student.by_class else "Type what you want to see"
    how = "student and teachers draw it from the same seed" if names else "the model draws it"
    return (
        f'<header class="sr-top"><p>stillroom</p><h1>{escape(studio.student.name)}{beside}</h1>'
        f"<p>{what}; {how}, on this machine.</p></header>"
    )


def _draw_tab(gr: Any, studio: Studio) -> dict[str, Any]:
    by_class, wishes = studio.student.by_class, studio.student.model.examples()
    parts: dict[str, Any] = {}
    with gr.Row(elem_classes="sr-ask"):
        if by_class:
            parts["wish"] = gr.Dropdown(
                wishes,
                value=wishes[0] if wishes else None,
                label="Class",
                visible=bool(wishes),
                scale=6,
                container=False,
                show_label=False,
            )
        else:
            parts["wish"] = gr.Textbox(
                label="Caption", placeholder=f"for instance: {wishes[-1]}" if wishes else "", scale=6, max_lines=3,
                autofocus=True, container=False, show_label=False,
            )  # fmt: skip
        parts["go"] = gr.Button("Draw", variant="primary", min_width=90, elem_id="sr-go")
        parts["again"] = gr.Button("New seed", min_width=90, elem_id="sr-again")
        parts["surprise"] = gr.Button("Surprise me", min_width=110, visible=bool(wishes), elem_id="sr-surprise")
    parts["chips"] = {}
    if wishes and not by_class:
        with gr.Row(elem_classes="sr-chips"):
            parts["chips"] = {wish: gr.Button(wish, size="sm") for wish in wishes}
    parts["seed"], parts["n"], parts["settings"] = _settings(gr, studio, "teachers keep their own")
    parts["notice"] = gr.HTML(elem_id="sr-notice")
    parts["cards"] = gr.HTML(elem_id="sr-cards")
    return parts


def _settings(gr: Any, studio: Studio, remark: str = "") -> tuple[Any, Any, dict[str, Any]]:
    """Seed, number of images, and the sliders of the student's sampler."""
    sliders = {}
    title = f"Settings · {remark}" if remark and studio.teachers else "Settings"
    with gr.Accordion(title, open=False, elem_classes="sr-settings"), gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED, min_width=120)
        n = gr.Slider(1, MOST_IMAGES, value=4, step=1, label="Images", min_width=150, buttons=[])
        for name, value in studio.student.model.settings.items():
            low, high, step = RANGES[name]
            high = max(high, value)
            sliders[name] = gr.Slider(
                low, high, value=value, step=step, label=name.capitalize(), min_width=150, buttons=[]
            )
    return seed, n, sliders


def _on_draw(gr: Any, studio: Studio, shelf: Any, parts: dict[str, Any], more: list[Any]) -> None:
    """Let every button that draws do so. ``more``: the canvas and the caption of the other tab, if there is one."""
    names = tuple(parts["settings"])
    inputs = [parts["wish"], parts["seed"], parts["n"], shelf, *parts["settings"].values()]
    outputs = [parts["notice"], parts["cards"], shelf, *more]

    def draw(wish: Any, seed: Any, n: Any, shelf: Any, *values: Any) -> Iterator[Any]:
        for shown in studio.draw(wish, seed, n, dict(zip(names, values, strict=True)), shelf):
            painted = [_easel(gr, studio, shown), wish if shown.shelf is not None else gr.skip()] if more else []
            yield [shown.notice, _kept(gr, shown.cards), _kept(gr, shown.shelf), *painted]

    gr.on(
        [parts["go"].click, *([parts["wish"].submit] if hasattr(parts["wish"], "submit") else [])],
        draw, inputs, outputs, api_name="draw", **ONE_AT_A_TIME,
    )  # fmt: skip
    first: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    for button, change, changed in (
        (parts["again"], lambda: random.randint(0, 99_999), parts["seed"]),
        (parts["surprise"], studio.student.surprise, parts["wish"]),
        *((chip, lambda wish=wish: wish, parts["wish"]) for wish, chip in parts["chips"].items()),
    ):
        button.click(change, None, changed, **first).then(
            draw, inputs, outputs, api_visibility="private", **ONE_AT_A_TIME
        )


def _fill_tab(gr: Any, studio: Studio, shelf: Any, drawn: dict[str, Any]) -> None:
    with gr.Row(elem_classes="sr-fill"):
        with gr.Column(scale=5, min_width=300):
            easel = gr.HTML(
                value=studio.easel(Shown()), html_template=(HERE / "easel.html").read_text(encoding="utf-8"),
                js_on_load=(HERE / "easel.js").read_text(encoding="utf-8"), apply_default_css=False,
                elem_id="sr-easel",
            )  # fmt: skip
            file = gr.UploadButton("Upload a picture", file_types=["x"], size="sm", elem_id="sr-upload")
        with gr.Column(scale=6, min_width=300):
            wish = gr.Textbox(
                label="Caption of the whole picture", max_lines=3, placeholder="what the filled picture is to show"
            )
            go = gr.Button("Fill the hole", variant="primary", elem_id="sr-fill-go")
            seed, n, sliders = _settings(gr, studio)
            told = gr.HTML(elem_id="sr-fill-notice")
            cards = gr.HTML(elem_id="sr-fill-cards")
    names = tuple(sliders)

    def fill(painted: Any, wish: Any, seed: Any, n: Any, shelf: Any, *values: Any) -> list[Any]:
        shown = studio.fill(painted, wish, seed, n, dict(zip(names, values, strict=True)), shelf)
        return [shown.notice, _kept(gr, shown.cards), _kept(gr, shown.shelf), _easel(gr, studio, shown)]

    def upload(path: Any, shelf: Any) -> list[Any]:
        shown = studio.upload(path, shelf)
        return [shown.notice, _kept(gr, shown.shelf), _easel(gr, studio, shown)]

    inputs = [easel, wish, seed, n, shelf, *sliders.values()]
    gr.on([go.click, wish.submit], fill, inputs, [told, cards, shelf, easel], api_name="fill", **ONE_AT_A_TIME)
    file.upload(upload, [file, shelf], [told, shelf, easel], show_progress="hidden", api_visibility="private")
    _on_draw(gr, studio, shelf, drawn, [easel, wish])


def _kept(gr: Any, value: Any) -> Any:
    return gr.skip() if value is None else value


def _easel(gr: Any, studio: Studio, shown: Shown) -> Any:
    return gr.skip() if shown.shelf is None else studio.easel(shown)


def dressed(gr: Any) -> dict[str, Any]:
    """Theme and styles: system fonts, nothing from outside."""
    teal = gr.themes.Color(
        "#eef6f6", "#d6e9ea", "#b3d6d8", "#86bcbf", "#559da1", "#1f6f74", "#1b6165", "#175256", "#134346", "#0f3436",
        "#0a2425", name="teal",
    )  # fmt: skip
    theme = gr.themes.Base(
        primary_hue=teal, secondary_hue=teal, neutral_hue=gr.themes.colors.zinc, font=FONTS, font_mono=MONO,
        radius_size=gr.themes.sizes.radius_md,
    ).set(
        body_background_fill="#fbfaf8", body_background_fill_dark="#15171a", body_text_color_subdued="#6b6f76",
        body_text_color_subdued_dark="#989ca3", block_background_fill="#ffffff",
        block_background_fill_dark="#1c1f23", block_label_text_weight="500", input_background_fill_dark="#26292e",
        button_primary_background_fill="#1f6f74", button_primary_background_fill_dark="#1f6f74",
        button_primary_background_fill_hover="#175256", button_primary_text_color="#ffffff",
        button_secondary_background_fill="#ebe8e2", button_secondary_background_fill_hover="#dedad2",
        button_secondary_background_fill_dark="#2f3338", slider_color="#1f6f74",
    )  # fmt: skip
    return {"theme": theme, "css": (HERE / "style.css").read_text(encoding="utf-8")}
