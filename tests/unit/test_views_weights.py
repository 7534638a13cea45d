"""What the Weights tab says and shows, for sessions in every state."""

from __future__ import annotations

import html
from dataclasses import replace
from typing import Any

import pytest

from components.session import Session
from components.views.weights import (
    MeasureButton,
    MeasuredSoFar,
    drawing_key,
    duration,
    example_labels,
    measure_button,
    missing_html,
    source_html,
    table_html,
)
from llm_merge.examples import rows_hash
from llm_merge.loss_table import LossTable
from llm_merge.measurements import Estimate

ROWS = (
    {"input": "Define the word: harbour", "output": "A place for ships.", "task": "dictionary"},
    {"input": "Define the word: <b>gospel</b>", "output": "Good news.", "task": "dictionary"},
    {"input": "What is the capital of France?", "output": "Paris.", "task": "general"},
)
MODELS = ("base", "org/king-james", "org/dictionary")


@pytest.fixture
def session() -> Session:
    """Models and rows, nothing measured."""
    return Session().with_models("decoder", MODELS[0], MODELS[1:]).with_rows(ROWS, "pasted", ())


def measured(session: Session, **about: Any) -> Session:
    losses = ((2.5, 3.5, 1.0), (1.5, 2.5, 1.1), (2.0, 1.0, 1.2))
    return session.with_losses(LossTable(MODELS, losses, rows_hash(ROWS), **about))


# ── the button ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_button_says_what_it_costs(session: Session) -> None:
    assert measure_button(session, Estimate(9, 9, 37.2)) == MeasureButton("Measure (≈ 40 s)")
    assert measure_button(session, None) == MeasureButton("Measure")
    assert measure_button(session, Estimate(0, 9, 0.0)) == MeasureButton("Fill in what was measured before")


def test_measuring_again_measures_everything_again(session: Session) -> None:
    again = measure_button(measured(session, recorded=(False,) * 3), Estimate(9, 9, 8.1))
    assert again == MeasureButton("Measure again (≈ 9 s)", primary=False, fresh=True)
    live = measure_button(measured(session, recorded=(True,) * 3, dates=("2026-11-21",) * 3), Estimate(9, 9, 100))
    assert live == MeasureButton("Measure live (≈ 2 min)", fresh=True)


def test_one_more_model_is_measured_without_measuring_the_others_again(session: Session) -> None:
    more = measured(session).with_models("decoder", MODELS[0], [*MODELS[1:], "org/another"])
    assert measure_button(more, Estimate(3, 12, 12.0)) == MeasureButton("Measure (≈ 15 s)")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fine_tunes": ()}, "Choose at least two models first, in Models."),
        ({"rows": (), "measured_rows": ()}, "Add examples first, in Examples: the losses on them decide the shares."),
        ({"model_type": "reranker"}, "Rerankers cannot be measured yet: set the shares by hand."),
    ],
)
def test_what_is_missing_is_said_and_the_button_waits(session: Session, change: dict[str, Any], words: str) -> None:
    incomplete = replace(session, **change)
    assert words in missing_html(incomplete)
    assert not measure_button(incomplete, None).enabled


def test_other_examples_make_the_losses_old(session: Session) -> None:
    assert missing_html(measured(session)) == ""
    other = measured(session).with_rows(ROWS[:2], "pasted", ())
    assert "The examples have changed since these models were measured: measure again." in missing_html(other)
    assert source_html(other) == ""
    assert "2.50" not in table_html(other, None)


def test_other_models_were_not_measured_on_the_old_examples(session: Session) -> None:
    other = measured(session).with_models("decoder", "org/base", ["org/one"]).with_rows(ROWS[:2], "pasted", ())
    assert missing_html(other) == ""


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (3.1, "4 s"), (12, "15 s"), (54, "55 s"), (56, "1 min"), (61, "2 min")]
)
def test_an_estimate_is_no_finer_than_it_is(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# ── where the numbers come from ─────────────────────────────────────────────────────────────────────────────────────


def test_recorded_losses_are_called_recorded(session: Session) -> None:
    shown = measured(session, recorded=(True,) * 3, dates=("2026-11-20",) * 3, format="Chat format: all read one.")
    assert "Recorded on 2026-11-20. Chat format: all read one." in source_html(shown)


def test_another_base_is_said(session: Session) -> None:
    shown = measured(session, recorded=(True,) * 3, dates=("2026-11-20",) * 3, other_base=True)
    assert "Measured on another base, recorded on 2026-11-20" in source_html(shown)
    assert "warning" in source_html(shown)


def test_remembered_models_are_named(session: Session) -> None:
    some = measured(session, recorded=(False,) * 3, dates=("2026-11-19", "2026-11-20", ""))
    assert "Measured before, on 2026-11-20: base and king-james." in source_html(some)
    everything = measured(session, recorded=(False,) * 3, dates=("2026-11-19",) * 3)
    assert "Measured before, on 2026-11-19: all models." in source_html(everything)


def test_notes_are_shown_and_escaped(session: Session) -> None:
    noted = measured(session, notes=("Each query competes with 32 passages.", "<i>odd</i>"))
    assert "Each query competes with 32 passages. &lt;i&gt;odd&lt;/i&gt;" in source_html(noted)


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────────────


def cells(table: str) -> list[list[str]]:
    """The table's text, line by line."""
    lines = table.split("<tr")[2:]
    return [[part.split("</td>")[0] for part in line.split("<td>")[1:]] for line in lines]


def test_means_come_first_and_the_lowest_loss_is_bold(session: Session) -> None:
    assert cells(table_html(measured(session), None)) == [
        ["2.33", "1.70", "<b>1.40</b>"],
        ["2.50", "<b>1.50</b>", "2.00"],
        ["3.50", "2.50", "<b>1.00</b>"],
        ["<b>1.00</b>", "1.10", "1.20"],
    ]


def test_rows_appear_as_they_are_measured(session: Session) -> None:
    so_far = MeasuredSoFar(session.rows_hash, MODELS, ((2.5, 3.5, 1.0), (1.5, None, None), (None,) * 3))
    table = table_html(session, so_far, active=True)
    assert cells(table) == [["2.33"], ["2.50", "1.50"], ["3.50"], ["1.00"]]
    assert table.count('class="open"') == 2 + 1 + 2 + 2
    assert not any("<b>" in cell for line in cells(table) for cell in line)  # nobody is best before all are measured
    assert table_html(session, so_far) == table  # what a stop left stays to be seen
    assert cells(table_html(measured(session), so_far))[0][1] == "1.70"  # but not in place of whole losses


def test_a_measurement_of_other_rows_or_models_is_not_shown(session: Session) -> None:
    so_far = MeasuredSoFar("other rows", MODELS, ((2.5,) * 3,) * 3)
    assert "2.50" not in table_html(session, so_far, active=True)
    so_far = MeasuredSoFar(session.rows_hash, MODELS[:2], ((2.5,) * 3,) * 2)
    assert "2.50" not in table_html(session, so_far, active=True)


def test_what_visitors_type_is_escaped(session: Session) -> None:
    evil = session.with_models("decoder", MODELS[0], ['x"><img src=x onerror=alert(1)>', "org/dictionary"])
    for table in (table_html(evil, None), table_html(session, None)):
        assert "<img" not in table
        assert "<b>gospel" not in table
    assert html.escape("<b>gospel</b>") in table_html(session, None)


def test_examples_that_begin_alike_are_told_apart_by_the_rest() -> None:
    assert example_labels(ROWS) == ["… harbour", "… <b>gospel</b>", "What is the capital of France?"]
    assert example_labels(ROWS[:1]) == ["Define the word: harbour"]
    assert example_labels([{"query": "a\n b"}, {"query": "a b"}]) == ["a b", "a b"]
    assert example_labels([{"input": "Say: x: 1"}, {"input": "Say: x: 2"}]) == ["… 1", "… 2"]


def test_a_temperature_draws_nothing_anew(session: Session) -> None:
    shown = measured(session)
    assert drawing_key(shown) == drawing_key(shown.with_temperature(0.5))
    assert drawing_key(shown) == drawing_key(shown.with_base_included(True))
    assert drawing_key(shown) != drawing_key(session)
    assert drawing_key(shown) != drawing_key(shown.with_rows(ROWS[:2], "pasted", ()))
