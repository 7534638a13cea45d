"""Making the demo's base models ready, once per machine: in the background when the app starts, with its progress for
whoever needs one of them sooner. Knows which references are the demo's; the conversion itself is `llm_merge.demo`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence

from components.jobs import Step
from llm_merge.demo import DEMO_MODELS, demo_path, is_prepared, prepare
from llm_merge.errors import MergeError, Stopped

log = logging.getLogger(__name__)

_turn = threading.Lock()
_latest: dict[str, tuple[str, float]] = {}  # what the thread whose turn it is said last, by base key


def unprepared(references: Sequence[str]) -> tuple[str, ...]:
    """Keys of the demo bases that these references need and that are not ready."""
    needed: dict[str, None] = {}
    for model in DEMO_MODELS:
        if demo_path(model.key) in references and not is_prepared(model.key):
            needed[model.base or model.key] = None
    return tuple(needed)


def prepare_steps(references: Sequence[str], stop: threading.Event | None = None) -> Iterator[Step]:
    """Make ready what these references need; nothing to do for models that are no demo. Raises Stopped."""
    for key in unprepared(references):
        while not _turn.acquire(timeout=0.3):  # another thread converts: show its progress
            message, fraction = _latest.get(key, ("Waiting for the demo models", 0.0))
            yield Step(message, fraction)
            if stop is not None and stop.is_set():
                raise Stopped
        try:
            for message, fraction in prepare(key):
                _latest[key] = (message, fraction)
                yield Step(message, fraction)
                if stop is not None and stop.is_set():
                    raise Stopped
        except OSError as error:
            raise MergeError(f"The demo model could not be made ready: {error}. Free some disk space.") from error
        finally:
            _turn.release()


def prepare_in_background() -> threading.Thread:
    """Make every demo base ready while the visitor looks at what is recorded. Errors show when a model is needed."""

    def run() -> None:
        try:
            for _ in prepare_steps([demo_path(model.key) for model in DEMO_MODELS]):
                pass
        except Exception:
            log.exception("the demo models could not be made ready")

    thread = threading.Thread(target=run, daemon=True, name="prepare demo")
    thread.start()
    return thread
