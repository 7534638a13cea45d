"""Measured cells kept on disk by content: a merge, rows and a metric are measured once, whatever analysis asks.

Lines of JSON, added as they are measured, one file per process that writes: a crash loses at most the line it was
writing, and processes on several machines can share a folder. This module knows hashes and numbers, no models.
"""

from __future__ import annotations

import json
import math
import os
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path


class CellStore:
    """Values by key. `folder` None keeps them in memory only. A file that cannot be read or written is no error: what
    it held is measured again. Safe between threads and between processes."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._values: dict[str, tuple[float, ...]] = {}
        self._sizes: dict[Path, int] = {}
        self._own: Path | None = None

    def get(self, key: str) -> tuple[float, ...] | None:
        """The values, or None. Looks at the files again only for a key that is not known."""
        with self._lock:
            if key not in self._values:
                self._read_new()
            return self._values.get(key)

    def put(self, key: str, values: Sequence[float]) -> None:
        """Keep the values; written at once."""
        kept = tuple(float(value) for value in values)
        if not kept or not all(math.isfinite(value) for value in kept):
            return
        with self._lock:
            self._values[key] = kept
            if self._folder is None:
                return
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                if self._own is None:
                    self._own = self._folder / f"{uuid.uuid4().hex[:12]}.jsonl"
                line = json.dumps({"key": key, "values": kept}, separators=(",", ":")) + "\n"
                with self._own.open("a", encoding="utf-8") as file:
                    file.write(line)
                self._sizes[self._own] = self._own.stat().st_size
            except OSError:
                self._own = None  # it may end in half a line: what comes next goes into another file

    def _read_new(self) -> None:
        """What other processes have added since."""
        if self._folder is None:
            return
        try:
            with os.scandir(self._folder) as entries:
                files = [(Path(e.path), e.stat().st_size) for e in entries if e.name.endswith(".jsonl")]
        except OSError:
            return
        for path, size in files:
            seen = self._sizes.get(path, 0)
            if size <= seen:
                continue
            try:
                with path.open("rb") as file:
                    file.seek(seen)
                    data = file.read()
            except OSError:
                continue
            whole = data[: data.rfind(b"\n") + 1]  # a line that is being written is read next time
            self._sizes[path] = seen + len(whole)
            for line in whole.splitlines():
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            values = tuple(float(value) for value in entry["values"])
            if isinstance(entry["key"], str) and values and all(map(math.isfinite, values)):
                self._values.setdefault(entry["key"], values)
        except (ValueError, KeyError, TypeError):
            return
