"""The data in the charts, read without a browser."""

from __future__ import annotations

import math
from typing import Any

import pytest

from components.charts import loss_dots, scoreboard_bars, similarity_heatmaps
from components.palette import BASE, MERGED, SPECIALISTS
from llm_merge.loss_table import LossTable
from llm_merge.scoreboard import ScoredModel, score

TABLE = LossTable(("base", "a"), ((2.0, 3.0, 1.0), (1.0, 1.5, 0.5)), "hash")
BOARD = score(
    [
        ScoredModel("Base", "base", ((2.0, 3.0, 4.0), (1.0, 1.1, 1.2))),
        ScoredModel("King <b>James", "specialist", ((1.0, 2.1, 2.9), (1.3, 1.4, 1.4))),
        ScoredModel("Merged", "merged", ((1.2, 2.2, 3.1), (1.0, 1.2, 1.2))),
    ],
    ["verse", "general"],
)


def traces(figure: Any, kind: str) -> list[dict[str, Any]]:
    return [trace for trace in figure.to_dict()["data"] if trace["type"] == kind]


@pytest.fixture(params=["dots", "bars", "heatmaps"])
def figure(request: pytest.FixtureRequest) -> Any:
    square = [[1.0, 0.5], [0.5, 1.0]]
    return {
        "dots": lambda: loss_dots(TABLE, ["Base", "A"], [BASE, SPECIALISTS[0]], ["one", "two", "three"]),
        "bars": lambda: scoreboard_bars(BOARD),
        "heatmaps": lambda: similarity_heatmaps(["one", "two"], square, square),
    }[request.param]()


def test_every_chart_follows_the_theme(figure: Any) -> None:
    layout = figure.to_dict()["layout"]
    assert layout["paper_bgcolor"] == layout["plot_bgcolor"] == "rgba(0,0,0,0)"
    assert "title" not in layout  # Gradio would lay its label over it
    assert layout["height"] > 100
    assert "color" not in layout["font"]  # the style sheet's


def test_every_example_is_a_dot_at_its_loss_and_the_mean_a_tick() -> None:
    drawn = loss_dots(TABLE, ["Base", "A"], [BASE, SPECIALISTS[0]], ["one", "two", "three"])
    dots, tick, other, _ = traces(drawn, "scatter")
    assert list(dots["x"]) == [2.0, 3.0, 1.0]
    assert list(dots["text"]) == ["one", "two", "three"]
    assert all(abs(height) < 0.36 for height in dots["y"])  # in its lane
    assert list(tick["x"]) == [2.0, 2.0]
    assert (dots["marker"]["color"], other["marker"]["color"]) == (BASE, SPECIALISTS[0])


def test_bars_are_losses_and_never_negated() -> None:
    bars = traces(scoreboard_bars(BOARD), "bar")
    assert [bar["marker"]["color"] for bar in bars] == [BASE, SPECIALISTS[0], MERGED]
    assert list(bars[0]["x"]) == [3.0, pytest.approx(1.1)]
    assert all(value > 0 for bar in bars for value in bar["x"])
    layout = scoreboard_bars(BOARD).to_dict()["layout"]
    assert "lower is better" in layout["xaxis"]["title"]["text"]
    higher = scoreboard_bars(score([ScoredModel("A", "specialist", ((0.5, 0.6),))], ["mine"], metric="MRR"))
    assert "higher is better" in higher.to_dict()["layout"]["xaxis"]["title"]["text"]


def test_error_bars_are_two_paired_standard_errors() -> None:
    base, specialist, _ = traces(scoreboard_bars(BOARD), "bar")
    cell = BOARD.lines[1].cells[0]
    assert list(base["error_x"]["array"]) == [0.0, 0.0]  # the base differs from itself by nothing
    assert specialist["error_x"]["array"][0] == pytest.approx(2 * cell.gain_error)
    assert cell.gain_error < cell.error / 5  # not the spread of the rows


def test_one_row_has_no_error_bar() -> None:
    lonely = score([ScoredModel("Base", "base", ((2.0,),)), ScoredModel("A", "specialist", ((1.0,),))], ["mine"])
    assert math.isinf(lonely.lines[1].cells[0].gain_error)
    assert [list(bar["error_x"]["array"]) for bar in traces(scoreboard_bars(lonely), "bar")] == [[0.0], [0.0]]


def test_names_are_text_for_plotly_too() -> None:
    assert [bar["name"] for bar in traces(scoreboard_bars(BOARD), "bar")][1] == "King &lt;b&gt;James"


def test_both_heatmaps_share_one_scale() -> None:
    base = [[1.0, -0.3, 0.2], [-0.3, 1.0, 0.1], [0.2, 0.1, 1.0]]
    merged = [[1.0, 0.9, 0.2], [0.9, 1.0, 0.1], [0.2, 0.1, 1.0]]
    drawn = similarity_heatmaps(["one", "two"], base, merged)
    left, right = traces(drawn, "heatmap")
    assert (left["coloraxis"], right["coloraxis"]) == ("coloraxis", "coloraxis")
    axis = drawn.to_dict()["layout"]["coloraxis"]
    assert (axis["cmin"], axis["cmax"]) == (-0.3, 1.0)
    assert list(left["x"]) == ["query", "1", "2"]  # one row more than texts: the query's
    assert [list(line) for line in right["z"]] == merged
