"""Which rows belong to which fine-tune on the Layers tab, and what has to happen before layers can be analysed.

Pure: a session in, tasks or a sentence out. Rows that the scoreboard reports never decide here.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import replace

from components.feedback import note_html
from components.naming import short_name
from components.session import Session, row_shape
from components.settings import Settings
from llm_merge.demo import demo_examples
from llm_merge.errors import ExampleError, MergeError
from llm_merge.hashing import combined_hash
from llm_merge.tasks import GENERAL, Row, Task, assign_owners, split_tasks

ROWS = (8, 16, 32)
"""Rows per task that a visitor may choose to analyse with."""


def row_choices(settings: Settings) -> tuple[int, ...]:
    """On a public page only the fewest: one visitor's analysis keeps the others waiting."""
    return ROWS[:1] if settings.public else ROWS


def owners(session: Session) -> Mapping[str, str]:
    """Task → fine-tune: as the visitor said, else guessed. Raises ExampleError when a fine-tune has no task."""
    names = list(dict.fromkeys(str(row.get("task", "")) for row in session.rows))
    given = {task: model for task, model in session.owners if task in names and model in session.fine_tunes}
    return assign_owners(names, session.fine_tunes, given)


def tasks_for(session: Session, settings: Settings, rows: int) -> tuple[Task, ...]:
    """The session's tasks with at most `rows` rows to analyse; held-out rows are those that the scoreboard reports.

    Raises MergeError, in one sentence, when there is something to do first.
    """
    if reason := nothing_to_analyse(session):
        raise MergeError(reason, field="models")
    if not all(str(row.get("task", "")).strip() for row in session.rows):
        raise ExampleError([NO_TASKS])
    held_out = _held_out(session)
    tasks = split_tasks(session.measured_rows, owners(session), analysis=max(1, rows), held_out=held_out)
    if session.demo_tasks:
        general = demo_examples(_kind(session), GENERAL, "heldout")
        tasks = (*tasks, Task(GENERAL, "", (), tuple({**row, "task": GENERAL} for row in general)))
    return tasks


def _held_out(session: Session) -> list[Row]:
    if session.demo_tasks:
        kind = _kind(session)
        return [{**row, "task": task} for task in session.demo_tasks for row in demo_examples(kind, task, "heldout")]
    measured = {id(row) for row in session.measured_rows}  # the same objects; comparing thousands of rows is slow
    return [row for row in session.rows if id(row) not in measured]


def _kind(session: Session) -> str:
    return "decoder" if row_shape(session.model_type) == "answer" else "encoder"


NO_TASKS = (
    "Some rows do not say which task they are of: give them a column “task” in Examples, or name the task of what you "
    "paste there, so that every fine-tune has rows of its own."
)


def nothing_to_analyse(session: Session) -> str:
    """What to do first, in one sentence; "" when layers can be analysed as far as models and rows go."""
    if not session.base:
        return "Layers are compared with a base: choose one in Models."
    if not session.fine_tunes:
        return "Choose a fine-tune of the base in Models first."
    if session.model_type == "reranker":
        return "Rerankers cannot be measured yet, so neither can their layers."
    if not session.measured_rows:
        return "Add examples in Examples first: a few rows of what each fine-tune is good at."
    return ""


def missing_html(session: Session, settings: Settings) -> str:
    """The sentence of the first thing that is missing, or "" """
    try:
        tasks_for(session, settings, 1)
    except MergeError as error:
        return note_html(error.message)
    return ""


def owners_html(session: Session, settings: Settings, rows: int) -> str:
    """Which rows every fine-tune is analysed on; "" while that cannot be told."""
    try:
        tasks = tasks_for(session, settings, rows)
    except MergeError:
        return ""
    parts = [
        f"<b>{html.escape(short_name(task.model))}</b> on {len(task.analysis)} rows of {html.escape(task.name)}"
        for task in tasks
        if task.model
    ]
    same = any(task.same_rows for task in tasks if task.model)
    note = " Too few rows to hold some out: results are reported on the same rows, and look better than they are."
    return f'<p class="facts">{", ".join(parts)}.{note if same else ""}</p>'


def with_owner(session: Session, model: str, task: str) -> Session:
    """The session with a task given to a fine-tune; another one that had it is guessed anew."""
    if model not in session.fine_tunes:
        raise ExampleError(["This fine-tune is not among the models any more: choose again."], field="tasks")
    kept = tuple((t, m) for t, m in session.owners if t != task and m != model)
    return replace(session, owners=(*kept, (task, model)))


def layers_key(session: Session) -> str:
    """Equal keys: results are of these models and tasks. What a result names as what it was made for."""
    try:
        own = sorted(owners(session).items())
    except MergeError:
        own = []
    parts = [session.model_type, session.base, *session.fine_tunes, session.measured_hash]
    return combined_hash([*parts, *(f"{task}\n{model}" for task, model in own)])
