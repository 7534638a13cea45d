"""Hi-Merging's charts: the grid of pruning and scaling, and the metric over the steps. Values in, a Figure out.

As in `charts.py`: transparent, text colours from the style sheet, nothing said by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from components.charts import SIMILARITY_SCALE, _plain, _safe
from components.palette import BASE, MERGED, SPECIALISTS

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from llm_merge.hi_merging import GridCell
    from llm_merge.hierarchical import Point

GRID_HEIGHT = 330


def pruning_grid(cells: Sequence[GridCell], tasks: Sequence[str], unit: str) -> go.Figure:
    """One panel per specialist: the metric on its own task for each (p, s), a ring around the best so far."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=len(tasks), subplot_titles=[_safe(task) for task in tasks],
                           horizontal_spacing=0.06, shared_yaxes=True)  # fmt: skip
    for column, task in enumerate(tasks, start=1):
        mine = [cell for cell in cells if cell.task == task]
        if not mine:
            continue
        shares = sorted({cell.p for cell in mine})
        scales = sorted({cell.s for cell in mine})
        value = {(cell.p, cell.s): cell.score for cell in mine}
        z = [[value[p, s].value if (p, s) in value else None for p in shares] for s in scales]
        hover = [
            [f"p {p:g}, s {s:g}: {value[p, s].value:.3f} ± {value[p, s].error:.3f}" if (p, s) in value else ""
             for p in shares] for s in scales
        ]  # fmt: skip
        figure.add_trace(
            go.Heatmap(
                z=z, x=[f"{p:g}" for p in shares], y=[f"{s:g}" for s in scales], text=hover, xgap=1, ygap=1,
                colorscale=SIMILARITY_SCALE, showscale=False, hovertemplate=f"%{{text}} {unit}<extra></extra>",
            ),
            row=1, col=column,
        )  # fmt: skip
        best = max(mine, key=lambda cell: (cell.score.value, cell.p, cell.s))
        figure.add_scatter(
            x=[f"{best.p:g}"], y=[f"{best.s:g}"], mode="markers", row=1, col=column, hoverinfo="skip",
            marker={"symbol": "circle-open", "size": 16, "color": "#FFFFFF", "line": {"width": 3}},
        )  # fmt: skip
        figure.update_xaxes(title="p: share kept", type="category", row=1, col=column)
    steps = [f"{s:g}" for s in sorted({cell.s for cell in cells})]
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=steps)
    figure.update_yaxes(title="s: scale", row=1, col=1)
    return _plain(figure, height=GRID_HEIGHT).update_layout(margin={"t": 34})


def steps_curve(points: Sequence[Point], tasks: Sequence[str], unit: str, *, same_rows: bool = False) -> go.Figure:
    """One panel per task and general set: the metric over the edited steps, solid on analysis rows, which may decide,
    dashed with standard errors on held-out rows, which never do; level lines for plain average, specialist and base.
    `same_rows`: there were too few to hold some out."""
    from plotly.subplots import make_subplots

    steps = [point for point in points if point.name.startswith("step ")]
    places = [int(point.name.removeprefix("step ")) for point in steps]
    reported = "rows reported, the same ones" if same_rows else "held-out rows"
    sets = list(dict.fromkeys([*tasks, *(steps[0].held_out if steps else ())]))
    figure = make_subplots(rows=len(sets), cols=1, shared_xaxes=True, vertical_spacing=0.09 / max(1, len(sets) - 1),
                           subplot_titles=[_safe(name) for name in sets])  # fmt: skip
    for row, name in enumerate(sets, start=1):
        color = SPECIALISTS[tasks.index(name) % len(SPECIALISTS)] if name in tasks else BASE
        for which, dash in (("analysis", "solid"), ("held_out", "dash")):
            scores = [getattr(point, which).get(name) for point in steps]
            if not scores or None in scores:
                continue
            held = which == "held_out"
            whose = reported if held else "analysis rows"
            figure.add_scatter(
                x=places,
                y=[score.value for score in scores],
                mode="lines+markers",
                name=whose,
                legendgroup=which,
                showlegend=row == 1,
                line={"color": color, "dash": dash, "width": 2},
                marker={"size": 6, "symbol": "circle-open" if held else "circle"},
                error_y={"type": "data", "visible": held, "thickness": 1, "width": 2,
                         "array": [0.0 if math.isnan(score.error) else score.error for score in scores]},
                hovertemplate=f"step %{{x}}: %{{y:.3f}} {unit}<extra>{_safe(name)}, {whose}</extra>",
                row=row,
                col=1,
            )  # fmt: skip
        for title, reference, dash in (("plain average", "average", "dot"), ("its fine-tune", name, "dashdot"),
                                       ("base", "base", "longdash")):  # fmt: skip
            level = _level(points, reference, name)
            if level is None or not places:
                continue
            figure.add_scatter(
                x=[places[0], max(places[-1], places[0] + 1)],
                y=[level, level],
                mode="lines",
                name=title,
                legendgroup=title,
                showlegend=row == 1,
                line={"color": MERGED if reference == "average" else BASE, "width": 1.5, "dash": dash},
                hovertemplate=f"{title}: {level:.3f} {unit}<extra>{_safe(name)}</extra>",
                row=row,
                col=1,
            )
    few = {"dtick": 1} if len(places) < 12 else {}
    figure.update_xaxes(title="step; 0 is before any edit", row=len(sets), col=1, **few)
    figure.update_yaxes(title=unit)
    figure = _plain(figure, height=126 + 170 * len(sets))
    legend = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "yref": "container"}
    return figure.update_layout(showlegend=True, legend={**legend, "yanchor": "top"}, margin={"t": 100, "l": 64})


def _level(points: Sequence[Point], reference: str, rows: str) -> float | None:
    """What a model that is compared with is worth on some rows, held-out ones where there are some."""
    point = next((point for point in points if point.name == reference), None)
    score = (point.held_out or point.analysis).get(rows) if point is not None else None
    return score.value if score is not None else None
