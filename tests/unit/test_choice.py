"""Multiple choice: every way data sets write it becomes the same row, and rows without choices stay as they were."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_merge.errors import ExampleError
from llm_merge.examples import Columns, check_rows, guess_columns, read_examples, split

ROW = {"input": "Capital of France?", "output": "Paris", "choices": ["Rome", "Paris", "Bern"], "answer": 1, "task": ""}
TEXTS = ["Rome", "Paris", "Bern"]
LETTERS = {"A": "Rome", "B": "Paris", "C": "Bern"}


def read(value: Any, **options: Any) -> tuple[Any, ...]:
    return read_examples(json.dumps(value), model_type="decoder", **options).rows


WAYS: dict[str, dict[str, Any]] = {
    "text": {"input": "Capital of France?", "choices": TEXTS, "answer": "Paris"},
    "letter": {"input": "Capital of France?", "choices": TEXTS, "answer": "B"},
    "small letter in brackets": {"input": "Capital of France?", "choices": TEXTS, "answer": "(b)"},
    "place (MMLU)": {"question": "Capital of France?", "choices": TEXTS, "answer": 1},
    "MedQA": {"question": "Capital of France?", "options": LETTERS, "answer": "Paris", "answer_idx": "B"},
    "MedQA by letter": {"question": "Capital of France?", "options": LETTERS, "answer_idx": "B"},
    "CMExam": {"Question": "Capital of France?", "Options": "A Rome\nB Paris\nC Bern", "Answer": "B"},
    "CMExam, dots": {"Question": "Capital of France?", "Options": "A. Rome\nB. Paris\nC. Bern", "Answer": "B"},
    "Chinese marks": {"Question": "Capital of France?", "Options": "A、Rome\nB、Paris\nC、Bern", "Answer": "B"},
    "key and value": {
        "Question": "Capital of France?",
        "Options": [{"key": key, "value": text} for key, text in LETTERS.items()],
        "Answer": "B",
    },
    "ARC": {
        "question": "Capital of France?",
        "choices": {"text": TEXTS, "label": ["1", "2", "3"]},
        "answerKey": "2",
    },
    "lines": {"input": "Capital of France?", "choices": "Rome\nParis\nBern", "answer": "Paris"},
    "our own rows": ROW,
}


@pytest.mark.parametrize("value", WAYS.values(), ids=WAYS)
def test_every_way_becomes_the_same_row(value: dict[str, Any]) -> None:
    assert read([value]) == (ROW,)
    assert check_rows([value], "decoder") == (ROW,)
    assert check_rows([value], "encoder-decoder") == (ROW,)


def test_a_table_holds_choices_in_a_cell() -> None:
    for cell in ('["Rome", "Paris", "Bern"]', '{"A": "Rome", "B": "Paris", "C": "Bern"}', "A Rome\nB Paris\nC Bern"):
        quoted = cell.replace('"', '""')
        text = f'input,choices,answer\nCapital of France?,"{quoted}",B\n'
        assert read_examples(text, model_type="decoder", name="rows.csv").rows == (ROW,)


def test_a_text_is_meant_before_a_letter_and_a_letter_before_a_place() -> None:
    def right(choices: Any, answer: str) -> int:
        return int(read([{"input": "?", "choices": choices, "answer": answer}])[0]["answer"])

    assert right(["2", "1", "0"], "0") == 2
    assert right(["B", "A"], "A") == 1
    assert right({"1": "x", "2": "y"}, "1") == 0
    assert right(["x", "y"], "1") == 1


def test_a_choice_may_go_on_over_lines() -> None:
    (row,) = read([{"input": "?", "options": "A Rome,\nof course\nB Paris", "answer": "A"}])
    assert row["choices"] == ["Rome,\nof course", "Paris"]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"choices": TEXTS, "answer": "Oslo"},
            "Row 1: “answer” is “Oslo”, which is none of the 3 choices: write the right one's text, its letter (A to "
            "C), or its place from 0.",
        ),
        (
            {"choices": TEXTS, "answer": "AB"},
            "Row 1: “answer” is “AB”, which is none of the 3 choices: write the right one's text, its letter (A to "
            "C), or its place from 0.",
        ),
        ({"choices": ["Rome"], "answer": "A"}, "Row 1: “choices” has 1 choice; at least two are needed."),
        ({"choices": ["Rome", ""], "answer": "A"}, "Row 1: choice 2 of “choices” is empty."),
        ({"choices": ["Rome", "Rome"], "answer": "A"}, "Row 1: “choices” has the choice “Rome” twice."),
        ({"choices": [["Rome"], "x"], "answer": "A"}, "Row 1: a choice of “choices” is a list; text was expected."),
        ({"choices": True, "answer": "A"}, "Row 1: “choices” is true or false; a list of choices was expected."),
    ],
)
def test_choices_that_cannot_be_used_are_named_with_their_row(row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ExampleError) as caught:
        read([{"input": "Capital?", **row}])
    assert list(caught.value.problems) == [sentence]


def test_rows_without_choices_stay_as_they_were() -> None:
    mixed = read([{"input": "a", "output": "b", "choices": None}, {"input": "a", "output": "b"}])
    assert mixed == ({"input": "a", "output": "b", "task": ""},) * 2
    assert guess_columns(["input", "output"], "decoder") == Columns("input", "output")
    assert guess_columns(["input", "choices", "answer"], "decoder") == Columns("input", "answer", choices="choices")
    assert guess_columns(["query", "pos", "options"], "encoder") == Columns("query", "pos")


def test_choices_can_be_left_aside_and_are_hashed_with_the_row() -> None:
    (row,) = read([WAYS["text"]], columns=Columns("input", "answer"))
    assert row == {"input": "Capital of France?", "output": "Paris", "task": ""}
    many = check_rows([{**WAYS["text"], "input": str(number)} for number in range(24)], "decoder")
    assert len(split(many).held_out) == 6
