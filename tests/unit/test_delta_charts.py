"""The data in the charts of deltas, read without a browser."""

from __future__ import annotations

from typing import Any

import pytest

from components.charts import SIMILARITY_SCALE
from components.delta_charts import DIVERGING_SCALE, KIND_TITLES, MEASURES, binned, delta_cosine, delta_norms
from components.delta_charts import sign_conflict as conflict_chart
from components.palette import contrast
from llm_merge.delta_stats import KINDS, DeltaStats, DeltaSums, GroupDeltas
from llm_merge.delta_view import BinnedDelta


def sums(one: float, other: float, dot: float, conflicts: int = 1) -> DeltaSums:
    """Ten entries of a base of norm 10."""
    dots = ((one**2, dot), (dot, other**2))
    changed = (10 if one else 0, 10 if other else 0)
    both = ((changed[0], min(changed)), (min(changed), changed[1]))
    crossed = ((0, conflicts), (conflicts, 0))
    return DeltaSums(10, 100.0, changed, (2, 2), (one**2 / 2, other**2 / 2), dots, both, crossed)


STATS = DeltaStats(
    "base",
    ("a", "b"),
    0.2,
    (
        GroupDeltas("embeddings", "Embeddings", None, (("embeddings", sums(0.0, 2.0, 0.0)),)),
        GroupDeltas("encoder.0", "Encoder layer 0", 0, (("q", sums(1.0, 2.0, -1.0)), ("norm", sums(3.0, 3.0, 9.0)))),
        GroupDeltas("decoder.0", "Decoder layer 0", 1, (("q", sums(1.0, 1.0, 0.5, 5)),)),
    ),
)
LEFT = BinnedDelta("a", "x", (4, 2), (0, 2, 4), (0, 1, 2), ((0.1, -0.2), (0.0, 0.05)), ((0.1, 0.2), (0.3, 0.4)))
RIGHT = BinnedDelta("b", "x", (4, 2), (0, 2, 4), (0, 1, 2), ((0.0, 0.5), (0.0, 0.0)), ((0.1, 0.5), (0.3, 0.4)))


def parts(figure: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    data = figure.to_dict()
    return data["data"], data["layout"]


@pytest.mark.parametrize("kind", ["norms", "conflict", "cosine", "binned"])
def test_every_chart_follows_the_theme(kind: str) -> None:
    figure = {
        "norms": lambda: delta_norms(STATS, ["A", "B"]),
        "conflict": lambda: conflict_chart(STATS, 0, 1),
        "cosine": lambda: delta_cosine(STATS, 0, 1),
        "binned": lambda: binned([LEFT, RIGHT], ["A", "B"]),
    }[kind]()
    _, layout = parts(figure)
    assert layout["paper_bgcolor"] == layout["plot_bgcolor"] == "rgba(0,0,0,0)"
    assert "title" not in layout
    assert "color" not in layout["font"]


def test_norms_have_a_panel_per_model_on_one_scale_from_zero() -> None:
    panels, layout = parts(delta_norms(STATS, ["A", "<b>B"]))
    assert [panel["coloraxis"] for panel in panels] == ["coloraxis", "coloraxis"]
    assert (layout["coloraxis"]["cmin"], layout["coloraxis"]["cmax"]) == (0.0, pytest.approx(0.3))
    assert [note["text"] for note in layout["annotations"]] == ["A", "&lt;b&gt;B"]
    first, second = panels
    assert list(first["x"]) == ["emb", "enc 0", "dec 0"]
    assert list(first["y"]) == ["all", "query", "norms", "embeddings"]
    assert first["z"][1] == [None, pytest.approx(0.1), pytest.approx(0.1)]  # no query among the embeddings
    assert first["z"][3] == [0.0, None, None]  # there, and not changed
    assert second["z"][0][0] == pytest.approx(0.2)
    assert first["text"][1][1] == "Encoder layer 0, query"
    assert "%" in first["hovertemplate"] and "norm" in first["hovertemplate"]


@pytest.mark.parametrize("measure", list(MEASURES))
def test_every_measure_is_a_figure_of_the_sums(measure: str) -> None:
    panels, _ = parts(delta_norms(STATS, ["A", "B"], measure))
    total = STATS.of("decoder.0")
    assert total is not None
    assert panels[1]["z"][0][2] == getattr(total, measure)(1)


def test_conflicts_are_shares_from_0_to_1() -> None:
    (panel,), layout = parts(conflict_chart(STATS, 0, 1))
    assert panel["z"][1] == [None, 0.1, 0.5]
    assert panel["z"][3] == [None, None, None]  # one of them changed nothing: no share, and no zero
    assert (layout["coloraxis"]["cmin"], layout["coloraxis"]["cmax"]) == (0.0, 1.0)
    assert [list(stop) for stop in layout["coloraxis"]["colorscale"]] == SIMILARITY_SCALE


def test_the_scale_of_cosines_is_centred_at_zero() -> None:
    (panel,), layout = parts(delta_cosine(STATS, 0, 1))
    assert panel["z"][1] == [None, pytest.approx(-0.5), pytest.approx(0.5)]
    assert layout["coloraxis"]["cmin"] == -layout["coloraxis"]["cmax"] == pytest.approx(-1.0)
    calm = DeltaStats("base", ("a", "b"), 0.2, (GroupDeltas("0", "Layer 0", 0, (("q", sums(1.0, 1.0, 1e-6)),)),))
    assert parts(delta_cosine(calm, 0, 1))[1]["coloraxis"]["cmax"] == 0.01  # noise is not blown up


def test_two_deltas_share_one_scale_centred_at_zero() -> None:
    (left, right), layout = parts(binned([LEFT, RIGHT], ["A", "B"]))
    assert left["z"] == [[0.1, -0.2], [0.0, 0.05]]
    assert right["customdata"] == [[0.1, 0.5], [0.3, 0.4]]
    assert left["coloraxis"] == right["coloraxis"] == "coloraxis"
    assert (layout["coloraxis"]["cmin"], layout["coloraxis"]["cmax"]) == (-0.5, 0.5)
    assert list(left["y"]) == [0.5, 2.5]
    assert left["text"][1][0] == "rows 2 to 3, column 0"


def test_a_delta_of_zeros_is_drawn_in_the_middle_of_the_scale() -> None:
    still = BinnedDelta("a", "x", (1, 2), (0, 1), (0, 1, 2), ((0.0, 0.0),), ((0.0, 0.0),))
    _, layout = parts(binned([still], ["A"]))
    assert layout["coloraxis"]["cmin"] < 0 < layout["coloraxis"]["cmax"]


def test_both_sides_of_the_diverging_scale_are_equally_dark() -> None:
    colors = [color for _, color in DIVERGING_SCALE]
    for low, high in zip(colors, reversed(colors), strict=True):
        assert contrast(low, "#FFFFFF") == pytest.approx(contrast(high, "#FFFFFF"), rel=0.15)


def test_every_kind_has_a_name() -> None:
    assert set(KIND_TITLES) == {"", *KINDS}
