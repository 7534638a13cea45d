"""Multiple choice as data sets write it: the texts to choose from, and which of them is right.

The choices come as a list, as letter → text (MedQA), as lines "A …" (CMExam), or as key and text pairs; the answer as a
choice's text, its letter, or its place counted from 0. Letters only say which text is meant: the texts are what a model
is scored on. Knows single values; not rows, columns or models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from llm_merge.example_values import BadRow, as_text, is_empty, unpacked
from llm_merge.read_json import kind_of

AROUND_A_LETTER = " \t().:[]．、：）（"
LABEL_NAMES = ("label", "key", "letter", "id")
TEXT_NAMES = ("text", "value", "content")


def read_choices(value: Any, what: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The choices' texts and their labels (A, B, … where they have none). Raises BadRow, calling the value `what`."""
    pairs = _pairs(_unpacked(value), what)
    texts = tuple(as_text(text, f"a choice of {what}").strip() for _, text in pairs)
    if len(texts) < 2:
        raise BadRow(f"{what} has {len(texts)} choice{'' if len(texts) == 1 else 's'}; at least two are needed.")
    for number, text in enumerate(texts, start=1):
        if not text:
            raise BadRow(f"choice {number} of {what} is empty.")
        if text in texts[: number - 1]:
            raise BadRow(f"{what} has the choice “{text}” twice.")
    labels = tuple(label or _letter(place) for place, (label, _) in enumerate(pairs))
    return texts, labels


def right_choice(answer: str, texts: Sequence[str], labels: Sequence[str], what: str) -> int:
    """The place (from 0) of the choice that the answer names by its text, else its letter, else its place.

    Raises BadRow if it names none, calling the answer `what`.
    """
    answer = answer.strip()
    if answer in texts:
        return texts.index(answer)
    plain = answer.strip(AROUND_A_LETTER).casefold()
    letters = [label.casefold() for label in labels]
    if plain in letters:
        return letters.index(plain)
    if plain.isdecimal() and int(plain) < len(texts):
        return int(plain)
    raise BadRow(
        f"{what} is “{answer}”, which is none of the {len(texts)} choices: write the right one's text, "
        f"its letter ({labels[0]} to {labels[-1]}), or its place from 0."
    )


def _pairs(value: Any, what: str) -> list[tuple[str, Any]]:
    """(label or "", text) for each choice."""
    if isinstance(value, str):
        return _lettered_lines(value)
    if isinstance(value, Mapping):
        texts, labels = _named(value, TEXT_NAMES), _named(value, LABEL_NAMES)
        if isinstance(texts, (list, tuple)) and isinstance(labels, (list, tuple)) and len(texts) == len(labels):
            return [(str(label).strip(), text) for label, text in zip(labels, texts, strict=True)]
        return [(str(label).strip(), text) for label, text in value.items() if not is_empty(text)]
    if not isinstance(value, (list, tuple)):
        raise BadRow(f"{what} is {kind_of(value)}; a list of choices was expected.")
    pairs = []
    for item in value:
        if isinstance(item, Mapping):
            pairs.append((as_text(_named(item, LABEL_NAMES), f"a label of {what}").strip(), _named(item, TEXT_NAMES)))
        else:
            pairs.append(("", item))
    return pairs


def _lettered_lines(text: str) -> list[tuple[str, str]]:
    """Lines "A …", "B. …" in the alphabet's order, a line without the next letter going on with the choice before it.

    Without such letters every line is a choice.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found: list[tuple[str, str]] = []
    for line in lines:
        match = re.match(r"[(（]?([A-Za-z])(?:[ \t.．、:：)）]+)(.*)", line)
        if match and match[1].upper() == _letter(len(found)):
            found.append((match[1].upper(), match[2].strip()))
        elif found:
            label, before = found[-1]
            found[-1] = (label, f"{before}\n{line}")
        else:
            break
    return found if len(found) > 1 else [("", line) for line in lines]


def _named(value: Mapping[Any, Any], names: Sequence[str]) -> Any:
    return next((value[name] for name in names if name in value), None)


def _unpacked(value: Any) -> Any:
    """A list or an object written as JSON inside a table's cell is that list or object."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return json.loads(value, strict=False)
        except (ValueError, RecursionError):
            return value
    return unpacked(value)


def _letter(place: int) -> str:
    """A to Z, then numbers from 27."""
    return ascii_uppercase[place] if place < len(ascii_uppercase) else str(place + 1)
