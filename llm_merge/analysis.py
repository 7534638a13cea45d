"""Contribution analysis on real models: from references and example rows to a `ContributionReport`.

Opens the models once and hands them to the deciders. What is compared is decided in `contributions.py`; how a merge is
measured quickly, in `layer_scorer.py`. A stop or an error loses nothing that was measured.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import TYPE_CHECKING, Any

from llm_merge.cell_store import CellStore
from llm_merge.contribution_report import ContributionReport
from llm_merge.contributions import Layer, Setup, cells_of, measure_cells, whole_models
from llm_merge.errors import ExampleError, MergeError
from llm_merge.evaluation import EvaluationSettings, Prepared, prepare, resolve_format
from llm_merge.examples import rows_hash
from llm_merge.families import get_family
from llm_merge.layer_estimates import estimate_cells
from llm_merge.layer_map import Group, LayerMap, layer_map
from llm_merge.layer_scorer import LayerScorer
from llm_merge.measurement_keys import default_settings
from llm_merge.metrics import LOSS, PreparedMetric, prepare_metric
from llm_merge.plan import Plan, is_unchanged, make_plan
from llm_merge.tasks import Task

if TYPE_CHECKING:
    from llm_merge.workbench import Workbench

CHUNK = 6
"""Layers measured together when there are fewer models in memory than anchors: pouring one costs seconds."""


HELD_OUT = "\0held out"
"""Added to a task's name for the scorer: no task that a person named is called so."""


@dataclass(frozen=True)
class AnalysisEvent:
    """Progress: what is being done, how far it is (cells, of how many), and the report so far."""

    phase: str  # "models" | "estimate" | "exact" | "done"
    message: str
    done: int
    total: int
    report: ContributionReport


@dataclass
class Analysis:
    """An opened analysis: the models' layers, the rows made ready, and the resident models that measure.

    tasks       the specialists' tasks, in the order of `setup.models`, then general sets
    losses      the rows made ready for the loss, for estimates
    held_out    task or general set → the scorer's name of its held-out rows
    """

    setup: Setup
    tasks: tuple[Task, ...]
    scorer: LayerScorer
    layers: LayerMap
    losses: Mapping[str, Prepared]
    metric: str
    unit: str
    held_out: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    stop: threading.Event | None = None
    started: float = field(default_factory=time.monotonic)

    def report(self) -> ContributionReport:
        """Nothing measured yet."""
        hashes = {task.name: rows_hash(task.analysis) for task in self.tasks if task.name in self.setup.tasks}
        return ContributionReport(
            self.setup, self.metric, self.unit, measured_on=date.today().isoformat(), rows=hashes, notes=self.notes
        )

    def estimate(self, report: ContributionReport) -> Generator[AnalysisEvent, None, ContributionReport]:
        """The report with first-order estimates of every layer: 3·M backward passes."""
        groups = {tensor: group.key for group in self.layers.groups for tensor in group.tensors}
        found, since = dict(report.estimates), time.monotonic() - report.seconds
        total = len(self.setup.layers) * len(self.setup.tasks) * 4
        for number, (cell, value) in enumerate(
            estimate_cells(self.setup, self.scorer, self.losses, groups, stop=self.stop), start=1
        ):
            found[cell] = value
            if number % len(self.setup.layers) == 0:
                report = _timed(replace(report, estimates=dict(found)), since)
                yield AnalysisEvent("estimate", "Estimating every layer", number, total, report)
        return _timed(replace(report, estimates=found), since)

    def measure(
        self, report: ContributionReport, layers: Sequence[str] | None = None
    ) -> Generator[AnalysisEvent, None, ContributionReport]:
        """The report with these layers measured exactly (default: all), the most doubtful first."""
        since = time.monotonic() - report.seconds
        wanted = [self.setup.layer(key).key for key in (report.doubtful() if layers is None else layers)]
        yield AnalysisEvent("models", "Measuring the whole models", 0, 1, report)
        whole = {(task, which): values for task, which, values in whole_models(self.setup, self.scorer)}
        report = replace(report, whole=whole)
        anchors = len(self.setup.models) + 2
        size = 1 if len(self.scorer.benches) >= anchors else CHUNK
        chunks = [wanted[start : start + size] for start in range(0, len(wanted), size)]
        total, done = len(list(cells_of(self.setup, wanted))), 0
        for chunk in chunks:
            fresh = {}
            for cell, values in measure_cells(self.setup, cells_of(self.setup, chunk), self.scorer):
                fresh[cell] = values
                done += 1
                title = self.setup.layer(cell.layer).title
                yield AnalysisEvent(
                    "exact", f"{title}: {cell.task}, {cell.side} merging", done, total, report.with_cells(fresh.items())
                )
            report = _timed(report.with_cells(fresh.items()), since)
        return report


def open_analysis(
    base: str,
    tasks: Sequence[Task],
    *,
    model_type: str = "decoder",
    metric: str = LOSS,
    pruning: Sequence[tuple[float, float]] = (),
    combine: str = "average",
    device: str = "auto",
    format: str = "auto",
    settings: EvaluationSettings | None = None,
    store: CellStore | None = None,
    benches: Sequence[Workbench] = (),
    held_out: int = 0,
    stop: threading.Event | None = None,
) -> Analysis:
    """Open models and rows for an analysis.

    base, tasks     the base, and one task per specialist (`Task.model`); tasks without a model are general sets, which
                    are not analysed
    benches         resident models to use; without them as many are built as there is memory for
    held_out        make at most so many held-out rows of every task and general set ready, too: for reports, never used
                    to decide

    Everything wrong is said here, as IncompatibleModels, ExampleError with the rows' numbers, RecipeError or
    CheckpointError.
    """
    own = [task for task in tasks if task.model]
    if not own:
        raise ExampleError(["No task belongs to a specialist: name the fine-tune of each task."], field="tasks")
    empty = [task.name for task in own if not task.analysis]
    if empty:
        raise ExampleError([f"The task “{empty[0]}” has no rows to analyse: add some."], field="tasks")
    models = tuple(task.model for task in own)
    draft = Setup(base, models, tuple(task.name for task in own), (), tuple(pruning), combine)
    plan = make_plan(draft.merged())
    groups = layer_map(tensor.name for tensor in plan.tensors)
    setup = replace(draft, layers=_layers(plan, groups))
    notes = () if groups.known else ("The layers of this architecture are not recognised: all weights are one group.",)
    settings = settings or default_settings(model_type)
    fmt = resolve_format(plan.checkpoints, format)
    benches = list(benches) or build_benches(plan, model_type, device, len(models) + 2)
    tokenizer = benches[0].tokenizer
    problems: list[str] = []
    ready: dict[str, PreparedMetric] = {}
    losses: dict[str, Prepared] = {}
    for task in own:
        try:
            ready[task.name] = prepare_metric(task.analysis, metric, model_type, tokenizer, settings, fmt)
            known = ready[task.name].prepared if metric == LOSS else None
            losses[task.name] = known or prepare(task.analysis, model_type, tokenizer, settings, fmt)
        except ExampleError as error:
            problems += [f"{task.name}: {problem}" for problem in error.problems]
    if problems:
        raise ExampleError(problems)
    outside: dict[str, str] = {}
    for task in tasks if held_out else ():
        kept = task.held_out[:held_out]
        if kept:
            outside[task.name] = f"{task.name}{HELD_OUT}"
            ready[outside[task.name]] = prepare_metric(kept, metric, model_type, tokenizer, settings, fmt)
    scorer = LayerScorer(benches, ready, store=store, stop=stop, reported=outside.values())
    scorer.plan(setup.merged())
    unit = next(iter(ready.values())).metric.unit
    ordered = (*own, *(task for task in tasks if not task.model))
    notes = (*notes, *(note for task in ready.values() for note in task.notes))
    if metric != LOSS:
        notes = (*notes, "Estimates are of −loss and decide only the order of measuring.")
    return Analysis(setup, ordered, scorer, groups, losses, metric, unit, outside, tuple(dict.fromkeys(notes)), stop)


def build_benches(plan: Plan, model_type: str, device: str, wanted: int) -> list[Workbench]:
    """As many resident models of the plan's base as fit into half of the free memory, at least one.

    Processes that torchrun or accelerate started on one machine share its memory.
    """
    from llm_merge.workbench import WORKING_ROOM, Workbench, choose_device, free_memory

    get_family(model_type)
    where = choose_device(device)
    benches = [Workbench(plan.base, model_type, where)]
    beside = 1 if where.startswith("cuda") else max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    while len(benches) < wanted:
        if where.startswith("cuda"):
            import torch

            free = int(torch.cuda.mem_get_info(where)[0])
        else:
            free = free_memory()
        if benches[0].nbytes * WORKING_ROOM > free / 2 / beside:
            break
        benches.append(Workbench(plan.base, model_type, where, dtype=benches[0].dtype))
    return benches


def iter_contributions(
    analysis: Analysis, *, estimate: bool = True, layers: Sequence[str] | int | None = None
) -> Generator[AnalysisEvent, None, ContributionReport]:
    """Estimate, then measure: events while it goes on, the report as the generator's result.

    layers      None: all; a number: so many, those that the estimate ranks highest; or keys, measured in their order
    """
    report = analysis.report()
    if estimate:
        report = yield from analysis.estimate(report)
    if isinstance(layers, int):
        if layers < 0:
            raise MergeError(f"{layers} layers cannot be measured: give 0 or more.", field="layers")
        layers = report.doubtful()[:layers]
    if layers is None or layers:
        report = yield from analysis.measure(report, layers)
    yield AnalysisEvent("done", report.headline(), 1, 1, report)
    return report


def analyze_contributions(
    base: str,
    models: Mapping[str, str],
    example_data: Any,
    *,
    model_type: str = "decoder",
    estimate: bool = False,
    layers: Sequence[str] | int | None = None,
    seed: int = 0,
    **options: Any,
) -> ContributionReport:
    """Which layer of each specialist helps its task, and where merging makes layers fight.

    base            reference of the base that all specialists were tuned from
    models          task name → reference of its specialist
    example_data    rows with a "task", or a dict task → rows; a part of each task is held out and not used here
    estimate        first-order estimates too; with `layers=0` nothing else: seconds instead of minutes
    layers          measure exactly: None all, a number those ranked highest by an estimate, or keys: ["0", "7"]
    options         those of `open_analysis`

    Raises the errors of `open_analysis`.
    """
    tasks = tasks_of(example_data, models, model_type, seed=seed)
    analysis = open_analysis(base, tasks, model_type=model_type, **options)
    report: ContributionReport = _result(
        iter_contributions(analysis, estimate=estimate or isinstance(layers, int), layers=layers)
    )
    return report


def tasks_of(example_data: Any, models: Mapping[str, str], model_type: str, *, seed: int = 0) -> tuple[Task, ...]:
    """The tasks of rows given from Python, divided into analysis and held-out rows; in the order of `models`."""
    from llm_merge.examples import check_rows
    from llm_merge.tasks import assign_owners, split_tasks

    rows = check_rows(example_data, model_type)
    if len(models) == 1 and not any(row.get("task") for row in rows):
        rows = tuple({**row, "task": next(iter(models))} for row in rows)
    names = list(dict.fromkeys(str(row.get("task", "")) for row in rows))
    owners = assign_owners(names, list(models.values()), models)
    tasks = {task.name: task for task in split_tasks(rows, owners, seed=seed)}
    return tuple(tasks[name] for name in dict.fromkeys((*models, *tasks)))


def _layers(plan: Plan, groups: LayerMap) -> tuple[Layer, ...]:
    """All blocks, and of what lies outside of them the groups that some model may have changed.

    A group is left out if the name of one of its tensors is a part of another tensor's: mergekit has no filter for it.
    """
    sources = {tensor.name: tensor for tensor in plan.tensors if tensor.action == "merge"}

    def changes(names: Iterable[str]) -> bool:
        return any(
            not is_unchanged(plan.base, checkpoint, source)
            for name in names
            if name in sources
            for checkpoint, source in zip(plan.checkpoints, sources[name].sources, strict=True)
        )

    def can_be_named(group: Group) -> bool:
        own, filters = set(group.tensors), _filters(group)
        return not any(part in name for name in sources if name not in own for part in filters)

    return tuple(
        Layer(group.key, group.title, _filters(group), group.layer is not None)
        for group in groups.groups
        if (group.layer is not None or changes(group.tensors)) and can_be_named(group)
    )


def _filters(group: Group) -> tuple[str, ...]:
    return (group.filter,) if group.filter else group.tensors


def _timed(report: ContributionReport, since: float) -> ContributionReport:
    """What was measured in an earlier call took its time, too: `since` counts it."""
    return replace(report, seconds=time.monotonic() - since)


def _result(events: Generator[Any, None, Any]) -> Any:
    while True:
        try:
            next(events)
        except StopIteration as end:
            return end.value
