"""LLaMA-Factory's data folders as example rows: `dataset_info.json` with the alpaca and sharegpt files that it names.

Follows the keys documented in LLaMA-Factory's data/README.md, and its reader in that a `columns` entry names all the
columns that are read. Of a conversation the last answer is the one measured, as everywhere here. Preference, multimodal
and pre-training sets are refused; nothing is downloaded, and no file outside the folder is opened.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm_merge.errors import ExampleError
from llm_merge.example_columns import RETRIEVAL_TYPES, Columns, check_model_type
from llm_merge.example_rows import Row, last_answer, last_question
from llm_merge.example_values import BadRow, as_text, is_empty, unpacked
from llm_merge.examples import ExampleSet, make_rows, repeated_note
from llm_merge.read_examples import Limits, Record, Table, parse_examples
from llm_merge.read_json import kind_of

FORMATTINGS = ("alpaca", "sharegpt")
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
ELSEWHERE = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
PREFERENCES = ("chosen", "rejected", "kto_tag")
MEDIA = ("images", "videos", "audios")
TABLES = (".parquet", ".arrow")


@dataclass(frozen=True)
class Dataset:
    """One entry of a dataset_info.json.

    file        the file it names; None if that cannot be read here
    formatting  "alpaca" or "sharegpt"
    columns     what a column is for (prompt, query, response, system, history, messages, tools) → its name
    tags        LLaMA-Factory's tag → the word that the file uses
    problem     one sentence if the set cannot be read here, else ""
    """

    name: str
    file: Path | None
    formatting: str
    columns: Mapping[str, str]
    tags: Mapping[str, str]
    problem: str = ""


def read_dataset_info(source: Path | str, folder: Path | None = None) -> dict[str, Dataset]:
    """A dataset_info.json (its path, or its text with the folder that it lies in) → name → entry, in its order.

    Sets that cannot be read have their reason in `problem`. Raises ExampleError if it is not such a file.
    """
    if isinstance(source, Path):
        folder = folder or source.parent
        try:
            source = source.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ExampleError([f"{source} cannot be read: give the path of a dataset_info.json."]) from error
    try:
        entries = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise ExampleError([f"dataset_info.json is not valid JSON ({error}): repair it."]) from error
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ExampleError(['dataset_info.json must hold an object of name → {"file_name": …}.'])
    return {name: _entry(name, entry, folder or Path()) for name, entry in entries.items()}


def read_dataset(info_path: Path, name: str, *, model_type: str, limits: Limits | None = None) -> ExampleSet:
    """The rows of one set of a dataset_info.json, for chat and encoder-decoder models.

    Rows with tool calls are left out, and a note says how many. Raises ExampleError for an unknown set, one that cannot
    be read here, and for rows that cannot be used, each with its place.
    """
    check_model_type(model_type)
    if model_type in RETRIEVAL_TYPES:
        raise ExampleError(
            ["LLaMA-Factory's sets hold questions and answers, for chat models; an embedding model needs passages."]
        )
    known = read_dataset_info(Path(info_path))
    if name not in known:
        close = difflib.get_close_matches(name, list(known), n=1)
        meant = f" Did you mean “{close[0]}”?" if close else ""
        some = ", ".join(list(known)[:20]) + (", …" if len(known) > 20 else "")
        raise ExampleError([f"{info_path} has no set “{name}”.{meant} It has {some or 'none'}."])
    entry = known[name]
    if entry.problem or entry.file is None:
        raise ExampleError([entry.problem])
    limits = limits or Limits()
    table = parse_examples(_content(entry.file, limits), name=entry.file.name, limits=limits)
    kept = [record for record in table.records if not _has_tools(record, entry)]
    left_out = len(table.records) - len(kept)
    if left_out and not kept:
        raise ExampleError([f"Every row of “{name}” has tool calls, which are not read: choose another set."])
    make = _alpaca if entry.formatting == "alpaca" else _sharegpt
    rows = make_rows(replace(table, records=tuple(kept)), lambda record: make(record, entry), limits)
    many = "rows with tool calls were" if left_out > 1 else "row with tool calls was"
    notes = (f"{left_out} {many} left out.",) if left_out else ()
    notes = (*table.notes, *_unused(table, entry), *notes, *repeated_note(rows))
    return ExampleSet(tuple(rows), model_type, _columns(entry), f"{entry.formatting} {table.format}", notes)


def _columns(entry: Dataset) -> Columns:
    names = entry.columns
    if entry.formatting == "sharegpt":
        return Columns(names["messages"])
    return Columns(names["prompt"], names["response"], context=names.get("query", ""))


def _unused(table: Table, entry: Dataset) -> tuple[str, ...]:
    unused = [name for name in table.names if name not in entry.columns.values()]
    return (f"Not used: {', '.join(unused)}.",) if unused else ()


# ---- entries ---------------------------------------------------------------------------------------------------------


def _entry(name: str, entry: Mapping[str, Any], folder: Path) -> Dataset:
    formatting = str(entry.get("formatting") or "alpaca")
    stated, tags = entry.get("columns"), entry.get("tags")
    columns = {key: str(column) for key, column in (stated if isinstance(stated, dict) else {}).items() if column}
    words = TAGS | {key: str(tag) for key, tag in (tags if isinstance(tags, dict) else {}).items() if tag}
    file = _inside(folder, entry.get("file_name"))
    problem = _problem(name, entry, formatting, columns, file)
    columns = _with_defaults(columns, formatting, isinstance(stated, dict))
    return Dataset(name, None if problem else file, formatting, columns, words, problem)


def _with_defaults(columns: dict[str, str], formatting: str, stated: bool) -> dict[str, str]:
    """What is not named is not read, but for what no set can be without; with nothing named all defaults count."""
    needed = ("messages",) if formatting == "sharegpt" else ("prompt",) if stated else ("prompt", "query", "response")
    return {key: COLUMNS[key] for key in needed} | columns


def _problem(
    name: str, entry: Mapping[str, Any], formatting: str, columns: Mapping[str, str], file: Path | None
) -> str:
    """Why a set cannot be read here, and what to do; "" if it can."""
    if formatting not in FORMATTINGS:
        return f"“{name}” has the formatting “{formatting}”; alpaca and sharegpt are read: convert it to one of them."
    if entry.get("ranking") or any(key in columns for key in PREFERENCES):
        return f"“{name}” is a preference set (better and worse answers): choose a set with one right answer a row."
    if any(key in columns for key in MEDIA):
        return f"“{name}” has images, video or sound, and only text is read: choose a set of text."
    if formatting == "alpaca" and isinstance(entry.get("columns"), dict) and "response" not in columns:
        return f"“{name}” names no response column, as for pre-training: choose a set with questions and answers."
    if not entry.get("file_name"):
        if place := next((key for key in ELSEWHERE if entry.get(key)), ""):
            return (
                f"“{name}” is not in the folder but at {entry[place]} ({place}): download its file into the folder and "
                "name it as file_name."
            )
        return f"“{name}” names no file: give it a file_name."
    if file is None:
        return f"“{name}” names the file {entry['file_name']}, which is outside its folder: copy it into the folder."
    if file.suffix.lower() in TABLES:
        return f"“{name}” is a {file.suffix.lower()[1:]} file; JSON, JSON Lines and CSV are read: convert it."
    if file.is_dir():
        return f"“{name}” is the folder {entry['file_name']}: name one file in it."
    return ""


def _inside(folder: Path, file_name: object) -> Path | None:
    """The file, links followed, if it lies in the folder."""
    if not isinstance(file_name, str) or not file_name or "\x00" in file_name:
        return None
    path = (folder / file_name).resolve()
    return path if path.is_relative_to(folder.resolve()) else None


def _content(file: Path, limits: Limits) -> bytes:
    try:
        size = file.stat().st_size
        if size > 4 * limits.characters:
            raise ExampleError(
                [f"{file.name} has {size:,} bytes; at most {4 * limits.characters:,} are read: leave out some rows."]
            )
        return file.read_bytes()
    except OSError as error:
        raise ExampleError(
            [f"{file} cannot be read ({error.strerror}): check file_name in dataset_info.json."]
        ) from error


# ---- rows ------------------------------------------------------------------------------------------------------------


def _has_tools(record: Record, entry: Dataset) -> bool:
    """Tool descriptions, calls or results: each chat model writes them in its own way, which is not known here."""
    tools = unpacked(record.values.get(entry.columns.get("tools", "")))
    if not is_empty(tools):
        return True
    if entry.formatting == "alpaca":
        return False
    turns = unpacked(record.values.get(entry.columns["messages"]))
    words = (entry.tags["observation_tag"], entry.tags["function_tag"])
    role = entry.tags["role_tag"]
    return isinstance(turns, list) and any(isinstance(turn, Mapping) and turn.get(role) in words for turn in turns)


def _alpaca(record: Record, entry: Dataset) -> Row:
    """system, then the turns of history, then prompt and query on two lines; the response is the answer."""
    names = entry.columns
    for key in ("prompt", "response"):
        if names[key] not in record.values:
            raise BadRow(f"there is no “{names[key]}” in this row (it has {', '.join(map(str, record.values))}).")
    parts = [_text(record, names.get(key, "")) for key in ("prompt", "query")]
    question = "\n".join(part for part in parts if part)
    turns = [*_system(record, names), *_history(record, names.get("history", ""))]
    turns.append({"role": "user", "content": question})
    return _row(record, turns, _text(record, names["response"]), (names["prompt"], names["response"]))


def _sharegpt(record: Record, entry: Dataset) -> Row:
    """The turns by their tags; a system turn at the start counts instead of the system column."""
    names, tags = entry.columns, entry.tags
    name = names["messages"]
    value = unpacked(record.values.get(name))
    if not isinstance(value, list) or not value:
        raise BadRow(f"“{name}” is {kind_of(value)}; a list of turns was expected.")
    speakers = {tags["user_tag"]: "user", tags["assistant_tag"]: "assistant", tags["system_tag"]: "system"}
    turns = []
    for number, turn in enumerate(value, start=1):
        what = f"turn {number} of “{name}”"
        if not isinstance(turn, Mapping) or not {tags["role_tag"], tags["content_tag"]} <= turn.keys():
            raise BadRow(f"{what} has no “{tags['role_tag']}” and “{tags['content_tag']}”: check the tags.")
        speaker = turn[tags["role_tag"]]
        if speaker not in speakers:
            raise BadRow(f"{what} is by “{speaker}”; {', '.join(speakers)} was expected: check the tags.")
        turns.append({"role": speakers[speaker], "content": as_text(turn[tags["content_tag"]], what)})
    if turns[0]["role"] != "system":
        turns = [*_system(record, names), *turns]
    turns, answer = last_answer(turns, name)
    return _row(record, turns, answer, (name, name))


def _row(record: Record, turns: list[dict[str, str]], answer: str, names: tuple[str, str]) -> Row:
    """`names`: the columns of question and answer."""
    question = last_question(turns)
    if not question.strip():
        raise BadRow(f"the question (column “{names[0]}”) is empty.")
    if not answer.strip():
        raise BadRow(f"the answer (column “{names[1]}”) is empty.")
    row: dict[str, Any] = {"input": question, "output": answer}
    if len(turns) > 1:
        row["messages"] = turns
    return {**row, "task": record.task.strip()}


def _system(record: Record, names: Mapping[str, str]) -> list[dict[str, str]]:
    text = _text(record, names.get("system", ""))
    return [{"role": "system", "content": text}] if text else []


def _history(record: Record, name: str) -> list[dict[str, str]]:
    value = unpacked(record.values.get(name))
    if is_empty(value):
        return []
    if not isinstance(value, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
        raise BadRow(f"“{name}” is {kind_of(value)}; a list of [question, answer] pairs was expected.")
    turns = []
    for pair in value:
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": as_text(text, f"a turn of “{name}”")})
    return turns


def _text(record: Record, name: str) -> str:
    return as_text(record.values.get(name), f"“{name}”")
