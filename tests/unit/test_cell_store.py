"""Measured cells on disk: seen by every process that shares the folder, and never worse than not being there."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from llm_merge.cell_store import CellStore

REPOSITORY = Path(__file__).resolve().parents[2]


def test_what_one_keeps_another_sees_at_once_and_to_the_bit(tmp_path: Path) -> None:
    one, other = CellStore(tmp_path / "cells"), CellStore(tmp_path / "cells")
    assert other.get("a") is None
    one.put("a", (0.1, -1 / 3, 1e-300))
    assert other.get("a") == (0.1, -1 / 3, 1e-300)
    other.put("b", (2,))
    assert one.get("b") == (2.0,)
    assert CellStore(tmp_path / "cells").get("a") == (0.1, -1 / 3, 1e-300)


def test_another_process_s_cells_are_seen(tmp_path: Path) -> None:
    store = CellStore(tmp_path)
    assert store.get("a") is None
    code = f"from llm_merge.cell_store import CellStore; from pathlib import Path; CellStore(Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", f"{code}.put('a', (1.5, 2))"], check=True, cwd=REPOSITORY)
    assert store.get("a") == (1.5, 2.0)


def test_without_a_folder_they_are_kept_in_memory(tmp_path: Path) -> None:
    store = CellStore(None)
    store.put("a", (1.0,))
    assert store.get("a") == (1.0,)
    assert CellStore(None).get("a") is None


def test_half_a_line_is_read_when_it_is_whole(tmp_path: Path) -> None:
    file, store = tmp_path / "theirs.jsonl", CellStore(tmp_path)
    file.write_text('{"key":"a","values":[1.0]}\n{"key":"b","val')
    assert store.get("a") == (1.0,)
    assert store.get("b") is None
    with file.open("a") as more:
        more.write('ues":[2.0]}\n')
    assert store.get("b") == (2.0,)


def test_a_torn_last_line_is_ignored_and_measured_again(tmp_path: Path) -> None:
    (tmp_path / "dead.jsonl").write_text('{"key":"a","values":[1.0]}\n{"key":"b","values":[2.')
    store = CellStore(tmp_path)
    assert (store.get("a"), store.get("b")) == ((1.0,), None)
    store.put("b", (3.0,))
    assert CellStore(tmp_path).get("b") == (3.0,)


@pytest.mark.parametrize(
    "line", ["", "nonsense", "[]", "{}", '{"key":1,"values":[1]}', '{"key":"a","values":[]}', '{"key":"a","values":3}',
             '{"key":"a","values":[NaN]}', "\xff"],
)  # fmt: skip
def test_lines_that_say_nothing_are_passed_over(tmp_path: Path, line: str) -> None:
    (tmp_path / "odd.jsonl").write_bytes(line.encode("latin-1") + b'\n{"key":"b","values":[2]}\n')
    store = CellStore(tmp_path)
    assert (store.get("a"), store.get("b")) == (None, (2.0,))


def test_a_folder_that_cannot_be_used_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = CellStore(tmp_path / "file")
    store.put("a", (1.0,))
    assert store.get("a") == (1.0,)
    assert store.get("b") is None
    (tmp_path / "odd.jsonl").mkdir()
    assert CellStore(tmp_path).get("a") is None


def test_after_a_failed_write_the_next_cell_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk may leave half a line; what is written once there is room must not be glued to it."""
    store = CellStore(tmp_path)
    store.put("a", (1.0,))
    (own,) = tmp_path.glob("*.jsonl")
    path = type(own)

    def full(self: Path, *args: object, **kwargs: object) -> object:
        with open(self, "ab") as file:
            file.write(b'{"key":"b","val')
        raise OSError("no space left on the device")

    with monkeypatch.context() as patched:
        patched.setattr(path, "open", full)
        store.put("b", (2.0,))
    store.put("c", (3.0,))
    fresh = CellStore(tmp_path)
    assert (fresh.get("a"), fresh.get("b"), fresh.get("c")) == ((1.0,), None, (3.0,))


def test_values_that_are_no_numbers_are_not_kept(tmp_path: Path) -> None:
    store = CellStore(tmp_path)
    store.put("a", ())
    store.put("b", (1.0, math.nan))
    assert (store.get("a"), store.get("b")) == (None, None)
    assert not list(tmp_path.iterdir())
