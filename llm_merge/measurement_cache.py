"""What was measured, kept as small JSON files named by the content of model, settings and rows.

Two layers: a folder that came with the program (recorded beforehand, read only) and the user's own. A file that cannot
be read is as good as none: its content is measured again. This module knows numbers and hashes, no models.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from llm_merge.hashing import json_hash

VERSION = 1


@dataclass(frozen=True)
class Key:
    """What a measurement was made with. Equal keys, equal losses.

    model       content hash of the model (or of the mix)
    settings    hash of everything about reading the rows that changes a loss: format, length, tokenizer, batches
    dtype       type computed in, for example "float32"; "" finds any
    together    hash of all rows, where a row's loss depends on the others (embedding models); else ""
    """

    model: str
    settings: str
    dtype: str = ""
    together: str = ""


@dataclass(frozen=True)
class Measurement:
    """Losses of one model, in nats, one per row.

    rows            hash of each row
    name            what the model was called, for people; for a demo model its key
    base_hash       content hash of the base it stands on (its own for a whole model)
    adapter_hash    of the adapter's file, "" for a whole model
    measured_on     ISO date
    seconds         that measuring these rows took, without loading the model
    format          how the rows were written for the model, in one sentence
    """

    key: Key
    rows: tuple[str, ...]
    losses: tuple[float, ...]
    name: str = ""
    base_hash: str = ""
    adapter_hash: str = ""
    measured_on: str = ""
    seconds: float = 0.0
    format: str = ""


@dataclass(frozen=True)
class Found:
    """A remembered loss: when it was measured, and whether before the program was shipped."""

    loss: float
    measured_on: str
    recorded: bool


class MeasurementCache:
    """The user's measurements in `folder`, and those shipped in `recorded` (None: none). Safe between processes:
    files are only ever added, each written aside and renamed."""

    def __init__(self, folder: Path, recorded: Path | None = None) -> None:
        self.folder = folder
        self.recorded = recorded
        self._read: dict[Path, tuple[tuple[int, int], Measurement | None]] = {}

    def put(self, measurement: Measurement, folder: Path | None = None) -> Path | None:
        """Keep a measurement; without rows there is nothing to keep. A full or read-only disk is no reason to fail:
        it only has to be measured again. `folder` defaults to the user's own."""
        if not measurement.rows:
            return None
        place = folder or self.folder
        name = f"{measurement.key.model[:20]}-{json_hash([asdict(measurement.key), measurement.rows])[:20]}.json"
        text = json.dumps({"version": VERSION, **asdict(measurement)}, indent=None, separators=(",", ":"))
        try:
            place.mkdir(parents=True, exist_ok=True)
            handle, aside = tempfile.mkstemp(prefix=".measuring-", dir=place)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text + "\n")
                os.chmod(aside, 0o644)  # mkstemp's file is for its owner only; a cache may be shared
                os.replace(aside, place / name)
            except OSError:
                os.unlink(aside)
                raise
        except OSError:
            return None
        return place / name

    def find(self, key: Key, rows: Sequence[str]) -> dict[str, Found]:
        """Row hash → its loss, for the rows that are known; the user's own measurements before the shipped ones."""
        wanted, found = set(rows), dict[str, Found]()
        for measurement, recorded in self._of_model(key.model):
            if not _serves(measurement.key, key) or (key.together and measurement.rows != tuple(rows)):
                continue
            for row, loss in zip(measurement.rows, measurement.losses, strict=True):
                if row in wanted:
                    found.setdefault(row, Found(loss, measurement.measured_on, recorded))
        return found

    def get(self, key: Key, rows: Sequence[str]) -> tuple[Found, ...] | None:
        """The losses of all rows in their order, or None when one is missing."""
        found = self.find(key, rows)
        return tuple(found[row] for row in rows) if all(row in found for row in rows) else None

    def recordings(self) -> Iterator[Measurement]:
        """Everything that was shipped."""
        if self.recorded is not None:
            yield from self._in(self.recorded, "*.json")

    def own(self) -> Iterator[Measurement]:
        """Everything that was measured here."""
        yield from self._in(self.folder, "*.json")

    def _of_model(self, model: str) -> Iterator[tuple[Measurement, bool]]:
        for folder, recorded in ((self.folder, False), (self.recorded, True)):
            if folder is not None and model:
                yield from ((found, recorded) for found in self._in(folder, f"{model[:20]}-*.json"))

    def _in(self, folder: Path, pattern: str) -> Iterator[Measurement]:
        for path in sorted(folder.glob(pattern)):
            measurement = self._load(path)
            if measurement is not None:
                yield measurement

    def _load(self, path: Path) -> Measurement | None:
        try:
            stat = path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size)
            known = self._read.get(path)
            if known is None or known[0] != stamp:
                known = (stamp, parse(json.loads(path.read_text(encoding="utf-8"))))
                self._read[path] = known
        except (OSError, ValueError):
            return None
        return known[1]


def parse(data: Any) -> Measurement | None:
    """A measurement from its JSON form; None for anything else, also for one with a loss that is no number."""
    if not isinstance(data, Mapping) or data.get("version") != VERSION or not isinstance(data.get("key"), Mapping):
        return None
    rows, losses = data.get("rows"), data.get("losses")
    if not isinstance(rows, list) or not isinstance(losses, list) or len(rows) != len(losses) or not rows:
        return None
    if not all(isinstance(row, str) for row in rows) or not all(_finite(loss) for loss in losses):
        return None
    texts = {field.name: data["key"].get(field.name) for field in fields(Key)}
    about = {name: data.get(name, "") for name in ("name", "base_hash", "adapter_hash", "measured_on", "format")}
    seconds = data.get("seconds", 0.0)
    if not all(isinstance(text, str) for text in (*texts.values(), *about.values())) or not _finite(seconds):
        return None
    return Measurement(Key(**texts), tuple(rows), tuple(map(float, losses)), seconds=float(seconds), **about)


def _serves(has: Key, wants: Key) -> bool:
    same = (has.model, has.settings, has.together) == (wants.model, wants.settings, wants.together)
    return same and (not wants.dtype or wants.dtype == has.dtype)


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
