"""What stands in one cell of an example: text, a list, or nothing, however it was written.

Knows single values; not rows, columns or files.
"""

from __future__ import annotations

import json
from typing import Any

from llm_merge.read_json import kind_of


class BadRow(Exception):
    """What is wrong with one row, without its place."""


def as_text(value: object, what: str) -> str:
    """Text as it was typed, numbers too; "" for nothing. Raises BadRow, calling the value `what`, for anything else."""
    if is_empty(value):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, (str, int, float)):
        raise BadRow(f"{what} is {kind_of(value)}; text was expected.")
    text = str(value)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise BadRow(f"{what} holds half a character (a lone surrogate, \\ud800 to \\udfff): type it again.")
    return text


def unpacked(value: Any) -> Any:
    """A list written as JSON inside a table's cell is that list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            inner = json.loads(value, strict=False)
        except (ValueError, RecursionError):
            return value
        return inner if isinstance(inner, list) else value
    return value


def is_empty(value: object) -> bool:
    """Whether a value is nothing: None, NaN, or a text, list or object without content."""
    return value is None or value != value or (isinstance(value, (str, list, tuple, dict)) and len(value) == 0)
