"""Several example files at once: each a task called after it, or LLaMA-Factory's files with its dataset_info.json.

Files are read in a folder of their own and forgotten; nothing outside of it is opened.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from components.session import Row, Session
from components.settings import Settings
from components.views.examples import Reading, limits
from llm_merge.datasets_info import read_dataset, read_dataset_info
from llm_merge.errors import ExampleError
from llm_merge.examples import read_examples

DATASET_INFO = "dataset_info.json"


def read_several(session: Session, files: Sequence[Path], settings: Settings) -> Reading:
    """Several files at once: each is a task called after it; with LLaMA-Factory's dataset_info.json, the sets it names.

    A file that cannot be used leaves the session as it was, with every problem said.
    """
    most, source = limits(settings), f"{len(files)} files"
    rows: list[Row] = []
    notes, problems = list[str](), list[str]()
    with tempfile.TemporaryDirectory(prefix="llm-merge-rows-") as folder:
        for file in files:
            shutil.copyfile(file, Path(folder) / file.name)
        info = Path(folder) / DATASET_INFO
        try:
            names = _sets_of(info, files) if info.is_file() else [file.name for file in files]
        except ExampleError as error:
            return Reading(session, problems=error.problems, source=source)
        for name in names:
            try:
                if info.is_file():
                    found = read_dataset(info, name, model_type=session.model_type, limits=most)
                else:
                    data = (Path(folder) / name).read_bytes()
                    found = read_examples(data, model_type=session.model_type, name=name, limits=most)
                task = Path(name).stem
                rows += [{**row, "task": row.get("task") or task} for row in found.rows]
                notes += [f"{name}: {note}" for note in found.notes]
            except ExampleError as error:
                problems += [f"{name}: {problem}" for problem in error.problems]
    if not problems and len(rows) > most.rows:
        problems.append(f"Together these are {len(rows)} rows; at most {most.rows} are read: upload fewer.")
    if problems:
        return Reading(session, problems=tuple(problems), source=source)
    tasks = ", ".join(dict.fromkeys(str(row["task"]) for row in rows))
    return Reading(session.with_rows(rows, source, ()), "tasks " + tasks, notes=tuple(notes), source=source)


def _sets_of(info: Path, files: Sequence[Path]) -> list[str]:
    """Names of the sets of a dataset_info.json whose files were uploaded beside it."""
    uploaded = {file.name for file in files}
    known = read_dataset_info(info)
    names = [name for name, entry in known.items() if entry.file is not None and entry.file.name in uploaded]
    if not names:
        wanted = ", ".join(entry.file.name for entry in known.values() if entry.file is not None) or "none that is read"
        raise ExampleError([f"{DATASET_INFO} names the files {wanted}: upload those you want together with it."])
    return names
