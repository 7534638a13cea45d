"""The job behind Measure: every model on every row, rows appearing as they are measured.

Borrows a model in memory from `live.py`, unless everything is remembered; what is measured goes into the cache.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import nullcontext
from typing import TYPE_CHECKING

from components.demo_setup import prepare_steps
from components.jobs import Step, Work
from components.live import LIVE, LiveModels
from components.naming import short_name
from components.session import Session
from components.settings import Settings
from components.views.weights import MeasuredSoFar
from llm_merge.errors import MergeError
from llm_merge.measurements import estimate, measure_models, recorded_losses
from llm_merge.recipe import Recipe

if TYPE_CHECKING:
    from llm_merge.measurements import LossTable, MeasurementCache


def work(
    session: Session, settings: Settings, cache: MeasurementCache, *, fresh: bool = False, pool: LiveModels = LIVE
) -> Work:
    """The job for `JobRegistry.start`; its result is the LossTable. `fresh` measures what is remembered, too.

    Raises MergeError, before anything starts, when there is nothing to measure or more than is allowed.
    """
    check(session, settings)

    def run(stop: threading.Event) -> Generator[Step, None, LossTable]:
        models, rows, model_type = session.models, session.measured_rows, session.model_type
        if not fresh:
            recorded = recorded_losses(models, model_type, rows, cache)
            if recorded is not None and not recorded.other_base:
                return recorded
        yield from prepare_steps(models, stop)
        yield Step("Getting the models ready", None)
        needed = fresh or estimate(models, model_type, rows, cache).missing > 0
        first = Recipe.single(models[0])
        lent = (
            pool.borrow(session.base or models[0], model_type, [first], settings, stop)
            if needed
            else nullcontext([None])
        )
        with lent as benches:
            measuring = measure_models(
                models, model_type, rows, cache=cache, device=settings.device, stop=stop, fresh=fresh, bench=benches[0]
            )
            known: dict[str, dict[int, float]] = {model: {} for model in models}
            while True:
                try:
                    event = next(measuring)
                except StopIteration as end:
                    table: LossTable = end.value
                    return table
                if event.row >= 0:
                    known[event.model][event.row] = event.loss
                if event.from_cache and event.done < event.total:
                    continue  # many at once: shown with the next one that takes time
                losses = tuple(tuple(known[model].get(i) for i in range(len(rows))) for model in models)
                count = sum(loss is not None for loss in losses[models.index(event.model)])
                yield Step(
                    f"{short_name(event.model)}: {count} of {len(rows)} rows",
                    event.done / event.total,
                    MeasuredSoFar(session.measured_hash, models, losses),
                )

    return run


def check(session: Session, settings: Settings) -> None:
    """Raise MergeError, in one sentence, when the session cannot be measured."""
    if len(session.models) < 2:
        raise MergeError("There are fewer than two models to compare: choose them in Models first.", field="models")
    if not session.measured_rows:
        raise MergeError("There are no example rows to measure on: add some in Examples first.", field="examples")
    if session.model_type == "reranker":
        raise MergeError("Rerankers cannot be measured yet: set the shares by hand.", field="models")
    count = len(session.measured_rows)
    if count > settings.max_rows:
        raise MergeError(
            f"These are {count} rows and at most {settings.max_rows} can be measured here: use fewer rows.",
            field="examples",
        )
    if len(session.models) > settings.max_models + 1:
        raise MergeError(
            f"These are {len(session.models) - 1} fine-tunes and at most {settings.max_models} can be measured here.",
            field="models",
        )
