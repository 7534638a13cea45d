"""Long work that outlives the page: measure, merge, prepare, the live demo run.

A job is a generator of `Step`s that runs in a thread of its own and belongs to one visitor. The page follows it, loses
it on a reload and finds it again by visitor and kind. One job at a time uses the processor; others wait in line and see
their place. This module knows nothing of Gradio, models or recipes.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from llm_merge.errors import MergeError, Stopped

log = logging.getLogger(__name__)

KEPT = 100  # finished jobs remembered, over all visitors
WAITING = 20  # jobs in line, over all visitors

Work = Callable[[threading.Event], Generator["Step", None, Any]]


@dataclass(frozen=True)
class Step:
    """One sign of progress: a sentence, a fraction of 1 (None: unknown), and what is known so far."""

    message: str
    fraction: float | None = None
    data: Any = None


@dataclass(frozen=True)
class JobView:
    """A job as it stands at one moment. `status`: waiting | running | done | stopped | failed."""

    id: str
    kind: str
    title: str
    status: str
    step: Step
    seconds: float
    place: int = 0  # jobs before this one in the line
    result: Any = None
    error: Exception | None = None

    @property
    def active(self) -> bool:
        return self.status in ("waiting", "running")


@dataclass
class _Job:
    owner: str
    kind: str
    title: str
    work: Work
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    stop: threading.Event = field(default_factory=threading.Event)
    status: str = "waiting"
    step: Step = Step("Waiting for other work on this machine", None)
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None
    result: Any = None
    error: Exception | None = None
    version: int = 0


class JobRegistry:
    """All jobs of this process. Thread-safe; every question names the visitor who asks."""

    def __init__(self) -> None:
        self._jobs: dict[str, _Job] = {}
        self._changed = threading.Condition()
        self._line: list[_Job] = []
        self._worker: threading.Thread | None = None

    def start(self, owner: str, kind: str, title: str, work: Work) -> str:
        """Put `work` in line and return the job's id. An active job of the same visitor and kind is stopped first.

        Raises MergeError when too many jobs wait.
        """
        job = _Job(owner, kind, title, work)
        with self._changed:
            for other in self._jobs.values():
                if other.owner == owner and other.kind == kind and other.status in ("waiting", "running"):
                    self._ask_to_stop(other)
            if len(self._line) >= WAITING:
                raise MergeError("Too much work is waiting on this machine: try again in a minute.")
            self._forget_old()
            self._jobs[job.id] = job
            self._line.append(job)
            if self._worker is None or not self._worker.is_alive():
                self._worker = threading.Thread(target=self._run_line, daemon=True, name="jobs")
                self._worker.start()
            self._changed.notify_all()
        return job.id

    def follow(self, owner: str, job_id: str) -> Iterator[JobView]:
        """Every change of a job until it ends; the last view is never active. Nothing for a job of somebody else."""
        seen = -1
        while True:
            with self._changed:
                job = self._jobs.get(job_id)
                if job is None or job.owner != owner:
                    return
                self._changed.wait_for(lambda job=job, seen=seen: job.version != seen, timeout=1.0)  # type: ignore[misc]
                seen, view = job.version, self._view(job)
            yield view
            if not view.active:
                return

    def latest(self, owner: str, kind: str) -> JobView | None:
        """The visitor's newest job of a kind, active or not."""
        with self._changed:
            jobs = [job for job in self._jobs.values() if job.owner == owner and job.kind == kind]
            return self._view(jobs[-1]) if jobs else None

    def stop(self, owner: str, kind: str) -> None:
        """Ask the visitor's active job of a kind to stop; it ends at its next step."""
        with self._changed:
            for job in self._jobs.values():
                if job.owner == owner and job.kind == kind and job.status in ("waiting", "running"):
                    self._ask_to_stop(job)

    def _ask_to_stop(self, job: _Job) -> None:
        job.stop.set()
        if job in self._line:
            self._line.remove(job)
            self._end(job, "stopped")

    def _run_line(self) -> None:
        while True:
            with self._changed:
                if not self._line:
                    self._worker = None
                    return
                job = self._line.pop(0)
                job.status, job.started = "running", time.monotonic()
                self._touch(job)
            self._run(job)

    def _run(self, job: _Job) -> None:
        steps = job.work(job.stop)
        status = "done"
        try:
            while True:
                step = next(steps)
                with self._changed:
                    job.step = step
                    self._touch(job)
                if job.stop.is_set():
                    status = "stopped"
                    break
        except StopIteration as end:
            job.result = end.value
        except Stopped:
            status = "stopped"
        except Exception as error:
            status, job.error = "failed", error
            if not isinstance(error, MergeError):
                log.exception("job %s (%s) failed", job.id, job.kind)
        finally:
            steps.close()  # whatever was half done cleans up after itself before the job counts as ended
        with self._changed:
            self._end(job, status)

    def _end(self, job: _Job, status: str) -> None:
        job.status, job.ended = status, time.monotonic()
        self._touch(job)

    def _touch(self, job: _Job) -> None:
        job.version += 1
        for waiting in self._line:
            waiting.version += 1
        self._changed.notify_all()

    def _view(self, job: _Job) -> JobView:
        seconds = (job.ended or time.monotonic()) - job.started
        place = self._line.index(job) + 1 if job in self._line else 0
        return JobView(job.id, job.kind, job.title, job.status, job.step, seconds, place, job.result, job.error)

    def _forget_old(self) -> None:
        ended = [job for job in self._jobs.values() if job.ended is not None]
        for job in ended[: max(0, len(ended) - KEPT)]:
            del self._jobs[job.id]
