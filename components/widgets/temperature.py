"""The weight temperature: shares as bars, the curve of weights against T, the formula, computed in the browser.

Python gives it models, losses and settings (`widget_value`) and hears what was chosen on letting go (`.release`).
What that means for the session is decided in `views/shares.py`; the arithmetic is that of `llm_merge/weights.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from components.views.choice import Choice, read_choice, widget_value
from llm_merge.errors import RecipeError

HERE = Path(__file__).resolve().parent


class WeightTemperature(gr.HTML):
    """The component. `compact` shows bars, slider and sentence only. Its value is a dict from `widget_value`; a handler
    of `.release` that takes it as input is given a `Choice`."""

    def __init__(self, value: dict[str, Any] | None = None, *, compact: bool = False, **arguments: Any) -> None:
        super().__init__(
            value if value is not None else widget_value((), Choice()),
            html_template=f'<div class="wt" data-compact="{str(compact).lower()}"></div>',
            css_template=(HERE / "temperature.css").read_text("utf-8"),
            js_on_load="\n".join(
                (HERE / name).read_text("utf-8") for name in ("temperature_math.js", "temperature.js")
            ),
            apply_default_css=False,
            **arguments,
        )

    def preprocess(self, payload: Any) -> Choice:  # type: ignore[override]
        try:
            return read_choice(payload)
        except RecipeError as error:
            raise gr.Error(error.message, print_exception=False) from error

    def postprocess(self, value: Any) -> Any:
        return value

    def api_info(self) -> dict[str, Any]:
        return {"type": "object"}
