"""Reads JSON and JSON Lines as people write them, and says where and what is wrong in words that help.

It knows rows only as values with a place ("Row 3 (line 12)"); what a row must hold is for others to say. Rows may
come as one list, one object, one per line, one after another, an object of task → rows, or one conversation.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from llm_merge.errors import ExampleError

JSON_LINES = (".jsonl", ".ndjson")
WRAPPERS = ("data", "examples", "rows", "items", "train", "validation", "test")
"""Names that people wrap one list in; any other name of a list is a task."""

Found = tuple[str, Any, str]
"""Where a row stands, its value (any JSON value), and its task ("" if it has none)."""


def read_json(text: str, suffix: str = "") -> tuple[str, list[Found], list[str]]:
    """Text → the format's name, the rows, and one sentence for each line that is not valid.

    A file with one object per line is read past a broken line; anything else that is not valid JSON raises
    ExampleError with line and column.
    """
    if _starts_with_a_whole_line(text):
        return "JSON Lines", *_read_lines(text)
    try:
        return "JSON", _read_whole(text), []
    except ExampleError:
        if _looks_like_lines(text, suffix):
            return "JSON Lines", *_read_lines(text)
        raise


def is_conversation(value: object) -> bool:
    """Whether a value is a list of turns, each with a speaker: `role`/`content`, or ShareGPT's `from`/`value`."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, dict) and ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys())
            for turn in value
        )
    )


def kind_of(value: object) -> str:
    """What a value is, in a person's words."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    return "an object" if isinstance(value, Mapping) else "a list"


class _Object(dict[str, Any]):
    """A JSON object that remembers a name it was given twice: plain dicts would silently keep the last."""

    twice = ""


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    result = _Object(pairs)
    if len(result) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        result.twice = next(name for name, count in counts.items() if count > 1)
    return result


def name_given_twice(value: object) -> str:
    """The first name that occurs more than once in an object that was read here, "" if none does."""
    return value.twice if isinstance(value, _Object) else ""


# Numbers stay as they were typed ("0.10"), NaN is nothing, and line breaks inside a text are let through.
_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=str, parse_float=str, parse_constant=lambda _: None, strict=False
)


def _decode_at(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that starts at `at`, and where it ends."""
    try:
        return _DECODER.raw_decode(text, at)
    except RecursionError as error:
        raise json.JSONDecodeError("Too deep", text, at) from error


def _skip(text: str, at: int, characters: str = " \t\n\r") -> int:
    while at < len(text) and text[at] in characters:
        at += 1
    return at


def _starts_with_a_whole_line(text: str) -> bool:
    """Whether the first of several lines is a whole object: then every line is."""
    first, _, more = text.strip().partition("\n")
    try:
        _, end = _decode_at(first, 0)
    except json.JSONDecodeError:
        return False
    return bool(more) and first[0] == "{" and not first[end:].strip(" \t,")


def _looks_like_lines(text: str, suffix: str) -> bool:
    """Whether text that is not valid JSON was meant to be one object per line, its first line being broken."""
    lines = [line.strip().rstrip(",") for line in text.split("\n") if line.strip()]
    if len(lines) < 2 or lines[0] in ("{", "["):
        return False
    whole = sum(line.startswith("{") and line.endswith("}") for line in lines[:10])
    return suffix in JSON_LINES or (whole >= 2 and lines[0].count("[") == lines[0].count("]"))


def _read_lines(text: str) -> tuple[list[Found], list[str]]:
    found: list[Found] = []
    problems = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip().rstrip(",")
        if not line:
            continue
        try:
            value, end = _decode_at(line, 0)
            if end < len(line):
                raise json.JSONDecodeError("Extra data", line, end)
            found.append((f"Line {number}", value, ""))
        except json.JSONDecodeError as error:
            problems.append(f"Line {number}, column {error.pos + 1}: not valid JSON: {_hint(error)}.")
    return found, problems


def _read_whole(text: str) -> list[Found]:
    breaks = [match.start() for match in re.finditer("\n", text)]
    several = "\n" in text.strip()

    def where(row: int, at: int, task: str = "") -> str:
        line = f" (line {bisect_left(breaks, at) + 1})" if several else ""
        return f"Row {row}{f' of “{task}”' if task else ''}{line}"

    try:
        values = list(_json_values(text))
    except json.JSONDecodeError as error:
        raise ExampleError([f"Line {error.lineno}, column {error.colno}: not valid JSON: {_hint(error)}."]) from error
    value, start = values[0]
    if len(values) > 1:
        return [(where(i, at), v, "") for i, (v, at) in enumerate(values, start=1)]
    if is_conversation(value):
        return [(where(1, start), value, "")]
    if isinstance(value, list):
        children = enumerate(_children(text, start), start=1)
        return [(where(i, at), child, "") for i, (_, child, at) in children]
    if not is_task_object(value):
        return [(where(1, start), value, "")]
    if value.twice:
        raise ExampleError([f"The task “{value.twice}” occurs twice: put its rows into one list."])
    found = []
    for name, _, at in _children(text, start):
        task = "" if len(value) == 1 and name.lower() in WRAPPERS else name
        for row, (_, child, place) in enumerate(_children(text, at), start=1):
            found.append((where(row, place, task), child, task))
    return found


def is_task_object(value: object) -> bool:
    """Whether a value is an object of task → rows: all its values are lists, with at least one row in them."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(rows, list) and not is_conversation(rows) for rows in value.values())
        and any(isinstance(row, Mapping) for rows in value.values() for row in rows)
    )


def _json_values(text: str) -> Iterator[tuple[Any, int]]:
    """Every value at the top level with its position: one, or several with or without commas between them."""
    at = _skip(text, 0)
    while at < len(text):
        value, end = _decode_at(text, at)
        yield value, at
        at = _skip(text, end, " \t\n\r,")
        if at < len(text) and (not isinstance(value, dict) or text[at] != "{"):
            raise json.JSONDecodeError("Extra data", text, at)


def _children(text: str, start: int) -> Iterator[tuple[str, Any, int]]:
    """Name ("" in a list), value and position of all that a list or object holds; it is known to be valid JSON."""
    at = _skip(text, start + 1)
    while text[at] not in "]}":
        name = ""
        if text[start] == "{":
            name, at = _decode_at(text, at)
            at = _skip(text, at, " \t\n\r:")
        value, end = _decode_at(text, at)
        yield name, value, at
        at = _skip(text, end, " \t\n\r,")


def _hint(error: json.JSONDecodeError) -> str:
    """What is probably wrong where the decoder stopped, in words that help."""
    text, at = error.doc, error.pos
    rest, before = text[at : at + 10], text[:at].rstrip()[-1:]
    if error.msg.startswith("Too deep"):
        return "lists or objects are nested too deeply"
    if error.msg.startswith("Unterminated string"):
        return "a quotation mark is opened here and never closed"
    if not rest.strip():
        return "the text ends too early; a closing ], } or quotation mark is missing"
    if rest[0] == "'":
        return 'texts and names stand between double quotation marks ("), not single ones'
    if rest[0] in "“”„‘’«":
        return 'these are typographic quotation marks; use straight ones (")'
    if rest[0] in "]}" and before == ",":
        return f"remove the comma before {rest[0]}"
    if re.match("True|False|None", rest):
        return "write true, false or null"
    if error.msg.startswith("Expecting ','"):
        return 'a comma is missing before this, or a quotation mark inside a text needs a backslash before it (\\")'
    if error.msg.startswith("Invalid \\"):
        return "a backslash inside a text must be written twice (\\\\)"
    if error.msg.startswith("Expecting property"):
        return "a column name between double quotation marks was expected"
    if error.msg.startswith("Extra data"):
        return "something follows after the end of the rows; put all rows into one list [ … ]"
    return "a text between double quotation marks, a number, a list or an object was expected"
