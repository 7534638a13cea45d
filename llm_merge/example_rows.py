"""One record → one row that a model can be measured on.

This module knows records, columns and rows; it reads no text formats and decides nothing about sets of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm_merge.choice import read_choices, right_choice
from llm_merge.example_columns import RETRIEVAL_TYPES, Columns
from llm_merge.example_values import BadRow, as_text, is_empty, unpacked
from llm_merge.read_examples import Record
from llm_merge.read_json import is_conversation, kind_of

Row = Mapping[str, Any]
"""One example: {"input", "output", "task"}; for a conversation also "messages" (every turn before the answer), for
multiple choice also "choices" (their texts) and "answer" (the right one's place from 0, whose text is the output). Or
{"query", "pos": [...], "neg": [...], "task"} for models that search or rank."""

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


def make_row(record: Record, columns: Columns, model_type: str) -> Row:
    """A record as the row that models are measured on (see `Row`). Raises BadRow in one sentence."""
    if all(is_empty(value) for value in record.values.values()):
        raise BadRow("this row is empty.")
    for name in (columns.question, columns.answer):
        if name and name not in record.values:
            raise BadRow(f"there is no “{name}” in this row (it has {', '.join(map(str, record.values))}).")
    task = record.task
    if columns.task and not is_empty(record.values.get(columns.task)):
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
        turns, answer = last_answer(turns, columns.question)
    else:
        reply = _turns(record, columns.answer)
        answer = reply[-1]["content"] if reply else _text(record, columns.answer)
    question = last_question(turns) if turns is not None else _text(record, columns.question)
    if columns.context and not is_empty(record.values.get(columns.context)):
        question = f"{question}\n{_text(record, columns.context)}"
    if not question.strip():
        raise BadRow(f"the question (column “{columns.question}”) is empty.")
    if not answer.strip():
        raise BadRow(f"the answer (column “{columns.answer or columns.question}”) is empty.")
    row: dict[str, Any] = {"input": question, "output": answer}
    if turns is not None and len(turns) > 1:
        row["messages"] = turns
    if columns.choices and not is_empty(record.values.get(columns.choices)):
        texts, labels = read_choices(record.values[columns.choices], f"“{columns.choices}”")
        right = right_choice(answer, texts, labels, f"“{columns.answer or columns.question}”")
        row |= {"output": texts[right], "choices": list(texts), "answer": right}
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


def last_answer(turns: Sequence[dict[str, str]], name: str) -> tuple[list[dict[str, str]], str]:
    """The turns before the last assistant's, and what that one says. Raises BadRow if there is none."""
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    if last < 0:
        raise BadRow(f"“{name}” has no assistant turn, so there is no answer to learn from.")
    return list(turns[:last]), turns[last]["content"]


def last_question(turns: Sequence[Mapping[str, str]]) -> str:
    """What the user's last turn says. Raises BadRow if another turn stands between it and the answer."""
    if not turns or turns[-1]["role"] != "user":
        raise BadRow("the turn before the answer is not the user's; each answer must follow a question.")
    return turns[-1]["content"]


def _turns(record: Record, name: str) -> list[dict[str, str]] | None:
    """A conversation as [{"role", "content"}], or None if the value is not one."""
    value = unpacked(record.values[name])
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
        turns.append({"role": role, "content": as_text(content, f"turn {number} of “{name}”")})
    return turns


def _text(record: Record, name: str) -> str:
    return as_text(record.values.get(name), f"“{name}”")


def _texts(record: Record, name: str) -> list[str]:
    """One text or a list of them; empty ones are left out."""
    value = unpacked(record.values.get(name))
    values = value if isinstance(value, (list, tuple)) else [value]
    texts = [as_text(item, f"“{name}”") for item in values if not is_empty(item)]
    return [text for text in texts if text.strip()]
