"""The job behind Measure, without a page."""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components.jobs import Step
from components.live import LiveModels
from components.measure_job import work
from components.session import Session
from components.settings import Settings
from components.views.weights import MeasuredSoFar
from llm_merge.errors import MergeError, Stopped
from llm_merge.measurements import LossTable, MeasurementCache
from tests.tiny_models import TinyFamily

ROWS = [{"input": f"What is {n} + {n}?", "output": f"It is {2 * n}.", "task": ""} for n in range(12)]


@pytest.fixture
def session(tiny_llama: TinyFamily) -> Session:
    base, *tunes = tiny_llama.references
    return Session().with_models("decoder", base, tunes).with_rows(ROWS, "pasted", ())


@pytest.fixture
def cache(tmp_path: Path) -> MeasurementCache:
    return MeasurementCache(tmp_path / "measured")


def start(
    session: Session, cache: MeasurementCache, stop: threading.Event | None = None, **options: Any
) -> Generator[Step, None, Any]:
    settings = Settings(home=cache.folder, device="cpu")
    return work(session, settings, cache, pool=LiveModels(), **options)(stop or threading.Event())


def finish(job: Generator[Step, None, Any]) -> tuple[list[Step], LossTable]:
    steps = []
    while True:
        try:
            steps.append(next(job))
        except StopIteration as end:
            return steps, end.value


def test_rows_appear_as_they_are_measured(session: Session, cache: MeasurementCache) -> None:
    steps, table = finish(start(session, cache))
    seen = [step.data for step in steps if isinstance(step.data, MeasuredSoFar)]
    counts = [sum(loss is not None for model in so_far.losses for loss in model) for so_far in seen]
    assert counts == sorted(counts)
    assert counts[-1] == 3 * 12
    assert seen[-1].losses == table.losses
    assert all(so_far.rows_hash == session.rows_hash and so_far.models == session.models for so_far in seen)
    fractions = [step.fraction for step in steps if step.fraction is not None]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert steps[-1].message == "tune-2: 12 of 12 rows"


def test_the_sessions_shares_follow(session: Session, cache: MeasurementCache) -> None:
    _, table = finish(start(session, cache))
    after = session.with_losses(table)
    assert (session.origin, after.origin) == ("equal", "losses")
    best = min(after.mixed, key=table.mean)
    assert dict(zip(after.mixed, after.shares, strict=True))[best] == max(after.shares)


def test_a_second_time_takes_what_is_remembered_and_fresh_does_not(session: Session, cache: MeasurementCache) -> None:
    _, first = finish(start(session, cache))
    steps, again = finish(start(session, cache))
    assert again.losses == first.losses
    assert all(again.dates)
    assert len(steps) == 2  # getting ready, and everything at once
    _, live = finish(start(session, cache, fresh=True))
    assert not any(live.dates)
    assert [live.of(model) for model in session.models] == [pytest.approx(losses) for losses in first.losses]


def test_a_stop_ends_it_and_keeps_what_was_measured(session: Session, cache: MeasurementCache) -> None:
    stop = threading.Event()
    job = start(session, cache, stop)
    for step in job:
        if step.fraction:  # the first row is there
            stop.set()
            break
    with pytest.raises(Stopped):
        next(job)
    (kept,) = cache.own()
    assert 0 < len(kept.rows) < len(ROWS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fine_tunes": ()}, "There are fewer than two models to compare: choose them in Models first."),
        ({"measured_rows": ()}, "There are no example rows to measure on: add some in Examples first."),
        ({"model_type": "reranker"}, "Rerankers cannot be measured yet: set the shares by hand."),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    session: Session, cache: MeasurementCache, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(MergeError) as error:
        start(replace(session, **change), cache)
    assert error.value.message == words


def test_a_public_page_measures_no_more_than_it_may(session: Session, cache: MeasurementCache) -> None:
    settings = replace(Settings.for_public(cache.folder), max_rows=10)
    with pytest.raises(MergeError, match="These are 12 rows and at most 10 can be measured here: use fewer rows"):
        work(session, settings, cache)
