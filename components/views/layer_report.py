"""A contribution report as the layer map shows it: rows, colours, marks, and the numbers of a selected layer in words.

Pure: a report in, the map's value and HTML out. Names and text from outside are escaped here.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from components.feedback import note_html
from components.views.layer_choice import (
    OUTSIDE,
    MapCell,
    MapColumn,
    MapMark,
    MapRow,
    MapScale,
    cell_text,
    layer_value,
    number_text,
    scale_limit,
)
from llm_merge.contribution_report import MUTUAL, NEITHER, PARTIAL, SEVERE, ContributionReport, Stat
from llm_merge.contributions import SIDES
from llm_merge.hi_merging import Switches, decide

GAMMA, BEFORE_AFTER, ALPHA, BETA = "gamma", "contribution", "alpha", "beta"
DELTAS, SIGNS, COSINE, TENSOR = "deltas", "signs", "cosine", "tensor"
CONTRIBUTIONS = {
    GAMMA: "Conflict: γ per task, and Γ",
    BEFORE_AFTER: "Contribution c, before and after merging",
    ALPHA: "α: what is lost without the layer",
    BETA: "β: what the layer brings alone",
}
STATISTICS = {
    DELTAS: "How much each layer changed",
    SIGNS: "Where two fine-tunes pull in opposite directions",
    COSINE: "How alike two fine-tunes' changes are",
    TENSOR: "One weight matrix, close up",
}
SHOWS = [(title, key) for key, title in {**CONTRIBUTIONS, **STATISTICS}.items()]

CONFLICT_SCALE = MapScale(1.0, low="merging helps", high="merging hurts", warm="high")
VALUE_SCALE = MapScale(1.0, low="layer hurts", high="layer helps", warm="low")
WORDS = {
    SEVERE: "Severe: merging makes this layer serve at least two tasks worse",
    PARTIAL: "Partial: merging helps one task here and hurts another",
    MUTUAL: "Mutual enhancement: merging makes this layer serve no task worse",
    NEITHER: "One task is hurt and the others are untouched: no rule of the method fits",
}
ABOUT = (
    "Which layers of the fine-tunes carry their skill, and where do they get in each other’s way once merged? "
    "γ compares what a layer contributes to a task before and after merging."
)
EMPTY = (
    "Here every layer will show what merging does to each task: press Analyse. A first estimate comes after seconds, "
    "measured cells then take its place, the worst conflicts first."
)
FIRST = "The analysis takes the changes as they are, nothing pruned or scaled; Hi-Merging below chooses that first."
DILUTED = (
    "Nearly every layer counts as hurt for every task, because an average takes only 1/{} of each change: that is "
    "dilution rather than conflict. Choose “Sum” to see conflict alone."
)


def map_value(
    report: ContributionReport | None, show: str, *, selected: Sequence[str] | None = None, busy: bool = False
) -> dict[str, Any]:
    """What the layer map draws: one row per task (and side), one column per layer."""
    if report is None or not report.setup.layers:
        return layer_value((), (), scale=MapScale(1.0), note=EMPTY)
    columns = [
        MapColumn(layer.key, layer.key if layer.block else OUTSIDE.get(layer.key, (layer.key,))[0], layer.title,
                  outside=not layer.block)
        for layer in report.setup.layers
    ]  # fmt: skip
    rows = _rows(report, show)
    words = CONFLICT_SCALE if show == GAMMA else VALUE_SCALE
    scale = replace(words, limit=scale_limit(rows), unit=unit_of(report))
    marks = [_mark(report, layer.key) for layer in report.setup.layers] if show == GAMMA else ()
    return layer_value(rows, columns, scale=scale, marks=marks, selected=selected, busy=busy)


def unit_of(report: ContributionReport) -> str:
    return report.unit or "points"


def headline_html(report: ContributionReport | None, source: str = "") -> str:
    """What the analysis says in one line, where it comes from, and what it was made with."""
    if report is None or not report.headline():
        return f'<h3 class="layers-headline">Nothing is analysed yet</h3><p class="facts">{FIRST}</p>'
    raw = all(pair == (1.0, 1.0) for pair in report.setup.pruning)
    how = "changes as they are, nothing pruned or scaled" if raw else "changes pruned and scaled as chosen"
    combine = {"average": "merged as an average", "sum": "merged as a sum", "ties_sum": "merged with TIES’ signs"}
    facts = [source, how, combine[report.setup.combine], *report.notes]
    text = " · ".join(html.escape(fact) for fact in facts if fact)
    diluted = note_html(DILUTED.format(len(report.setup.models))) if is_diluted(report) else ""
    return f'<h3 class="layers-headline">{html.escape(report.headline())}</h3><p class="facts">{text}</p>{diluted}'


def is_diluted(report: ContributionReport) -> bool:
    """Whether γ > 0 nearly everywhere for all tasks, as an average of useful changes gives it."""
    if report.setup.combine != "average" or len(report.setup.models) < 2:
        return False
    measured = [layer.key for layer in report.setup.layers if layer.block and report.is_measured(layer.key)]
    severe = sum(report.conflict(key).kind == SEVERE for key in measured)
    return bool(measured) and severe >= 0.8 * len(measured)


def detail_html(report: ContributionReport | None, keys: Sequence[str], switches: Switches) -> str:
    """The selected layer's numbers with errors, what they mean, and what the method will do there."""
    known = {layer.key for layer in report.setup.layers} if report is not None else set()
    keys = [key for key in keys if key in known]
    if report is None:
        return ""
    if not keys:
        return '<p class="facts">Select a layer in the map to read its numbers and what the method does there.</p>'
    if len(keys) > 1:
        titles = ", ".join(report.setup.layer(key).title for key in keys[:6]) + (", …" if len(keys) > 6 else "")
        return f'<h4>{len(keys)} layers selected</h4><p class="facts">{html.escape(titles)}</p>'
    key = keys[0]
    conflict = report.conflict(key)
    lines = "".join(_detail_line(report, task, key) for task in report.setup.tasks)
    head = "".join(f'<th scope="col">{name}</th>' for name in ("task", "α", "β", "c before", "c after", "γ"))
    words = WORDS.get(conflict.kind, "Not measured yet")
    if conflict.uncertain:
        words += ", but it rests on noise or an estimate: uncertain"
    return (
        f"<h4>{html.escape(report.setup.layer(key).title)}</h4>"
        f'<div class="layer-numbers" tabindex="0" role="region" aria-label="Numbers of this layer"><table><thead>'
        f"<tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
        f'<p class="facts">{html.escape(unit_of(report))}, ± one standard error; α and β before merging'
        f"{_meaning(report, key)}</p><p><b>{html.escape(words)}.</b> {html.escape(_action(report, key, switches))}</p>"
    )


def _rows(report: ContributionReport, show: str) -> list[MapRow]:
    setup = report.setup
    if show == GAMMA:
        rows = [
            MapRow(f"gamma:{task}", f"γ {task}", _cells(report, partial(report.gamma, task)),
                   f"c before − c after merging, on {task}")
            for task in setup.tasks
        ]  # fmt: skip
        total = MapRow(
            "total", "Γ all tasks", _cells(report, report.total), "Sum of γ: the method's order", strong=True
        )
        return [*rows, total]
    measure = {BEFORE_AFTER: report.contribution, ALPHA: report.alpha, BETA: report.beta}[show]
    letter = {BEFORE_AFTER: "c", ALPHA: "α", BETA: "β"}[show]
    return [
        MapRow(f"{show}:{side}:{task}", f"{letter} {task}, {side}", _cells(report, partial(measure, task, side)),
               f"{side} merging")
        for side in SIDES
        for task in setup.tasks
    ]  # fmt: skip


def _cells(report: ContributionReport, stat_of: Callable[[str], Stat | None]) -> tuple[MapCell, ...]:
    return tuple(_cell(stat_of(layer.key)) for layer in report.setup.layers)


def _cell(stat: Stat | None) -> MapCell:
    if stat is None:
        return MapCell()
    if stat.estimated:
        return MapCell(stat.value, None, "estimate")
    if stat.value == 0 and stat.error == 0:
        return MapCell(0.0, None, "fixed")  # no model changes this layer
    return MapCell(stat.value, None if math.isnan(stat.error) else stat.error, "exact")


def _mark(report: ContributionReport, key: str) -> MapMark:
    conflict = report.conflict(key)
    kind = conflict.kind if conflict.kind in (SEVERE, PARTIAL, MUTUAL) else "none"
    return MapMark(kind, conflict.uncertain and kind != "none")  # type: ignore[arg-type]


def _detail_line(report: ContributionReport, task: str, key: str) -> str:
    stats = (
        report.alpha(task, "before", key),
        report.beta(task, "before", key),
        report.contribution(task, "before", key),
        report.contribution(task, "after", key),
        report.gamma(task, key),
    )
    cells = "".join(f"<td>{html.escape(stat_text(stat))}</td>" for stat in stats)
    return f'<tr><th scope="row">{html.escape(task)}</th>{cells}</tr>'


def stat_text(stat: Stat | None) -> str:
    """ "0.042 ± 0.011", "≈ 0.04" for an estimate, "·" for nothing yet."""
    if stat is None:
        return "·"
    if stat.estimated:
        return f"≈ {number_text(stat.value)}"
    if math.isnan(stat.error) or stat.value == stat.error == 0:
        return number_text(stat.value)
    return f"{number_text(stat.value, stat.error)} ± {number_text(stat.error, stat.error)}"


def _meaning(report: ContributionReport, key: str) -> str:
    """One sentence: what γ of each task says."""
    parts = []
    for task in report.setup.tasks:
        cell = _cell(report.gamma(task, key))
        words = replace(CONFLICT_SCALE, unit=unit_of(report))
        if cell.known:
            parts.append(f"γ {html.escape(task)}: {html.escape(cell_text(cell, words))}")
    return f"; {'; '.join(parts)}." if parts else "."


def _action(report: ContributionReport, key: str, switches: Switches) -> str:
    layer = report.setup.layer(key)
    if not layer.block:
        return "The method edits transformer blocks only: this is shown and left as it is."
    if report.total(key) is None:
        return ""
    action = decide(report, key, switches)[1]
    return f"Hi-Merging here: {action}."
