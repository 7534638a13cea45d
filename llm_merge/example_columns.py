"""Which column is the question and which the answer, and one record → one row that a model can be measured on.

The guess is a value that a person can change. This module knows records and rows; it reads no text formats and
decides nothing about sets of rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_merge.errors import ExampleError
from llm_merge.read_examples import Record
from llm_merge.read_json import is_conversation, kind_of

Row = Mapping[str, Any]
"""One example: {"input", "output", "task"} and, for a conversation, "messages" (every turn before the answer); or
{"query", "pos": [...], "neg": [...], "task"} for models that search or rank."""

RETRIEVAL_TYPES = ("encoder", "reranker")
MODEL_TYPES = ("decoder", "encoder", "reranker", "encoder-decoder")

# The best name first: where several are there, the first is taken.
CONVERSATION = ("messages", "conversations", "conversation", "dialog", "dialogue")
QUESTION = (
    "input",
    "question",
    "prompt",
    "instruction",
    "query",
    "source",
    "user",
    "human",
    "problem",
    "request",
    "text",
    "q",
)
ANSWER = (
    "output",
    "answer",
    "answers",
    "completion",
    "response",
    "target",
    "assistant",
    "chosen",
    "reply",
    "solution",
    "gold",
    "summary",
    "translation",
    "label",
    "a",
)
QUERY = (
    "query",
    "anchor",
    "sentence1",
    "sentence_1",
    "question",
    "search",
    "premise",
    "text1",
    "text_1",
    "input",
    "instruction",
    "prompt",
    "q",
)
POSITIVE = (
    "pos",
    "positive",
    "positives",
    "sentence2",
    "sentence_2",
    "passage",
    "document",
    "context",
    "answer",
    "answers",
    "text2",
    "text_2",
    "hypothesis",
    "output",
    "response",
    "completion",
    "a",
)
NUMBERS = ("id", "idx", "index", "nr", "no", "number", "row", "key", "uid", "score", "column_1")
NEGATIVE = re.compile(r"(hard_)?neg(ative)?s?(_?\d+)?")
TASK = ("task", "task_name", "dataset", "category", "subject")

SPEAKERS = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
}


@dataclass(frozen=True)
class Columns:
    """Where a row's parts stand.

    question   the column of the question (or query); it may hold a whole conversation
    answer     the column of the answer (or of the passages to be found); "" when the question column is a conversation,
               whose last assistant turn is then the answer
    context    a column that is appended to the question on a new line (alpaca's `input` after `instruction`)
    negatives  columns of passages that must not be found
    task       a column that names the row's task
    by_name    the names said so; otherwise the first two columns were taken
    """

    question: str
    answer: str = ""
    context: str = ""
    negatives: tuple[str, ...] = ()
    task: str = ""
    by_name: bool = field(default=True, compare=False)

    @property
    def used(self) -> tuple[str, ...]:
        """The columns that are read, in the order question, context, answer, negatives, task."""
        return tuple(n for n in (self.question, self.context, self.answer, *self.negatives, self.task) if n)


def guess_columns(names: Sequence[str], model_type: str) -> Columns:
    """The columns' likely meaning by their names; raises ExampleError if no two columns can be told apart.

    Model types "decoder" and "encoder-decoder" need a question and an answer, "encoder" and "reranker" a query and
    the passages to be found.
    """
    check_model_type(model_type)
    task = _find(names, TASK)
    rest = [name for name in names if name != task]
    if model_type in RETRIEVAL_TYPES:
        return _guess_passages(rest, task)
    if conversation := _find(rest, CONVERSATION, parts=False):
        return Columns(conversation, task=task)
    instruction = _find(rest, ("instruction",), parts=False)
    question = instruction or _find(rest, QUESTION)
    answer = _find([name for name in rest if name != question], ANSWER)
    context = _find(
        [name for name in rest if name not in (question, answer)],
        ("input", "context") if instruction else ("context",),
        parts=False,
    )
    if not answer and _find(rest, ("pos", "positive", "positives"), parts=False):
        raise ExampleError(
            [
                "These rows hold queries and passages, as for an embedding model; a chat model needs a "
                "question column and an answer column."
            ]
        )
    return _by_name_or_place(
        Columns(question, answer, context=context, task=task), rest, "a question column and an answer column"
    )


def _guess_passages(rest: Sequence[str], task: str) -> Columns:
    negatives = tuple(name for name in rest if NEGATIVE.fullmatch(_plain(name)))
    rest = [name for name in rest if name not in negatives]
    query = _find(rest, QUERY)
    positive = _find([name for name in rest if name != query], POSITIVE)
    if not positive and _find(rest, CONVERSATION, parts=False):
        raise ExampleError(
            [
                "These rows hold conversations, as for a chat model; an embedding model needs a query "
                "column and a column of passages to be found."
            ]
        )
    return _by_name_or_place(
        Columns(query, positive, negatives=negatives, task=task),
        rest,
        "a query column and a column of passages to be found",
    )


def _by_name_or_place(found: Columns, rest: Sequence[str], needed: str) -> Columns:
    if found.question and found.answer:
        return found
    # Columns that number or grade the rows come last: "id;frage;antwort" has its question in the second.
    left = sorted((name for name in rest if name not in found.used), key=lambda name: _plain(name) in NUMBERS)
    if len(left) < (not found.question) + (not found.answer):
        only = ", ".join(f"“{name}”" for name in rest) or "none"
        raise ExampleError([f"Two columns are needed, {needed}; found: {only}."])
    question = found.question or left.pop(0)
    answer = found.answer or left.pop(0)
    return Columns(question, answer, found.context, found.negatives, found.task, by_name=False)


def _find(names: Sequence[str], wanted: Iterable[str], *, parts: bool = True) -> str:
    """The name that matches the earliest wanted one, whole ("Question") or else in part ("user question")."""
    wanted = tuple(wanted)
    plain = {name: _plain(name) for name in names}
    for word in wanted:
        for name in names:
            if plain[name] == word:
                return name
    for word in wanted if parts else ():
        for name in names:
            if len(word) > 2 and word in plain[name].split("_"):
                return name
    return ""


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "_", name.strip().lower()).strip("_")


# ---- one record → one row --------------------------------------------------------------------------------------------


class BadRow(Exception):
    """What is wrong with one row, without its place."""


def make_row(record: Record, columns: Columns, model_type: str) -> Row:
    """A record as the row that models are measured on (see `Row`). Raises BadRow in one sentence."""
    if all(_is_empty(value) for value in record.values.values()):
        raise BadRow("this row is empty.")
    for name in (columns.question, columns.answer):
        if name and name not in record.values:
            raise BadRow(f"there is no “{name}” in this row (it has {', '.join(map(str, record.values))}).")
    task = record.task
    if columns.task and not _is_empty(record.values.get(columns.task)):
        task = _text(record, columns.task)
    row = _passages(record, columns) if model_type in RETRIEVAL_TYPES else _pair(record, columns)
    return {**row, "task": task.strip()}


def _pair(record: Record, columns: Columns) -> dict[str, Any]:
    turns = _turns(record, columns.question)
    if not columns.answer:
        if turns is None:
            raise BadRow(
                f"“{columns.question}” is {kind_of(record.values[columns.question])}; a list of turns such as "
                '[{"role": "user", "content": …}, …] was expected.'
            )
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
        if last < 0:
            raise BadRow(f"“{columns.question}” has no assistant turn, so there is no answer to learn from.")
        turns, answer = turns[:last], turns[last]["content"]
    else:
        reply = _turns(record, columns.answer)
        answer = reply[-1]["content"] if reply else _text(record, columns.answer)
    question = _last_question(turns) if turns is not None else _text(record, columns.question)
    if columns.context and not _is_empty(record.values.get(columns.context)):
        question = f"{question}\n{_text(record, columns.context)}"
    if not question.strip():
        raise BadRow(f"the question (column “{columns.question}”) is empty.")
    if not answer.strip():
        raise BadRow(f"the answer (column “{columns.answer or columns.question}”) is empty.")
    row: dict[str, Any] = {"input": question, "output": answer}
    if turns is not None and len(turns) > 1:
        row["messages"] = turns
    return row


def _passages(record: Record, columns: Columns) -> dict[str, Any]:
    query = _text(record, columns.question)
    positives = _texts(record, columns.answer)
    if not query.strip():
        raise BadRow(f"the query (column “{columns.question}”) is empty.")
    if not positives:
        raise BadRow(f"the passage to be found (column “{columns.answer}”) is empty.")
    negatives = [text for name in columns.negatives for text in _texts(record, name)]
    return {"query": query, "pos": positives, "neg": negatives}


def _last_question(turns: Sequence[Mapping[str, str]]) -> str:
    if not turns or turns[-1]["role"] != "user":
        raise BadRow("the turn before the answer is not the user's; each answer must follow a question.")
    return turns[-1]["content"]


def _turns(record: Record, name: str) -> list[dict[str, str]] | None:
    """A conversation as [{"role", "content"}], or None if the value is not one."""
    value = _unpacked(record.values[name])
    if not is_conversation(value):
        return None
    turns = []
    for number, turn in enumerate(value, start=1):
        speaker = turn["role"] if "role" in turn else turn["from"]
        content = turn["content"] if "content" in turn else turn["value"]
        if isinstance(content, list):  # OpenAI's content parts
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
        role = SPEAKERS.get(str(speaker).lower())
        if role is None:
            raise BadRow(f"turn {number} of “{name}” is by “{speaker}”; system, user or assistant was expected.")
        turns.append({"role": role, "content": _as_text(content, f"turn {number} of “{name}”")})
    return turns


def _text(record: Record, name: str) -> str:
    return _as_text(record.values.get(name), f"“{name}”")


def _texts(record: Record, name: str) -> list[str]:
    """One text or a list of them; empty ones are left out."""
    value = _unpacked(record.values.get(name))
    values = value if isinstance(value, (list, tuple)) else [value]
    texts = [_as_text(item, f"“{name}”") for item in values if not _is_empty(item)]
    return [text for text in texts if text.strip()]


def _as_text(value: object, what: str) -> str:
    if _is_empty(value):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, (str, int, float)):
        raise BadRow(f"{what} is {kind_of(value)}; text was expected.")
    text = str(value)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise BadRow(f"{what} holds half a character (a lone surrogate, \\ud800 to \\udfff): type it again.")
    return text


def _unpacked(value: Any) -> Any:
    """A list written as JSON inside a table's cell is that list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            inner = json.loads(value, strict=False)
        except (ValueError, RecursionError):
            return value
        return inner if isinstance(inner, list) else value
    return value


def _is_empty(value: object) -> bool:
    return value is None or value != value or (isinstance(value, (str, list, tuple, dict)) and len(value) == 0)


def check_model_type(model_type: str) -> None:
    """Raises ExampleError unless the model type is one of the four."""
    if model_type not in MODEL_TYPES:
        raise ExampleError(
            [f"Model type “{model_type}” is not known: use {', '.join(MODEL_TYPES)}."], field="model_type"
        )
