"""Hi-Merging's charts, read without a browser: the grid of p and s, and the metric over the steps."""

from __future__ import annotations

import json
from typing import Any

from components.hi_charts import pruning_grid, steps_curve
from llm_merge.contribution_report import Stat
from llm_merge.hi_merging import GridCell
from llm_merge.hierarchical import Point

HOSTILE = "<img src=x onerror=1>"
TASKS = ("law", "poems")


def cell(task: str, p: float, s: float, value: float) -> GridCell:
    return GridCell(task, p, s, Stat(value, 0.01, 8))


def point(name: str, law: float, poems: float, held_out: bool = True) -> Point:
    inside = {"law": Stat(law, 0.1, 8), "poems": Stat(poems, 0.1, 8)}
    outside = {"law": Stat(law - 1, 0.1, 4), "poems": Stat(poems - 1, 0.1, 4), "general": Stat(-9.0, 0.1, 4)}
    return Point(name, inside, outside if held_out else {})


POINTS = [point("base", -5.0, -6.0), point("law", -3.0, -6.5), point("poems", -5.5, -4.0),
          point("average", -4.0, -5.0), point("step 0", -3.9, -4.9), point("step 2", -3.5, -4.8)]  # fmt: skip


def traces(figure: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(figure.to_json())["data"]
    return found


def test_the_grid_is_one_panel_a_task_with_a_ring_around_the_chosen_cell() -> None:
    cells = [cell("law", 1.0, 1.0, -2.0), cell("law", 0.5, 1.0, -1.0), cell("law", 0.5, 0.5, -3.0),
             cell("poems", 1.0, 1.0, -1.5), cell("poems", 0.1, 1.0, -1.5)]  # fmt: skip
    found = traces(pruning_grid(cells, TASKS, "nats"))
    heat = [trace for trace in found if trace["type"] == "heatmap"]
    rings = [trace for trace in found if trace["type"] == "scatter"]
    assert len(heat) == len(rings) == 2
    assert heat[0]["x"] == ["0.5", "1"]  # p
    assert heat[0]["y"] == ["0.5", "1"]  # s
    assert heat[0]["z"] == [[-3.0, None], [-1.0, -2.0]]  # a pair that was not tried stays empty
    assert (rings[0]["x"], rings[0]["y"]) == (["0.5"], ["1"])
    assert (rings[1]["x"], rings[1]["y"]) == (["1"], ["1"])  # of equal ones, the least change
    assert heat[0]["text"][1][1] == "p 1, s 1: -2.000 ± 0.010"


def test_the_ring_is_where_the_search_ends() -> None:
    """The same rule of ties as the search's own, told by its result."""
    from llm_merge.contributions import Setup
    from llm_merge.hi_merging import search_pruning

    class Flat:
        def whole(self, recipe: object, task: str) -> tuple[float, ...]:
            return (-1.0, -1.0)

        def changed(self, anchor: object, variant: object, layer: str, task: str) -> tuple[float, ...]:
            raise AssertionError("a search asks for whole models only")

    search, cells = search_pruning(Setup("base", TASKS, TASKS, ()), 0, Flat(), "coarse"), []
    while True:
        try:
            cells.append(next(search))
        except StopIteration as end:
            chosen = end.value
            break
    ring = next(trace for trace in traces(pruning_grid(cells, TASKS, "nats")) if trace["type"] == "scatter")
    assert (float(ring["x"][0]), float(ring["y"][0])) == chosen


def test_the_curve_shows_analysis_and_held_out_rows_and_what_the_merge_is_compared_with() -> None:
    found = traces(steps_curve(POINTS, TASKS, "nats"))
    curves = [trace for trace in found if trace["mode"] == "lines+markers"]
    assert [curve["line"]["dash"] for curve in curves] == ["solid", "dash", "solid", "dash", "dash"]
    assert curves[0]["x"] == [0, 2]  # the steps that edited something, after none
    assert curves[0]["y"] == [-3.9, -3.5]
    assert curves[1]["y"] == [-4.9, -4.5]
    levels = {trace["name"]: set(trace["y"]) for trace in found if trace["mode"] == "lines" and trace["showlegend"]}
    assert levels == {"plain average": {-5.0}, "its fine-tune": {-4.0}, "base": {-6.0}}  # on held-out rows


def test_without_held_out_rows_the_curve_is_of_analysis_rows_alone() -> None:
    points = [point(entry.name, entry.analysis["law"].value, entry.analysis["poems"].value, False) for entry in POINTS]
    found = traces(steps_curve(points, TASKS, "nats"))
    assert {trace["line"]["dash"] for trace in found if trace["mode"] == "lines+markers"} == {"solid"}
    average = next(trace for trace in found if trace["name"] == "plain average")
    assert set(average["y"]) == {-4.0}


def test_rows_that_are_reported_and_decide_are_not_called_held_out() -> None:
    names = {trace["name"] for trace in traces(steps_curve(POINTS, TASKS, "nats", same_rows=True))}
    assert "held-out rows" not in names
    assert "rows reported, the same ones" in names


def test_before_the_first_step_there_are_no_curves_and_no_errors() -> None:
    assert traces(steps_curve(POINTS[:4], TASKS, "nats")) == []
    assert traces(steps_curve([], TASKS, "nats")) == []
    assert traces(pruning_grid([], TASKS, "nats")) == []


def test_a_single_row_has_no_error_bar() -> None:
    alone = [Point("step 0", {"law": Stat(-1.0, float("nan"), 1)}, {"law": Stat(-2.0, float("nan"), 1)})]
    assert "NaN" not in steps_curve(alone, ("law",), "nats").to_json()


def test_names_of_tasks_are_text() -> None:
    odd = [Point("step 0", {HOSTILE: Stat(-1.0, 0.1, 4)}, {HOSTILE: Stat(-1.0, 0.1, 4)})]
    for figure in (steps_curve(odd, (HOSTILE,), "nats"), pruning_grid([cell(HOSTILE, 1, 1, -1.0)], (HOSTILE,), "nats")):
        drawn = json.dumps(json.loads(figure.to_json()))  # as the browser reads it: Plotly escapes "<" itself
        assert "img src" in drawn
        assert "<img" not in drawn
