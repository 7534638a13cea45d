"""Tasks: which rows a specialist is analysed on, and which it is reported on; the two never mix.

Rows are divided once, by seed and content. What is chosen (settings, layers, shares) is chosen on the analysis rows;
held-out rows are only ever reported. This module knows rows and names of models; it opens no model and measures
nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from llm_merge.datasets_info import read_dataset
from llm_merge.demo import DEMO_MODELS
from llm_merge.errors import ExampleError
from llm_merge.examples import ExampleSet, Limits, read_examples, rows_hash, split

Row = Mapping[str, Any]
GENERAL = "general"
"""The name of a set that belongs to no specialist, unless the user says so."""
LONGEST_NAME = 60
_IN_A_FOLDER = re.compile(r"(?P<info>.+\.json):(?P<name>[^/\\]+)")


@dataclass(frozen=True)
class Task:
    """One task's rows.

    model      reference of the specialist that the task belongs to; "" for a general set
    analysis   rows that may decide
    held_out   rows that are reported and never decide
    same_rows  there were too few rows to divide: both are the same, and what is reported is optimistic
    """

    name: str
    model: str
    analysis: tuple[Row, ...]
    held_out: tuple[Row, ...]
    same_rows: bool = False

    @property
    def note(self) -> str:
        """One sentence for the reader about the rows."""
        many, held = len(self.analysis), len(self.held_out)
        if self.same_rows:
            return (
                f"{self.name}: {held} row{'s' if held != 1 else ''} to analyse and to report (same rows: optimistic)."
            )
        return f"{self.name}: {many} row{'s' if many != 1 else ''} to analyse, {held} held out."


def split_tasks(
    rows: Sequence[Row],
    owners: Mapping[str, str],
    *,
    seed: int = 0,
    analysis: int | None = None,
    held_out: Sequence[Row] = (),
) -> tuple[Task, ...]:
    """The tasks of the rows in order of appearance, each divided once by seed and content as `examples.split` does.

    owners     task → reference of its specialist; a task without one is a general set
    analysis   at most so many analysis rows per task, drawn by seed and content; None: all
    held_out   rows that are held out already, by their "task" (the demo's); such a task's other rows are all analysed

    A row that says the same as an earlier one of its task counts once, so that no row stands on both sides. Raises
    ExampleError for names or numbers that cannot be used.
    """
    if analysis is not None and analysis < 1:
        raise ExampleError([f"{analysis} analysis rows per task are too few: use at least 1."], field="analysis")
    by_task, ready = _by_task(rows), _by_task(held_out)
    if not by_task:
        raise ExampleError(["There are no example rows: pass at least one."])
    check_names(list(by_task))
    unknown = [name for name in owners if name not in by_task]
    if unknown:
        raise ExampleError([f"There are no rows of the task “{unknown[0]}”; there are {', '.join(by_task)}."])
    tasks = []
    for name, own in by_task.items():
        work, kept, same_rows = _divided(own, ready.get(name, []), seed)
        if analysis is not None and len(work) > analysis:
            drawn = {rows_hash([row]) for row in sorted(work, key=lambda row: _place(row, seed))[:analysis]}
            work = tuple(row for row in work if rows_hash([row]) in drawn)
        tasks.append(Task(name, owners.get(name, ""), work, kept, same_rows))
    return tuple(tasks)


def check_names(names: Sequence[str]) -> None:
    """Raises ExampleError unless all names are there, different (also to a reader), and at most 60 characters long."""
    problems, seen = [], dict[str, str]()
    for name in names:
        plain = name.strip().casefold()
        if not plain:
            problems.append("Some rows have no task: name the task of each.")
        elif len(name) > LONGEST_NAME:
            problems.append(f"The task “{name[:20]}…” has {len(name)} characters: use at most {LONGEST_NAME}.")
        elif plain in seen:
            problems.append(f"The tasks “{seen[plain]}” and “{name}” have the same name: rename one.")
        seen.setdefault(plain, name)
    if problems:
        raise ExampleError(problems, field="tasks")


def assign_owners(
    tasks: Sequence[str], models: Sequence[str], given: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Task → reference of the specialist it belongs to, one task for every specialist in `models`.

    What is `given` (task → reference, or its last part) counts; then a task with the specialist's own name, or the one
    that a demo model was made for; then the tasks that are left, in order of appearance, "general" excepted. Raises
    ExampleError for a specialist without a task, and for a given task or model that is not there.
    """
    models, owners = list(dict.fromkeys(models)), dict[str, str]()
    for task, name in (given or {}).items():
        if task not in tasks:
            raise ExampleError([f"There are no rows of the task “{task}”; there are {_listed(tasks)}."], field="tasks")
        called = [model for model in models if name == model] or [m for m in models if name == _name_of(m)]
        if len(called) != 1:
            names = ", ".join(map(_name_of, models))
            raise ExampleError([f"The task “{task}” is given to “{name}”; the specialists are {names}."], field="tasks")
        if called[0] in owners.values():
            raise ExampleError([f"“{_name_of(called[0])}” has two tasks: put their rows into one."], field="tasks")
        owners[task] = called[0]
    for model in models:
        own = (_name_of(model), _demo_task(model))
        fitting = [
            task for task in tasks if task not in owners and task.casefold() in {name.casefold() for name in own}
        ]
        if model not in owners.values() and fitting:
            owners[fitting[0]] = model
    left = [task for task in tasks if task not in owners and task.strip().casefold() != GENERAL]
    for model in models:
        # A demo model's task is known: another one would be a wrong guess.
        if model not in owners.values() and left and not _demo_task(model):
            owners[left.pop(0)] = model
    problems = [
        f"“{_name_of(model)}” has no task: name one of the tasks ({_listed(tasks)}) for it, or add rows for one."
        for model in models
        if model not in owners.values()
    ]
    if problems:
        raise ExampleError(problems, field="tasks")
    return {task: owners[task] for task in tasks if task in owners}


def tasks_from_files(
    files: Sequence[str], *, model_type: str, limits: Limits | None = None
) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    """Rows with their task, and notes, from files as the command line names them.

    Each is "task=file", whose rows all get that task, or "file", whose rows keep their own task, else get the file's
    name. A file is JSON, JSON Lines, CSV or TSV, or "dataset_info.json:name" for a set of LLaMA-Factory. Raises
    ExampleError with the file's name before each problem.
    """
    rows, notes, named = list[Row](), list[str](), list[str]()
    for text in files:
        task, path = _task_and_path(text)
        try:
            found = _read(path, model_type, limits)
        except ExampleError as error:
            raise ExampleError([f"{path}: {problem}" for problem in error.problems]) from error
        default = task or (path.rpartition(":")[2] if _IN_A_FOLDER.fullmatch(path) else PurePath(path).stem)
        own = [{**row, "task": task or row["task"].strip() or default} for row in found.rows]
        named += list(dict.fromkeys(row["task"] for row in own))
        rows += own
        notes += [f"{path}: {note}" for note in found.notes]
    check_names(named)
    return tuple(rows), tuple(notes)


def _task_and_path(text: str) -> tuple[str, str]:
    task, sign, path = text.partition("=")
    if not sign or Path(text).is_file():
        return "", text
    if not task.strip() or not path.strip():
        raise ExampleError([f"“{text}” does not say which file: write task=file, such as verse=verse.jsonl."])
    return task.strip(), path.strip()


def _read(path: str, model_type: str, limits: Limits | None) -> ExampleSet:
    match = _IN_A_FOLDER.fullmatch(path)
    if match and not Path(path).is_file():
        return read_dataset(Path(match["info"]), match["name"], model_type=model_type, limits=limits)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ExampleError([f"the file cannot be read ({error.strerror}): check its name."]) from error
    return read_examples(data, model_type=model_type, name=PurePath(path).name, limits=limits)


def _by_task(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Task → its rows, each once."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(str(row.get("task", "")), {}).setdefault(rows_hash([row]), row)
    return {task: list(own.values()) for task, own in found.items()}


def _divided(own: list[Row], ready: list[Row], seed: int) -> tuple[tuple[Row, ...], tuple[Row, ...], bool]:
    """Analysis rows, held-out rows, and whether they are the same."""
    if not ready:
        parts = split(own, seed)
        return parts.work, parts.held_out, parts.same_rows
    seen = {rows_hash([row]) for row in ready}
    work = tuple(row for row in own if rows_hash([row]) not in seen)
    return (work, tuple(ready), False) if work else (tuple(own), tuple(ready), True)


def _place(row: Row, seed: int) -> str:
    return hashlib.sha256(f"analysis {seed}\n{rows_hash([row])}".encode()).hexdigest()


def _name_of(model: str) -> str:
    """The last part of a reference, as people call it: the adapter's folder, or the model's name on the hub."""
    return re.split(r"[/\\]", model.rpartition("+")[2].rstrip("/\\"))[-1].partition("@")[0]


def _demo_task(model: str) -> str:
    """The task that a demo specialist was made for, "" for other models."""
    adapter = model.rpartition("+")[2]
    return next((known.task for known in DEMO_MODELS if known.base and known.reference == adapter), "")


def _listed(tasks: Sequence[str]) -> str:
    return ", ".join(tasks) or "none"
