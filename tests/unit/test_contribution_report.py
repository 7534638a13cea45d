"""What a report says of measured, estimated and missing cells, and that it survives being written down."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_merge.contribution_report import ContributionReport, Stat, kind_of_signs, mean_stat
from llm_merge.contributions import Cell, Layer, Setup, cells_of, measure_cells, whole_models
from llm_merge.errors import MergeError
from tests.closed_form import ClosedForm, layers, linear, setup_of

SETUP = setup_of(depth=2)


def report_of(alphas: dict[tuple[str, str, str], tuple[float, ...]], setup: Setup = SETUP) -> ContributionReport:
    """A report with these α by (task, side, layer), row by row, and β 0."""
    rows = len(next(iter(alphas.values())))
    whole = {(task, which): (0.0,) * rows for task in setup.tasks for which in ("base", "before", "after")}
    cells = dict.fromkeys(cells_of(setup, [layer.key for layer in setup.layers]), (0.0,) * rows)
    for (task, side, layer), values in alphas.items():
        cells[Cell(task, side, "delete", layer)] = tuple(-value for value in values)  # type: ignore[arg-type]
    return ContributionReport(setup, whole=whole, cells=cells)


def measured(setup: Setup = SETUP) -> ContributionReport:
    scorer = ClosedForm(setup, linear({("task a", "a", "0"): 1.0, ("task b", "a", "0"): -1.0}))
    whole = {(task, which): values for task, which, values in whole_models(setup, scorer)}
    cells = measure_cells(setup, cells_of(setup, [layer.key for layer in setup.layers]), scorer)
    return ContributionReport(setup, whole=whole, cells=dict(cells), measured_on="2026-01-02", rows={"task a": "x"})


# ── numbers and their errors ────────────────────────────────────────────────────────────────────────────────────────


def test_an_error_is_that_of_the_rows_differences() -> None:
    """γ of rows that differ by 100 among each other but by exactly 1 from side to side is certain."""
    report = report_of({("task a", "before", "0"): (100.0, 0.0, 50.0), ("task a", "after", "0"): (99.0, -1.0, 49.0)})
    gamma = report.gamma("task a", "0")
    assert gamma == Stat(1.0, 0.0, 3)
    alpha = report.alpha("task a", "before", "0")
    assert alpha is not None
    assert alpha.error == pytest.approx(50 / math.sqrt(3))


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20))
def test_a_mean_and_its_error(values: list[float]) -> None:
    import statistics

    stat = mean_stat(values)
    assert stat.value == pytest.approx(statistics.mean(values), abs=1e-9)
    assert stat.error == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)), abs=1e-9)
    assert stat.n == len(values)


def test_the_error_of_gamma_counts_both_sides_row_by_row() -> None:
    report = measured()
    whole, cells = report.whole, report.cells
    for task in report.setup.tasks:
        by_row = []
        for row in range(3):
            c = {}
            for side in ("before", "after"):
                alpha = whole[task, side][row] - cells[Cell(task, side, "delete", "0")][row]  # type: ignore[arg-type]
                beta = cells[Cell(task, side, "add", "0")][row] - whole[task, "base"][row]  # type: ignore[arg-type]
                c[side] = alpha + beta
            by_row.append(c["before"] - c["after"])
        gamma, expected = report.gamma(task, "0"), mean_stat(by_row)
        assert gamma is not None
        assert (gamma.value, gamma.error) == (pytest.approx(expected.value), pytest.approx(expected.error))
    total = report.total("0")
    assert total is not None
    errors = [report.gamma(task, "0") for task in report.setup.tasks]
    assert total.error == pytest.approx(math.hypot(*(stat.error for stat in errors if stat)))


def test_of_one_row_the_error_is_not_known_and_no_type_is_certain() -> None:
    report = report_of({("task a", "before", "0"): (5.0,), ("task b", "before", "0"): (5.0,)})
    assert math.isnan(report.gamma("task a", "0").error)  # type: ignore[union-attr]
    assert report.conflict("0").kind == "severe"
    assert report.conflict("0").uncertain
    assert report.headline().startswith("None of 2 layers conflict beyond noise")


# ── types ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("signs", "kind"),
    [
        ((1, 1), "severe"), ((1, -1), "partial"), ((-1, 1), "partial"), ((-1, -1), "mutual"), ((0, -1), "mutual"),
        ((0, 0), "mutual"), ((1, 0), "none"), ((1,), "none"), ((-1,), "mutual"), ((1, 1, -1), "severe"),
        ((1, 1, 0), "severe"), ((1, -1, -1), "partial"), ((1, 0, -1), "partial"), ((1, 0, 0), "none"),
        ((0, -1, 0), "mutual"),
    ],
)  # fmt: skip
def test_the_type_follows_the_signs(signs: tuple[int, ...], kind: str) -> None:
    assert kind_of_signs(signs) == kind


@given(st.lists(st.sampled_from([-1.0, 0.0, 2.0]), min_size=1, max_size=4))
def test_the_type_does_not_hang_on_the_order_of_the_models(signs: list[float]) -> None:
    assert kind_of_signs(signs) == kind_of_signs(signs[::-1])


def test_a_sign_within_noise_makes_a_type_uncertain() -> None:
    sure = (1.0, 1.1, 0.9)
    report = report_of({("task a", "before", "0"): sure, ("task b", "before", "0"): sure,
                        ("task a", "before", "1"): sure, ("task b", "before", "1"): (5.0, -4.0, 0.1)})  # fmt: skip
    assert [(report.conflict(key).kind, report.conflict(key).uncertain) for key in "01"] == [
        ("severe", False), ("severe", True),
    ]  # fmt: skip
    assert report.headline() == "1 of 2 layers conflicts beyond noise (3 rows of task a, 3 rows of task b)"


def test_layers_are_ranked_by_gamma_and_equal_ones_by_depth() -> None:
    setup = setup_of(depth=4)
    gains = {"0": 1.0, "1": 2.0, "2": 1.0, "3": -1.0}
    report = report_of({("task a", "before", key): (gain, gain) for key, gain in gains.items()}, setup)
    assert report.ranking() == ("1", "0", "2", "3")
    outside = (*layers(4), Layer("norm", "Final norm", ("model.norm.weight",), block=False))
    setup = setup_of(depth=4)
    report = report_of({("task a", "before", "norm"): (9.0, 9.0)}, replace(setup, layers=outside))
    assert report.ranking() == ("0", "1", "2", "3"), "what lies outside of the blocks is shown, not edited"


# ── unfinished ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_report_with_nothing_in_it_can_be_read() -> None:
    report = ContributionReport(SETUP)
    assert report.headline() == ""
    assert report.ranking() == ()
    assert report.doubtful() == ("0", "1")
    assert report.conflict("0").kind == "unknown"
    assert report.alpha("task a", "before", "0") is None
    assert report.total("0") is None
    assert len(report.to_frame()) == 2 * 2 * 2
    assert ContributionReport.from_dict(report.to_dict()) == report


def test_every_part_of_a_report_can_be_read() -> None:
    """Stopped anywhere: what is there is right, what is not is None."""
    full = measured()
    cells = list(full.cells.items())
    for count in range(len(cells) + 1):
        report = replace(full, cells=dict(cells[:count]))
        for task, side, key in product(SETUP.tasks, ("before", "after"), "01"):
            for name in ("alpha", "beta", "contribution"):
                found = getattr(report, name)(task, side, key)  # type: ignore[arg-type]
                assert found is None or found == getattr(full, name)(task, side, key)
            assert report.gamma(task, key) in (None, full.gamma(task, key))
        assert set(report.ranking()) <= set(full.ranking())
        assert ("beyond noise" in report.headline()) == any(report.is_measured(key) for key in "01")
        json.loads(report.to_json())
    without = replace(full, whole={})
    assert without.alpha("task a", "before", "0") is None
    assert without.conflict("0").kind == "unknown"


def test_estimates_are_labelled_and_give_way_to_what_is_measured() -> None:
    full = measured()
    estimates = dict.fromkeys(cells_of(SETUP, ["0", "1"]), 0.25)
    report = ContributionReport(SETUP, estimates=estimates)
    assert report.alpha("task a", "before", "0").estimated  # type: ignore[union-attr]
    assert report.contribution("task a", "before", "0").value == 0.5  # type: ignore[union-attr]
    assert report.gamma("task a", "0").value == 0  # type: ignore[union-attr]
    assert report.conflict("0").uncertain
    assert report.headline() == "Estimates for 2 layers: nothing is measured yet"
    own = {cell: values for cell, values in full.cells.items() if cell.layer == "0"}
    mixed = replace(report, whole=full.whole, cells=own)
    assert mixed.gamma("task a", "0") == full.gamma("task a", "0")
    assert mixed.gamma("task a", "1").estimated  # type: ignore[union-attr]
    assert mixed.headline() == (
        "1 of the 1 layer measured so far conflicts beyond noise (3 rows of task a, 3 rows of task b)"
    )


def test_the_most_doubtful_layer_is_the_one_of_the_largest_estimated_gamma() -> None:
    estimates = dict.fromkeys(cells_of(setup_of(depth=3), "012"), 0.0)
    estimates[Cell("task b", "after", "add", "2")] = 3.0
    estimates[Cell("task a", "before", "delete", "1")] = -2.0
    assert ContributionReport(setup_of(depth=3), estimates=estimates).doubtful() == ("2", "1", "0")


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_json_and_back_is_the_same_to_seven_digits() -> None:
    report = measured()
    again = ContributionReport.from_dict(json.loads(report.to_json()))
    assert again == report
    assert again.to_json() == report.to_json()
    third = replace(report, cells={cell: tuple(v / 3 for v in values) for cell, values in report.cells.items()})
    again = ContributionReport.from_dict(json.loads(third.to_json()))
    for cell, values in third.cells.items():
        assert again.cells[cell] == pytest.approx(values, rel=1e-6)
    assert ContributionReport.from_dict(json.loads(again.to_json())) == again


def _broken() -> list[Any]:
    good = measured().to_dict()
    cell = good["cells"][0]
    return [
        None, [], "report", 3, {}, {**good, "version": 2}, {**good, "setup": None}, {**good, "setup": {}},
        {**good, "cells": [cell[:3]]}, {**good, "cells": [[*cell[:4], 5]]}, {**good, "cells": [[*cell[:4], "123"]]},
        {**good, "cells": [[cell[0], "between", *cell[2:]]]}, {**good, "cells": [[*cell[:4], [1.0]]]},
        {**good, "cells": [[*cell[:4], ["x", "y", "z"]]]}, {**good, "whole": [["task a", "base"]]},
        {**good, "seconds": "long"}, {**good, "rows": 5}, {key: v for key, v in good.items() if key != "whole"},
        {**good, "setup": {**good["setup"], "pruning": [[0, 1], [1, 1]]}},
        {**good, "setup": {**good["setup"], "layers": [{"key": "0"}]}},
        {**good, "setup": {**good["setup"], "combine": "mean"}},
    ]  # fmt: skip


@pytest.mark.parametrize("data", _broken())
def test_what_is_no_report_is_said(data: Any) -> None:
    with pytest.raises(MergeError) as caught:
        ContributionReport.from_dict(data)
    assert caught.value.message.endswith((".", "analysis again."))


def test_a_frame_has_a_line_for_each_layer_task_and_side() -> None:
    report = measured()
    frame = report.to_frame()
    assert len(frame) == 2 * 2 * 2
    line = frame[(frame.layer == "0") & (frame.task == "task a") & (frame.side == "before")].iloc[0]
    assert line["alpha"] == report.alpha("task a", "before", "0").value  # type: ignore[union-attr]
    assert line["gamma_se"] == report.gamma("task a", "0").error  # type: ignore[union-attr]
    assert line["type"] == report.conflict("0").kind
