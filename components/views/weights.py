"""The Weights tab's decisions: what the Measure button says, the table of losses, and where its numbers come from.

Pure: from a session (and a measurement under way) to text and tables. Rows and names come from outside and are escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from components.feedback import note_html
from components.naming import middle_cut, short_name, without_demo_paths
from components.session import Row, Session
from components.views.recipe_bar import colors
from llm_merge.loss_table import LossTable
from llm_merge.measurements import Estimate

SHOWN_ROWS = 300  # a longer table helps nobody; the means are over all rows
STOPPED = "Stopped. What was measured is kept: measuring again goes on from there."
Losses = Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class MeasuredSoFar:
    """Losses [models][rows] while they are being measured; None for those still to come."""

    rows_hash: str
    models: tuple[str, ...]
    losses: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class MeasureButton:
    """What the button says, whether it can be pressed, and whether it measures what is known already, too."""

    label: str
    enabled: bool = True
    primary: bool = True
    fresh: bool = False


def is_fresh(session: Session) -> bool:
    """Whether Measure means measuring again: there are losses already for all models and these rows."""
    table = session.table
    return table is not None and all(model in table.models for model in session.models)


def measure_button(session: Session, cost: Estimate | None) -> MeasureButton:
    """The button for the session; `cost` is None while it cannot be told."""
    if len(session.models) < 2 or not session.measured_rows or session.model_type == "reranker":
        return MeasureButton("Measure", enabled=False)
    time = f" (≈ {duration(cost.seconds)})" if cost is not None else ""
    table = session.table
    if is_fresh(session) and table is not None:
        if any(table.recorded):
            return MeasureButton(f"Measure live{time}", fresh=True)
        return MeasureButton(f"Measure again{time}", primary=False, fresh=True)
    if cost is not None and cost.missing == 0:
        return MeasureButton("Fill in what was measured before")
    return MeasureButton(f"Measure{time}")


def duration(seconds: float) -> str:
    """An estimate, no finer than it is: "3 s", "40 s", "2 min"."""
    if seconds < 10:
        return f"{max(1, math.ceil(seconds))} s"
    if seconds < 55:
        return f"{5 * math.ceil(seconds / 5)} s"
    return f"{math.ceil(seconds / 60)} min"


def missing_html(session: Session) -> str:
    """What has to happen before measuring, or that the losses shown are no longer those of these rows."""
    if session.model_type == "reranker" and session.models:
        return note_html("Rerankers cannot be measured yet: set the shares by hand.")
    if len(session.models) < 2:
        return note_html("Choose at least two models first, in Models.")
    if not session.measured_rows:
        return note_html("Add examples first, in Examples: the losses on them decide the shares.")
    losses = session.losses
    if losses and losses.rows_hash != session.measured_hash and set(session.models) <= set(losses.models):
        return note_html("The examples have changed since these models were measured: measure again.", "warning")
    return ""


def source_html(session: Session) -> str:
    """Where the losses come from and how the rows were read; empty while there are none."""
    table = measured(session)
    if table is None:
        return ""
    sentences = []
    if table.other_base:
        sentences.append(f"Measured on another base, recorded on {max(table.dates)}: measure live to compare fairly.")
    elif any(table.recorded):
        sentences.append(f"Recorded on {max(table.dates)}.")
    elif any(table.dates):
        kept = [short_name(model) for model, date in zip(table.models, table.dates, strict=True) if date]
        who = "all models" if len(kept) == len(table.models) else " and ".join(kept)
        sentences.append(f"Measured before, on {max(table.dates)}: {who}.")
    sentences += [sentence for sentence in (table.format, *table.notes) if sentence]
    kind = "warning" if table.other_base else "note"
    return note_html(" ".join(sentences), kind)


def table_html(session: Session, so_far: MeasuredSoFar | None, *, active: bool = False) -> str:
    """Losses of models on rows: those under way (`active`), else the session's, else what a stop left, else dots."""
    models = session.models
    if not session.measured_rows or not models:
        return ""
    fits = so_far is not None and (so_far.rows_hash, so_far.models) == (session.measured_hash, models)
    table = measured(session)
    if so_far is not None and fits and (active or table is None):
        losses: Losses = so_far.losses
    elif table is not None:
        losses = [table.of(model) if model in table.models else [None] * len(session.measured_rows) for model in models]
    else:
        losses = [[None] * len(session.measured_rows)] * len(models)
    return losses_html(models, losses, session.measured_rows, colors(session))


def measured(session: Session) -> LossTable | None:
    """The session's losses if they are of its rows; they may lack a model."""
    table = session.losses
    return table if table is not None and session.measured_rows and table.rows_hash == session.measured_hash else None


def drawing_key(session: Session) -> str:
    """Equal keys: the same table and chart. Moving the temperature changes neither."""
    table = measured(session)
    made = (table.models, table.dates, table.losses) if table is not None else ()
    return f"{session.models}{session.measured_hash}{session.model_type}{session.rows_from}{hash(made)}"


def losses_html(models: Sequence[str], losses: Losses, rows: Sequence[Row], color: dict[str, str]) -> str:
    """The table: means first, then one line per example; the lowest loss of a line is bold."""
    head = "".join(
        f'<th scope="col" title="{html.escape(without_demo_paths(model))}"><i style="background:{color[model]}"></i>'
        f"{html.escape(middle_cut(short_name(model), 22))}</th>"
        for model in models
    )
    means = [_mean(values) for values in losses]
    lines = [_line("mean", f"mean of {len(rows)} rows", "", means)]
    labels = example_labels(rows)
    for number, row in enumerate(rows[:SHOWN_ROWS]):
        lines.append(_line("", labels[number][:80], example_text(row), [values[number] for values in losses]))
    more = len(rows) - SHOWN_ROWS
    note = f'<p class="facts">… and {more} more rows, counted in the means.</p>' if more > 0 else ""
    return (
        '<div class="losses" tabindex="0" role="region" aria-label="Losses of each model on each example">'
        f'<table><thead><tr><th scope="col">loss in nats, lower is better</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>{note}</div>"
    )


def example_text(row: Row) -> str:
    """How an example is called in a table: its question, on one line."""
    text = row.get("input") or row.get("query") or row.get("output") or ""
    if not text and row.get("messages"):
        text = row["messages"][0].get("content", "")
    return " ".join(str(text).split())


def example_labels(rows: Sequence[Row]) -> list[str]:
    """What tells examples apart: of questions that begin alike ("Define the word: …") the rest, task by task."""
    texts = [example_text(row) for row in rows]
    tasks: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        tasks.setdefault(str(row.get("task", "")), []).append(number)
    for numbers in tasks.values():
        mine = sorted(texts[number] for number in numbers)
        alike = next((i for i, (a, b) in enumerate(zip(mine[0], mine[-1], strict=False)) if a != b), 0)
        shared = mine[0][: mine[0].rfind(": ", 0, alike) + 2] if ": " in mine[0][:alike] else ""
        for number in numbers:
            if shared and len(numbers) > 1 and len(texts[number]) > len(shared):
                texts[number] = "… " + texts[number][len(shared) :]
    return texts


def chart_names(session: Session, table: LossTable) -> tuple[list[str], list[str]]:
    """Names and colours of the table's models, for the chart."""
    color = colors(session)
    return [short_name(model) for model in table.models], [color.get(model, "#7A828E") for model in table.models]


def _line(kind: str, label: str, full: str, values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    best = min(known) if len(known) == len(values) else None
    cells = "".join(
        '<td class="open">·</td>' if value is None else f"<td>{_bold(f'{value:.2f}', value == best)}</td>"
        for value in values
    )
    title = f' title="{html.escape(full)}"' if full else ""
    return f'<tr class="{kind}"><th scope="row"{title}>{html.escape(label)}</th>{cells}</tr>'


def _bold(text: str, bold: bool) -> str:
    return f"<b>{text}</b>" if bold else text


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None
