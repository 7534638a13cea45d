"""The scoreboard's words: which rows are scored, the table with errors, the sentence, and what is out of date.

Pure. A number is a loss in nats (lower is better) or a share of queries; beside it stands the difference to the base
with its standard error, from paired rows. Nothing within noise is coloured or claimed.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from components.naming import short_name
from components.palette import BASE, MERGED
from components.session import Row, Session, row_shape
from components.settings import Settings
from components.views.recipe_bar import colors
from components.views.try_view import is_stale, nothing_to_try, stale_html
from llm_merge.demo import DEMO_MODELS, demo_examples, demo_path
from llm_merge.errors import MergeError
from llm_merge.scoreboard import Cell, Line, Scoreboard, summary, worse_than_parents

METRICS = [("Loss", "loss"), ("R@1", "R@1"), ("MRR", "MRR"), ("nDCG@10", "nDCG@10")]
GENERAL = "general"
EXAMPLES = "example rows"
EXAMPLE_ROWS = 64
SEARCH_ROWS = 200  # embedding is quick, and a share of 32 queries says little


@dataclass(frozen=True)
class RowSet:
    """Rows scored together.

    same_rows   the shares were computed from these very rows, and there are no others
    seen        they were, and held-out rows stand beside them
    note        one sentence
    """

    name: str
    rows: tuple[Row, ...]
    same_rows: bool = False
    note: str = ""
    seen: bool = False


@dataclass(frozen=True)
class Scored:
    """A finished scoreboard, by metric, and the recipe that its merge was made with."""

    recipe_key: str
    mix: str
    boards: Mapping[str, Scoreboard]
    notes: tuple[str, ...] = ()

    def board(self, metric: str) -> Scoreboard:
        return self.boards.get(metric) or self.boards["loss"]


def row_sets(session: Session, settings: Settings) -> tuple[RowSet, ...]:
    """The sets to score: the demo's held-out rows or the visitor's own, by task, then *general*, then the rows that
    the shares come from.

    Raises MergeError when there is nothing to score on.
    """
    if nothing_to_try(session):
        raise MergeError(nothing_to_try(session), field="models")
    kind = "decoder" if row_shape(session.model_type) == "answer" else "encoder"
    count = min(settings.demo_rows if kind == "decoder" else SEARCH_ROWS, settings.max_rows)
    # Without rows, demo specialists are scored on what they were made for.
    made_for = () if session.rows else tuple(dict.fromkeys(filter(None, map(task_of, session.models))))
    tasks = session.demo_tasks or made_for
    if tasks:
        sets = [RowSet(task, _demo(kind, task, count)) for task in tasks]
    else:
        sets = list(own_sets(session))
    if all(found.name != GENERAL for found in sets):
        sets.append(RowSet(GENERAL, _demo(kind, GENERAL, count)))
    if not any(found.same_rows for found in sets):
        sets.append(RowSet(EXAMPLES, session.measured_rows[:EXAMPLE_ROWS], seen=True))
    sets = [found for found in sets if found.rows]
    if not sets:
        raise MergeError("There are no rows to score on: add some in Examples.", field="examples")
    return tuple(sets)


def own_sets(session: Session) -> tuple[RowSet, ...]:
    """The visitor's held-out rows by task; the same rows again, marked so, when there are too few to divide."""
    from llm_merge.examples import split

    if not session.rows:
        return ()
    parts = split(session.rows)  # the same cut as the session's: what is held out here was never measured for shares
    same = parts.same_rows
    note = "Your rows are the ones that the shares were computed from: optimistic." if same else parts.note + "."
    tasks = list(dict.fromkeys(str(row.get("task") or "") for row in parts.held_out))
    return tuple(
        RowSet(
            task or ("your rows" if same else "held-out rows"),
            tuple(row for row in parts.held_out if str(row.get("task") or "") == task),
            same,
            note if place == 0 else "",
        )
        for place, task in enumerate(tasks)
    )


def about_html(session: Session, settings: Settings) -> str:
    """What pressing the button will do, in a sentence."""
    try:
        sets = row_sets(session, settings)
    except MergeError as error:
        return f'<p class="about">{html.escape(error.message)}</p>'
    rows = ", ".join(f"{len(found.rows)} of {found.name}" for found in sets if not found.seen)
    same = " The first are the rows that the shares come from: optimistic." if sets[0].same_rows else ""
    kind = "held-out rows" if not sets[0].same_rows else "rows"
    seen = "".join(f", and on {len(found.rows)} of the rows that the shares come from" for found in sets if found.seen)
    text = (
        f"Every model and the merge on the same {kind} ({rows}){seen}; what is remembered is not measured again.{same}"
    )
    return f'<p class="about">{html.escape(text)}</p>'


def title(session: Session, model: str) -> str:
    """What a line is called; anything that is not one of the session's models is the merge."""
    if model not in session.models:
        return "Merged"
    return "Base" if model == session.base else short_name(model)


def task_of(model: str) -> str:
    """The set a demo specialist was made for; "" for all others."""
    return next((m.task for m in DEMO_MODELS if m.base and demo_path(m.key) == model), "")


def line_colors(session: Session, board: Scoreboard) -> tuple[str, ...]:
    """Each line in its model's colour, as everywhere on the page."""
    by_title = {title(session, model): color for model, color in colors(session).items()}
    return tuple(MERGED if line.role == "merged" else by_title.get(line.name, BASE) for line in board.lines)


def scored_html(scored: Scored, metric: str, session: Session) -> str:
    """Sentence, warning, table and notes; greyed when the mix is another one by now."""
    board = scored.board(metric)
    stale = is_stale(scored.recipe_key, session)
    worse = worse_than_parents(board)
    sentence = summary(board)
    parts = [stale_html(scored.mix) if stale else ""]
    parts.append(f'<p class="headline">{html.escape(sentence)}</p>' if sentence else "")
    parts.append(f'<div class="message problem" role="alert">{html.escape(worse)}</div>' if worse else "")
    parts.append(table_html(board))
    optimistic: tuple[str, ...] = ("The shares were computed from these rows: optimistic.",) if board.same_rows else ()
    optimistic += tuple(f"The shares come from the {name}: optimistic there." for name in board.seen)
    notes = dict.fromkeys((f"Merged is {scored.mix}.", _legend(board), *optimistic, *scored.notes))
    parts.append(f'<p class="how">{html.escape(" ".join(notes))}</p>')
    return f'<div class="scoreboard{" stale" if stale else ""}">{"".join(parts)}</div>'


def table_html(board: Scoreboard) -> str:
    """One line a model, one column a set: the mean, and the difference to the base with its standard error."""
    counts = board.lines[0].cells if board.lines else ()
    head = "".join(
        f'<th scope="col">{html.escape(name)} <small>n = {cell.n}</small></th>'
        for name, cell in zip(board.sets, counts, strict=True)
    )
    lines = "".join(_line_html(line, board.metric) for line in board.lines)
    unit = "loss in nats, lower is better" if board.metric == "loss" else f"{board.metric}, higher is better"
    return (
        f'<div class="scroll"><table><caption>{html.escape(unit)}</caption><thead><tr><th scope="col">Model</th>{head}'
        f"</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _line_html(line: Line, metric: str) -> str:
    worst = line.worst or (False,) * len(line.cells)
    cells = "".join(
        f'<td class="{_class(cell, bad)}">{cell.mean:.3f}{_difference(cell, line.role, metric)}</td>'
        for cell, bad in zip(line.cells, worst, strict=True)
    )
    return f'<tr class="{line.role}"><th scope="row">{html.escape(line.name)}</th>{cells}</tr>'


def _difference(cell: Cell, role: str, metric: str) -> str:
    """ "−0.81 ± 0.05" in the metric's own direction: a loss that falls has a minus."""
    if role == "base" or math.isnan(cell.gain):
        return ""
    change = -cell.gain if metric == "loss" else cell.gain
    error = f" ± {cell.gain_error:.2f}" if math.isfinite(cell.gain_error) else ""
    sign = "−" if change < 0 else "+"
    return f" <small>{sign}{abs(change):.2f}{error}</small>"


def _class(cell: Cell, worst: bool) -> str:
    if worst:
        return "worst"
    if math.isnan(cell.gain) or cell.is_noise:
        return ""
    return "up" if cell.gain > 0 else "down"


def _legend(board: Scoreboard) -> str:
    if not any(line.role == "base" for line in board.lines):
        return ""
    return "Small numbers: difference to the base ± one standard error of the paired rows; coloured beyond two."


def _demo(kind: str, task: str, count: int) -> tuple[Row, ...]:
    """Held-out rows of a demo set; none when the set is not there."""
    try:
        rows: Sequence[Row] = demo_examples(kind, task, "heldout")[:count]
    except FileNotFoundError:
        return ()
    return tuple({**row, "task": task} for row in rows)
