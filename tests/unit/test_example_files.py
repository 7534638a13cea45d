"""Several example files at once: tasks named after files, LLaMA-Factory's folder, and mistakes that name their file."""

from __future__ import annotations

import json
from pathlib import Path

from components.session import Session
from components.settings import Settings
from components.views.example_files import read_several

SETTINGS = Settings()
DECODER = Session(model_type="decoder")


def put(folder: Path, name: str, value: object) -> Path:
    path = folder / name
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_each_file_is_a_task_called_after_it(tmp_path: Path) -> None:
    law = put(tmp_path, "law.csv", "input,output\nWhat is a tort?,A wrong.\n")
    poems = put(tmp_path, "poems.jsonl", '{"input": "A line on rain", "output": "It rains."}\n')
    reading = read_several(DECODER, [law, poems], SETTINGS)
    assert not reading.problems
    assert [(row["task"], row["input"]) for row in reading.session.rows] == [
        ("law", "What is a tort?"),
        ("poems", "A line on rain"),
    ]


def test_rows_that_name_their_task_keep_it(tmp_path: Path) -> None:
    one = put(tmp_path, "one.csv", "task,input,output\nlaw,a,b\n")
    two = put(tmp_path, "two.csv", "input,output\nc,d\n")
    reading = read_several(DECODER, [one, two], SETTINGS)
    assert [row["task"] for row in reading.session.rows] == ["law", "two"]


def test_llama_factorys_folder_is_read_by_its_index(tmp_path: Path) -> None:
    info = put(
        tmp_path,
        "dataset_info.json",
        {
            "law": {"file_name": "law_rows.json"},
            "chat": {"file_name": "chat_rows.json", "formatting": "sharegpt"},
            "elsewhere": {"hf_hub_url": "org/set"},
        },
    )
    law = put(tmp_path, "law_rows.json", [{"instruction": "Define", "input": "tort", "output": "A wrong."}])
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    chat = put(tmp_path, "chat_rows.json", [{"conversations": turns}])
    reading = read_several(DECODER, [chat, info, law], SETTINGS)
    assert not reading.problems
    rows = {row["task"]: row for row in reading.session.rows}
    assert rows["law"]["input"] == "Define\ntort"
    assert rows["chat"]["output"] == "Hello"


def test_an_index_alone_says_which_files_it_wants(tmp_path: Path) -> None:
    info = put(tmp_path, "dataset_info.json", {"law": {"file_name": "law_rows.json"}})
    reading = read_several(DECODER, [info], SETTINGS)
    assert reading.problems == (
        "dataset_info.json names the files law_rows.json: upload those you want together with it.",
    )
    assert reading.session is DECODER


def test_a_mistake_names_its_file_and_changes_nothing(tmp_path: Path) -> None:
    good = put(tmp_path, "good.csv", "input,output\na,b\n")
    bad = put(tmp_path, "bad.jsonl", '{"input": "a"\n')
    reading = read_several(DECODER, [good, bad], SETTINGS)
    assert reading.session is DECODER
    assert all(problem.startswith("bad.jsonl: ") for problem in reading.problems)
    assert reading.problems


def test_more_rows_than_allowed_are_refused_together(tmp_path: Path) -> None:
    files = [put(tmp_path, f"{name}.csv", "input,output\n" + "a,b\n" * 40) for name in ("x", "y")]
    reading = read_several(DECODER, files, Settings.for_public(tmp_path))
    assert reading.problems == ("Together these are 80 rows; at most 64 are read: upload fewer.",)
