"""What the layer map says of a number, when a number is noise, and what of a browser's message is believed."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from components.views.layer_choice import (
    MapCell,
    MapColumn,
    MapMark,
    MapRow,
    MapScale,
    Selection,
    cell_text,
    layer_columns,
    layer_value,
    mark_text,
    number_text,
    read_selection,
    scale_limit,
)
from llm_merge.errors import MergeError

SCALE = MapScale(0.1)
COLUMNS = ["embeddings", "0", "1", "2", "head"]


@pytest.mark.parametrize(
    ("cell", "noise"),
    [
        (MapCell(0.042, 0.011, "exact"), False),
        (MapCell(0.021, 0.011, "exact"), True),
        (MapCell(-0.021, 0.011, "exact"), True),
        (MapCell(0.022, 0.011, "exact"), False),  # two standard errors are enough
        (MapCell(0.0, 0.01, "exact"), True),
        (MapCell(0.0, 0.0, "exact"), False),  # known to be 0
        (MapCell(0.01, None, "estimate"), False),  # nothing is known of its noise
        (MapCell(0.01, math.nan, "estimate"), False),
        (MapCell(0.01, 0.02, "estimate"), True),
        (MapCell(), False),
    ],
)
def test_noise_is_less_than_two_standard_errors(cell: MapCell, noise: bool) -> None:
    assert cell.noise is noise


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (MapCell(0.042, 0.011, "exact"), "0.042 ± 0.011 nats, hurts, beyond noise"),
        (MapCell(-0.5, 0.125, "exact"), "−0.50 ± 0.12 nats, helps, beyond noise"),
        (MapCell(-0.0042, 0.011, "exact"), "−0.004 ± 0.011 nats, within noise"),
        (MapCell(-0.0001, 0.011, "exact"), "0.000 ± 0.011 nats, within noise"),
        (MapCell(12.3, 14, "exact"), "12 ± 14 nats, within noise"),
        (MapCell(0.04213, None, "exact"), "0.0421 nats, hurts, error not known"),
        (MapCell(0.04213, None, "estimate"), "≈ 0.0421 nats, hurts, estimate, not measured"),
        (MapCell(-0.01, 0.02, "estimate"), "≈ −0.010 ± 0.020 nats, within noise, estimate, not measured"),
        (MapCell(0.0, None, "fixed"), "0 nats, known without measuring"),
        (MapCell(0.0, 0.0, "exact"), "0 ± 0 nats, no effect"),
        (MapCell(), "not measured yet"),
        (MapCell(math.nan, 0.1, "exact"), "not measured yet"),
    ],
)
def test_a_cell_in_words(cell: MapCell, words: str) -> None:
    assert cell_text(cell, SCALE) == words


def test_the_scale_says_which_sign_helps_and_in_what_unit() -> None:
    scale = MapScale(12, unit="points", low="hurts", high="helps", warm="low")
    assert cell_text(MapCell(5.0, 1.0, "exact"), scale) == "5.0 ± 1.0 points, helps, beyond noise"
    drawn = layer_value((), (), scale=scale)["scale"]
    assert drawn == {
        "limit": 12,
        "warm": "low",
        "low": "−12 hurts",
        "zero": "0 no effect",
        "high": "+12 points helps",
    }


def test_numbers_alone_have_three_digits_and_no_empty_ones() -> None:
    shown = [number_text(value) for value in (0, 0.1, -0.0651, 1234.5, 0.0312345, 1e-12)]
    assert shown == ["0", "0.1", "−0.0651", "1234", "0.0312", "0"]


def test_a_mark_in_words() -> None:
    assert mark_text(MapMark("severe", note="Kept from A.")) == "severe conflict: Kept from A."
    assert mark_text(MapMark("mutual", uncertain=True)) == "mutual enhancement, uncertain"


def test_columns_stand_in_the_order_of_the_model() -> None:
    columns = layer_columns(2)
    assert [(column.key, column.outside) for column in columns] == [
        ("embeddings", True),
        ("0", False),
        ("1", False),
        ("norm", True),
        ("head", True),
    ]
    assert columns[1] == MapColumn("0", "0", "Layer 0")
    assert [column.key for column in layer_columns(1, ["head"])] == ["0", "head"]


def test_the_scale_reaches_the_largest_value_beyond_noise() -> None:
    cells = (MapCell(0.0312, 0.001, "exact"), MapCell(-0.06412, 0.01, "exact"), MapCell(0.9, 0.8, "exact"), MapCell())
    assert scale_limit([MapRow("g", "γ", cells)]) == 0.065
    assert scale_limit([MapRow("g", "γ", cells[2:])]) == 0.9  # nothing but noise: still a scale
    assert scale_limit([MapRow("g", "γ", cells[3:])]) == scale_limit([]) == 1


def test_a_value_can_be_sent_whatever_was_measured() -> None:
    cells = (MapCell(math.nan, math.inf, "exact"), MapCell(0.1, math.nan, "estimate"))
    value = layer_value([MapRow("g", "γ", cells)], layer_columns(2, ()), scale=SCALE, marks=[MapMark(), MapMark()])
    json.dumps(value, allow_nan=False)
    nothing, estimate = value["rows"][0]["cells"]
    assert (nothing["value"], nothing["error"], nothing["state"]) == (None, None, "missing")
    assert (estimate["value"], estimate["error"], estimate["state"], estimate["noise"]) == (
        0.1,
        None,
        "estimate",
        False,
    )


def test_what_is_selected_is_left_alone_unless_it_is_said() -> None:
    assert layer_value((), (), scale=SCALE)["selected"] is None
    assert layer_value((), (), scale=SCALE, selected=())["selected"] == []


def test_rows_and_marks_must_fit_the_columns() -> None:
    columns = layer_columns(2, ())
    with pytest.raises(ValueError, match="longer"):
        layer_value([MapRow("g", "γ", (MapCell(),))], columns, scale=SCALE)
    with pytest.raises(ValueError, match="longer"):
        layer_value((), columns, scale=SCALE, marks=[MapMark()])


def test_a_selection_is_read_in_the_order_of_the_map() -> None:
    payload = {"selected": ["2", "0", "2"], "row": "g", "column": "2"}
    assert read_selection(payload, COLUMNS, ["g"]) == Selection(("0", "2"), "g", "2")
    assert read_selection({"selected": None, "row": None, "column": None}, COLUMNS) == Selection()
    assert read_selection({}, COLUMNS) == Selection()


@pytest.mark.parametrize(
    "payload",
    [
        None,
        "0",
        ["0"],
        {"selected": "0"},
        {"selected": {"0": 1}},
        {"selected": ["7"]},
        {"selected": [0]},
        {"selected": [["0"]]},
        {"selected": ["0"] * 6},
        {"selected": [], "column": "7"},
        {"selected": [], "column": ["0"]},
        {"selected": [], "row": "h"},
        {"selected": [], "row": ["g"]},
        {"selected": ["<script>" + "x" * 10_000]},
    ],
)
def test_anything_may_come_from_a_browser(payload: Any) -> None:
    with pytest.raises(MergeError) as error:
        read_selection(payload, COLUMNS, ["g"])
    assert error.value.field == "layers"
    assert error.value.message.endswith(": reload the page and select again.")
    assert len(error.value.message) < 200
