"""Losses of models on example rows: measured one model after the other, and remembered by content.

Adding a model measures only that model; adding a row to a chat model's examples measures only that row. What a loss is,
`evaluation.py` knows; how a model comes into memory, `workbench.py`; what is kept where, `measurement_cache.py`.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import TYPE_CHECKING

from llm_merge.errors import Stopped
from llm_merge.evaluation import EvaluationSettings, Prepared, losses, prepare, resolve_format, saturation
from llm_merge.examples import rows_hash
from llm_merge.hashing import combined_hash
from llm_merge.loss_table import LossTable, Measured, model_name
from llm_merge.measurement_cache import Found, Key, Measurement, MeasurementCache
from llm_merge.measurement_keys import (
    APART,
    Row,
    adapter_hash,
    content_of,
    default_settings,
    name_of,
    reading_hash,
    row_hash,
)
from llm_merge.plan import Plan, make_plan
from llm_merge.recipe import Recipe
from llm_merge.remembered import Estimate, estimate, recorded_losses

if TYPE_CHECKING:
    from llm_merge.prompts import ResolvedFormat
    from llm_merge.workbench import Workbench

__all__ = [
    "Estimate",
    "LossTable",
    "MeasureEvent",
    "Measurement",
    "MeasurementCache",
    "default_settings",
    "estimate",
    "measure_models",
    "model_name",
    "recorded_losses",
]


@dataclass(frozen=True)
class MeasureEvent:
    """One loss, or the beginning of a model (`row` is -1 and `loss` NaN while it is loaded).

    done, total     losses known, of all models
    from_cache      the day it was measured on when it was remembered, else ""
    """

    model: str
    row: int
    loss: float
    done: int
    total: int
    from_cache: str = ""


def measure_models(
    models: Sequence[Measured],
    model_type: str,
    rows: Sequence[Row],
    *,
    settings: EvaluationSettings | None = None,
    cache: MeasurementCache | None = None,
    device: str = "auto",
    stop: threading.Event | None = None,
    fresh: bool = False,
    today: str | None = None,
    bench: Workbench | None = None,
) -> Generator[MeasureEvent, None, LossTable]:
    """The loss of every model on every row: one event per loss, and the whole table as the generator's result.

    models      references, and recipes for merges that are measured without being written
    cache       where losses are looked up and kept; None: nowhere
    fresh       measure everything anew, whatever is remembered
    bench       a resident model of the same architecture to use instead of building one

    All models read the rows in one format with the first model's tokenizer. Raises IncompatibleModels, ExampleError
    (naming the rows), CheckpointError, or Stopped; what was measured before a stop is kept.
    """
    run = _Run(models, model_type, rows, settings or default_settings(model_type), device, stop, bench)
    day = today or date.today().isoformat()
    known: list[dict[int, Found]] = []
    for plan in run.plans:
        remembered = cache.find(run.key(plan), run.row_hashes) if cache is not None and not fresh else {}
        if not run.apart and len(remembered) < len(set(run.row_hashes)):
            remembered = {}
        known.append({i: remembered[row] for i, row in enumerate(run.row_hashes) if row in remembered})
    done, total = 0, len(run.plans) * len(run.row_hashes)
    values: list[dict[int, float]] = []
    for name, plan, found in zip(run.names, run.plans, known, strict=True):
        mine = {i: item.loss for i, item in found.items()}
        for i, item in found.items():
            done += 1
            yield MeasureEvent(name, i, item.loss, done, total, item.measured_on)
        missing = [i for i in range(len(run.row_hashes)) if i not in mine]
        if missing:
            yield MeasureEvent(name, -1, math.nan, done, total)
            fresh_losses = dict[int, float]()
            try:
                for i, loss in run.losses(plan, missing):
                    mine[i] = fresh_losses[i] = loss
                    done += 1
                    yield MeasureEvent(name, i, loss, done, total)
            finally:
                if cache is not None and fresh_losses and (run.apart or len(fresh_losses) == len(missing)):
                    cache.put(run.measurement(plan, fresh_losses, day))
        values.append(mine)
    table = LossTable(
        models=run.names,
        losses=tuple(tuple(mine[i] for i in range(len(run.row_hashes))) for mine in values),
        rows_hash=rows_hash(rows),
        dates=tuple(_date(found, len(rows)) for found in known),
        recorded=tuple(len(found) == len(rows) and any(f.recorded for f in found.values()) for found in known),
        format=run.format.why if run.apart else "",
        notes=run.prepared.notes,
    )
    saturated = saturation(run.prepared, [table.mean(name) for name in run.names])
    return replace(table, notes=(*table.notes, saturated)) if saturated else table


class _Run:
    """One call of `measure_models`: what all models share, made once."""

    def __init__(
        self,
        models: Sequence[Measured],
        model_type: str,
        rows: Sequence[Row],
        settings: EvaluationSettings,
        device: str,
        stop: threading.Event | None,
        bench: Workbench | None,
    ) -> None:
        from llm_merge.families import get_family
        from llm_merge.workbench import Workbench, choose_device, choose_dtype

        self.model_type, self.settings, self.stop = model_type, settings, stop
        self.apart = model_type in APART
        self.names = tuple(model_name(model) for model in models)
        references = dict.fromkeys(r for m in models for r in ([m] if isinstance(m, str) else m.references))
        together = make_plan(Recipe.linear(tuple(references), [1 / len(references)] * len(references)))
        self.plans = [make_plan(m if isinstance(m, Recipe) else Recipe.single(m)) for m in models]
        first = together.checkpoints[0]
        self.format: ResolvedFormat = resolve_format(together.checkpoints, settings.format)
        tokenizer = bench.tokenizer if bench is not None else get_family(model_type).load_tokenizer(first)
        self.prepared: Prepared = prepare(rows, model_type, tokenizer, settings, self.format)
        self.row_hashes = tuple(row_hash(row) for row in rows)
        self.together = "" if self.apart else combined_hash(self.row_hashes)
        self.reading = reading_hash(first, model_type, settings, self.format)
        self.first = first
        where = bench.device if bench is not None else choose_device(device)
        dtype = bench.dtype if bench is not None else choose_dtype(first, where)
        self.dtype = str(dtype).removeprefix("torch.")
        self._bench = bench
        self._began = 0.0
        self._build = lambda: Workbench(first, model_type, where, dtype=dtype)

    def key(self, plan: Plan) -> Key:
        return Key(content_of(plan), self.reading, self.dtype, self.together)

    def losses(self, plan: Plan, missing: Sequence[int]) -> Generator[tuple[int, float], None, None]:
        """(row, loss) of the missing rows. The model is built when it is first needed: all may be remembered."""
        if self._bench is None:
            self._bench = self._build()
        some = self.prepared
        if self.apart:
            some = replace(some, rows=tuple(some.rows[i] for i in missing))
        with self._bench.lock:
            self._bench.follow(plan, self.stop)
            self._began = time.monotonic()
            for place, loss in losses(self._bench, some, self.stop):
                if self.stop is not None and self.stop.is_set():
                    raise Stopped
                yield missing[place], loss

    def measurement(self, plan: Plan, found: Mapping[int, float], day: str) -> Measurement:
        order = sorted(found)
        single = plan.checkpoints[0] if len(plan.checkpoints) == 1 else None
        return Measurement(
            key=self.key(plan),
            rows=tuple(self.row_hashes[i] for i in order),
            losses=tuple(found[i] for i in order),
            name=name_of(single) if single else "merge",
            base_hash=self.first.base_hash(),
            adapter_hash=adapter_hash(single) if single else "",
            measured_on=day,
            seconds=round(time.monotonic() - self._began, 3),
            format=self.format.why if self.apart else "",
        )


def _date(found: Mapping[int, Found], count: int) -> str:
    return max((item.measured_on for item in found.values()), default="") if len(found) == count else ""
