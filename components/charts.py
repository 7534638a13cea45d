"""Charts: measured values in, a plotly Figure out, one function per chart. No session, no page, no Gradio.

Figures are transparent and leave text colours to the style sheet, so that they follow the theme. A colour never says
anything alone: names, hover texts and a table beside the chart say the same. (plotly is imported when one is drawn.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from components.naming import middle_cut
from components.palette import BASE, GRID, MERGED, SPECIALISTS

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from llm_merge.loss_table import LossTable
    from llm_merge.scoreboard import Scoreboard

# Lightness rises evenly and the hue stays within blue to yellow, which every kind of colour vision tells apart.
SIMILARITY_SCALE = [[0.0, "#00224E"], [0.25, "#35456C"], [0.5, "#7C7B78"], [0.75, "#C9B75D"], [1.0, "#FDE737"]]
LANE = 46  # pixels for one model's dots
BAR = 20  # pixels for one bar


def loss_dots(table: LossTable, names: Sequence[str], colors: Sequence[str], examples: Sequence[str]) -> go.Figure:
    """One lane per model, one dot per example at its loss, a tick at the mean. `names` and `colors` in table order."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for lane, (values, name, color) in enumerate(zip(table.losses, names, colors, strict=True)):
        # Dots of near-equal losses would cover each other: spread them a little, the same way every time.
        heights = [lane + 0.24 * math.sin(7.0 * number) for number in range(len(values))]
        dots = {"color": color, "size": 7, "opacity": 0.6}
        figure.add_scatter(
            x=values,
            y=heights,
            mode="markers",
            marker=dots,
            name=name,
            text=[middle_cut(text, 70) for text in examples],
            hovertemplate="%{text}<br>%{x:.2f} nats<extra>" + _safe(name) + "</extra>",
        )
        mean = math.fsum(values) / len(values)
        figure.add_scatter(
            x=[mean, mean],
            y=[lane - 0.36, lane + 0.36],
            mode="lines",
            line={"color": color, "width": 4},
            hovertemplate=f"mean {mean:.2f} nats<extra>{_safe(name)}</extra>",
        )
    ticks = [_safe(middle_cut(name, 24)) for name in names]
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=ticks, range=[len(names) - 0.5, -0.5])
    figure.update_xaxes(title="loss, nats (lower is better)")
    return _plain(figure, height=70 + LANE * len(names))


def scoreboard_bars(board: Scoreboard, colors: Sequence[str] = ()) -> go.Figure:
    """Means of every model on every set of rows. Error bars are two standard errors of the difference to the base."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for line, color in zip(board.lines, colors or _board_colors(board), strict=True):
        errors = [2 * cell.gain_error if math.isfinite(cell.gain_error) else 0.0 for cell in line.cells]
        figure.add_bar(
            x=[cell.mean for cell in line.cells],
            y=[f"{name} " for name in board.sets],
            orientation="h",
            name=_safe(middle_cut(line.name, 28)),
            marker={"color": color},
            error_x={"type": "data", "array": errors, "color": "rgba(128,128,128,.9)", "thickness": 1.5, "width": 4},
            text=[f"{cell.mean:.2f}" for cell in line.cells],
            textposition="inside",
            insidetextanchor="start",
            insidetextfont={"color": "#FFFFFF"},
            customdata=[[cell.n, 2 * cell.gain_error] for cell in line.cells],
            hovertemplate="%{x:.3f} ± %{customdata[1]:.3f}, %{customdata[0]} rows<extra>"
            + _safe(line.name)
            + "</extra>",
        )
    title = "loss, nats per token (lower is better)" if board.metric == "loss" else f"{board.metric} (higher is better)"
    figure.update_xaxes(title=title, rangemode="tozero")
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(
        barmode="group", bargap=0.25, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    )
    figure = _plain(figure, height=110 + (BAR * len(board.lines) + 14) * len(board.sets))
    return figure.update_layout(showlegend=True, margin={"t": 60})


def similarity_heatmaps(
    texts: Sequence[str], base: Sequence[Sequence[float]], merged: Sequence[Sequence[float]]
) -> go.Figure:
    """Cosine similarities between all texts, by the base and by the merge, on one colour scale.

    `base` and `merged` are square [texts, texts]; when they have one row more than `texts`, the first is the query.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    with_query = len(base) == len(texts) + 1
    names = [*(["query"] if with_query else []), *(str(number) for number in range(1, len(texts) + 1))]
    full = [_safe(middle_cut(text, 60)) for text in [*(["the query"] if with_query else []), *texts]]
    hover = [[f"{one}<br>{other}" for other in full] for one in full]
    lowest = min((value for matrix in (base, merged) for line in matrix for value in line), default=0.0)
    figure = make_subplots(rows=1, cols=2, subplot_titles=["Base", "Merged"], horizontal_spacing=0.1)
    for column, matrix in enumerate((base, merged), start=1):
        figure.add_trace(
            go.Heatmap(
                z=[list(line) for line in matrix],
                x=names,
                y=names,
                text=hover,
                coloraxis="coloraxis",
                xgap=1,
                ygap=1,
                hovertemplate="%{text}<br>similarity %{z:.2f}<extra></extra>",
            ),
            row=1,
            col=column,
        )
    figure.update_yaxes(autorange="reversed", type="category", constrain="domain")
    figure.update_xaxes(type="category", constrain="domain")
    bar = {"title": {"text": "similarity"}, "thickness": 12, "len": 0.9}
    figure.update_layout(
        coloraxis={"colorscale": SIMILARITY_SCALE, "cmin": min(0.0, lowest), "cmax": 1.0, "colorbar": bar}
    )
    return _plain(figure, height=340).update_layout(margin={"t": 34, "r": 70})


def _board_colors(board: Scoreboard) -> list[str]:
    specialists = iter(SPECIALISTS * 2)
    fixed = {"base": BASE, "merged": MERGED}
    return [fixed.get(line.role) or next(specialists) for line in board.lines]


def _plain(figure: go.Figure, height: int) -> go.Figure:
    """What every chart has in common: no background, quiet grid, room for nothing but the data."""
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        height=height,
        margin={"l": 10, "r": 16, "t": 12, "b": 44},
        showlegend=False,
        font={"family": "inherit", "size": 13},
        hoverlabel={"align": "left"},
        dragmode=False,
    )
    axis: dict[str, Any] = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID, "automargin": True}
    figure.update_xaxes(**axis, fixedrange=True, title_font={"size": 13})
    figure.update_yaxes(**axis, fixedrange=True)
    return figure


def _safe(text: str) -> str:
    """Plotly reads a little HTML in texts; a model's name is not meant as HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
