"""Tasks: the two sides never mix, nothing depends on the order of rows, and every specialist has a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_merge.demo import demo_model
from llm_merge.errors import ExampleError
from llm_merge.examples import rows_hash, split
from llm_merge.tasks import Task, assign_owners, check_names, split_tasks, tasks_from_files


def rows(task: str, count: int) -> list[dict[str, Any]]:
    return [{"input": f"{task} {number}?", "output": f"{number}", "task": task} for number in range(count)]


def keys(some: Any) -> set[str]:
    return {rows_hash([row]) for row in some}


@given(
    count=st.integers(1, 60), repeats=st.integers(0, 20), seed=st.integers(0, 3), most=st.none() | st.integers(1, 30)
)
def test_no_row_is_on_both_sides_unless_it_is_said(count: int, repeats: int, seed: int, most: int | None) -> None:
    own = rows("verse", count)
    (task,) = split_tasks([*own, *own[:repeats]], {}, seed=seed, analysis=most)
    assert task.same_rows == (count < 20)
    assert keys(task.analysis) <= keys(own)
    if task.same_rows:
        assert keys(task.held_out) == keys(own)
    else:
        assert not keys(task.analysis) & keys(task.held_out)
    assert len(task.analysis) == min(most or count, count if task.same_rows else count - count // 4)
    assert len(task.held_out) == (count if task.same_rows else count // 4)


@given(order=st.permutations(rows("a", 24) + rows("b", 30)))
def test_the_order_of_the_rows_decides_nothing(order: list[dict[str, Any]]) -> None:
    found = {task.name: task for task in split_tasks(order, {}, analysis=8)}
    again = {task.name: task for task in split_tasks(rows("a", 24) + rows("b", 30), {}, analysis=8)}
    for name, task in again.items():
        assert keys(found[name].analysis) == keys(task.analysis)
        assert keys(found[name].held_out) == keys(task.held_out)


def test_each_task_is_divided_as_examples_are_and_knows_its_owner() -> None:
    verse, general = split_tasks([*rows("verse", 40), *rows("general", 4)], {"verse": "my-verse"})
    parts = split(rows("verse", 40))
    assert verse == Task("verse", "my-verse", parts.work, parts.held_out)
    assert general == Task("general", "", tuple(rows("general", 4)), tuple(rows("general", 4)), same_rows=True)
    assert verse.note == "verse: 30 rows to analyse, 10 held out."
    assert general.note == "general: 4 rows to analyse and to report (same rows: optimistic)."
    other = split_tasks(rows("verse", 40), {}, seed=1)[0]
    assert keys(other.held_out) != keys(verse.held_out)


def test_ready_held_out_rows_are_reported_and_never_analysed() -> None:
    own = rows("verse", 10)
    (task,) = split_tasks(own, {}, held_out=[*own[7:], *rows("other", 3)])
    assert task.analysis == tuple(own[:7])
    assert task.held_out == tuple(own[7:])
    assert not task.same_rows
    (task,) = split_tasks(own[:3], {}, held_out=own)
    assert task.same_rows


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"rows": [], "owners": {}}, "There are no example rows: pass at least one."),
        ({"rows": rows("", 2), "owners": {}}, "Some rows have no task: name the task of each."),
        ({"rows": rows("verse", 2), "owners": {"verses": "m"}}, "There are no rows of the task “verses”; there are"),
        ({"rows": rows("verse", 2), "owners": {}, "analysis": 0}, "0 analysis rows per task are too few"),
    ],
)
def test_what_cannot_be_divided_is_said(arguments: dict[str, Any], sentence: str) -> None:
    own = arguments.pop("rows")
    with pytest.raises(ExampleError, match=sentence):
        split_tasks(own, arguments.pop("owners"), **arguments)


def test_names_are_there_short_and_different() -> None:
    check_names(["verse", "dictionary", "x" * 60])
    with pytest.raises(ExampleError) as caught:
        check_names(["verse", " ", "Verse", "x" * 61])
    assert list(caught.value.problems) == [
        "Some rows have no task: name the task of each.",
        "The tasks “verse” and “Verse” have the same name: rename one.",
        "The task “xxxxxxxxxxxxxxxxxxxx…” has 61 characters: use at most 60.",
    ]


# ── whose task it is ────────────────────────────────────────────────────────────────────────────────────────────────

VERSE = f"/cache/SmolLM2+{demo_model('king-james').reference}"
WORDS = f"/cache/SmolLM2+{demo_model('dictionary').reference}"


@pytest.mark.parametrize(
    ("tasks", "models", "explicit", "expected"),
    [
        (["law", "poems"], ["org/poems@v2", "org/law"], {}, {"law": "org/law", "poems": "org/poems@v2"}),
        (["a", "b"], ["x", "y"], {}, {"a": "x", "b": "y"}),
        (["a", "b"], ["x", "y"], {"a": "y"}, {"a": "y", "b": "x"}),
        (["a", "b"], ["org/x", "org/y"], {"a": "y"}, {"a": "org/y", "b": "org/x"}),
        (["general", "b", "a"], ["x", "a"], {}, {"b": "x", "a": "a"}),
        (["general"], ["x"], {"general": "x"}, {"general": "x"}),
        (["dictionary", "general", "verse"], [VERSE, WORDS], {}, {"dictionary": WORDS, "verse": VERSE}),
    ],
)
def test_tasks_find_their_specialists(
    tasks: list[str], models: list[str], explicit: dict[str, str], expected: dict[str, str]
) -> None:
    assert assign_owners(tasks, models, explicit) == expected


@pytest.mark.parametrize(
    ("tasks", "models", "explicit", "sentence"),
    [
        (["a"], ["x", "org/y"], {}, "“y” has no task: name one of the tasks (a) for it, or add rows for one."),
        (["general"], ["x"], {}, "“x” has no task: name one of the tasks (general) for it, or add rows for one."),
        (["a", "general"], [VERSE], {}, "“king-james” has no task: name one of the tasks (a, general) for it, or add "
         "rows for one."),
        (["a"], ["x"], {"b": "x"}, "There are no rows of the task “b”; there are a."),
        (["a"], ["x"], {"a": "z"}, "The task “a” is given to “z”; the specialists are x."),
        (["a", "b"], ["x"], {"a": "x", "b": "x"}, "“x” has two tasks: put their rows into one."),
    ],
)  # fmt: skip
def test_a_specialist_without_a_task_is_named(
    tasks: list[str], models: list[str], explicit: dict[str, str], sentence: str
) -> None:
    with pytest.raises(ExampleError) as caught:
        assign_owners(tasks, models, explicit)
    assert list(caught.value.problems) == [sentence]


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "lines.jsonl").write_text('{"input": "1?", "output": "1"}\n{"input": "2?", "output": "2"}\n')
    (tmp_path / "mixed.csv").write_text("task,input,output\nsums,1?,1\n,2?,2\n")
    (tmp_path / "broken.csv").write_text("input,output\n1?,\n")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"own": {"file_name": "lines.jsonl", "columns": {
        "prompt": "input", "response": "output"}}}))  # fmt: skip
    return tmp_path


def test_files_give_rows_with_their_task(folder: Path) -> None:
    found, notes = tasks_from_files([f"verse={folder}/lines.jsonl", f"{folder}/mixed.csv"], model_type="decoder")
    assert [row["task"] for row in found] == ["verse", "verse", "sums", "mixed"]
    assert notes == ()
    named, _ = tasks_from_files([f"verse={folder}/mixed.csv"], model_type="decoder")
    assert [row["task"] for row in named] == ["verse", "verse"]


def test_a_set_of_a_dataset_info_is_a_file_too(folder: Path) -> None:
    for text, task in ((f"{folder}/dataset_info.json:own", "own"), (f"v={folder}/dataset_info.json:own", "v")):
        found, _ = tasks_from_files([text], model_type="decoder")
        assert [(row["input"], row["task"]) for row in found] == [("1?", task), ("2?", task)]


def test_what_is_wrong_with_a_file_is_said_with_its_name(folder: Path) -> None:
    def problem(*files: str) -> str:
        with pytest.raises(ExampleError) as caught:
            tasks_from_files(files, model_type="decoder")
        return caught.value.problems[0]

    path = f"{folder}/broken.csv"
    assert problem(f"v={path}") == f"{path}: Line 2: the answer (column “output”) is empty."
    assert problem("v=none.csv") == ("none.csv: the file cannot be read (No such file or directory): check its name.")
    assert problem("v=") == "“v=” does not say which file: write task=file, such as verse=verse.jsonl."
    assert problem(f"v={folder}/lines.jsonl", f"V={folder}/mixed.csv") == (
        "The tasks “v” and “V” have the same name: rename one."
    )
