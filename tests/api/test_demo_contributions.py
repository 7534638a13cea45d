"""The demo's recorded contribution analysis, measured again in part on the real models: one layer, a few rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from components.recorded import MEASURED, recorded_contributions
from llm_merge.analysis import open_analysis
from llm_merge.contribution_report import ContributionReport
from llm_merge.contributions import Cell
from llm_merge.demo import demo_examples, demo_path, is_prepared, prepare
from llm_merge.tasks import Task

ROWS, LAYER = 3, "29"
OWNERS = {"verse": "king-james", "dictionary": "dictionary"}


@pytest.fixture(scope="module")
def report() -> ContributionReport:
    found = recorded_contributions("decoder")
    assert found is not None, "the demo's analysis is recorded, for the adapters that lie beside it"
    return found


def test_it_is_of_the_rows_that_the_page_analyses(report: ContributionReport) -> None:
    data: Mapping[str, Any] = json.loads((MEASURED / "contributions-decoder.json").read_text(encoding="utf-8"))
    for task in OWNERS:
        rows = demo_examples("decoder", task, "work")
        assert len(report.whole[task, "base"]) == data["analysis_rows"][task] == len(rows)
    assert report.setup.models == tuple(demo_path(key) for key in OWNERS.values())
    assert report.measured_on == data["report"]["measured_on"]


def test_a_layer_measured_again_gives_what_is_recorded(report: ContributionReport) -> None:
    if not is_prepared("smollm2"):
        for _ in prepare("smollm2"):
            pass
    tasks = [
        Task(task, demo_path(key), tuple(demo_examples("decoder", task, "work")[:ROWS]), ())
        for task, key in OWNERS.items()
    ]
    analysis = open_analysis(demo_path("smollm2"), tasks, device="cpu")
    measuring = analysis.measure(analysis.report(), [LAYER])
    while True:
        try:
            next(measuring)
        except StopIteration as end:
            again: ContributionReport = end.value
            break
    assert again.setup == report.setup
    for key, values in again.whole.items():
        assert values == pytest.approx(report.whole[key][:ROWS], abs=2e-4), key
    cells = [cell for cell in report.cells if cell.layer == LAYER]
    assert len(cells) == 8
    for cell in cells:
        assert isinstance(cell, Cell)
        assert again.cells[cell] == pytest.approx(report.cells[cell][:ROWS], abs=2e-4), cell
