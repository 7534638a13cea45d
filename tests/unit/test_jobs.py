"""Jobs: they outlive who watches them, stop when asked, wait in line, and belong to one visitor."""

from __future__ import annotations

import threading
from collections.abc import Generator
from typing import Any

import pytest

from components.jobs import WAITING, JobRegistry, JobView, Step
from llm_merge.errors import MergeError, Stopped


def last(registry: JobRegistry, owner: str, job: str) -> JobView:
    return list(registry.follow(owner, job))[-1]


def counting(stop: threading.Event) -> Generator[Step, None, str]:
    for i in range(3):
        yield Step(f"step {i}", i / 3, data=i)
    return "whole"


def test_a_job_ends_with_its_result_and_can_be_found_again() -> None:
    registry = JobRegistry()
    job = registry.start("ann", "measure", "Measuring", counting)
    view = last(registry, "ann", job)
    assert (view.status, view.result, view.step.data) == ("done", "whole", 2)
    again = registry.latest("ann", "measure")
    assert again is not None
    assert again.id == job


def test_nobody_else_sees_follows_or_stops_it() -> None:
    registry, release = JobRegistry(), threading.Event()

    def slow(stop: threading.Event) -> Generator[Step, None, str]:
        yield Step("begun")
        release.wait(10)
        yield Step("more")
        return "whole"

    job = registry.start("ann", "measure", "Measuring", slow)
    assert registry.latest("bob", "measure") is None
    assert list(registry.follow("bob", job)) == []
    registry.stop("bob", "measure")
    release.set()
    assert last(registry, "ann", job).status == "done"


def test_stopping_closes_the_work_before_it_counts_as_ended() -> None:
    registry, begun, cleaned = JobRegistry(), threading.Event(), threading.Event()

    def endless(stop: threading.Event) -> Generator[Step, None, None]:
        try:
            while True:
                yield Step("going")
                begun.set()
                stop.wait(0.01)
        finally:
            cleaned.set()

    job = registry.start("ann", "save", "Saving", endless)
    assert begun.wait(10)
    registry.stop("ann", "save")
    assert last(registry, "ann", job).status == "stopped"
    assert cleaned.is_set()


def test_work_that_raises_stopped_is_stopped_not_failed() -> None:
    def gives_up(stop: threading.Event) -> Generator[Step, None, None]:
        yield Step("going")
        raise Stopped

    registry = JobRegistry()
    assert last(registry, "ann", registry.start("ann", "save", "Saving", gives_up)).status == "stopped"


def test_an_error_is_kept_for_the_page() -> None:
    def fails(stop: threading.Event) -> Generator[Step, None, None]:
        yield Step("going")
        raise MergeError("The disk is full: free 2 GB.")

    registry = JobRegistry()
    view = last(registry, "ann", registry.start("ann", "save", "Saving", fails))
    assert view.status == "failed"
    assert str(view.error) == "The disk is full: free 2 GB."


def test_jobs_run_one_at_a_time_and_say_their_place() -> None:
    registry, release, running = JobRegistry(), threading.Event(), []

    def work(stop: threading.Event) -> Generator[Step, None, int]:
        running.append(1)
        together = len(running)
        yield Step("going")
        release.wait(10)
        running.pop()
        return together

    first = registry.start("ann", "measure", "Measuring", work)
    second = registry.start("bob", "measure", "Measuring", work)
    third = registry.start("cyd", "measure", "Measuring", work)
    view = registry.latest("cyd", "measure")
    assert view is not None
    assert view.status == "waiting"
    assert view.place >= 1
    release.set()
    results = [last(registry, owner, job).result for owner, job in (("ann", first), ("bob", second), ("cyd", third))]
    assert results == [1, 1, 1]


def test_a_second_job_of_the_same_kind_stops_the_first() -> None:
    def endless(stop: threading.Event) -> Generator[Step, None, None]:
        while True:
            yield Step("going")
            stop.wait(0.01)

    registry = JobRegistry()
    first = registry.start("ann", "measure", "Measuring", endless)
    second = registry.start("ann", "measure", "Measuring", counting)
    assert last(registry, "ann", first).status == "stopped"
    assert last(registry, "ann", second).status == "done"


def test_a_full_line_is_refused_in_words() -> None:
    registry, release = JobRegistry(), threading.Event()

    def waits(stop: threading.Event) -> Generator[Step, None, Any]:
        yield Step("going")
        release.wait(10)

    visitors = iter(range(WAITING + 1))
    for visitor in visitors:
        try:
            registry.start(f"visitor {visitor}", "measure", "Measuring", waits)
        except MergeError:  # the first job may still stand in line when the last one comes
            assert visitor == WAITING
    with pytest.raises(MergeError, match="try again in a minute"):
        registry.start("one too many", "measure", "Measuring", waits)
    release.set()
