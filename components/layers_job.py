"""The Layers tab's work on models in memory: contribution analysis, Hi-Merging, delta statistics. Runs as jobs.

Models are borrowed from `live.py`; what is measured goes into the app's store of cells, so a stop or a second run loses
nothing. What is decided from the numbers is the core's business.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from components.demo_setup import prepare_steps
from components.jobs import Step, Work
from components.live import LIVE, LiveModels
from components.naming import short_name
from components.session import Session
from components.settings import Settings
from components.views.layer_scores import recipes_of
from components.views.layer_tasks import layers_key, tasks_for
from llm_merge.cell_store import CellStore
from llm_merge.checkpoint import Checkpoint
from llm_merge.contribution_report import ContributionReport
from llm_merge.contributions import Setup
from llm_merge.errors import MergeError
from llm_merge.hi_merging import Switches
from llm_merge.tasks import Task

if TYPE_CHECKING:
    from llm_merge.analysis import Analysis
    from llm_merge.delta_stats import DeltaStats
    from llm_merge.held_out import HeldOutTable
    from llm_merge.hierarchical import HiMergeEvent
    from llm_merge.workbench import Workbench


@dataclass(frozen=True)
class How:
    """How a visitor wants layers analysed: rows per task, the merge that is analysed, the metric."""

    rows: int
    combine: str = "average"
    metric: str = "-loss"


@dataclass(frozen=True)
class Analysed:
    """A contribution report, whole or so far, and the key of the session that it belongs to."""

    key: str
    report: ContributionReport


@dataclass(frozen=True)
class Merged:
    """Hi-Merging so far, and the key of the session that it belongs to. `same_rows`: too few rows to hold some out."""

    key: str
    event: HiMergeEvent
    same_rows: bool = False


@dataclass(frozen=True)
class Deltas:
    """Delta statistics and the key of the session that they belong to."""

    key: str
    stats: DeltaStats


@dataclass(frozen=True)
class Scored:
    """Scores on held-out rows, and the key of the recipe and rows that they belong to. `same_rows`: as of `Merged`."""

    key: str
    table: HeldOutTable
    same_rows: bool = False


def cell_store(settings: Settings) -> CellStore:
    """Where this app keeps measured cells."""
    return CellStore(settings.home / "cells")


def analyse_work(
    session: Session,
    settings: Settings,
    store: CellStore,
    how: How,
    layers: Sequence[str] | None = None,
    before: ContributionReport | None = None,
    *,
    estimate_only: bool = False,
    pool: LiveModels = LIVE,
) -> Work:
    """The job that analyses; its result, and each step's data, is an `Analysed`.

    layers      None: an estimate of all, then all exactly; keys: these exactly, added to `before`

    Raises MergeError, before anything starts, for a metric that the models do not have.
    """
    key, tasks = layers_key(session), tasks_for(session, settings, how.rows)
    check_metric(how.metric, session)

    def run(stop: threading.Event) -> Generator[Step, None, Analysed]:
        from llm_merge.analysis import iter_contributions

        yield from prepare_steps(session.models, stop)
        yield Step("Getting the models ready", None)
        with _benches(session, settings, pool, stop) as benches:
            analysis = _open(session, tasks, how, store, benches, 0, stop)
            if layers is None:
                events = iter_contributions(analysis, layers=() if estimate_only else None)
            else:
                start = analysis.report()
                same = (start.setup, start.rows, start.metric)
                if before is not None and (before.setup, before.rows, before.metric) == same:
                    start = before
                events = analysis.measure(start, list(layers))
            report = None
            while True:
                try:
                    event = next(events)
                except StopIteration as end:
                    report = end.value
                    break
                share = {"estimate": 0.15 * event.done / event.total, "models": 0.15}.get(
                    event.phase, 0.15 + 0.85 * event.done / event.total
                )
                yield Step(event.message, share, Analysed(key, event.report))
            return Analysed(key, report)

    return run


def hi_merge_work(
    session: Session,
    settings: Settings,
    store: CellStore,
    how: How,
    switches: Switches,
    pool: LiveModels = LIVE,
) -> Work:
    """The job that runs Hi-Merging; its result, and each step's data, is a `Merged`."""
    key, tasks = layers_key(session), tasks_for(session, settings, how.rows)
    check_metric(how.metric, session)
    weight = {"grid": (0.0, 0.3), "models": (0.3, 0.3), "exact": (0.3, 0.7), "layers": (0.7, 1.0), "done": (1.0, 1.0)}

    def run(stop: threading.Event) -> Generator[Step, None, Merged]:
        from llm_merge.hierarchical import iter_hi_merge

        yield from prepare_steps(session.models, stop)
        yield Step("Getting the models ready", None)
        with _benches(session, settings, pool, stop) as benches:
            analysis = _open(session, tasks, how, store, benches, settings.demo_rows, stop)
            last = None
            for event in iter_hi_merge(analysis, switches, dtype=session.dtype):
                low, high = weight[event.phase]
                share = low + (high - low) * event.done / max(event.total, 1)
                last = Merged(key, event, any(task.same_rows for task in tasks if task.model))
                yield Step(event.message, share, last)
            assert last is not None
            return last

    return run


def score_work(session: Session, settings: Settings, store: CellStore, metric: str, pool: LiveModels = LIVE) -> Work:
    """The job that scores the recipe in use beside its parents on held-out rows; its result is a `Scored`.

    Raises MergeError, before anything starts, when there is nothing to score or the metric does not apply.
    """
    from llm_merge.metrics import get_metric

    tasks, recipes, key = tasks_for(session, settings, 1), recipes_of(session), score_key(session)
    same = any(task.same_rows for task in tasks if task.model)
    if get_metric(metric, session.model_type).kind == "generated" and settings.public:
        raise MergeError("This public page does not score generated answers: choose −loss.", field="metric")

    def run(stop: threading.Event) -> Generator[Step, None, Scored]:
        from llm_merge.held_out import score_held_out

        yield from prepare_steps(session.models, stop)
        yield Step("Getting the models ready", None)
        with _benches(session, settings, pool, stop) as benches:
            events = score_held_out(
                recipes, tasks, metric, model_type=session.model_type, rows=settings.demo_rows, store=store,
                benches=benches, stop=stop,
            )  # fmt: skip
            while True:
                try:
                    event = next(events)
                except StopIteration as end:
                    return Scored(key, end.value, same)
                yield Step(f"{event.name} on {event.rows}", event.done / event.total, Scored(key, event.table, same))

    return run


def score_key(session: Session) -> str:
    """Equal keys: the same recipe on the same rows."""
    return f"{layers_key(session)}\n{session.recipe_key}"


def delta_work(session: Session) -> Work:
    """The job that reads what the fine-tunes changed; its result is a `Deltas`."""

    def run(stop: threading.Event) -> Generator[Step, None, Deltas]:
        from llm_merge.delta_stats import delta_statistics

        yield from prepare_steps(session.models, stop)
        events = delta_statistics(session.base, session.fine_tunes, stop=stop)
        while True:
            try:
                event = next(events)
            except StopIteration as end:
                return Deltas(delta_key(session), end.value)
            yield Step(f"{event.done} of {event.total} tensors", event.done / event.total)

    return run


def delta_key(session: Session) -> str:
    """Equal keys: the same models, so the same deltas."""
    return "\n".join((session.base, *session.fine_tunes))


def check_metric(name: str, session: Session) -> None:
    """Raise MergeError unless contributions can be measured so: what is generated takes too long for a page."""
    from llm_merge.metrics import get_metric

    if get_metric(name, session.model_type).kind == "generated":
        raise MergeError(f"{name} is for results, not for a search: measure layers by −loss.", field="metric")


def check(session: Session, settings: Settings, rows: int) -> None:
    """Raise MergeError, in one sentence, when the session's layers cannot be analysed."""
    tasks = tasks_for(session, settings, rows)
    count = max(len(task.analysis) for task in tasks if task.model)
    if count > settings.max_rows:
        raise MergeError(
            f"These are {count} rows of a task and at most {settings.max_rows} can be measured here: use fewer.",
            field="examples",
        )


def _open(
    session: Session,
    tasks: Sequence[Task],
    how: How,
    store: CellStore,
    benches: Sequence[Workbench],
    held_out: int,
    stop: threading.Event,
) -> Analysis:
    from llm_merge.analysis import open_analysis

    return open_analysis(
        session.base,
        tasks,
        model_type=session.model_type,
        combine=how.combine,
        metric=how.metric,
        store=store,
        benches=benches,
        held_out=held_out,
        stop=stop,
    )


@contextmanager
def _benches(
    session: Session, settings: Settings, pool: LiveModels, stop: threading.Event
) -> Iterator[list[Workbench]]:
    """A model for each whole merge that is compared, as far as memory reaches; given back as they were lent."""
    setup = Setup(session.base, session.fine_tunes, tuple(map(short_name, session.fine_tunes)), ())
    anchors = [setup.base_recipe(), *(setup.specialist(i) for i in range(len(setup.models))), setup.merged()]
    with pool.borrow(session.base, session.model_type, anchors, settings, stop) as benches:
        try:
            yield benches
        finally:
            for bench in benches:
                bench.read = Checkpoint.read  # what the analysis remembers of the models goes with it
