"""Reads example rows as people paste or upload them: JSON, JSON Lines, CSV or TSV becomes a table of records.

Every record remembers where it came from, so that whatever is wrong with it later can be said with its line. This
module knows formats and places only: which column is the question and what makes a row usable is in `examples`.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_merge.errors import ExampleError
from llm_merge.read_json import JSON_LINES, is_conversation, name_given_twice, read_json

EXPECTED = "JSON, JSON Lines, CSV or TSV"
DELIMITERS = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar"}
SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Limits:
    """How much is read. The page's public mode narrows these."""

    rows: int = 5_000
    characters: int = 10_000_000
    row_characters: int = 120_000


@dataclass(frozen=True)
class Record:
    """One row as it was written: column → value (text, None, list or mapping), and where it stands ("Line 7")."""

    values: Mapping[str, Any]
    where: str
    task: str = ""


@dataclass(frozen=True)
class Table:
    """What was read. `names` are all columns in order of appearance; `problems` one sentence per row that is broken."""

    format: str
    names: tuple[str, ...]
    records: tuple[Record, ...]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def parse_examples(data: str | bytes, *, name: str = "", limits: Limits | None = None) -> Table:
    """Text (or a file's bytes) → Table; `name` is the file's name, when there is one, and only breaks ties.

    Raises ExampleError if there is nothing to read, too much of it, or no format fits. Single broken rows do not
    raise: they are in `problems`, so that the others can still be shown.
    """
    limits = limits or Limits()
    if len(data) > limits.characters * (4 if isinstance(data, bytes) else 1):
        raise ExampleError([_too_long(len(data), limits)])
    text, notes = decode(data) if isinstance(data, bytes) else (data, ())
    if len(text) > limits.characters:
        raise ExampleError([_too_long(len(text), limits)])
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise ExampleError([f"There are no example rows: paste {EXPECTED}, or upload a file."])
    suffix = name[name.rfind(".") :].lower() if "." in name else ""
    if text.lstrip()[0] in "[{" or suffix in (".json", *JSON_LINES):
        table = _json_table(text, suffix)
    else:
        table = _read_table(text, suffix)
    if not table.records and not table.problems:
        raise ExampleError([f"There are no example rows in this {table.format}."])
    if len(table.records) > limits.rows:
        raise ExampleError(
            [f"There are {len(table.records):,} rows; at most {limits.rows:,} are read here: leave some out."]
        )
    return Table(table.format, table.names, table.records, table.problems, (*notes, *table.notes))


def decode(data: bytes) -> tuple[str, tuple[str, ...]]:
    """A file's bytes → its text and what a person should know about the reading. UTF-8, UTF-16 or Windows-1252."""
    if data.startswith(b"PK\x03\x04"):
        raise ExampleError(["This is a zip or spreadsheet file: save the sheet as CSV and upload that."])
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace"), ()
    if b"\x00" in data:
        raise ExampleError([f"This is not a text file: upload {EXPECTED}."])
    try:
        return data.decode("utf-8-sig"), ()
    except UnicodeDecodeError:
        note = "The file is not UTF-8 and was read as Windows-1252: check its accented letters."
        return data.decode("cp1252", errors="replace"), (note,)


def first_problems(problems: Sequence[str]) -> list[str]:
    """The problems that are shown: the first twenty by line, and how many more there are."""
    # What does not fit the format and what does not fit a row are found in two passes.
    problems = sorted(problems, key=lambda words: [int(n) for n in re.findall(r"[Ll]ine (\d+)", words)[:1]])
    more = len(problems) - SHOWN_PROBLEMS
    if more <= 0:
        return list(problems)
    return [*problems[:SHOWN_PROBLEMS], f"… and {more:,} more problem{'s' if more > 1 else ''}."]


def _json_table(text: str, suffix: str) -> Table:
    form, found, problems = read_json(text, suffix)
    records, names = [], dict[str, None]()
    for where, value, task in found:
        if is_conversation(value):
            value = {"messages": value}
        if not isinstance(value, dict):
            problems.append(f'{where}: expected an object such as {{"input": …, "output": …}}.')
        elif name := name_given_twice(value):
            problems.append(f"{where}: “{name}” occurs twice in this row: rename or remove one.")
        else:
            records.append(Record(dict(value), where, task))
            names.update(dict.fromkeys(value))
    return Table(form, tuple(names), tuple(records), tuple(problems))


# ---- CSV and TSV -----------------------------------------------------------------------------------------------------


def _read_table(text: str, suffix: str) -> Table:
    delimiter = _delimiter(text, suffix)
    # Ways to write a table, tried in turn; the first that fits wins, and what is said of a misfit is the first's.
    spaced = f'{delimiter} "' in text  # a, "b": the space is not part of the text
    ways: list[dict[str, Any]] = [{"strict": True, "skipinitialspace": skip} for skip in (spaced, not spaced)]
    if delimiter == "\t":
        ways = [{"strict": True}, {"quoting": csv.QUOTE_NONE}]  # spreadsheets copy a leading quotation mark as it is
    tables = (_read_cells(text, delimiter, way) for way in ways)
    first = next(tables)
    if not first.problems:
        return first
    return next((table for table in tables if not table.problems), first)


def _delimiter(text: str, suffix: str) -> str:
    """The separator that cuts the header into the most columns; a tab wins a tie."""
    header = next(line for line in text.split("\n") if line.strip())
    if suffix in (".tsv", ".tab") and "\t" in header:
        return "\t"
    # Not strict here: a quotation mark that is never closed is reported later, with its line.
    width = {d: len(next(csv.reader([header], delimiter=d))) for d in DELIMITERS}
    best = max(width, key=lambda d: width[d])
    if width[best] == 1:
        raise ExampleError(
            [
                f"Line 1: no rows found. Expected {EXPECTED}; a table's first line names its columns, for example "
                "input,output."
            ]
        )
    return best


def _read_cells(text: str, delimiter: str, way: Mapping[str, Any]) -> Table:
    form = "TSV" if delimiter == "\t" else "CSV"
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, **way)
    names: tuple[str, ...] = ()
    records, problems, blank = [], [], []
    line = 1
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            problems.append(f"Line {line}: {_cell_hint(error, delimiter)}.")
            break  # after this, nobody knows where rows begin
        if not any(cell.strip() for cell in cells):
            if len(cells) > 1:
                blank.append(line)
        elif not names:
            names = tuple(cell.strip() or f"column {i}" for i, cell in enumerate(cells, start=1))
            twice = [name for i, name in enumerate(names) if name in names[:i]]
            if twice:
                raise ExampleError([f"Line {line}: two columns are called “{twice[0]}”: rename one."])
        elif len(cells) < len(names) or any(cell.strip() for cell in cells[len(names) :]):
            many = f"{len(cells)} cell{'s' if len(cells) != 1 else ''}"
            problems.append(
                f"Line {line} has {many}, the header has {len(names)} columns: put a text that contains "
                f"a {DELIMITERS[delimiter]} between quotation marks."
            )
        else:
            records.append(Record(dict(zip(names, cells, strict=False)), f"Line {line}"))
    if names and not records and not problems:
        raise ExampleError([f"There is a header ({', '.join(names)}) but no rows: add a line for each example."])
    places = ", ".join(map(str, blank[:5])) + (" …" if len(blank) > 5 else "")
    notes = (f"Empty rows were left out (line{'s' if len(blank) > 1 else ''} {places}).",) if blank else ()
    return Table(form, names, tuple(records), tuple(problems), notes)


def _cell_hint(error: csv.Error, delimiter: str) -> str:
    words = str(error)
    if "unexpected end" in words:
        return "a quotation mark is opened in this row and never closed"
    if "field limit" in words:
        return (
            f"a cell has more than {csv.field_size_limit():,} characters; perhaps a quotation mark is opened here "
            "and never closed"
        )
    return (
        f"after a closing quotation mark a {DELIMITERS[delimiter]} or a new line must follow; "
        'write a quotation mark inside a text twice ("")'
    )


# ---- words -----------------------------------------------------------------------------------------------------------


def _too_long(characters: int, limits: Limits) -> str:
    return f"The text has {characters:,} characters; at most {limits.characters:,} are read here: leave out some rows."
