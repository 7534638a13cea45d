"""The table that compares the recipe in use with its parents on held-out rows, by any metric. Pure."""

from __future__ import annotations

import html
from dataclasses import replace

from components.naming import short_name
from components.session import Session
from components.settings import Settings
from components.views.layer_choice import number_text
from components.views.layer_report import stat_text
from components.views.layer_tasks import tasks_for
from llm_merge.errors import MergeError
from llm_merge.held_out import HeldOutTable
from llm_merge.recipe import Recipe

AVERAGE, IN_USE = "Plain average", "The recipe in use"
ANSWER_SECONDS = 2.0  # for one generated answer of a small model on two cores


def recipes_of(session: Session) -> dict[str, Recipe]:
    """Name → merge: base, fine-tunes, their plain average, the recipe in use. Raises MergeError if there is none."""
    if session.recipe is None or not session.base or not session.fine_tunes:
        raise MergeError("There is no recipe to score: choose a base and fine-tunes in Models.", field="models")
    tunes = session.fine_tunes
    average = replace(Recipe.linear(tunes, [1 / len(tunes)] * len(tunes), dtype=session.dtype), base_model=session.base)
    parents = {f"{short_name(model)}": Recipe.single(model, dtype=session.dtype) for model in tunes}
    base = {"Base": Recipe.single(session.base, dtype=session.dtype)}
    return {**base, **parents, AVERAGE: average, IN_USE: session.recipe}


def metric_choices(session: Session) -> list[tuple[str, str]]:
    """(label, name) of every metric that applies to the model type."""
    from llm_merge.metrics import metrics_for

    return [(metric.title, metric.name) for metric in metrics_for(session.model_type)]


def seconds(session: Session, settings: Settings, metric: str, rows: int) -> float | None:
    """What scoring by a generated metric costs, roughly; None for the others, which are quick."""
    from llm_merge.metrics import METRICS

    kind = next((entry.kind for entry in METRICS if entry.name == metric), "")
    if kind != "generated":
        return None
    try:
        sets = sum(min(rows, len(task.held_out)) for task in tasks_for(session, settings, 1))
    except MergeError:
        return None
    return ANSWER_SECONDS * sets * (len(session.fine_tunes) + 3)


def table_html(table: HeldOutTable | None, *, same_rows: bool = False) -> str:
    """Means with standard errors and rows; under the recipe in use its paired difference to the plain average.

    same_rows   there were too few rows to hold some out: said, since the numbers look better than they are
    """
    if table is None:
        return ""
    unit = table.unit or "share from 0 to 1"
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in ("merge", *table.sets))
    lines = []
    for name in table.names:
        cells = "".join(f"<td>{html.escape(stat_text(table.score(name, rows)))}</td>" for rows in table.sets)
        lines.append(f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>')
    differences = "".join(f"<td>{html.escape(_difference(table, rows))}</td>" for rows in table.sets)
    lines.append(f'<tr class="edited"><th scope="row">in use − plain average</th>{differences}</tr>')
    counts = ", ".join(f"{len(table.values[table.names[0], rows])} of {html.escape(rows)}" for rows in table.sets
                       if (table.names[0], rows) in table.values)  # fmt: skip
    whose = "rows that also decide, so this looks better than it is" if same_rows else "held-out rows"
    return (
        '<div class="layer-steps" tabindex="0" role="region" aria-label="Scores on held-out rows"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        f'<p class="facts">{html.escape(unit)}, higher is better, ± one standard error; {whose}: {counts}. '
        "The last line is paired row by row.</p>"
    )


def _difference(table: HeldOutTable, rows: str) -> str:
    stat = table.against(IN_USE, AVERAGE, rows)
    if stat is None:
        return "·"
    noise = " (noise)" if stat.is_noise else ""
    sign = "+" if stat.value > 0 else ""
    return f"{sign}{number_text(stat.value, stat.error)} ± {number_text(stat.error, stat.error)}{noise}"
