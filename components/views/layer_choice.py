"""The values that pass between Python and the layer map: what it shows of each layer, and which layers somebody chose.

What a cell says is worded here, so that the map, its tooltips and a panel beside it say the same. What the browser
sends is checked here, because it may be anything. Knows nothing of Gradio, nor of how a contribution is measured.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llm_merge.errors import MergeError

NOISE_ERRORS = 2.0  # a value less than so many standard errors from 0 is not told from noise
DIGITS = 6  # decimals at most

State = Literal["exact", "estimate", "missing", "fixed"]
MarkType = Literal["severe", "partial", "mutual", "none"]

MARK_WORDS: dict[MarkType, str] = {
    "severe": "severe conflict",
    "partial": "partial conflict",
    "mutual": "mutual enhancement",
    "none": "no conflict type",
}
OUTSIDE = {
    "embeddings": ("emb", "Embeddings"),
    "norm": ("norm", "Final norm"),
    "head": ("head", "Output head"),
}
"""What is no block of the chain: key → label and title."""


@dataclass(frozen=True)
class MapCell:
    """One number of one layer and its standard error, None where there is none.

    `state`: measured ("exact"), computed from gradients ("estimate"), not there yet ("missing"), or known without
    measuring ("fixed"), as where no model differs from the base.
    """

    value: float | None = None
    error: float | None = None
    state: State = "missing"

    @property
    def known(self) -> bool:
        """Whether there is a number to show."""
        return self.state != "missing" and _finite(self.value) is not None

    @property
    def noise(self) -> bool:
        """Whether the value lies less than NOISE_ERRORS standard errors from 0. A value without error: not said."""
        value, error = _finite(self.value), _finite(self.error)
        return self.known and value is not None and error is not None and abs(value) < NOISE_ERRORS * error


@dataclass(frozen=True)
class MapRow:
    """One quantity over the layers, one cell per column. `title` explains it; `strong` sets it apart (Γ)."""

    key: str
    label: str
    cells: tuple[MapCell, ...]
    title: str = ""
    strong: bool = False


@dataclass(frozen=True)
class MapColumn:
    """One layer; `outside` for what is no block of the chain and stands apart: embeddings, final norm, head."""

    key: str
    label: str
    title: str = ""
    outside: bool = False


@dataclass(frozen=True)
class MapMark:
    """The conflict type of one layer. `uncertain`: it rests on noise. `note`: one more sentence for the tooltip."""

    type: MarkType = "none"
    uncertain: bool = False
    note: str = ""


@dataclass(frozen=True)
class MapScale:
    """The colours: `limit` is the absolute value of the strongest ones, `low`, `zero`, `high` what the signs mean.

    `warm` is the side drawn in orange, which should be the one that hurts: "high" for γ and Γ, "low" for α, β and c.
    """

    limit: float
    unit: str = "nats"
    low: str = "helps"
    high: str = "hurts"
    zero: str = "no effect"
    warm: Literal["low", "high"] = "high"


@dataclass(frozen=True)
class Selection:
    """Which layers are selected, in the map's order, and the cell that was chosen last ("" for none)."""

    selected: tuple[str, ...] = ()
    row: str = ""
    column: str = ""


def layer_columns(layers: int, outside: Collection[str] = tuple(OUTSIDE)) -> tuple[MapColumn, ...]:
    """Columns in the order of the model: the embeddings, blocks "0" … , final norm and head, as far as `outside` has
    them.
    """
    blocks = [MapColumn(str(layer), str(layer), f"Layer {layer}") for layer in range(layers)]
    apart = {key: MapColumn(key, *OUTSIDE[key], outside=True) for key in OUTSIDE if key in outside}
    before = [column for key, column in apart.items() if key == "embeddings"]
    return (*before, *blocks, *(column for key, column in apart.items() if key != "embeddings"))


def scale_limit(rows: Sequence[MapRow]) -> float:
    """The largest absolute value beyond noise, else the largest at all, rounded up to two digits; 1 without a value."""
    cells = [cell for row in rows for cell in row.cells if cell.known]
    sizes = [abs(cell.value or 0.0) for cell in cells if not cell.noise] or [abs(cell.value or 0.0) for cell in cells]
    largest = max(sizes, default=0.0)
    if largest == 0:
        return 1.0
    step = 10.0 ** (math.floor(math.log10(largest)) - 1)
    return float(f"{math.ceil(largest / step - 1e-9) * step:.2g}")


def layer_value(
    rows: Sequence[MapRow],
    columns: Sequence[MapColumn],
    *,
    scale: MapScale,
    marks: Sequence[MapMark] = (),
    selected: Sequence[str] | None = None,
    busy: bool = False,
    note: str = "",
) -> dict[str, Any]:
    """What the browser is given. Every row has one cell per column, `marks` one per column or none at all (ValueError).

    `selected` None leaves selected what the visitor has selected; a list sets it. `note` is a sentence below the map,
    and without rows or columns all that is shown: what will appear and how to get it.
    """
    return {
        "rows": [
            {
                "key": row.key,
                "label": row.label,
                "title": row.title,
                "strong": row.strong,
                "cells": [_cell(cell, scale) for cell, _ in zip(row.cells, columns, strict=True)],
            }
            for row in rows
        ],
        "columns": [
            {"key": one.key, "label": one.label, "title": one.title or one.label, "outside": one.outside}
            for one in columns
        ],
        "marks": [
            {"type": mark.type, "uncertain": mark.uncertain, "text": mark_text(mark)}
            for mark, _ in zip(marks, columns, strict=True)
        ]
        if marks
        else [],
        "scale": {
            "limit": scale.limit,
            "warm": scale.warm,
            "low": f"{number_text(-scale.limit)} {scale.low}",
            "zero": f"0 {scale.zero}",
            "high": f"+{number_text(scale.limit)} {scale.unit} {scale.high}",
        },
        "selected": None if selected is None else list(selected),
        "busy": busy,
        "note": note,
    }


def cell_text(cell: MapCell, scale: MapScale) -> str:
    """A cell in words: "0.042 ± 0.011 nats, hurts, beyond noise", "≈ 0.04 nats, hurts, estimate, not measured"."""
    if not cell.known or cell.value is None:
        return "not measured yet"
    error = _finite(cell.error)
    side = scale.high if cell.value > 0 else scale.low if cell.value < 0 else scale.zero
    number = number_text(cell.value, error)
    spread = f" ± {number_text(error, error)}" if error is not None and cell.state != "fixed" else ""
    words = [f"{'≈ ' if cell.state == 'estimate' else ''}{number}{spread} {scale.unit}"]
    if cell.state == "fixed":
        return f"{words[0]}, known without measuring"
    words.append("within noise" if cell.noise else side)
    if cell.state == "estimate":
        words.append("estimate, not measured")
    elif error is None:
        words.append("error not known")
    elif not cell.noise and cell.value:
        words.append("beyond noise")
    return ", ".join(words)


def mark_text(mark: MapMark) -> str:
    """A mark in words: "severe conflict, uncertain: Kept from Dictionary." """
    words = f"{MARK_WORDS[mark.type]}{', uncertain' if mark.uncertain else ''}"
    return f"{words}: {mark.note}" if mark.note else words


def number_text(value: float, error: float | None = None) -> str:
    """A number as people read it: the error to two digits, the value to as many decimals; alone to three digits."""
    size = abs(error) if error else abs(value)
    digits = 2 if error else 3
    decimals = min(DIGITS, max(0, digits - 1 - math.floor(math.log10(size)))) if size > 0 else 0
    text = f"{abs(value):.{decimals}f}"
    if not error and "." in text:
        text = text.rstrip("0").rstrip(".")
    return f"−{text}" if value < 0 and float(text) != 0 else text


def read_selection(payload: object, columns: Collection[str], rows: Collection[str] | None = None) -> Selection:
    """What the browser sent, checked against the keys of the columns (and rows) that this visitor was shown.

    Raises MergeError with a sentence for the visitor: the payload may hold anything.
    """
    again = "reload the page and select again."
    if not isinstance(payload, Mapping):
        raise MergeError(f"The selected layers could not be read: {again}", field="layers")
    selected = payload.get("selected")
    selected = () if selected is None else selected
    if not isinstance(selected, (list, tuple)):
        raise MergeError(f"The selected layers could not be read: {again}", field="layers")
    if len(selected) > len(columns):
        raise MergeError(f"{len(selected)} layers are selected, the map has {len(columns)}: {again}", field="layers")
    column, row = payload.get("column") or "", payload.get("row") or ""
    for key in (*selected, *((column,) if column else ())):
        if not isinstance(key, str) or key not in columns:
            raise MergeError(f"This map has no layer “{str(key)[:40]}”: {again}", field="layers")
    if not isinstance(row, str) or (row and rows is not None and row not in rows):
        raise MergeError(f"This map has no row “{str(row)[:40]}”: {again}", field="layers")
    return Selection(tuple(key for key in columns if key in selected), row, column)


def _cell(cell: MapCell, scale: MapScale) -> dict[str, Any]:
    known = cell.known
    return {
        "value": _finite(cell.value) if known else None,
        "error": _finite(cell.error) if known else None,
        "state": cell.state if known else "missing",
        "noise": cell.noise,
        "text": cell_text(cell, scale),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
