"""Example rows: what weights are computed from and what a merge is judged on.

Pasted text, a file or a list from Python all become the same checked rows; everything wrong with them is collected and
said with its line. Rows here know nothing of tokens, models or losses: `evaluation` prepares them for a model.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_merge.errors import ExampleError
from llm_merge.example_columns import RETRIEVAL_TYPES, Columns, check_model_type, guess_columns
from llm_merge.example_rows import Row, make_row
from llm_merge.example_values import BadRow
from llm_merge.read_examples import (
    Limits,
    Record,
    Table,
    first_problems,
    parse_examples,
)
from llm_merge.read_json import is_task_object, kind_of

__all__ = [
    "Columns",
    "ExampleSet",
    "Limits",
    "Row",
    "Split",
    "check_rows",
    "guess_columns",
    "parse_examples",
    "read_examples",
    "rows_from_table",
    "rows_hash",
    "split",
]

HELD_OUT = 4
"""One row in four is held out."""
SPLIT_FROM = 20
"""Rows from which on some are held out: fewer would leave too little on both sides."""


@dataclass(frozen=True)
class ExampleSet:
    """Checked rows (see `Row`), and what a person should know about how they were read."""

    rows: tuple[Row, ...]
    model_type: str
    columns: Columns
    format: str = ""
    notes: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks in order of appearance; rows without one belong to the task ""."""
        return tuple(self.counts)

    @property
    def counts(self) -> dict[str, int]:
        """Task → its number of rows."""
        return dict(Counter(row["task"] for row in self.rows))


def read_examples(
    text: str | bytes, *, model_type: str, name: str = "", columns: Columns | None = None, limits: Limits | None = None
) -> ExampleSet:
    """Pasted text or a file's bytes (JSON, JSON Lines, CSV, TSV) → checked rows.

    `columns` overrules the guess. Raises ExampleError; its `problems` name the line of each row that is wrong.
    """
    check_model_type(model_type)
    return rows_from_table(parse_examples(text, name=name, limits=limits), model_type, columns, limits)


def rows_from_table(
    table: Table, model_type: str, columns: Columns | None = None, limits: Limits | None = None
) -> ExampleSet:
    """A table's records as checked rows. Raises ExampleError with the problems of reading and of rows together."""
    limits = limits or Limits()
    if not table.records:
        raise ExampleError(first_problems(table.problems))
    if not table.names:
        raise ExampleError(first_problems([f"{record.where}: this row is empty." for record in table.records]))
    columns = columns or guess_columns(table.names, model_type)
    missing = [name for name in columns.used if name not in table.names]
    if missing:
        raise ExampleError([f"There is no column “{missing[0]}”; there are {', '.join(table.names)}."])
    if columns.question == columns.answer:
        raise ExampleError([f"“{columns.question}” cannot be both question and answer: choose two columns."])
    chosen = columns
    rows = make_rows(table, lambda record: make_row(record, chosen, model_type), limits)
    if model_type in RETRIEVAL_TYPES and len(rows) == 1 and not rows[0]["neg"]:
        raise ExampleError(
            [
                "One query without negatives has nothing to compete with: add a second row, or a passage "
                "that must not be found (column “neg”)."
            ]
        )
    return ExampleSet(tuple(rows), model_type, columns, table.format, _notes(table, columns, rows, model_type))


def make_rows(table: Table, make: Callable[[Record], Row], limits: Limits) -> list[Row]:
    """Every record as a row. Raises ExampleError with the problems of reading and those of `make` (BadRow) together."""
    rows, found = [], list(table.problems)
    for record in table.records:
        try:
            row = make(record)
        except BadRow as problem:
            found.append(f"{record.where}: {problem}")
            continue
        length = _characters(row)
        if length > limits.row_characters:
            found.append(
                f"{record.where}: this row has {length:,} characters; at most {limits.row_characters:,} "
                "are read: shorten it."
            )
        rows.append(row)
    if found:
        raise ExampleError(first_problems(found))
    return rows


def check_rows(rows: object, model_type: str, *, limits: Limits | None = None) -> tuple[Row, ...]:
    """`example_data` as given to `mix_models_with_data`: a list of dicts (or a dict task → list) → checked rows.

    Columns are guessed as they are for files. Raises ExampleError with the number of each row that is wrong.
    """
    check_model_type(model_type)
    if is_task_object(rows):
        assert isinstance(rows, Mapping)
        lists = [(str(task), list(inner)) for task, inner in rows.items()]
    elif isinstance(rows, Iterable) and not isinstance(rows, (str, bytes, Mapping)):
        lists = [("", list(rows))]
    else:
        raise ExampleError(
            [f'example_data is {kind_of(rows)}: pass a list of rows such as {{"input": …, "output": …}}.']
        )
    records, problems = [], []
    for task, inner in lists:
        for number, row in enumerate(inner, start=1):
            where = f"Row {number}" + (f" of “{task}”" if task else "")
            if isinstance(row, Mapping):
                records.append(Record({str(name): value for name, value in row.items()}, where, task))
            else:
                problems.append(f'{where} is {kind_of(row)}: expected a dict such as {{"input": …, "output": …}}.')
    if not records and not problems:
        raise ExampleError(["There are no example rows: pass at least one."])
    names = tuple(dict.fromkeys(name for record in records for name in record.values))
    table = Table("Python", names, tuple(records), tuple(problems))
    return rows_from_table(table, model_type, limits=limits or Limits(rows=10**9, row_characters=10**9)).rows


def _notes(table: Table, columns: Columns, rows: Sequence[Row], model_type: str) -> tuple[str, ...]:
    notes = list(table.notes)
    if not columns.by_name:
        first, second = ("query", "passage to be found") if model_type in RETRIEVAL_TYPES else ("question", "answer")
        notes.append(
            f"The names do not say which column is which: “{columns.question}” is taken as the {first}, "
            f"“{columns.answer}” as the {second}."
        )
        if table.format in ("CSV", "TSV"):
            notes.append(
                "The first line is read as the columns' names; if it is an example, put a line with names above it."
            )
    unused = [name for name in table.names if name not in columns.used]
    if unused:
        notes.append(f"Not used: {', '.join(unused)}.")
    return (*notes, *repeated_note(rows))


def repeated_note(rows: Sequence[Row]) -> tuple[str, ...]:
    """A note on rows that say what an earlier one says, if there are any."""
    repeated = len(rows) - len({_canonical(row) for row in rows})
    many = repeated > 1
    return (f"{repeated} row{'s' if many else ''} repeat{'' if many else 's'} an earlier one.",) if repeated else ()


def _characters(row: Row) -> int:
    turns = row.get("messages", ())
    texts = [turn["content"] for turn in turns[:-1]]
    for value in (row.get(key, "") for key in ("input", "output", "choices", "query", "pos", "neg")):
        texts += [value] if isinstance(value, str) else value
    return sum(map(len, texts))


# ---- sets of rows ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Rows to measure on and rows for the scoreboard; the same ones when there are too few to divide."""

    work: tuple[Row, ...]
    held_out: tuple[Row, ...]
    same_rows: bool
    note: str


def split(rows: Sequence[Row], seed: int = 0, from_rows: int = SPLIT_FROM) -> Split:
    """Holds out one row in four of every task, when there are at least `from_rows` rows.

    Which rows are held out depends on the seed and on what they say, not on their order. Of a task with n rows, n/4
    rounded up or down are held out.
    """
    if len(rows) < max(from_rows, HELD_OUT):
        count = f"{len(rows)} row{'s' if len(rows) != 1 else ''}"
        return Split(
            tuple(rows),
            tuple(rows),
            True,
            f"{count} to measure on and for the scoreboard (same rows: optimistic). "
            f"From {from_rows} rows up, a quarter is held out.",
        )

    def place(index: int) -> tuple[str, str]:
        row = rows[index]
        return row.get("task", ""), hashlib.sha256(f"{seed}\n{_canonical(row)}".encode()).hexdigest()

    # Every fourth row of the tasks laid end to end: whatever the tasks' sizes, each is cut within one row of a quarter.
    chosen = set(sorted(range(len(rows)), key=place)[HELD_OUT - 1 :: HELD_OUT])
    work = tuple(row for i, row in enumerate(rows) if i not in chosen)
    held_out = tuple(row for i, row in enumerate(rows) if i in chosen)
    return Split(work, held_out, False, f"{len(work)} rows to measure on, {len(held_out)} held out for the scoreboard")


def rows_hash(rows: Sequence[Row]) -> str:
    """SHA-256 (hex) of the rows in their order, the same for the same content whatever the order of a row's keys."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_canonical(row).encode() + b"\n")
    return digest.hexdigest()


def _canonical(row: Mapping[str, Any]) -> str:
    return json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
