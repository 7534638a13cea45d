"""LLaMA-Factory's files: the documented keys, what is refused and why, and that no file outside is opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_merge.datasets_info import read_dataset, read_dataset_info
from llm_merge.errors import ExampleError
from llm_merge.examples import ExampleSet, Limits

ALPACA = [
    {"instruction": "Translate.", "input": "Hund", "output": "dog", "system": "Be brief.",
     "history": [["Hi", "Hello"]]},
    {"instruction": "Say hi.", "input": "", "output": "hi", "system": "", "history": []},
]  # fmt: skip
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
SHAREGPT = [
    {"conversations": [{"from": "human", "value": "1?"}, {"from": "gpt", "value": "1"},
                       {"from": "human", "value": "2?"}, {"from": "gpt", "value": "2"}], "system": "Count."},
    {"conversations": [{"from": "human", "value": "3?"}, {"from": "gpt", "value": "3"}], "system": ""},
]  # fmt: skip
OPENAI = [
    {"messages": [{"role": "system", "content": "Count."}, {"role": "user", "content": "1?"},
                  {"role": "assistant", "content": "1"}], "system": "Not this one."},
]  # fmt: skip
OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def read(folder: Path, rows: Any, entry: dict[str, Any], **options: Any) -> ExampleSet:
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({"set": {"file_name": "rows.json", **entry}}))
    return read_dataset(folder / "dataset_info.json", "set", **{"model_type": "decoder", **options})


def problems(folder: Path, rows: Any, entry: dict[str, Any], **options: Any) -> list[str]:
    with pytest.raises(ExampleError) as caught:
        read(folder, rows, entry, **options)
    return list(caught.value.problems)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_alpaca_rows_with_system_and_history(tmp_path: Path) -> None:
    found = read(tmp_path, ALPACA, {"columns": COLUMNS})
    question = "Translate.\nHund"
    turns = [turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Hello"), turn("user", question)]
    assert found.rows == (
        {"input": question, "output": "dog", "messages": turns, "task": ""},
        {"input": "Say hi.", "output": "hi", "task": ""},
    )
    assert found.format == "alpaca JSON"
    assert found.notes == ()


def test_alpaca_without_columns_reads_the_documented_ones(tmp_path: Path) -> None:
    found = read(tmp_path, ALPACA, {})
    assert [row["input"] for row in found.rows] == ["Translate.\nHund", "Say hi."]
    assert "messages" not in found.rows[0]
    assert found.notes == ("Not used: system, history.",)


def test_columns_that_an_entry_does_not_name_are_not_read(tmp_path: Path) -> None:
    found = read(tmp_path, ALPACA, {"columns": {"prompt": "instruction", "response": "output"}})
    assert [row["input"] for row in found.rows] == ["Translate.", "Say hi."]


def test_sharegpt_rows_by_default_tags(tmp_path: Path) -> None:
    entry = {"formatting": "sharegpt", "columns": {"messages": "conversations", "system": "system"}}
    turns = [turn("system", "Count."), turn("user", "1?"), turn("assistant", "1"), turn("user", "2?")]
    assert read(tmp_path, SHAREGPT, entry).rows == (
        {"input": "2?", "output": "2", "messages": turns, "task": ""},
        {"input": "3?", "output": "3", "task": ""},
    )
    assert "messages" in read(tmp_path, SHAREGPT, {"formatting": "sharegpt"}).rows[0]


def test_openai_tags_and_a_system_turn_before_the_column(tmp_path: Path) -> None:
    entry = {
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "system": "system"},
        "tags": {**OPENAI_TAGS, "system_tag": "system"},
    }
    (row,) = read(tmp_path, OPENAI, entry).rows
    assert row["messages"] == [turn("system", "Count."), turn("user", "1?")]


def test_tool_calls_are_left_out_and_counted(tmp_path: Path) -> None:
    call = [{"from": "human", "value": "Weather?"}, {"from": "call", "value": "{}"},
            {"from": "observation", "value": "rain"}, {"from": "gpt", "value": "Rain."}]  # fmt: skip
    entry = {"formatting": "sharegpt", "tags": {"function_tag": "call"}}
    found = read(tmp_path, [*SHAREGPT, {"conversations": call}], entry)
    assert len(found.rows) == 2
    assert found.notes == ("Not used: system.", "1 row with tool calls was left out.")
    described = [{**SHAREGPT[0], "tools": "[{}]"}]
    entry = {"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools"}}
    assert problems(tmp_path, described, entry) == [
        "Every row of “set” has tool calls, which are not read: choose another set."
    ]


ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "ranking": ({"ranking": True}, "“set” is a preference set"),
    "chosen": ({"columns": {"prompt": "a", "chosen": "b", "rejected": "c"}}, "“set” is a preference set"),
    "kto": ({"columns": {"prompt": "a", "response": "b", "kto_tag": "c"}}, "“set” is a preference set"),
    "images": ({"columns": {"prompt": "a", "response": "b", "images": "c"}}, "“set” has images, video or sound"),
    "pre-training": ({"columns": {"prompt": "text"}}, "“set” names no response column, as for pre-training"),
    "formatting": ({"formatting": "xml"}, "“set” has the formatting “xml”; alpaca and sharegpt are read"),
    "hub": ({"file_name": None, "hf_hub_url": "org/set"}, "“set” is not in the folder but at org/set (hf_hub_url)"),
    "no file": ({"file_name": None}, "“set” names no file: give it a file_name."),
    "above": ({"file_name": "../rows.json"}, "“set” names the file ../rows.json, which is outside its folder"),
    "absolute": ({"file_name": "/etc/passwd"}, "“set” names the file /etc/passwd, which is outside its folder"),
    "a number": ({"file_name": 5}, "“set” names the file 5, which is outside its folder"),
    "parquet": ({"file_name": "rows.parquet"}, "“set” is a parquet file"),
    "folder": ({"file_name": "inner"}, "“set” is the folder inner: name one file in it."),
}


@pytest.mark.parametrize(("entry", "sentence"), ENTRIES.values(), ids=ENTRIES)
def test_what_cannot_be_read_is_refused_in_a_sentence(tmp_path: Path, entry: dict[str, Any], sentence: str) -> None:
    (tmp_path / "inner").mkdir()
    (found,) = problems(tmp_path, ALPACA, entry)
    assert found.startswith(sentence)
    assert found.endswith(".")
    assert read_dataset_info(tmp_path / "dataset_info.json")["set"].problem == found


def test_a_link_that_leaves_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text(json.dumps(ALPACA))
    inside = tmp_path / "data"
    inside.mkdir()
    (inside / "link.json").symlink_to(tmp_path / "secret.json")
    (found,) = problems(inside, ALPACA, {"file_name": "link.json"})
    assert "outside its folder" in found


def test_a_set_whose_file_is_here_is_read_from_it_whatever_else_it_names(tmp_path: Path) -> None:
    assert len(read(tmp_path, ALPACA, {"hf_hub_url": "org/set"}).rows) == 2


def test_names_come_in_their_order_from_a_path_or_text(tmp_path: Path) -> None:
    text = json.dumps({"b": {"file_name": "b.json"}, "a": {"hf_hub_url": "org/a"}})
    (tmp_path / "dataset_info.json").write_text(text)
    found = read_dataset_info(tmp_path / "dataset_info.json")
    assert list(found) == ["b", "a"]
    assert found == read_dataset_info(text, tmp_path)
    assert found["b"].file == (tmp_path / "b.json").resolve()
    assert found["a"].file is None


def test_an_unknown_set_is_said_with_the_known_ones(tmp_path: Path) -> None:
    read(tmp_path, ALPACA, {})
    with pytest.raises(ExampleError, match=r"has no set “sets”\. Did you mean “set”\? It has set\."):
        read_dataset(tmp_path / "dataset_info.json", "sets", model_type="decoder")
    for text in ("[]", '{"a": 1}'):
        with pytest.raises(ExampleError, match="must hold an object of name"):
            read_dataset_info(text, tmp_path)
    with pytest.raises(ExampleError, match="is not valid JSON"):
        read_dataset_info("{", tmp_path)
    with pytest.raises(ExampleError, match="cannot be read: give the path"):
        read_dataset_info(tmp_path / "none.json")


ROWS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no answer": ([{"instruction": "a", "output": ""}], {}, "Row 1: the answer (column “output”) is empty."),
    "no question": ([{"instruction": "", "output": "a"}], {}, "Row 1: the question (column “instruction”) is empty."),
    "no column": ([{"instruction": "a"}], {}, "Row 1: there is no “output” in this row (it has instruction)."),
    "history": (
        [{"instruction": "a", "output": "b", "history": ["c"]}],
        {"columns": COLUMNS},
        "Row 1: “history” is a list; a list of [question, answer] pairs was expected.",
    ),
    "tags": (
        OPENAI,
        {"formatting": "sharegpt", "columns": {"messages": "messages"}},
        "Row 1: turn 1 of “messages” has no “from” and “value”: check the tags.",
    ),
    "speaker": (
        [{"conversations": [{"from": "user", "value": "a"}]}],
        {"formatting": "sharegpt"},
        "Row 1: turn 1 of “conversations” is by “user”; human, gpt, system was expected: check the tags.",
    ),
    "order": (
        [{"conversations": [{"from": "gpt", "value": "a"}]}],
        {"formatting": "sharegpt"},
        "Row 1: the turn before the answer is not the user's; each answer must follow a question.",
    ),
}


@pytest.mark.parametrize(("rows", "entry", "sentence"), ROWS.values(), ids=ROWS)
def test_rows_that_cannot_be_used_are_named(tmp_path: Path, rows: Any, entry: dict[str, Any], sentence: str) -> None:
    assert problems(tmp_path, rows, entry) == [sentence]


def test_limits_and_model_types(tmp_path: Path) -> None:
    assert problems(tmp_path, ALPACA, {}, limits=Limits(rows=1))[0].startswith("There are 2 rows; at most 1")
    assert problems(tmp_path, ALPACA, {}, limits=Limits(characters=10))[0].startswith("rows.json has")
    assert problems(tmp_path, ALPACA, {}, model_type="encoder")[0].startswith("LLaMA-Factory's sets hold questions")
    assert problems(tmp_path, ALPACA, {"file_name": "none.json"})[0].endswith(
        "cannot be read (No such file or directory): check file_name in dataset_info.json."
    )
