"""The values that pass between Python and the weight-temperature widget: what it shows, and what somebody set.

Checked here because they come from a browser; knows nothing of Gradio.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.palette import model_colors
from llm_merge.errors import RecipeError
from llm_merge.weights import DEFAULT_TEMPERATURE, validate_temperature

MAX_MODELS = 9  # a base and eight fine-tunes


@dataclass(frozen=True)
class WidgetRow:
    """One model: a short name, the full one for its tooltip, its mean loss (None: not measured), is it the base?"""

    name: str
    title: str = ""
    loss: float | None = None
    base: bool = False


@dataclass(frozen=True)
class Choice:
    """What somebody set. `shares` and `locked` have one entry per row, in their order; a row left out has share 0."""

    temperature: float = DEFAULT_TEMPERATURE
    shares: tuple[float, ...] = ()
    by_hand: bool = False
    locked: tuple[bool, ...] = ()
    include_base: bool = False


def widget_value(rows: Sequence[WidgetRow], choice: Choice, *, unit: str = "") -> dict[str, Any]:
    """What the browser is given: `unit` names the losses' unit, for example "nats per token"."""
    colors = model_colors([row.base for row in rows])
    shown = [
        {"name": row.name, "title": row.title or row.name, "loss": _finite(row.loss), "base": row.base, "color": color}
        for row, color in zip(rows, colors, strict=True)
    ]
    return {
        "rows": shown,
        "unit": unit,
        "temperature": choice.temperature,
        "shares": list(choice.shares),
        "by_hand": choice.by_hand,
        "locked": list(choice.locked),
        "include_base": choice.include_base,
    }


def read_choice(payload: object) -> Choice:
    """What the browser sent, checked: it may hold anything. Raises RecipeError with a sentence for the visitor."""
    if not isinstance(payload, Mapping):
        raise RecipeError("The shares could not be read: reload the page and set them again.", field="weights")
    temperature = payload.get("temperature")
    validate_temperature(temperature)
    shares, locked = payload.get("shares", ()), payload.get("locked", ())
    if not _short_list(shares) or not _short_list(locked):
        raise RecipeError(f"There can be at most {MAX_MODELS} shares.", field="weights")
    for position, share in enumerate(shares, start=1):
        number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if not number or not math.isfinite(share) or not -1e-9 <= share <= 1 + 1e-9:
            raise RecipeError(f"Share {position} is {share}: it must be between 0 and 1.", field="weights")
    return Choice(
        temperature=float(temperature),  # type: ignore[arg-type]  # validated above
        shares=tuple(float(share) for share in shares),
        by_hand=payload.get("by_hand") is True,
        locked=tuple(bool(lock) for lock in locked),
        include_base=payload.get("include_base") is True,
    )


def _finite(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None


def _short_list(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) <= MAX_MODELS
