"""Merges side by side on held-out rows, by any metric: the table that is reported and that never decides anything.

Also for metrics of generated answers, which take long and are therefore not what a search uses. Values are kept row by
row, so that two merges are compared on the same rows.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

from llm_merge.analysis import build_benches
from llm_merge.cell_store import CellStore
from llm_merge.contribution_report import Stat, mean_stat
from llm_merge.contributions import Values
from llm_merge.errors import ExampleError
from llm_merge.evaluation import EvaluationSettings, resolve_format
from llm_merge.layer_scorer import LayerScorer
from llm_merge.measurement_keys import default_settings
from llm_merge.metrics import get_metric, prepare_metric
from llm_merge.plan import make_plan
from llm_merge.recipe import Recipe
from llm_merge.tasks import Task
from llm_merge.workbench import Workbench


@dataclass(frozen=True)
class HeldOutTable:
    """Values of merges on sets of rows, row by row, higher is better. `values`: (merge, set) → one value per row."""

    metric: str
    unit: str
    names: tuple[str, ...]
    sets: tuple[str, ...]
    values: Mapping[tuple[str, str], Values]

    def score(self, name: str, rows: str) -> Stat | None:
        """Mean and standard error; None while it is not measured."""
        found = self.values.get((name, rows))
        return mean_stat(found) if found else None

    def against(self, name: str, other: str, rows: str) -> Stat | None:
        """The mean of the paired differences to another merge, with its standard error."""
        one, two = self.values.get((name, rows)), self.values.get((other, rows))
        return mean_stat([a - b for a, b in zip(one, two, strict=True)]) if one and two else None


@dataclass(frozen=True)
class ScoreEvent:
    """One merge on one set of rows is scored; `table` has what is known so far."""

    name: str
    rows: str
    done: int
    total: int
    table: HeldOutTable


def score_held_out(
    recipes: Mapping[str, Recipe],
    tasks: Sequence[Task],
    metric: str,
    *,
    model_type: str = "decoder",
    rows: int | None = None,
    device: str = "auto",
    format: str = "auto",
    settings: EvaluationSettings | None = None,
    store: CellStore | None = None,
    benches: Sequence[Workbench] = (),
    stop: threading.Event | None = None,
) -> Generator[ScoreEvent, None, HeldOutTable]:
    """Score each merge on every task's held-out rows (at most `rows` of each) by one of `metrics.METRICS`.

    recipes     name → merge, all of one architecture; the first gives tokenizer and chat format
    tasks       the tasks and general sets whose held-out rows are used

    Raises ExampleError for rows that the metric cannot use, and when no task has held-out rows.
    """
    chosen = get_metric(metric, model_type)
    sets = {task.name: task.held_out[:rows] for task in tasks if task.held_out}
    if not sets:
        raise ExampleError(["No task has held-out rows to report: add rows."])
    plan = make_plan(next(iter(recipes.values())))
    fmt = resolve_format(plan.checkpoints, format)
    benches = list(benches) or build_benches(plan, model_type, device, 1)
    settings = settings or default_settings(model_type)
    ready = {
        name: prepare_metric(kept, chosen, model_type, benches[0].tokenizer, settings, fmt)
        for name, kept in sets.items()
    }
    scorer = LayerScorer(benches, ready, store=store, stop=stop)
    values: dict[tuple[str, str], Values] = {}
    table = HeldOutTable(metric, chosen.unit, tuple(recipes), tuple(sets), {})
    for name, recipe in recipes.items():
        for rows_of in sets:
            values[name, rows_of] = scorer.whole(recipe, rows_of)
            table = HeldOutTable(metric, chosen.unit, tuple(recipes), tuple(sets), dict(values))
            yield ScoreEvent(name, rows_of, len(values), len(recipes) * len(sets), table)
    return table
