"""The Layers tab's jobs on three tiny real models: what they give is what the library gives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components import layers_job
from components.jobs import Step
from components.layers_job import Analysed, Deltas, How, Merged
from components.live import LiveModels
from components.session import Session
from components.settings import Settings
from components.views.layer_tasks import layers_key, tasks_for
from llm_merge.analysis import iter_contributions, open_analysis
from llm_merge.cell_store import CellStore
from llm_merge.checkpoint import Checkpoint
from llm_merge.contribution_report import ContributionReport
from llm_merge.delta_stats import delta_statistics
from llm_merge.errors import MergeError, Stopped
from llm_merge.hi_merging import Switches
from llm_merge.hierarchical import iter_hi_merge
from llm_merge.plan import make_plan
from llm_merge.workbench import Workbench
from tests.tiny_models import TinyFamily, make_family, make_tiny_llama

WORDS = tuple("and it with a for be god of the unto his shall was lamp ship corn heart".split())  # noqa: SIM905
ROWS = 4  # per task


def rows_of(task: str, count: int, shift: int) -> list[dict[str, Any]]:
    texts = [" ".join(WORDS[(n * shift + k) % len(WORDS)] for k in range(4)) for n in range(count)]
    return [{"input": f"{task} {text}", "output": text[::-1], "task": task} for text in texts]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    return make_family(make_tiny_llama, tmp_path_factory.mktemp("trio"), dtype="float32", layers=3, delta=0.1)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, device="cpu", demo_rows=4)


@pytest.fixture
def session(family: TinyFamily) -> Session:
    base, *tunes = family.references
    rows = [*rows_of("law", 12, 1), *rows_of("poems", 12, 5)]
    return Session().with_models("decoder", base, tunes).with_rows(rows, "mine", ())


@pytest.fixture
def pool() -> LiveModels:
    return LiveModels()


def finish(job: Generator[Step, None, Any]) -> tuple[list[Step], Any]:
    steps = []
    while True:
        try:
            steps.append(next(job))
        except StopIteration as end:
            return steps, end.value


def stopped_when(enough: Callable[[Any], bool], work: Any) -> Any:
    """The data of the last step of a job that is asked to stop as soon as it has enough."""
    stop, last = threading.Event(), None

    def go() -> None:
        nonlocal last
        for step in work(stop):
            last = step.data or last
            if enough(last):
                stop.set()

    with pytest.raises(Stopped):
        go()
    return last


def result_of(events: Generator[Any, None, Any]) -> Any:
    return finish(events)[1]


def analysis_of(session: Session, settings: Settings, **options: Any) -> Any:
    """The library's own analysis of the session's tasks, with nothing remembered."""
    return open_analysis(session.base, tasks_for(session, settings, ROWS), device="cpu", **options)


def measured(report: ContributionReport) -> dict[Any, Any]:
    """Everything that was measured."""
    return dict[Any, Any](report.whole) | dict(report.cells)


def values(report: ContributionReport) -> dict[Any, Any]:
    """The same up to rounding, to compare with."""
    return {key: pytest.approx(list(numbers), abs=1e-6) for key, numbers in measured(report).items()}


def counts(steps: Sequence[Step]) -> list[int]:
    return [len(step.data.report.cells) for step in steps if isinstance(step.data, Analysed)]


class Watched(CellStore):
    """A store that counts what is measured anew."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(folder)
        self.put_keys: list[str] = []

    def put(self, key: str, values: Sequence[float]) -> None:
        self.put_keys.append(key)
        super().put(key, values)


# ---- analysis --------------------------------------------------------------------------------------------------------


def test_the_report_grows_and_ends_as_the_librarys(session: Session, settings: Settings, pool: LiveModels) -> None:
    work = layers_job.analyse_work(session, settings, CellStore(None), How(ROWS), pool=pool)
    steps, found = finish(work(threading.Event()))
    assert isinstance(found, Analysed)
    assert found.key == layers_key(session)
    assert counts(steps) == sorted(counts(steps))
    assert (counts(steps)[0], counts(steps)[-1]) == (0, len(found.report.cells))
    estimated = [step for step in steps if isinstance(step.data, Analysed) and step.data.report.estimates]
    assert not estimated[0].data.report.cells  # the estimate comes first
    fractions = [step.fraction for step in steps if step.fraction is not None]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] <= fractions[-1] == 1.0
    expected = result_of(iter_contributions(analysis_of(session, settings)))
    assert found.report.setup == expected.setup
    assert found.report.rows == expected.rows
    assert measured(found.report) == values(expected)
    assert found.report.estimates == pytest.approx(expected.estimates, abs=1e-6)
    assert found.report.headline() == expected.headline()


def test_an_estimate_alone_measures_nothing(session: Session, settings: Settings, pool: LiveModels) -> None:
    store = Watched()
    work = layers_job.analyse_work(session, settings, store, How(ROWS), estimate_only=True, pool=pool)
    _, found = finish(work(threading.Event()))
    assert found.report.estimates
    assert not found.report.cells
    assert store.put_keys == []


def test_a_stop_keeps_what_was_measured_and_the_next_run_measures_the_rest(
    session: Session, settings: Settings, pool: LiveModels
) -> None:
    store = Watched(settings.home / "cells")
    work = layers_job.analyse_work(session, settings, store, How(ROWS), pool=pool)
    last = stopped_when(lambda data: data is not None and len(data.report.cells) >= 5, work)
    assert len(last.report.cells) >= 5
    first = list(store.put_keys)
    again = Watched(settings.home / "cells")  # as after a restart: from the files
    work = layers_job.analyse_work(session, settings, again, How(ROWS), pool=pool)
    _, found = finish(work(threading.Event()))
    assert not set(first) & set(again.put_keys)
    whole = Watched()
    _, fresh = finish(layers_job.analyse_work(session, settings, whole, How(ROWS), pool=pool)(threading.Event()))
    assert set(first) | set(again.put_keys) == set(whole.put_keys)
    assert measured(found.report) == values(fresh.report)


def test_selected_layers_are_added_to_the_report_before(session: Session, settings: Settings, pool: LiveModels) -> None:
    store, how = CellStore(None), How(ROWS)
    _, first = finish(
        layers_job.analyse_work(session, settings, store, how, estimate_only=True, pool=pool)(threading.Event())
    )
    report = first.report
    for keys, measured in ((("1",), ["1"]), (("0",), ["0", "1"])):
        work = layers_job.analyse_work(session, settings, store, how, keys, report, pool=pool)
        report = finish(work(threading.Event()))[1].report
        assert [layer.key for layer in report.setup.layers if report.is_measured(layer.key)] == measured
    assert report.estimates == first.report.estimates  # still shown where nothing is measured
    gamma = report.gamma("law", "2")
    assert gamma is not None
    assert gamma.estimated


def test_a_report_of_other_rows_or_another_merge_is_not_added_to(
    session: Session, settings: Settings, pool: LiveModels
) -> None:
    store = CellStore(None)
    work = layers_job.analyse_work(session, settings, store, How(ROWS), ("0",), pool=pool)
    _, before = finish(work(threading.Event()))
    for how in (How(ROWS - 1), How(ROWS, "sum")):
        work = layers_job.analyse_work(session, settings, store, how, ("1",), before.report, pool=pool)
        _, found = finish(work(threading.Event()))
        assert found.report.is_measured("1")
        assert not found.report.is_measured("0")
        assert found.report.setup.combine == how.combine


def test_a_layer_that_is_not_there_is_told(session: Session, settings: Settings, pool: LiveModels) -> None:
    work = layers_job.analyse_work(session, settings, CellStore(None), How(ROWS), ("99",), pool=pool)
    with pytest.raises(MergeError, match="There is no layer “99”"):
        finish(work(threading.Event()))


def test_what_cannot_be_analysed_is_refused_before_anything_starts(session: Session, settings: Settings) -> None:
    store = CellStore(None)
    without = session.with_rows([{"input": "a", "output": "b"}], "mine", ())
    with pytest.raises(MergeError, match="do not say which task"):
        layers_job.analyse_work(without, settings, store, How(ROWS))
    with pytest.raises(MergeError, match="measure layers by −loss"):
        layers_job.analyse_work(session, settings, store, How(ROWS, metric="rouge_l"))
    with pytest.raises(MergeError):
        layers_job.analyse_work(session, settings, store, How(ROWS, metric="../secret"))
    with pytest.raises(MergeError, match="at most 3 can be measured here"):
        layers_job.check(session, replace(settings, max_rows=3), ROWS)
    layers_job.check(session, settings, ROWS)


# ---- Hi-Merging ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("combine", "switches"),
    [
        ("average", Switches(grid="coarse")),
        ("sum", Switches(grid="none", recompute=True, partial_target="weakened", max_layers=2)),
    ],
)
def test_the_final_recipe_is_the_librarys(
    session: Session, settings: Settings, pool: LiveModels, combine: str, switches: Switches
) -> None:
    session = replace(session, dtype="float16")
    work = layers_job.hi_merge_work(session, settings, CellStore(None), How(ROWS, combine), switches, pool)
    steps, found = finish(work(threading.Event()))
    assert isinstance(found, Merged)
    analysis = analysis_of(session, settings, combine=combine, held_out=settings.demo_rows)
    expected = result_of(iter_hi_merge(analysis, switches, dtype="float16"))
    event = found.event
    assert event.recipe is not None
    assert event.recipe.to_yaml() == expected.recipe.to_yaml()
    assert event.recipe.dtype == "float16"
    assert [(t.layer, t.kind, t.action, t.accepted) for t in event.trials] == [
        (t.layer, t.kind, t.action, t.accepted) for t in expected.trials
    ]
    assert [point.name for point in event.points] == [point.name for point in expected.points]
    for one, other in zip(event.points, expected.points, strict=True):
        assert {name: stat.value for name, stat in one.held_out.items()} == pytest.approx(
            {name: stat.value for name, stat in other.held_out.items()}, abs=1e-6
        )
    assert set(event.points[0].held_out) == {"law", "poems"}
    assert not found.same_rows
    fractions = [step.fraction for step in steps if step.fraction is not None]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    trials = [len(step.data.event.trials) for step in steps if isinstance(step.data, Merged)]
    assert trials == sorted(trials)
    assert trials[-1] <= 3  # there are three blocks


def test_a_stop_leaves_the_recipe_reached_so_far(session: Session, settings: Settings, pool: LiveModels) -> None:
    work = layers_job.hi_merge_work(session, settings, CellStore(None), How(ROWS), Switches(grid="none"), pool)
    last = stopped_when(lambda data: data is not None and bool(data.event.trials), work)
    assert isinstance(last, Merged)
    assert len(last.event.trials) == 1
    assert last.event.recipe is not None
    make_plan(last.event.recipe)  # it can be run


def test_the_merge_says_when_it_is_reported_on_the_rows_that_decided(
    session: Session, settings: Settings, pool: LiveModels
) -> None:
    few = session.with_rows([*rows_of("law", 3, 1), *rows_of("poems", 3, 5)], "mine", ())
    work = layers_job.hi_merge_work(few, settings, CellStore(None), How(ROWS), Switches(grid="none"), pool)
    assert finish(work(threading.Event()))[1].same_rows


# ---- the models that are lent ----------------------------------------------------------------------------------------


def test_models_go_back_as_they_were_lent(session: Session, settings: Settings) -> None:
    seen: list[Any] = []

    def build(checkpoint: Checkpoint, model_type: str, device: str) -> Any:
        seen.append(Workbench(checkpoint, model_type, device))
        return seen[-1]

    pool, store, how = LiveModels(build), CellStore(None), How(ROWS)
    finish(layers_job.hi_merge_work(session, settings, store, how, Switches(grid="none"), pool)(threading.Event()))
    assert len(seen) == 4  # base, two specialists, the merge
    stopped_when(bool, layers_job.analyse_work(session, settings, Watched(), how, pool=pool))
    failing = layers_job.analyse_work(session, settings, store, how, ("99",), pool=pool)
    with pytest.raises(MergeError):
        finish(failing(threading.Event()))
    assert len(seen) == 4  # the same ones each time: they had come back
    assert all(bench.read is Checkpoint.read for bench in seen)


# ---- deltas ----------------------------------------------------------------------------------------------------------


def test_what_the_fine_tunes_changed_is_read_as_the_library_reads_it(session: Session) -> None:
    steps, found = finish(layers_job.delta_work(session)(threading.Event()))
    assert isinstance(found, Deltas)
    assert found.stats == result_of(delta_statistics(session.base, session.fine_tunes))
    assert found.key == layers_job.delta_key(session)
    assert found.key != layers_job.delta_key(session.with_models("decoder", session.base, session.fine_tunes[:1]))
    fractions = [step.fraction for step in steps if step.fraction is not None]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def test_reading_the_weights_can_be_stopped(session: Session) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        finish(layers_job.delta_work(session)(stop))
