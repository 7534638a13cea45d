"""Hi-Merging on real models: prune and scale each specialist, find the layers that fight, settle them one by one.

Opens the models, asks `hi_merging.py` what to do, measures what it asks for, and tells every step. Held-out rows are
measured beside and never decide. The merge reached so far is in every event: a stop keeps it.
Source: Fu et al., ACL 2025, arXiv:2506.12379.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llm_merge.analysis import Analysis, open_analysis, tasks_of
from llm_merge.contribution_report import ContributionReport, Stat, mean_stat
from llm_merge.contributions import Values
from llm_merge.hi_merging import COARSE, STEPS, GridCell, Switches, Trial, resolve, search_pruning
from llm_merge.recipe import Recipe

Scores = Mapping[str, Stat]
"""The metric on each task's rows, general sets included."""


@dataclass(frozen=True)
class Point:
    """What a merge is worth: on analysis rows, which may decide, and on held-out rows, which never do.

    name    "base", a specialist's task, "average", or "step 3"
    values  what `held_out` is made of, row by row; of the analysis rows where none are held out
    """

    name: str
    analysis: Scores
    held_out: Scores
    values: Mapping[str, Values] = field(default_factory=dict)

    def against(self, other: Point, rows: str) -> Stat:
        """The mean of the paired differences to another merge on a set of rows, above 0 when this one is better."""
        pairs = zip(self.values[rows], other.values[rows], strict=True)
        return mean_stat([mine - theirs for mine, theirs in pairs])


@dataclass(frozen=True)
class HiMergeEvent:
    """Progress and everything found so far. `recipe` is the merge reached, None before there is one."""

    phase: str  # "grid" | "models" | "exact" | "layers" | "done"
    message: str
    done: int
    total: int
    grid: tuple[GridCell, ...] = ()
    report: ContributionReport | None = None
    trials: tuple[Trial, ...] = ()
    points: tuple[Point, ...] = ()
    recipe: Recipe | None = None


@dataclass(frozen=True)
class HiMergeResult:
    """The merge and how it came about.

    recipe      an ordinary recipe: per-layer weights and densities
    report      the contributions that decided, with the pruned and scaled deltas
    pruning     (p, s) per specialist
    points      the base, each specialist, the plain average, and the merge before any edit and after each
    """

    recipe: Recipe
    trials: tuple[Trial, ...]
    report: ContributionReport
    pruning: tuple[tuple[float, float], ...]
    grid: tuple[GridCell, ...] = ()
    points: tuple[Point, ...] = field(default=())


def iter_hi_merge(
    analysis: Analysis, switches: Switches | None = None, *, dtype: str | None = None
) -> Generator[HiMergeEvent, None, HiMergeResult]:
    """The whole method, event by event; the result is the generator's.

    analysis    opened with `held_out` rows if points are to have held-out scores
    dtype       of the resulting recipe; the search compares float32
    """
    switches = switches or Switches()
    setup = analysis.setup
    grid: list[GridCell] = []
    pruning: list[tuple[float, float]] = []
    cells = {"full": len(STEPS) ** 2, "coarse": len(COARSE) ** 2, "none": 0}[switches.grid] * len(setup.models)
    for index, task in enumerate(setup.tasks):
        search = search_pruning(setup, index, analysis.scorer, switches.grid)
        while True:
            try:
                cell = next(search)
            except StopIteration as end:
                pruning.append(end.value)
                break
            grid.append(cell)
            words = f"{task}: p {cell.p:g}, s {cell.s:g}"
            yield HiMergeEvent("grid", words, len(grid), max(cells, len(grid)), tuple(grid))
    analysis.setup = setup = setup.with_pruning(pruning)
    merged = setup.merged()
    found = {"grid": tuple(grid), "recipe": merged.with_dtype(dtype)}

    measuring = analysis.measure(analysis.report())
    while True:
        try:
            step = next(measuring)
        except StopIteration as end:
            report: ContributionReport = end.value
            break
        yield HiMergeEvent(step.phase, step.message, step.done, step.total, report=step.report, **found)  # type: ignore[arg-type]

    points: list[Point] = []
    layers = sum(layer.block for layer in setup.layers)
    for name, recipe in _references(analysis):
        points.append(_point(name, recipe, analysis))
        yield HiMergeEvent("layers", f"Scoring {name}", 0, layers, report=report, points=tuple(points), **found)  # type: ignore[arg-type]
    trials: list[Trial] = []
    resolving = resolve(report, analysis.scorer, switches)
    while True:
        try:
            trial = next(resolving)
        except StopIteration as end:
            merged = end.value
            break
        trials.append(trial)
        if trial.changed:
            points.append(_point(f"step {trial.step}", trial.recipe, analysis))
        found["recipe"] = trial.recipe.with_dtype(dtype)
        yield HiMergeEvent("layers", f"{trial.title}: {trial.action}", trial.step, layers, report=report,
                           trials=tuple(trials), points=tuple(points), **found)  # type: ignore[arg-type]  # fmt: skip
    result = HiMergeResult(merged.with_dtype(dtype), tuple(trials), report, tuple(pruning), tuple(grid), tuple(points))
    yield HiMergeEvent("done", summary(result), layers, layers, result.grid, report, result.trials, result.points,
                       result.recipe)  # fmt: skip
    return result


def hi_merge(
    base: str,
    models: Mapping[str, str],
    example_data: Any,
    *,
    model_type: str = "decoder",
    switches: Switches | None = None,
    seed: int = 0,
    dtype: str | None = None,
    **options: Any,
) -> HiMergeResult:
    """Merge specialists of one base by Hi-Merging. The arguments are those of `analyze_contributions`.

    switches    what the published description leaves open, see `hi_merging.Switches`
    dtype       of the result; None: that of the first model

    The recipe of the result is run like any other: `run(make_plan(result.recipe), FolderSink(path))`.
    """
    tasks = tasks_of(example_data, models, model_type, seed=seed)
    analysis = open_analysis(base, tasks, model_type=model_type, **options)
    events = iter_hi_merge(analysis, switches, dtype=dtype)
    while True:
        try:
            next(events)
        except StopIteration as end:
            result: HiMergeResult = end.value
            return result


def summary(result: HiMergeResult) -> str:
    """One sentence: how many layers were changed, and how the specialists were pruned and scaled."""
    edited = sum(trial.changed for trial in result.trials)
    pairs = zip(result.report.setup.tasks, result.pruning, strict=True)
    kept = ", ".join(f"{task} p {p:g}, s {s:g}" for task, (p, s) in pairs)
    return f"{edited} of {len(result.trials)} layers changed ({kept})"


def _references(analysis: Analysis) -> list[tuple[str, Recipe]]:
    """What a merge is compared with: the base, the specialists as they are, their plain average, and the start."""
    raw = replace(analysis.setup, pruning=(), combine="average")
    named = [("base", raw.base_recipe())]
    named += [(task, raw.specialist(index)) for index, task in enumerate(raw.tasks)]
    return [*named, ("average", raw.merged()), ("step 0", analysis.setup.merged())]


def _point(name: str, recipe: Recipe, analysis: Analysis) -> Point:
    scorer = analysis.scorer
    inside = {task: scorer.whole(recipe, task) for task in analysis.setup.tasks}
    outside = {task: scorer.whole(recipe, row_set) for task, row_set in analysis.held_out.items()}
    analysed, held_out = ({task: mean_stat(v) for task, v in values.items()} for values in (inside, outside))
    return Point(name, analysed, held_out, outside or inside)
