"""Hidden states kept between a model's blocks, so that a change in one block runs again only what comes after it.

Exact: what is skipped has not changed. Every family whose blocks form a chain can do it; for the others, and where a
self-check fails, everything here quietly lets the model run in full. It knows no weights and does not look whether
those below the start are still what they were: the caller drops what it recorded.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from llm_merge.chain import StopHooks, chain_of, entering, replaced_forwards

if TYPE_CHECKING:
    import torch

    from llm_merge.workbench import Workbench

RELATIVE, ABSOLUTE = 1e-6, 1e-7
"""How far a replay may be from a full pass in the self-check: rounding of another kernel, never another number."""


@dataclass
class _Slot:
    """What one recording keeps.

    layers   after which a state is kept, rising: l is the state between block l - 1 and block l
    stride   of these, every which one is kept: doubled whenever memory runs out, so that gaps stay even
    calls    how many times the model was called
    states   (model call, layer) → [batch, tokens, dimensions]
    spilled  which of them are in main memory because the device's budget was full
    forms    block → how long a tuple it returns, None for a tensor alone
    """

    layers: tuple[int, ...]
    stride: int = 1
    calls: int = 0
    states: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    spilled: set[tuple[int, int]] = field(default_factory=set)
    forms: dict[int, int | None] = field(default_factory=dict)

    def wants(self, layer: int) -> bool:
        return layer in self.layers and (self.layers.index(layer) + 1) % self.stride == 0


class PrefixCache:
    """Hidden states of a resident model, recorded in one run and started from in later ones.

    budget_bytes        kept on the model's device
    cpu_budget_bytes    kept in main memory beyond that; default: as much again
    stop                asked before every block of a run inside `recording` and `starting_at`, which raise Stopped

    What fits into neither is not kept, evenly over the layers: such a layer starts from the nearest one kept below it.
    Runs must call the model equally often with the same inputs in the same order; the bench's lock is the caller's.
    Nothing is kept before `works` has said that it can be.
    """

    def __init__(
        self,
        bench: Workbench,
        budget_bytes: int,
        stop: threading.Event | None = None,
        *,
        cpu_budget_bytes: int | None = None,
    ) -> None:
        self._bench = bench
        self._budget = budget_bytes
        self._cpu_budget = budget_bytes if cpu_budget_bytes is None else cpu_budget_bytes
        self._stop = stop
        self._chain = chain_of(bench.model)
        self._works: bool | None = None if self._chain is not None else False
        self._slots: dict[Hashable, _Slot] = {}
        self._bytes = 0
        self._spilled_bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all states kept, wherever they are."""
        return self._bytes + self._spilled_bytes

    @property
    def spilled_bytes(self) -> int:
        """Bytes of the states that went to main memory because the device's budget was full."""
        return self._spilled_bytes

    def works(self, run: Callable[[], Sequence[float]]) -> bool:
        """Whether starting in the middle gives what the whole model gives; asked once, then remembered.

        run     calls the model (a few rows are enough) and returns numbers that depend on its result

        Where it is False, runs inside `recording` and `starting_at` are full ones.
        """
        if self._works is None and self._chain is not None:
            probe = PrefixCache(self._bench, sys.maxsize, self._stop)
            probe._works = True
            self._works = probe._agrees(run, (len(self._chain) + 1) // 2, len(self._chain))
        return bool(self._works)

    @contextmanager
    def recording(self, slot: Hashable, keep: Collection[int]) -> Iterator[None]:
        """Keep the state entering block l for each l in `keep` (the number of blocks: leaving the last) as `slot`.

        What the slot held before is dropped, and what it holds now if the run does not come to its end.
        """
        self.drop(slot)
        with StopHooks(self._bench.model, self._stop):
            if self._chain is None or not self._works:
                yield
                return
            place = self._slots[slot] = _Slot(tuple(sorted(set(keep) - {0})))
            try:
                with self._counting(place), replaced_forwards(self._chain.blocks, partial(self._recorder, place)):
                    yield
            except BaseException:
                self.drop(slot)
                raise

    @contextmanager
    def starting_at(self, slot: Hashable, layer: int) -> Iterator[None]:
        """The model's calls start at block `layer` with the states of `slot`; the number of blocks runs none of them.

        Embeddings, masks, final norm and head run as they are. A call without a state for `layer` starts lower.
        """
        kept = self._slots.get(slot)
        with StopHooks(self._bench.model, self._stop):
            if self._chain is None or kept is None or layer <= 0:
                yield
                return
            now = _Slot(())
            skipped = self._chain.blocks[:layer]
            with self._counting(now), replaced_forwards(skipped, partial(self._player, kept, now, layer)):
                yield

    def drop(self, slot: Hashable) -> None:
        """Forget what was recorded as `slot`; nothing if there is no such."""
        place = self._slots.pop(slot, _Slot(()))
        for key in list(place.states):
            self._forget(place, key)

    # ── one run ──────────────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def _counting(self, slot: _Slot) -> Iterator[None]:
        def count(*_: Any) -> None:
            slot.calls += 1

        handle = self._bench.model.register_forward_pre_hook(count)
        try:
            yield
        finally:
            handle.remove()

    def _recorder(self, slot: _Slot, number: int, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            several = isinstance(output, (tuple, list))
            slot.forms[number] = len(output) if several else None
            if number + 1 in slot.layers:
                self._keep(slot, (slot.calls, number + 1), output[0] if several else output)
            return output

        return forward

    def _player(self, kept: _Slot, now: _Slot, layer: int, number: int, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            start = max((at for call, at in kept.states if call == now.calls and at <= layer), default=0)
            if number >= start:
                return own(*args, **kwargs)
            state = entering(args, kwargs)  # what leaves a block below the last skipped one reaches nothing
            if number == start - 1:
                found = kept.states[now.calls, start]
                if found.shape != state.shape:
                    raise RuntimeError(f"call {now.calls} has other inputs than when it was recorded")
                state = found.to(state.device, copy=True, non_blocking=True)
            length = kept.forms[number]
            return state if length is None else (state, *[None] * (length - 1))

        return forward

    def _agrees(self, run: Callable[[], Sequence[float]], *layers: int) -> bool:
        """Whether runs that start at `layers` return what the whole run does."""
        with self.recording(None, layers):
            whole = list(run())
        if not self.nbytes:  # the blocks are not what the model runs
            return False
        for layer in layers:
            try:
                with self.starting_at(None, layer):
                    again = list(run())
            except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
                return False  # later blocks need more from the skipped ones than their state
            close = partial(math.isclose, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
            if len(again) != len(whole) or not all(map(close, whole, again)):
                return False
        return True

    # ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _keep(self, slot: _Slot, key: tuple[int, int], state: torch.Tensor) -> None:
        import torch

        size = state.nbytes
        if key in slot.states:  # a block that runs several times in one call: its last state is the one that leaves it
            self._forget(slot, key)
        while slot.wants(key[1]) and not self._fits(size) and 2 * slot.stride <= len(slot.layers):
            slot.stride *= 2
            for other in [other for other in slot.states if not slot.wants(other[1])]:
                self._forget(slot, other)
        if not slot.wants(key[1]) or not self._fits(size):
            return
        spill = self._bytes + size > self._budget
        with torch.inference_mode(False), torch.no_grad():  # a plain tensor, of use in any later run
            if spill:
                slot.spilled.add(key)
                self._spilled_bytes += size
                pinned = state.device.type == "cuda"
                room = torch.empty(state.shape, dtype=state.dtype, pin_memory=pinned)
                slot.states[key] = room.copy_(state, non_blocking=pinned)
            else:
                self._bytes += size
                slot.states[key] = state.detach().clone()

    def _fits(self, size: int) -> bool:
        return self._bytes + size <= self._budget or self._spilled_bytes + size <= self._cpu_budget

    def _forget(self, slot: _Slot, key: tuple[int, int]) -> None:
        size = slot.states.pop(key).nbytes
        if key in slot.spilled:
            slot.spilled.discard(key)
            self._spilled_bytes -= size
        else:
            self._bytes -= size
