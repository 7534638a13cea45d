"""Charts of deltas: what each fine-tune changed and where two of them pull apart. Statistics in, a plotly Figure out.

Layers run from left to right, kinds of modules from top to bottom. What is not defined (no such tensor, nothing
changed) is left empty, never drawn as zero. No session, no page, no reading of models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from components.charts import SIMILARITY_SCALE, _plain, _safe
from components.naming import middle_cut

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from llm_merge.delta_stats import DeltaStats, GroupDeltas
    from llm_merge.delta_view import BinnedDelta

# Blue below zero, orange above it, equally dark at equal distance: told apart by every kind of colour vision.
DIVERGING_SCALE = [
    [0.0, "#08519C"], [0.25, "#6AA2D0"], [0.5, "#EDEDED"], [0.75, "#D98A3C"], [1.0, "#963002"],
]  # fmt: skip
KIND_TITLES = {
    "": "all", "q": "query", "k": "key", "v": "value", "qkv": "query, key, value", "o": "attention out",
    "gate": "gate", "up": "up", "down": "down", "mlp": "gate and up", "norm": "norms", "embeddings": "embeddings",
    "head": "head", "other": "other",
}  # fmt: skip
PLACE_TITLES = {"embeddings": "emb", "norm": "norm", "head": "head", "other": "other"}
MEASURES: dict[str, tuple[str, str]] = {  # the method of DeltaSums: what its bar is called, and its hover text
    "relative_norm": ("‖δ‖ / ‖base‖", "the delta's norm is %{z:.3%} of the base's"),
    "changed_share": ("changed", "%{z:.1%} of the entries changed"),
    "density": ("kept", "%{z:.1%} of the entries are kept"),
    "energy": ("energy kept", "what is kept holds %{z:.1%} of the delta's squared norm"),
}
CELL = 22  # pixels for one kind's row


def delta_norms(stats: DeltaStats, names: Sequence[str], measure: str = "relative_norm") -> go.Figure:
    """One panel per model, layers × kinds, all on one scale from 0. `names` in the order of `stats.models`.

    measure: "relative_norm" (‖δ‖ / ‖base‖), "changed_share", "density" or "energy" (both after top-p).
    """
    from plotly.subplots import make_subplots

    bar, hover = MEASURES[measure]
    figure = make_subplots(
        rows=len(names),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.12 / len(names),
        subplot_titles=[_safe(middle_cut(name, 40)) for name in names],
    )
    highest = 0.0
    for row, name in enumerate(names):
        trace = _cells(stats, measure, (row,), hover, name)
        highest = max([highest, *(value for line in trace.z for value in line if value is not None)])
        figure.add_trace(trace, row=row + 1, col=1)
    figure = _laid_out(figure, 40 + (34 + CELL * (len(stats.kinds) + 1)) * len(names))
    figure.update_annotations(font_size=13)
    return figure.update_layout(
        coloraxis=_color_axis(SIMILARITY_SCALE, 0.0, highest or 1.0, bar, percent=True), margin={"t": 30}
    )


def sign_conflict(stats: DeltaStats, one: int, other: int) -> go.Figure:
    """Layers × kinds: of the entries that both models change, the share that they move in opposite directions.

    `one` and `other` are places in `stats.models`. The scale runs from 0 to 1; unrelated deltas lie at 0.5.
    """
    import plotly.graph_objects as go

    hover = "opposite directions in %{z:.1%} of the entries that both change"
    figure = go.Figure(_cells(stats, "conflict_share", (one, other), hover))
    figure = _laid_out(figure, 60 + CELL * (len(stats.kinds) + 1))
    return figure.update_layout(coloraxis=_color_axis(SIMILARITY_SCALE, 0.0, 1.0, "opposite", percent=True))


def delta_cosine(stats: DeltaStats, one: int, other: int) -> go.Figure:
    """Layers × kinds: the cosine between two models' deltas, on a scale centred at 0: below it they cancel out.

    The scale reaches as far as the largest cosine, 0.01 at least: noise must not look like agreement.
    """
    import plotly.graph_objects as go

    trace = _cells(stats, "cosine", (one, other), "cosine of the two deltas %{z:.3f}")
    reach = max([0.01, *(abs(value) for line in trace.z for value in line if value is not None)])
    figure = _laid_out(go.Figure(trace), 60 + CELL * (len(stats.kinds) + 1))
    return figure.update_layout(coloraxis=_color_axis(DIVERGING_SCALE, -reach, reach, "cosine"))


def binned(deltas: Sequence[BinnedDelta], names: Sequence[str]) -> go.Figure:
    """One tensor's delta of each model side by side, averaged over bins, on one scale centred at 0."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    titles = [_safe(middle_cut(name, 28)) for name in names]
    figure = make_subplots(rows=1, cols=len(deltas), subplot_titles=titles, horizontal_spacing=0.08)
    for column, (delta, name) in enumerate(zip(deltas, names, strict=True), start=1):
        rows, columns = _spans(delta.row_edges, "row"), _spans(delta.column_edges, "column")
        figure.add_trace(
            go.Heatmap(
                z=[list(line) for line in delta.mean],
                x=_middles(delta.column_edges),
                y=_middles(delta.row_edges),
                text=[[f"{row}, {part}" for part in columns] for row in rows],
                customdata=[list(line) for line in delta.magnitude],
                coloraxis="coloraxis",
                hovertemplate="%{text}<br>mean change %{z:.3g}<br>mean size of change %{customdata:.3g}<extra>"
                + _safe(name)
                + "</extra>",
            ),
            row=1,
            col=column,
        )
    reach = max((abs(value) for delta in deltas for value in (delta.low, delta.high)), default=0.0) or 1.0
    one_row = all(len(delta.mean) == 1 for delta in deltas)
    figure = _plain(figure, height=170 if one_row else 380)
    figure.update_xaxes(title="column", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_yaxes(title="row", col=1)
    for column in range(2, len(deltas) + 1):
        figure.update_yaxes(showticklabels=False, col=column)  # the same rows as in the first
    if one_row:
        figure.update_yaxes(visible=False)
    figure.update_annotations(font_size=13)
    color_axis = _color_axis(DIVERGING_SCALE, -reach, reach, "mean change")
    color_axis["colorbar"]["tickformat"] = ".2g"
    return figure.update_layout(coloraxis=color_axis, margin={"t": 34, "r": 90})


def _cells(stats: DeltaStats, measure: str, models: tuple[int, ...], hover: str, name: str = "") -> go.Heatmap:
    """A heatmap of one of DeltaSums' figures per group and kind, all kinds together in the first row."""
    import plotly.graph_objects as go

    kinds = ("", *stats.kinds)
    values: list[list[float | None]] = []
    for kind in kinds:
        found = [stats.of(group.key, kind) for group in stats.groups]
        line = [math.nan if sums is None else getattr(sums, measure)(*models) for sums in found]
        values.append([number if math.isfinite(number) else None for number in line])
    texts = [[f"{_safe(group.title)}, {KIND_TITLES[kind]}" for group in stats.groups] for kind in kinds]
    return go.Heatmap(
        z=values,
        x=[_label(group) for group in stats.groups],
        y=[KIND_TITLES[kind] for kind in kinds],
        text=texts,
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
        hoverongaps=False,
        hovertemplate="%{text}<br>" + hover + f"<extra>{_safe(name)}</extra>",
    )


def _label(group: GroupDeltas) -> str:
    """Short enough for thirty of them in a row: "7", "enc 3", "emb"."""
    if group.layer is None:
        return PLACE_TITLES.get(group.key, group.key)
    return group.key.replace("encoder.", "enc ").replace("decoder.", "dec ")


def _laid_out(figure: go.Figure, height: int) -> go.Figure:
    figure = _plain(figure, height=height)
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return figure.update_layout(margin={"r": 90})


def _color_axis(
    scale: list[list[Any]], low: float, high: float, title: str, *, percent: bool = False
) -> dict[str, Any]:
    bar: dict[str, Any] = {"title": {"text": title}, "thickness": 12, "len": 0.95}
    if percent:
        bar["tickformat"] = ".3~p" if high < 0.1 else ".0%"
    return {"colorscale": scale, "cmin": low, "cmax": high, "colorbar": bar}


def _middles(edges: Sequence[int]) -> list[float]:
    return [(start + end - 1) / 2 for start, end in pairwise(edges)]


def _spans(edges: Sequence[int], what: str) -> list[str]:
    """ "row 4", "rows 4 to 7"; counted from 0, as tensors are indexed."""
    pairs = pairwise(edges)
    return [f"{what} {start}" if end - start == 1 else f"{what}s {start} to {end - 1}" for start, end in pairs]
