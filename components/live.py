"""Models held in memory to answer and to embed: a bounded pool that lends each of them to one task at a time.

A lent model follows the borrower's recipe before it is used and belongs to nobody else meanwhile, so one visitor's mix
never speaks in another's answer. Idle models are given up, the longest unused first, when the budget asks for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from components.settings import Settings
from llm_merge.errors import MergeError, Stopped
from llm_merge.recipe import Recipe

if TYPE_CHECKING:
    from llm_merge.checkpoint import Checkpoint
    from llm_merge.workbench import Workbench

WAIT = 60.0
"""Seconds to wait for a model that somebody else is using."""

Key = tuple[str, str, str]


@dataclass
class _Held:
    """One resident model; `bench` is None while it is being built."""

    key: Key
    nbytes: int
    bench: Workbench | None = None
    busy: bool = True
    used: float = field(default_factory=time.monotonic)


class LiveModels:
    """The pool. Thread-safe. `build` is `Workbench`, or a test's fake of it."""

    def __init__(self, build: Callable[[Checkpoint, str, str], Any] | None = None) -> None:
        self._build = build
        self._held: list[_Held] = []
        self._changed = threading.Condition()

    @property
    def nbytes(self) -> int:
        """Bytes of all resident models."""
        with self._changed:
            return sum(held.nbytes for held in self._held)

    @contextmanager
    def borrow(
        self,
        base: str,
        model_type: str,
        recipes: Sequence[Recipe],
        settings: Settings,
        stop: threading.Event | None = None,
    ) -> Iterator[list[Workbench]]:
        """As many models of the base's architecture as the budget allows, at least one, at most one per recipe.

        Models that hold one of the recipes already are preferred: `follow` then has nothing to do. Raises MergeError
        when not even one fits, or when all that fit stay in use for a minute; Stopped when asked to stop.
        """
        from llm_merge.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(base)
        reason = why_not(checkpoint, settings)
        if reason:
            raise MergeError(reason, field="device")
        key = (model_type, base, settings.device)
        size = memory_of(checkpoint, settings)
        lent = self._take(key, size, recipes, settings.live_memory, stop)
        try:
            self._build_promised(lent, checkpoint)
            yield [held.bench for held in lent if held.bench is not None]
        finally:
            with self._changed:
                for held in lent:
                    held.busy, held.used = False, time.monotonic()
                    if held.bench is None:  # it could not be built
                        self._held.remove(held)
                self._changed.notify_all()

    def clear(self) -> None:
        """Give up every idle model."""
        with self._changed:
            self._held = [held for held in self._held if held.busy]

    def _build_promised(self, lent: list[_Held], checkpoint: Checkpoint) -> None:
        """Build the models that were only promised; outside the lock, since each takes a second."""
        from llm_merge.workbench import Workbench

        build = self._build or Workbench
        for held in lent:
            if held.bench is not None:
                continue
            try:
                held.bench = build(checkpoint, held.key[0], held.key[2])
            except MergeError:  # other programs have taken the memory: fewer will do
                if all(other.bench is None for other in lent):
                    raise
                return

    def _take(
        self, key: Key, size: int, recipes: Sequence[Recipe], budget: int, stop: threading.Event | None
    ) -> list[_Held]:
        deadline = time.monotonic() + WAIT
        with self._changed:
            while True:
                found = self._take_now(key, size, recipes, budget)
                if found:
                    return found
                if stop is not None and stop.is_set():
                    raise Stopped
                if time.monotonic() >= deadline:
                    raise MergeError("All models that fit into memory are answering others: try again in a minute.")
                self._changed.wait(timeout=0.2)

    def _take_now(self, key: Key, size: int, recipes: Sequence[Recipe], budget: int) -> list[_Held]:
        """One model for each recipe, as far as they reach: those that hold it, else idle ones, else new ones."""
        idle = sorted((held for held in self._held if held.key == key and not held.busy), key=lambda held: held.used)
        chosen: list[_Held | None] = []
        for recipe in recipes:
            holder = next((held for held in idle if _holds(held, recipe)), None)
            if holder is not None:
                idle.remove(holder)
            chosen.append(holder)
        for place, held in enumerate(chosen):
            if held is None and idle:
                chosen[place] = idle.pop(0)
            elif held is None and self._make_room(key, size, budget):
                chosen[place] = _Held(key, size)
                self._held.append(chosen[place])  # type: ignore[arg-type]
        lent = [held for held in chosen if held is not None]
        for held in lent:
            held.busy = True
        return lent

    def _room(self, size: int, budget: int) -> bool:
        return sum(held.nbytes for held in self._held) + size <= budget

    def _make_room(self, key: Key, size: int, budget: int) -> bool:
        """Give up idle models of other architectures until `size` more fits."""
        others = sorted((held for held in self._held if not held.busy and held.key != key), key=lambda held: held.used)
        while not self._room(size, budget):
            if not others:
                return False
            self._held.remove(others.pop(0))
        return True


LIVE = LiveModels()
"""The process's pool."""


def why_not(checkpoint: Checkpoint, settings: Settings) -> str:
    """Why the model cannot be held in memory, in one sentence with both sizes; "" when it can."""
    from llm_merge.plan import size_text

    need = memory_of(checkpoint, settings)
    if need <= settings.live_memory:
        return ""
    return (
        f"This model needs {size_text(need)} in memory and {size_text(settings.live_memory)} are set aside for trying: "
        "merge it to a folder in Save, which holds one tensor at a time, and run it on a larger machine."
    )


def memory_of(checkpoint: Checkpoint, settings: Settings) -> int:
    """Bytes of the resident weights on the device that the settings choose."""
    from llm_merge.workbench import choose_device, choose_dtype, resident_elements

    return resident_elements(checkpoint) * choose_dtype(checkpoint, choose_device(settings.device)).itemsize


def _holds(held: _Held, recipe: Recipe) -> bool:
    plan = held.bench.plan if held.bench is not None else None
    return plan is not None and plan.recipe == recipe
