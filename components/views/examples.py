"""The Examples view: what a text or a file becomes, the rows in use, and one row as the models read it.

Pure: a session and texts in, HTML and the next session out. Everything a visitor or a model wrote is escaped here.
"""

from __future__ import annotations

import html
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from components.exact_preview import ExactRow
from components.session import Row, Session, row_shape
from components.settings import Settings
from components.views.scoreboard_view import SEARCH_ROWS
from llm_merge.demo import demo_examples
from llm_merge.errors import ExampleError
from llm_merge.examples import Columns, Limits, guess_columns, parse_examples, rows_from_table, split
from llm_merge.tasks import check_names

DEMO_TASKS = ("verse", "dictionary")
DEMO_TITLES = {
    ("answer", "verse"): "Verse",
    ("answer", "dictionary"): "Dictionary",
    ("search", "verse"): "Spanish verse",
    ("search", "dictionary"): "Definition",
}
BOTH = "both"
OWN_TEXT = "Your text"
LAST_TURN = ("the last assistant turn", "")
EXPECTED = {
    "answer": "Each row needs a question and its answer. Other columns are left alone.",
    "search": "Each row needs a query and the passage to be found (pos); passages that must not be found (neg) help.",
}
PLACEHOLDERS = {
    "answer": 'input,output\nWhat is the capital of Greece?,Athens\n"Who wrote ""Emma""?",Jane Austen',
    "search": "query,pos,neg\ncapital of Greece,Athens is the capital of Greece.,Ankara is the capital of Turkey.",
}
SEEN_BY_NO_WEIGHT = ": a merge is judged on rows that its weights were not computed from."
SHOWN_CHARACTERS = 6000  # of one text in the preview
ROWS_PER_CHARACTER = 4  # a row may be a few prompts long


@dataclass(frozen=True)
class Reading:
    """What became of a text: the next session (the old one if the text cannot be used) and what to say about it."""

    session: Session
    format: str = ""
    names: tuple[str, ...] = ()
    columns: Columns | None = None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    source: str = ""


# ---- demo sets -------------------------------------------------------------------------------------------------------


def demo_choices(model_type: str) -> list[tuple[str, str]]:
    """(label, value) of the demo sets for a model type."""
    shape = row_shape(model_type)
    return [*((DEMO_TITLES[shape, task], task) for task in DEMO_TASKS), ("Both", BOTH)]


def demo_choice(session: Session) -> str | None:
    """Which demo set is in use, None for the visitor's own rows."""
    if session.demo_tasks == DEMO_TASKS:
        return BOTH
    return session.demo_tasks[0] if len(session.demo_tasks) == 1 else None


def use_demo(session: Session, choice: str) -> Session:
    """The session with a demo set's rows. Raises ExampleError for a choice that is none."""
    tasks = DEMO_TASKS if choice == BOTH else (choice,)
    if any(task not in DEMO_TASKS for task in tasks):
        raise ExampleError([f"There is no demo set called “{choice}”: choose {', '.join((*DEMO_TASKS, BOTH))}."])
    shape = row_shape(session.model_type)
    kind = "decoder" if shape == "answer" else "encoder"
    rows = [{**row, "task": task} for task in tasks for row in demo_examples(kind, task, "work")]
    title = " + ".join(DEMO_TITLES[shape, task] for task in tasks)
    return session.with_rows(rows, f"{title} (demo)", tasks)


# ---- a visitor's own rows --------------------------------------------------------------------------------------------


def limits(settings: Settings) -> Limits:
    """How much one visitor may paste."""
    return Limits(settings.max_rows, settings.max_text_chars, ROWS_PER_CHARACTER * settings.max_prompt_chars)


def read(
    session: Session,
    data: str | bytes,
    source: str,
    settings: Settings,
    columns: Columns | None = None,
    task: str = "",
) -> Reading:
    """A text or a file → Reading. `columns` are kept as long as the text has them; else they are guessed.

    task    what rows without a task are called; with one, the visitor's own rows of other tasks stay in use
    """
    name = "" if source == OWN_TEXT else source
    most = limits(settings)
    try:
        table = parse_examples(data, name=name, limits=most)
    except ExampleError as error:
        return Reading(session, problems=error.problems, source=source)
    if columns is not None and not set(columns.used) <= set(table.names):
        columns = None
    reading = Reading(session, table.format, table.names, columns, source=source)
    try:
        chosen = columns or guess_columns(table.names, session.model_type)
        reading = replace(reading, columns=chosen)
        found = rows_from_table(table, session.model_type, chosen, most)
    except ExampleError as error:
        return replace(reading, problems=error.problems)
    if not task.strip():
        return replace(reading, session=session.with_rows(found.rows, source, ()), notes=found.notes)
    rows = [{**row, "task": row.get("task") or task.strip()} for row in found.rows]
    others = others_of(session, {row["task"] for row in rows})
    try:
        check_names(list(dict.fromkeys(row["task"] for row in [*others, *rows])))
    except ExampleError as error:
        return replace(reading, problems=error.problems)
    count = len(others) + len(rows)
    if count > most.rows:
        return replace(reading, problems=(f"With the other tasks these are {count} rows; {most.rows} are allowed.",))
    kept = f"{len(others)} rows of other tasks stay in use." if others else ""
    session = session.with_rows([*others, *rows], source, ())
    return replace(reading, session=session, notes=(*found.notes, *([kept] if kept else [])))


def others_of(session: Session, tasks: set[str]) -> list[Row]:
    """The visitor's own rows of other tasks, which rows with a task's name are added to."""
    if session.demo_tasks:
        return []
    return [row for row in session.rows if row.get("task") and row["task"] not in tasks]


def with_choice(columns: Columns | None, question: str, answer: str) -> Columns:
    """The columns after somebody chose other ones; what is now the question or the answer is nothing else."""
    before = columns or Columns(question)
    taken = (question, answer)
    return Columns(
        question,
        answer,
        choices="" if before.choices in taken else before.choices,
        context="" if before.context in taken else before.context,
        negatives=tuple(name for name in before.negatives if name not in taken),
        task="" if before.task in taken else before.task,
    )


def column_titles(model_type: str) -> tuple[str, str]:
    """What the two column fields are called."""
    if row_shape(model_type) == "answer":
        return "Question column", "Answer column"
    return "Query column", "Column of passages to find"


def answer_choices(reading: Reading) -> list[tuple[str, str]]:
    """(label, value) of the answer column; a conversation brings its answer along."""
    choices = [(name, name) for name in reading.names]
    if row_shape(reading.session.model_type) == "answer":
        choices.append(LAST_TURN)
    return choices


def reading_html(reading: Reading) -> str:
    """The problems with their lines, or what was read; announced politely, since it changes while one types."""
    where = html.escape("Your text" if reading.source == OWN_TEXT else reading.source)
    if reading.problems:
        items = "".join(f"<li>{html.escape(problem)}</li>" for problem in reading.problems)
        kept = rows_in_use(reading.session)
        return (
            f'<div class="message problem" role="status"><b>{where} cannot be used yet.</b>'
            f'<ul class="problems" tabindex="0">{items}</ul>{html.escape(kept)}</div>'
        )
    count = len(reading.session.rows)
    notes = "".join(f"<br>{html.escape(note)}" for note in (*_columns_notes(reading.columns), *reading.notes))
    many = f"{count:,} row{'' if count == 1 else 's'}"
    return f'<div class="message good" role="status"><b>{where}: {many} read as {reading.format}.</b>{notes}</div>'


def rows_in_use(session: Session) -> str:
    """Which rows count while a text cannot be read."""
    if not session.rows:
        return "No rows are in use so far."
    source = "your text as it was" if session.rows_from == OWN_TEXT else session.rows_from
    return f"Until then the rows read last stay in use: {len(session.rows):,}, {source}."


def _columns_notes(columns: Columns | None) -> list[str]:
    if columns is None:
        return []
    notes = []
    if columns.context:
        notes.append(f"“{columns.context}” follows “{columns.question}” on a new line.")
    if columns.negatives:
        notes.append(f"Not to be found: {', '.join(columns.negatives)}.")
    if columns.task:
        notes.append(f"Tasks are named by “{columns.task}”.")
    return notes


# ---- the rows in use -------------------------------------------------------------------------------------------------


def summary_html(session: Session, settings: Settings) -> str:
    """Where the rows come from, how many there are of each task, and which are held out and why."""
    if not session.rows:
        return '<p class="facts">No examples yet: choose a demo set or paste your own.</p>'
    rows, note, parts = Counter(_task(row) for row in session.rows), "", None
    if session.demo_tasks:
        search = row_shape(session.model_type) == "search"
        others = min(SEARCH_ROWS if search else settings.demo_rows, settings.max_rows)
        many = f"{others} other rows of each task are" if len(rows) > 1 else f"{others} others are"
        note = f"{len(session.rows)} rows to measure on; {many} held out for the scoreboard."
    else:
        parts = split(session.rows)
        note = f"{parts.note.removesuffix('.')}{'.' if parts.same_rows else SEEN_BY_NO_WEIGHT}"
    heads, body = ["Task", "Rows"], [[task or "all", str(count)] for task, count in rows.items()]
    if parts is not None and not parts.same_rows:
        held = Counter(_task(row) for row in parts.held_out)
        heads += ["To measure on", "Held out"]
        body = [[*line, str(rows[task] - held[task]), str(held[task])] for line, task in zip(body, rows, strict=True)]
    head = "".join(f'<th scope="col"{" class=name" if head == "Task" else ""}>{head}</th>' for head in heads)
    lines = "".join(
        f'<tr><th scope="row" class="name">{html.escape(line[0])}</th>'
        + "".join(f"<td>{n}</td>" for n in line[1:])
        + "</tr>"
        for line in body
    )
    return (
        f'<h3 class="in-use">In use: {html.escape(session.rows_from)}</h3>'
        f'<table class="counts"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>'
        f'<p class="split">{html.escape(note)}</p>'
    )


def place_html(session: Session, index: int) -> str:
    """Which row is shown: "Row 3 of 24 · verse · held out"."""
    if not session.rows:
        return ""
    row = session.rows[index]
    parts = [f"Row {index + 1} of {len(session.rows):,}", _task(row)]
    if not session.demo_tasks:
        divided = split(session.rows)
        if not divided.same_rows:
            parts.append("held out" if any(row is other for other in divided.held_out) else "to measure on")
    return " · ".join(html.escape(part) for part in parts if part)


def row_index(session: Session, index: Any, step: int = 0) -> int:
    """A row number that exists, `step` further on; the ends are joined. Numbers come from a browser."""
    if not session.rows:
        return 0
    at = index if isinstance(index, int) and 0 <= index < len(session.rows) else 0
    return (at + step) % len(session.rows)


def preview_html(session: Session, index: int, exact: ExactRow | None) -> str:
    """One row: as the models read it when that is known, else as it was written."""
    if not session.rows:
        return ""
    row = session.rows[index]
    if row_shape(session.model_type) == "search":
        return _search_html(row, exact)
    if exact is None:
        return f'<div class="reads">{_plain_turns(row)}</div><p class="legend">{_mark("Underlined")} is the answer.</p>'
    pieces = "".join(_mark(text) if scored else html.escape(text) for text, scored in exact.pieces)
    notes = "".join(f"<br>{html.escape(note)}" for note in exact.notes)
    return (
        f'<div class="reads exact">{pieces}</div>'
        f'<p class="legend">{_mark("Underlined")} is scored: the loss is the mean over these {exact.scored:,} of '
        f"{exact.tokens:,} tokens. The rest is only read.{notes}</p>"
    )


def _plain_turns(row: Row) -> str:
    turns = row.get("messages") or [{"role": "user", "content": row["input"]}]
    shown = [(turn["role"], html.escape(_cut(turn["content"]))) for turn in turns]
    shown.append(("assistant", _mark(_cut(row["output"]))))
    return "".join(f'<p><span class="who">{html.escape(who)}</span>{text}</p>' for who, text in shown)


def _search_html(row: Row, exact: ExactRow | None) -> str:
    query, positives, negatives = row["query"], list(row["pos"]), list(row["neg"])
    notes = ""
    if exact is not None:
        notes = "".join(f"<br>{html.escape(note)}" for note in exact.notes)
        # The exact texts carry the model's prefixes; the loss looks for the first passage only.
        query = exact.pieces[0][0].removesuffix("\n")
        positives[0] = exact.pieces[1][0]
        negatives = [text.removeprefix("\n") for text, _ in exact.pieces[2:]]
    parts = [("query", html.escape(_cut(query))), ("to be found", _mark(_cut(positives[0])))]
    parts += [("also right", html.escape(_cut(text))) for text in positives[1:]]
    parts += [("not to be found", html.escape(_cut(text))) for text in negatives]
    shown = "".join(f'<p><span class="who">{who}</span>{text}</p>' for who, text in parts)
    return (
        f'<div class="reads">{shown}</div><p class="legend">{_mark("Underlined")} has to be nearer to the query than '
        f"every other passage.{notes}</p>"
    )


def _mark(text: str) -> str:
    return f'<mark class="scored">{html.escape(text)}</mark>'


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …"


def _task(row: Row) -> str:
    return str(row.get("task", ""))
