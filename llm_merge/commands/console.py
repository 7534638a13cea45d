"""What the commands write, and the only place that writes: results to standard output, all else to standard error.

With `--json` standard output holds one JSON value and nothing more. Progress is one line that is written over on a
terminal, and a line every tenth of the way in a log.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TextIO

from llm_merge.contribution_report import Stat

CLEAR = "\r\x1b[2K"


def write(stream: TextIO, text: str) -> None:
    """Text as it is. What the stream's encoding cannot say (γ in an old Windows console) becomes a question mark."""
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, errors="replace").decode(encoding))
    stream.flush()


class Console:
    """Where a command's words go.

    json    results are one JSON value; what would be text goes to standard error
    quiet   neither progress nor notes
    silent  another process speaks for this one: only errors are written
    """

    def __init__(self, *, json: bool = False, quiet: bool = False, silent: bool = False) -> None:
        self.json, self.quiet, self.silent = json, quiet, silent
        self._open_line = False
        self._last: tuple[str, int] = ("", -1)

    def say(self, text: str) -> None:
        """A part of the result, for people."""
        if self.json:
            self.note(text)
        elif not self.silent:
            self._end_line()
            write(sys.stdout, f"{text}\n")

    def result(self, value: Any) -> None:
        """The whole result, for programs; written only with `--json`. What is not a number is null."""
        if self.json and not self.silent:
            self._end_line()
            write(sys.stdout, json.dumps(plain(value), ensure_ascii=False) + "\n")

    def note(self, text: str) -> None:
        """Something worth knowing beside the result."""
        if not (self.quiet or self.silent):
            self._end_line()
            write(sys.stderr, f"{text}\n")

    def error(self, text: str) -> None:
        self._end_line()
        write(sys.stderr, f"{text}\n")

    def progress(self, phase: str, text: str, done: int, total: int) -> None:
        """How far a phase is: `done` of `total`."""
        if self.quiet or self.silent:
            return
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            write(sys.stderr, CLEAR + text[:width])
            self._open_line = True
            return
        tenth = 10 * done // max(total, 1)
        if (phase, tenth) != self._last:
            self._last = (phase, tenth)
            write(sys.stderr, f"{text}\n")

    def _end_line(self) -> None:
        if self._open_line:
            self._open_line = False
            write(sys.stderr, CLEAR)


@contextmanager
def stopping(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C sets `stop` for as long as the block lasts, so that work ends where nothing is half done; the second one
    interrupts. Only the main thread can receive it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns under their heads, the first and the last from the left, numbers from the right."""
    widths = [max(len(line[column]) for line in (head, *lines)) for column in range(len(head))]
    last = len(head) - 1

    def row(line: Sequence[str]) -> str:
        cells = [
            text.ljust(width) if column in (0, last) else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join(row(line) for line in (head, *lines))


def stat_text(stat: Stat | None, *, signed: bool = True) -> str:
    """ "+0.0123 ± 0.0045", "≈ +0.0123" for an estimate, "–" for what is not known."""
    if stat is None:
        return "–"
    value = number_text(stat.value, "+" if signed else "")
    if stat.estimated:
        return f"≈ {value}"
    return f"{value} ± {number_text(stat.error)}" if math.isfinite(stat.error) else value


def number_text(value: float, sign: str = "") -> str:
    small = value != 0 and abs(value) < 0.001
    return f"{value:{sign}.1e}" if small else f"{value:{sign}.4f}"


def stat_dict(stat: Stat | None) -> dict[str, Any] | None:
    return None if stat is None else asdict(stat)


def time_text(seconds: float) -> str:
    """ "40 s", "3 min", "2.5 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def plain(value: Any) -> Any:
    """The value with null for every number that is not finite: JSON has none of those."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value
