"""Example rows: every format people paste, the words of every mistake, and the laws of splitting and hashing."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_merge.errors import ExampleError
from llm_merge.examples import (
    Columns,
    Limits,
    check_rows,
    guess_columns,
    parse_examples,
    read_examples,
    rows_hash,
    split,
)

PAIR = [{"input": "2 + 2?", "output": "4", "task": ""}, {"input": "3 + 3?", "output": "6", "task": ""}]


def read(text: str | bytes, model_type: str = "decoder", **options: object) -> list[dict[str, object]]:
    return [dict(row) for row in read_examples(text, model_type=model_type, **options).rows]  # type: ignore[arg-type]


def problems(text: str | bytes, model_type: str = "decoder", **options: object) -> list[str]:
    with pytest.raises(ExampleError) as caught:
        read_examples(text, model_type=model_type, **options)  # type: ignore[arg-type]
    return list(caught.value.problems)


# ---- formats ---------------------------------------------------------------------------------------------------------

PASTED = {
    "JSON list": '[{"input": "2 + 2?", "output": "4"}, {"input": "3 + 3?", "output": "6"}]',
    "numbers stay as typed": '[{"input": "2 + 2?", "output": 4}, {"input": "3 + 3?", "output": 6}]',
    "JSON Lines": '{"input": "2 + 2?", "output": "4"}\n\n{"input": "3 + 3?", "output": "6"}\n',
    "JSON Lines with commas": '{"input": "2 + 2?", "output": "4"},\n{"input": "3 + 3?", "output": "6"}',
    "one object after another": '{\n "input": "2 + 2?",\n "output": "4"\n}\n{"input": "3 + 3?",\n "output": "6"}',
    "one wrapped list": '{"data": [{"input": "2 + 2?", "output": "4"}, {"input": "3 + 3?", "output": "6"}]}',
    "one task, a row per line": '{"": [{"input": "2 + 2?", "output": "4"},\n{"input": "3 + 3?", "output": "6"}\n]}',
    "CSV": "input,output\n2 + 2?,4\n3 + 3?,6\n",
    "CSV, Windows line ends, BOM": "\ufeffinput,output\r\n2 + 2?,4\r\n3 + 3?,6\r\n",
    "CSV, spaces after commas": 'input, output\n"2 + 2?", "4"\n"3 + 3?", "6"',
    "CSV, trailing commas": "input,output\n2 + 2?,4,\n3 + 3?,6,\n,,\n",
    "semicolons": "Question;Answer\n2 + 2?;4\n3 + 3?;6",
    "TSV": "prompt\tcompletion\n2 + 2?\t4\n3 + 3?\t6",
    "bars": "question|answer\n2 + 2?|4\n3 + 3?|6",
    "names in another order": "answer,id,question\n4,a,2 + 2?\n6,b,3 + 3?",
    "unknown names": "frage,antwort\n2 + 2?,4\n3 + 3?,6",
    "alpaca": '[{"instruction": "2 + 2?", "input": "", "output": "4"}, {"instruction": "3 + 3?", "output": "6"}]',
    "messages": '{"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}\n'
    '{"messages": [{"role": "user", "content": "3 + 3?"}, {"role": "assistant", "content": "6"}, '
    '{"role": "user", "content": "Thanks"}]}',
    "sharegpt": '[{"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}, '
    '{"conversations": [{"from": "human", "value": "3 + 3?"}, {"from": "gpt", "value": "6"}]}]',
    "bare lists of turns": '[[{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}], '
    '[{"role": "user", "content": "3 + 3?"}, {"role": "assistant", "content": "6"}]]',
    "prompt and completion as turns": '[{"prompt": [{"role": "user", "content": "2 + 2?"}], "completion": '
    '[{"role": "assistant", "content": "4"}]}, '
    '{"prompt": "3 + 3?", "completion": "6"}]',
}


@pytest.mark.parametrize("text", PASTED.values(), ids=PASTED)
def test_what_people_paste_becomes_the_same_rows(text: str) -> None:
    assert read(text) == PAIR


@pytest.mark.parametrize("text", PASTED.values(), ids=PASTED)
def test_a_file_reads_as_the_pasted_text_does(text: str) -> None:
    assert read(text.encode()) == PAIR
    assert read(text.encode("utf-16")) == PAIR


def test_an_object_of_task_to_rows_names_their_tasks() -> None:
    text = '{"sums": [{"input": "2 + 2?", "output": "4"}], "words": [{"input": "Opposite of hot?", "output": "cold"}]}'
    found = read_examples(text, model_type="decoder")
    assert found.counts == {"sums": 1, "words": 1}
    assert found.tasks == ("sums", "words")
    assert check_rows(json.loads(text), "decoder") == found.rows


def test_a_task_column_names_the_task() -> None:
    found = read_examples("task,input,output\nsums,2 + 2?,4\n,Hot?,cold", model_type="decoder")
    assert found.counts == {"sums": 1, "": 1}


def test_windows_1252_is_read_and_said() -> None:
    found = read_examples("input;output\nCafé?;Ja – “gern”".encode("cp1252"), model_type="decoder", name="a.csv")
    assert found.rows[0]["input"] == "Café?"
    assert found.rows[0]["output"] == "Ja – “gern”"
    assert found.notes == ("The file is not UTF-8 and was read as Windows-1252: check its accented letters.",)


def test_earlier_turns_are_kept_as_history() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": [{"type": "text", "text": "Bye"}]},
        {"role": "assistant", "content": "Goodbye"},
    ]
    history = [*turns[:3], {"role": "user", "content": "Bye"}]
    assert read(json.dumps(turns)) == [{"input": "Bye", "output": "Goodbye", "messages": history, "task": ""}]
    cell = io.StringIO()
    csv.writer(cell).writerows([["id", "messages"], ["1", json.dumps(turns)]])
    assert read(cell.getvalue())[0]["messages"] == history


def test_alpaca_input_follows_the_instruction_on_a_new_line() -> None:
    assert read('[{"instruction": "Translate.", "input": "Hund", "output": "dog"}]')[0]["input"] == "Translate.\nHund"


PASSAGES = {
    "LM-Cocktail": '{"query": "q", "pos": ["a", "b"], "neg": ["c"]}',
    "texts for lists": '{"query": "q", "pos": ["a", "b"], "neg": "c"}',
    "other names": '{"anchor": "q", "positives": ["a", "b"], "hard_negatives": ["c", ""]}',
    "sentence pairs": '{"sentence1": "q", "sentence2": ["a", "b"], "negative": ["c"]}',
    "question and context": '{"question": "q", "context": ["a", "b"], "negative_1": "c"}',
    "a list in a cell": 'query,pos,neg\nq,"[""a"", ""b""]",c',
    "one column per negative": 'query\tpos\tneg_1\tneg_2\nq\t["a", "b"]\tc\t',
}


@pytest.mark.parametrize("text", PASSAGES.values(), ids=PASSAGES)
def test_passages_for_models_that_search_or_rank(text: str) -> None:
    expected = [{"query": "q", "pos": ["a", "b"], "neg": ["c"], "task": ""}]
    assert read(text, "encoder") == expected
    assert read(text, "reranker") == expected


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\r"), min_size=1, max_size=12)
cells = texts.filter(lambda text: bool(text.strip()) and not text.startswith(("[", "\ufeff")))


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=5), delimiter=st.sampled_from(",;\t|"))
def test_any_quoted_table_reads_back(rows: list[tuple[str, str]], delimiter: str) -> None:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerows([("input", "output"), *rows])
    expected = [{"input": a, "output": b, "task": ""} for a, b in rows]
    assert read(out.getvalue()) == expected
    assert read(out.getvalue().encode(), name="rows.csv") == expected


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=5), indent=st.sampled_from([None, 2]))
def test_any_json_reads_back(rows: list[tuple[str, str]], indent: int | None) -> None:
    expected = [{"input": a, "output": b, "task": ""} for a, b in rows]
    assert read(json.dumps(expected, indent=indent, ensure_ascii=False)) == expected
    assert read("\n".join(json.dumps(row, ensure_ascii=False) for row in expected)) == expected


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(st.text(max_size=60), st.binary(max_size=60), st.text(alphabet='[]{}",:;\t\n\\ab1', max_size=40)),
    st.sampled_from(["decoder", "encoder"]),
)
def test_whatever_is_pasted_gives_rows_or_sentences(text: str | bytes, model_type: str) -> None:
    try:
        found = read_examples(text, model_type=model_type)
    except ExampleError as error:
        sentences = error.problems
    else:
        assert found.rows
        sentences = (f"{rows_hash(found.rows)}.",)
    assert sentences
    assert all(sentence.endswith(".") for sentence in sentences)


# ---- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["input", "output"], Columns("input", "output")),
        (["id", "Question", "Answer", "score"], Columns("Question", "Answer")),
        (["prompt", "response"], Columns("prompt", "response")),
        (["prompt", "chosen", "rejected"], Columns("prompt", "chosen")),
        (
            ["instruction", "context", "response", "category"],
            Columns("instruction", "response", context="context", task="category"),
        ),
        (["context", "question", "answer"], Columns("question", "answer", context="context")),
        (["prompt", "messages"], Columns("messages")),
        (["user question", "model answer"], Columns("user question", "model answer")),
        (["frage", "antwort"], Columns("frage", "antwort", by_name=False)),
        (["id", "frage", "score", "antwort"], Columns("frage", "antwort", by_name=False)),
    ],
)
def test_columns_are_guessed_by_their_names(names: list[str], expected: Columns) -> None:
    found = guess_columns(names, "decoder")
    assert found == expected
    assert found.by_name == expected.by_name


def test_the_guess_can_be_changed() -> None:
    text = "id,input,output,better\n1,q,a,b"
    assert read(text, columns=Columns("input", "better"))[0]["output"] == "b"
    assert problems(text, columns=Columns("input", "best")) == [
        "There is no column “best”; there are id, input, output, better."
    ]
    assert problems(text, columns=Columns("input", "input")) == [
        "“input” cannot be both question and answer: choose two columns."
    ]


def test_notes_say_what_was_guessed_left_out_and_repeated() -> None:
    found = read_examples("frage,antwort,id\nq,a,1\nq,a,2\n,,\n", model_type="decoder")
    assert found.notes == (
        "Empty rows were left out (line 4).",
        "The names do not say which column is which: “frage” is taken as the question, “antwort” as the answer.",
        "The first line is read as the columns' names; if it is an example, put a line with names above it.",
        "Not used: id.",
        "1 row repeats an earlier one.",
    )


# ---- mistakes --------------------------------------------------------------------------------------------------------

NO_JSON = "not valid JSON: "
MISTAKES = {
    "": "There are no example rows: paste JSON, JSON Lines, CSV or TSV, or upload a file.",
    " \n ": "There are no example rows: paste JSON, JSON Lines, CSV or TSV, or upload a file.",
    "[]": "There are no example rows in this JSON.",
    "hello": "Line 1: no rows found. Expected JSON, JSON Lines, CSV or TSV; a table's first line names its columns, "
    "for example input,output.",
    "input,output": "There is a header (input, output) but no rows: add a line for each example.",
    "input,input,output\na,b,c": "Line 1: two columns are called “input”: rename one.",
    "input,output\na": "Line 2 has 1 cell, the header has 2 columns: put a text that contains a comma between "
    "quotation marks.",
    "input;output\na;b\nc;d;e": "Line 3 has 3 cells, the header has 2 columns: put a text that contains a semicolon "
    "between quotation marks.",
    'input,output\n"two\nlines",b\na,"b\nc,d': "Line 4: a quotation mark is opened in this row and never closed.",
    'input,output\n"a" b,c': "Line 2: after a closing quotation mark a comma or a new line must follow; write a "
    'quotation mark inside a text twice ("").',
    'input,output\n"two\nlines",b\nc,': "Line 4: the answer (column “output”) is empty.",
    "input,output\n ,b": "Line 2: the question (column “input”) is empty.",
    '{"input": "a", "output": "b"}\n{"input": "c", "output": ""}': "Line 2: the answer (column “output”) is empty.",
    '[{"input": "a", "output": NaN}]': "Row 1: the answer (column “output”) is empty.",
    '[{"input": "a", "output": "b"},\n {}]': "Row 2 (line 2): this row is empty.",
    "{}": "Row 1: this row is empty.",
    '{"mnli": [\n{"input": "a", "output": "b"},\n{"input": "a"}]}': (
        "Row 2 of “mnli” (line 3): there is no “output” in this row (it has input)."
    ),
    '[{"input": "a", "output": ["b"]}]': "Row 1: “output” is a list; text was expected.",
    '[{"input": {"x": 1}, "output": "b"}]': "Row 1: “input” is an object; text was expected.",
    '[{"input": "a", "output": "\\ud800"}]': (
        "Row 1: “output” holds half a character (a lone surrogate, \\ud800 to \\udfff): type it again."
    ),
    '[{"input": "a", "input": "b", "output": "c"}]': "Row 1: “input” occurs twice in this row: rename or remove one.",
    '{"a": [{"input": "x", "output": "y"}], "a": [{"input": "x", "output": "y"}]}': (
        "The task “a” occurs twice: put its rows into one list."
    ),
    "[1, 2]": 'Row 1: expected an object such as {"input": …, "output": …}.',
    '[{"text": "a"}]': "Two columns are needed, a question column and an answer column; found: “text”.",
    '[{"messages": "hello"}]': "Row 1: “messages” is text; a list of turns such as "
    '[{"role": "user", "content": …}, …] was expected.',
    '[{"messages": [{"role": "user", "content": "a"}]}]': (
        "Row 1: “messages” has no assistant turn, so there is no answer to learn from."
    ),
    '[{"messages": [{"role": "assistant", "content": "a"}]}]': (
        "Row 1: the turn before the answer is not the user's; each answer must follow a question."
    ),
    '[{"messages": [{"role": "teacher", "content": "a"}]}]': (
        "Row 1: turn 1 of “messages” is by “teacher”; system, user or assistant was expected."
    ),
    '[{"query": "a", "pos": ["b"]}]': "These rows hold queries and passages, as for an embedding model; a chat model "
    "needs a question column and an answer column.",
    '[{"input": "a", "output": "b"},]': f"Line 1, column 32: {NO_JSON}remove the comma before ].",
    "[{'input': 'a'}]": f'Line 1, column 3: {NO_JSON}texts and names stand between double quotation marks ("), not '
    "single ones.",
    "[{“input”: 1}]": f'Line 1, column 3: {NO_JSON}these are typographic quotation marks; use straight ones (").',
    '[{"input": "a"\n"output": "b"}]': f"Line 2, column 1: {NO_JSON}a comma is missing before this, or a quotation "
    'mark inside a text needs a backslash before it (\\").',
    '[{"input": "a", "output": None}]': f"Line 1, column 27: {NO_JSON}write true, false or null.",
    '[{"input": "a", "output": "b"}': f"Line 1, column 31: {NO_JSON}the text ends too early; a closing ], }} or "
    "quotation mark is missing.",
    '[{"input": "a, "output": 1': f"Line 1, column 17: {NO_JSON}a comma is missing before this, or a quotation mark "
    'inside a text needs a backslash before it (\\").',
    '[{"input": "a': f"Line 1, column 12: {NO_JSON}a quotation mark is opened here and never closed.",
    '[{"input": "C:\\dir"}]': f"Line 1, column 15: {NO_JSON}a backslash inside a text must be written twice (\\\\).",
    "[{input: 1}]": f"Line 1, column 3: {NO_JSON}a column name between double quotation marks was expected.",
    '[{"input": "a", "output": "b"}]\n[1]': f"Line 2, column 1: {NO_JSON}something follows after the end of the rows; "
    "put all rows into one list [ … ].",
    '[{"input": =}]': f"Line 1, column 12: {NO_JSON}a text between double quotation marks, a number, a list or an "
    "object was expected.",
    "[" * 100_000: f"Line 1, column 1: {NO_JSON}lists or objects are nested too deeply.",
}


@pytest.mark.parametrize(("text", "sentence"), MISTAKES.items(), ids=[text[:30] for text in MISTAKES])
def test_each_mistake_gets_one_sentence(text: str, sentence: str) -> None:
    assert problems(text)[0] == sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("query,pos\na,", "Line 2: the passage to be found (column “pos”) is empty."),
        ("query,pos\n,a", "Line 2: the query (column “query”) is empty."),
        ('{"query": "a", "pos": []}', "Row 1: the passage to be found (column “pos”) is empty."),
        ('{"query": "a", "pos": [{"text": "b"}]}', "Row 1: “pos” is an object; text was expected."),
        (
            '{"query": "a", "pos": ["b"]}',
            "One query without negatives has nothing to compete with: add a second row, or a "
            "passage that must not be found (column “neg”).",
        ),
        (
            '{"messages": []}',
            "These rows hold conversations, as for a chat model; an embedding model needs a query column "
            "and a column of passages to be found.",
        ),
        (
            '{"query": "a", "neg": "b"}',
            "Two columns are needed, a query column and a column of passages to be found; found: “query”.",
        ),
    ],
)
def test_mistakes_in_passages(text: str, sentence: str) -> None:
    assert problems(text, "encoder") == [sentence]


def test_all_problems_are_collected_in_the_order_of_their_lines() -> None:
    text = '{"input": "a", "output": "b"}\n{"input": "a"}\n{"input": "a", "output": }\n5\n'
    assert [problem.split(":")[0] for problem in problems(text)] == ["Line 2", "Line 3, column 26", "Line 4"]


def test_a_broken_first_line_does_not_hide_the_others() -> None:
    text = '{"input": "a, "output": "b"}\n{"input": "a", "output": "b"}\n{"input": "a", "output": ""}'
    assert [problem.split(":")[0] for problem in problems(text)] == ["Line 1, column 16", "Line 3"]


def test_twenty_problems_are_shown_and_the_rest_counted() -> None:
    found = problems("input,output\n" + "a,\n" * 25)
    assert len(found) == 21
    assert found[19] == "Line 21: the answer (column “output”) is empty."
    assert found[20] == "… and 5 more problems."


def test_too_much_is_said_with_both_numbers() -> None:
    rows = "input,output\n" + "a,b\n" * 4
    assert problems(rows, limits=Limits(rows=3)) == ["There are 4 rows; at most 3 are read here: leave some out."]
    assert problems(rows, limits=Limits(characters=10)) == [
        "The text has 29 characters; at most 10 are read here: leave out some rows."
    ]
    assert problems("input,output\nabcde,b\na,b", limits=Limits(row_characters=5)) == [
        "Line 2: this row has 6 characters; at most 5 are read: shorten it."
    ]


def test_files_that_hold_no_text() -> None:
    assert problems(b"PK\x03\x04...", name="rows.xlsx") == [
        "This is a zip or spreadsheet file: save the sheet as CSV and upload that."
    ]
    assert problems(b"\x7fELF\x00\x01") == ["This is not a text file: upload JSON, JSON Lines, CSV or TSV."]


def test_a_broken_row_still_leaves_a_table_whose_columns_can_be_chosen() -> None:
    table = parse_examples("id,input,output\n1,a,b\n2,a\n")
    assert table.names == ("id", "input", "output")
    assert len(table.records) == 1
    assert table.problems[0].startswith("Line 3 has 2 cells")


# ---- lists from Python -----------------------------------------------------------------------------------------------


def test_rows_from_python_are_checked_like_a_file() -> None:
    assert check_rows(({"input": q["input"], "output": q["output"]} for q in PAIR), "decoder") == tuple(PAIR)
    assert check_rows([{"query": "q", "pos": "p", "neg": ("n",)}], "encoder") == (
        {"query": "q", "pos": ["p"], "neg": ["n"], "task": ""},
    )


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "There are no example rows: pass at least one."),
        ("rows.json", 'example_data is text: pass a list of rows such as {"input": …, "output": …}.'),
        (None, 'example_data is nothing: pass a list of rows such as {"input": …, "output": …}.'),
        ([{"input": "a", "output": "b"}, 5], 'Row 2 is a number: expected a dict such as {"input": …, "output": …}.'),
        (
            [{"input": "a", "output": "b"}, {"input": "a", "output": " "}],
            "Row 2: the answer (column “output”) is empty.",
        ),
        ([{"input": "a", "output": float("nan")}], "Row 1: the answer (column “output”) is empty."),
    ],
)
def test_rows_from_python_that_cannot_be_used(rows: object, sentence: str) -> None:
    with pytest.raises(ExampleError) as caught:
        check_rows(rows, "decoder")
    assert list(caught.value.problems) == [sentence]


def test_an_unknown_model_type_lists_the_known_ones() -> None:
    with pytest.raises(ExampleError, match="Model type “chat” is not known: use decoder, encoder, reranker"):
        check_rows(PAIR, "chat")


# ---- sets of rows ----------------------------------------------------------------------------------------------------

row = st.builds(
    lambda text, task: {"input": text, "output": "x", "task": task}, st.text(max_size=6), st.sampled_from("abc")
)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(row, min_size=20, max_size=90), seed=st.integers(0, 5))
def test_a_quarter_of_every_task_is_held_out(rows: list[dict[str, str]], seed: int) -> None:
    parts = split(rows, seed=seed)
    assert sorted(map(str, (*parts.work, *parts.held_out))) == sorted(map(str, rows))
    assert len(parts.held_out) == len(rows) // 4
    held = Counter(r["task"] for r in parts.held_out)
    for task, count in Counter(r["task"] for r in rows).items():
        assert abs(held[task] - count / 4) < 1
    again = split(rows[::-1], seed=seed)
    assert sorted(map(str, again.held_out)) == sorted(map(str, parts.held_out))


def test_another_seed_holds_out_other_rows() -> None:
    rows = [{"input": str(i), "output": "x", "task": ""} for i in range(32)]
    assert split(rows, seed=0).held_out != split(rows, seed=1).held_out
    assert split(rows).note == "24 rows to measure on, 8 held out for the scoreboard"
    assert not split(rows).same_rows


def test_few_rows_serve_both_ends_and_that_is_said() -> None:
    rows = [{"input": str(i), "output": "x", "task": ""} for i in range(19)]
    parts = split(rows)
    assert parts.work == parts.held_out == tuple(rows)
    assert parts.same_rows
    assert parts.note == (
        "19 rows to measure on and for the scoreboard (same rows: optimistic). From 20 rows up, a quarter is held out."
    )


def test_the_hash_is_of_the_content_and_the_order() -> None:
    first, second = PAIR
    assert rows_hash([first, second]) == rows_hash([dict(reversed(list(first.items()))), second])
    assert rows_hash([first, second]) != rows_hash([second, first])
    assert rows_hash([first]) != rows_hash([{**first, "task": "sums"}])
    # Recorded measurements are found by it, so it must never change by itself.
    assert rows_hash(PAIR) == "d5412845afd02a5e230b61025b7f68abe84e78ff1bf973f64673da5e7ef2bc01"
