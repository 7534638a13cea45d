"""Which column is the question and which the answer, guessed by their names.

The guess is a value that a person can change. This module knows the names of columns only: what stands in them is
read in `example_rows`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from llm_merge.errors import ExampleError

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
CHOICES = ("choices", "options", "endings")
CHOICE_ANSWER = ("answerkey", "correct")
"""Names of an answer's column that only count where there are choices."""
NUMBERS = ("id", "idx", "index", "nr", "no", "number", "row", "key", "uid", "score", "column_1")
NEGATIVE = re.compile(r"(hard_)?neg(ative)?s?(_?\d+)?")
TASK = ("task", "task_name", "dataset", "category", "subject")


@dataclass(frozen=True)
class Columns:
    """Where a row's parts stand.

    question   the column of the question (or query); it may hold a whole conversation
    answer     the column of the answer (or of the passages to be found); "" when the question column is a conversation,
               whose last assistant turn is then the answer
    context    a column that is appended to the question on a new line (alpaca's `input` after `instruction`)
    negatives  columns of passages that must not be found
    task       a column that names the row's task
    choices    a column of the texts that the answer is one of (multiple choice)
    by_name    the names said so; otherwise the first two columns were taken
    """

    question: str
    answer: str = ""
    context: str = ""
    negatives: tuple[str, ...] = ()
    task: str = ""
    choices: str = ""
    by_name: bool = field(default=True, compare=False)

    @property
    def used(self) -> tuple[str, ...]:
        """The columns that are read, in the order question, context, answer, choices, negatives, task."""
        names = (self.question, self.context, self.answer, self.choices, *self.negatives, self.task)
        return tuple(name for name in names if name)


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
    choices = _find(rest, CHOICES, parts=False)
    rest = [name for name in rest if name != choices]
    instruction = _find(rest, ("instruction",), parts=False)
    question = instruction or _find(rest, QUESTION)
    answer = _find([name for name in rest if name != question], (*ANSWER, *(CHOICE_ANSWER if choices else ())))
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
        Columns(question, answer, context=context, task=task, choices=choices),
        rest,
        "a question column and an answer column",
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
    return replace(found, question=question, answer=answer, by_name=False)


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


def check_model_type(model_type: str) -> None:
    """Raises ExampleError unless the model type is one of the four."""
    if model_type not in MODEL_TYPES:
        raise ExampleError(
            [f"Model type “{model_type}” is not known: use {', '.join(MODEL_TYPES)}."], field="model_type"
        )
