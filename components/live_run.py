"""The whole demo before the visitor's eyes: prepare, measure every model on every row, merge in memory, answer.

Runs as one job and yields what it knows so far; everything in it is measured anew, nothing is taken from a recording.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from components.demo_setup import prepare_steps, unprepared
from components.jobs import JobView, Step, Work
from components.naming import short_name
from components.session import Session
from components.settings import Settings
from components.views.start import MERGED_NAME, LiveAnswers
from llm_merge.recipe import Recipe

if TYPE_CHECKING:
    from llm_merge.measurements import LossTable, MeasurementCache

NEW_TOKENS = 48
# How the progress bar is shared out between the parts, by what they take on two cores.
PREPARE, MEASURE, ANSWER = 0.2, 0.5, 0.3


@dataclass(frozen=True)
class LiveResult:
    """What a live run leaves: the losses, the merge it tried, and the answers."""

    table: LossTable
    recipe_key: str
    answers: LiveAnswers


def recorded_table(session: Session, cache: MeasurementCache) -> LossTable | None:
    """The losses recorded for the demo's rows, without running a model; None when there are none."""
    from llm_merge.measurements import recorded_losses

    return recorded_losses(session.models, session.model_type, session.rows, cache)


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
        begin = PREPARE if unprepared(session.models) else 0.0
        for step in prepare_steps(session.models, stop):
            yield replace(step, message=f"1 of 3 · {step.message}", fraction=PREPARE * (step.fraction or 0))
        table = yield from _measure(session, settings, cache, stop, begin)
        merged = session.with_losses(table)
        answers = None
        for answers, fraction in _answers(merged, prompt, specialist, settings, stop):
            shown = 1 - ANSWER + ANSWER * fraction
            yield Step("3 of 3 · Merged in memory; three models answer the same prompt", shown, answers)
        assert answers is not None
        return LiveResult(table, merged.recipe_key, answers)

    return run


def _measure(
    session: Session, settings: Settings, cache: MeasurementCache, stop: threading.Event, begin: float
) -> Generator[Step, None, LossTable]:
    from llm_merge.measurements import measure_models

    measuring = measure_models(
        session.models, session.model_type, session.rows, cache=cache, device=settings.device, stop=stop, fresh=True
    )
    share = 1 - ANSWER - begin
    while True:
        try:
            event = next(measuring)
        except StopIteration as end:
            table: LossTable = end.value
            return table
        message = f"2 of 3 · Measuring {short_name(event.model)}: {event.done} of {event.total} rows"
        yield Step(message, begin + share * event.done / max(event.total, 1))


def _answers(
    session: Session, prompt: str, specialist: str, settings: Settings, stop: threading.Event
) -> Iterator[tuple[LiveAnswers, float]]:
    """Base, the specialist and the merge answer in turn on one model in memory."""
    from llm_merge.checkpoint import open_checkpoint
    from llm_merge.evaluation import resolve_format
    from llm_merge.generation import GenerationSettings, generate
    from llm_merge.workbench import Workbench

    recipe = session.recipe
    assert recipe is not None
    checkpoints = [open_checkpoint(model) for model in session.models]
    fmt = resolve_format(checkpoints)
    bench = Workbench(checkpoints[0], session.model_type, settings.device)
    generation = GenerationSettings(max_new_tokens=NEW_TOKENS)
    mix = " / ".join(f"{short_name(m)} {s:.2f}" for m, s in zip(session.mixed, session.shares, strict=True))
    columns: list[tuple[str, Recipe]] = [(model, Recipe.single(model)) for model in (session.base, specialist)]
    columns.append((MERGED_NAME, recipe))
    texts = {name: "" for name, _ in columns}

    def so_far() -> LiveAnswers:
        return LiveAnswers(prompt, tuple(texts.items()), session.recipe_key, mix)

    for number, (name, what) in enumerate(columns):
        bench.follow(what, stop)
        for text in generate(bench, prompt, generation, fmt, stop):
            texts[name] = text
            yield so_far(), number / len(columns)
    yield so_far(), 1.0
