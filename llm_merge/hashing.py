"""Content hashes of model files, so that a measurement can name exactly what it was made with.

Hashing a file costs a second per gigabyte, so each file's hash is remembered on disk by path, size and time of change.
This module knows files only; what belongs to a model's identity is decided in `checkpoint.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_REMEMBERED = 5000
"""Files kept in the memory on disk; the oldest are forgotten first."""

_lock = threading.Lock()


def file_hash(path: Path) -> str:
    """SHA-256 of the file's bytes, in hex. Raises OSError when it cannot be read."""
    path = path.resolve()
    stat = path.stat()
    key = f"{path}|{stat.st_size}|{stat.st_mtime_ns}"
    with _lock:
        known = _load().get(key)
    if isinstance(known, str):
        return known
    with path.open("rb") as file:
        result = hashlib.file_digest(file, "sha256").hexdigest()
    with _lock:
        _store(key, result)
    return result


def combined_hash(parts: Iterable[str]) -> str:
    """SHA-256 over the parts in their order; lengths are hashed too, so that ("ab", "c") is not ("a", "bc")."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def json_hash(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return combined_hash([json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)])


def _memory() -> Path:
    from llm_merge.demo import cache_folder

    return cache_folder() / "hashes.json"


def _load() -> dict[str, Any]:
    """What is remembered; nothing when the file is missing or damaged, since it can always be computed again."""
    try:
        data = json.loads(_memory().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _store(key: str, value: str) -> None:
    """Written aside and renamed, so that a second process never reads half a file. A full or read-only disk is no
    reason to fail: the hash is right, and only has to be computed again next time.
    """
    data = _load()
    data.pop(key, None)
    data[key] = value
    kept = dict(list(data.items())[-_REMEMBERED:])
    memory = _memory()
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(prefix=".hashes-", dir=memory.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(kept, file, indent=0)
            os.replace(aside, memory)
        except OSError:
            os.unlink(aside)
    except OSError:
        pass
