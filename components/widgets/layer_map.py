"""The layer map: quantities over a model's layers as a heatmap that is read, walked and brushed in the browser.

Python gives it a value (`layer_value`) and hears which layers were selected (`.select`). What that means for a recipe
is decided elsewhere.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from components.views.layer_choice import MapScale, layer_value

HERE = Path(__file__).resolve().parent
SENT = ("selected", "row", "column")


class LayerMap(gr.HTML):
    """The component. Its value is a dict from `layer_value`.

    A handler that takes it as input is given {"selected", "row", "column"} as the browser sent them: check them with
    `read_selection`. Listen with `.select(..., trigger_mode="always_last")`, so that the last of several quick
    selections is never dropped. The map keeps its own selection: a handler need not answer to it.
    """

    def __init__(self, value: dict[str, Any] | None = None, *, name: str = "Layers", **arguments: Any) -> None:
        """`name` is what screen readers call the map."""
        super().__init__(
            value if value is not None else layer_value((), (), scale=MapScale(1.0)),
            html_template=f'<div class="lm" data-name="{html.escape(name)}"></div>',
            css_template=(HERE / "layer_map.css").read_text("utf-8"),
            js_on_load="\n".join((HERE / name).read_text("utf-8") for name in ("layer_map_parts.js", "layer_map.js")),
            apply_default_css=False,
            **arguments,
        )

    def preprocess(self, payload: Any) -> Any:
        return {key: payload.get(key) for key in SENT} if isinstance(payload, Mapping) else payload

    def postprocess(self, value: Any) -> Any:
        return value

    def api_info(self) -> dict[str, Any]:
        return {"type": "object"}
