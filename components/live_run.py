"""The whole demo before the visitor's eyes: prepare, measure every model on every row, merge in memory, answer.

Runs as one job made of the jobs behind Measure and Try; everything in it is measured anew, nothing comes from a
recording.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from components import measure_job
from components.answering import answer_work
from components.jobs import JobView, Step, Work
from components.session import Session
from components.settings import Settings
from components.views import try_view
from components.views.start import MERGED_NAME, LiveAnswers
from llm_merge.generation import GenerationSettings
from llm_merge.measurements import recorded_losses

if TYPE_CHECKING:
    from llm_merge.measurements import LossTable, MeasurementCache

Result = TypeVar("Result")
NEW_TOKENS = 48
MEASURING = 0.6  # of the progress bar; the rest is answering


@dataclass(frozen=True)
class LiveResult:
    """What a live run leaves: the losses, the merge it tried, and the answers."""

    table: LossTable
    recipe_key: str
    answers: LiveAnswers


def recorded_table(session: Session, cache: MeasurementCache) -> LossTable | None:
    """The losses recorded for the demo's rows, without running a model; None when there are none."""
    return recorded_losses(session.models, session.model_type, session.measured_rows, cache)


def answers_of(job: JobView | None) -> LiveAnswers | None:
    """The answers of a live run so far, if it has come to that."""
    if job is None:
        return None
    if isinstance(job.result, LiveResult):
        return job.result.answers
    return job.step.data if isinstance(job.step.data, LiveAnswers) else None


def work(session: Session, prompt: str, specialist: str, settings: Settings, cache: MeasurementCache) -> Work:
    """The job for `JobRegistry.start`: base, `specialist` and the merge answer `prompt` in the end."""

    def run(stop: threading.Event) -> Generator[Step, None, LiveResult]:
        measuring = measure_job.work(session, settings, cache, fresh=True)(stop)
        table: LossTable = yield from _relabelled(measuring, "1 of 2", 0.0, MEASURING)
        merged = session.with_losses(table)
        columns = try_view.columns(merged, [merged.base, specialist])
        generation = GenerationSettings(max_new_tokens=NEW_TOKENS)
        answering = answer_work(merged, prompt, columns, generation, settings)(stop)
        answers: try_view.Answers = yield from _relabelled(answering, "2 of 2", MEASURING, 1 - MEASURING)
        return LiveResult(table, merged.recipe_key, live_answers(answers))

    return run


def live_answers(answers: try_view.Answers) -> LiveAnswers:
    """What Start shows of answers side by side."""
    shown = sorted(answers.columns, key=lambda answer: answer.name == MERGED_NAME)  # the merge last
    texts = tuple((answer.name, answer.text) for answer in shown)
    return LiveAnswers(answers.prompt, texts, answers.recipe_key, answers.mix)


def _relabelled(
    steps: Generator[Step, None, Result], part: str, begin: float, share: float
) -> Generator[Step, None, Result]:
    """The steps of one part of the run, as steps of the whole; closing this closes the part."""
    try:
        while True:
            step = next(steps)
            data = live_answers(step.data) if isinstance(step.data, try_view.Answers) else None
            fraction = begin + share * (_written(step.data) if data else step.fraction or 0)
            yield replace(step, message=f"{part} · {step.message}", fraction=fraction, data=data)
    except StopIteration as end:
        result: Result = end.value
        return result
    finally:
        steps.close()


def _written(answers: try_view.Answers) -> float:
    """How far the answers are, by their characters: a token is some four of them."""
    done = sum(1.0 if a.state == "done" else min(1.0, len(a.text) / 4 / NEW_TOKENS) for a in answers.columns)
    return done / len(answers.columns)
