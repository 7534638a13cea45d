"""Tensors of the source models kept in memory, for searches that pour hundreds of merges from the same few models.

Bounded; what was not used for longest goes first. It takes the place of `Checkpoint.read` and gives the same tensors,
which nobody may write to.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from llm_merge.checkpoint import Checkpoint


class SourceCache:
    """`read` as `Workbench.read` wants it. `budget_bytes`: the most that is kept. Thread-safe."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._kept: OrderedDict[tuple[str, str], torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self.nbytes = 0

    def read(self, checkpoint: Checkpoint, name: str) -> torch.Tensor:
        """The tensor as `Checkpoint.read` gives it, an adapter applied."""
        # What an adapter leaves alone is the base's: kept once, whatever adapters are in the merge.
        owner = checkpoint.reference if checkpoint.changes(name) else str(checkpoint.folder)
        with self._lock:
            known = self._kept.get((owner, name))
            if known is not None:
                self._kept.move_to_end((owner, name))
                return known
        tensor = checkpoint.read(name)
        with self._lock:
            if (owner, name) not in self._kept and tensor.nbytes <= self._budget:
                self._kept[owner, name] = tensor
                self.nbytes += tensor.nbytes
                while self.nbytes > self._budget:
                    self.nbytes -= self._kept.popitem(last=False)[1].nbytes
        return tensor
