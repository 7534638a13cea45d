"""What an analysis will cost, told before anything starts: from the base's headers and the length of the rows.

Counts the multiply-adds of the evaluations and of the models that are poured; how fast this machine is, `remembered.py`
knows roughly. Nothing is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from llm_merge.checkpoint import Checkpoint, describe
from llm_merge.hi_merging import COARSE, STEPS
from llm_merge.remembered import CORE_SPEED, GPU_SPEED
from llm_merge.tasks import Task

BACKWARD = 3.0
"""A backward pass with its forward pass, in forward passes."""
POURING = 3e7
"""Numbers per second and core that a merge of adapters writes into a model in memory."""
CHARACTERS = 4.0
"""Characters of a row to a token, about."""


@dataclass(frozen=True)
class AnalysisCost:
    """Seconds, roughly, and what they are spent on.

    layers          blocks
    evaluations     of one merge on one task's rows, each from the layer that changes
    estimate        the first look: 3 backward passes per specialist
    exact           every layer measured
    grid            of (p, s) pairs for all specialists, full and coarse
    layer_pass      the pass over the layers, at most, with held-out rows beside
    """

    layers: int
    evaluations: int
    estimate: float
    exact: float
    full_grid: float
    coarse_grid: float
    layer_pass: float

    def hi_merge(self, grid: str) -> float:
        """Seconds of a whole Hi-Merging run."""
        search = {"full": self.full_grid, "coarse": self.coarse_grid}.get(grid, 0.0)
        return search + self.exact + self.layer_pass


def analysis_cost(
    base: Checkpoint, tasks: Sequence[Task], *, held_out: int = 0, layers: float | None = None, gpu: bool = False
) -> AnalysisCost:
    """The cost of analysing these tasks' specialists. `layers`: how many are measured exactly; None all."""
    own = [task for task in tasks if task.model]
    parameters = sum(info.numel for info in base.tensors.values())
    cores = min(os.cpu_count() or 1, 16)
    speed = GPU_SPEED if gpu else CORE_SPEED * cores
    pour = parameters / (POURING * cores * (50 if gpu else 1))
    depth = describe(base).layers or 1
    count = depth if layers is None else min(layers, depth)

    def forward(rows: Sequence[object]) -> float:
        return 2 * parameters * sum(len(str(row)) for row in rows) / CHARACTERS / speed

    inside = sum(forward(task.analysis) for task in own)  # one merge on every task's rows
    outside = sum(forward(task.held_out[:held_out]) for task in tasks)
    models = len(own)
    half = (depth + 1) / (2 * depth)
    evaluations = round(4 * models * count)
    exact = 4 * count * inside * half + evaluations * pour / depth + (models + 2) * (pour + inside)
    coarse = len(COARSE) ** 2 + 8
    return AnalysisCost(
        layers=depth,
        evaluations=evaluations,
        estimate=3 * inside * BACKWARD + (models + 2) * 2 * pour,
        exact=exact,
        full_grid=len(STEPS) ** 2 * (inside + models * pour),
        coarse_grid=coarse * (inside + models * pour),
        layer_pass=depth * 0.7 * (inside + outside + pour / depth) + (models + 3) * (inside + outside + pour),
    )
