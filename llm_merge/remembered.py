"""What is known without running a model: losses that came with the program or were measured before, and how long the
rest will take. Opens headers and configs at most."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_merge.errors import CheckpointError
from llm_merge.evaluation import EvaluationSettings, resolve_format
from llm_merge.examples import rows_hash
from llm_merge.hashing import combined_hash, file_hash
from llm_merge.loss_table import LossTable
from llm_merge.measurement_cache import Key, Measurement, MeasurementCache
from llm_merge.measurement_keys import APART, Row, content_of, default_settings, reading_hash, row_hash
from llm_merge.plan import make_plan
from llm_merge.recipe import Recipe

CORE_SPEED = 9e10
"""Multiply-adds per second and core, twice: 670 tokens/s of a 135 M model in float32 on two cores."""
GPU_SPEED = 2e13
LOADING = 4e8  # bytes per second from a warm disk into a model, in float32
PREPARING = 20.0  # seconds to convert a demo base, once


@dataclass(frozen=True)
class Estimate:
    """What measuring still costs: losses that are not known yet, of how many, and seconds."""

    missing: int
    total: int
    seconds: float


def estimate(
    models: Sequence[str],
    model_type: str,
    rows: Sequence[Row],
    cache: MeasurementCache,
    *,
    settings: EvaluationSettings | None = None,
    gpu: bool = False,
    fresh: bool = False,
) -> Estimate:
    """How long `measure_models` will take, from what is remembered and from earlier measurements of the same kind.

    Raises MergeError for models or rows that cannot be measured, as `measure_models` would.
    """
    from llm_merge import demo

    total = len(models) * len(rows)
    demos = {demo.demo_path(model.key): model.key for model in demo.DEMO_MODELS}
    settings = settings or default_settings(model_type)
    if any(model in demos and not demo.is_prepared(demos[model]) for model in models):
        return Estimate(total, total, PREPARING + _rough(135e6, rows, len(models), gpu))
    plan = make_plan(Recipe.linear(list(models), [1 / len(models)] * len(models)))
    first = plan.checkpoints[0]
    reading = reading_hash(first, model_type, settings, resolve_format(plan.checkpoints, settings.format))
    hashes = tuple(row_hash(row) for row in rows)
    together = "" if model_type in APART else combined_hash(hashes)
    parameters = sum(info.numel for info in first.tensors.values())
    missing, begun = 0, 0
    for model in models:
        key = Key(content_of(make_plan(Recipe.single(model))), reading, together=together)
        found = {} if fresh else cache.find(key, hashes)
        lacking = sum(row not in found for row in hashes)
        lacking = len(hashes) if lacking and together else lacking
        missing, begun = missing + lacking, begun + bool(lacking)
    if not missing:
        return Estimate(0, total, 0.0)
    pace = _pace(cache, reading)
    loading = begun * 4 * parameters / LOADING
    measuring = pace * missing if pace else missing / len(hashes) * _rough(parameters, rows, 1, gpu)
    return Estimate(missing, total, loading + measuring)


def _pace(cache: MeasurementCache, reading: str) -> float | None:
    """Seconds per row that measuring took here before, in the same way; None when it never did."""
    paces = [m.seconds / len(m.rows) for m in cache.own() if m.key.settings == reading and m.seconds > 0]
    return statistics.median(paces) if paces else None


def _rough(parameters: float, rows: Sequence[Row], models: int, gpu: bool) -> float:
    """Seconds by counting multiply-adds: 2 per parameter and token, a token being some four characters."""
    tokens = sum(len(str(value)) for row in rows for value in row.values()) / 4
    speed = GPU_SPEED if gpu else CORE_SPEED * min(os.cpu_count() or 1, 16)
    return models * 2 * parameters * tokens / speed


def recorded_losses(
    models: Sequence[str], model_type: str, rows: Sequence[Row], cache: MeasurementCache
) -> LossTable | None:
    """What was recorded beforehand for demo models on these rows, without opening one; None unless it is all there.

    Found by the demo model's key and its adapter's content; when the base is here already and is another one than was
    measured, the table says so (`other_base`).
    """
    from llm_merge.demo import DEMO_MODELS, demo_path

    keys = {demo_path(model.key): model.key for model in DEMO_MODELS}
    if not rows or not models or any(model not in keys for model in models):
        return None
    adapters = {keys[model]: _demo_adapter_hash(keys[model]) for model in models}
    wanted = tuple(row_hash(row) for row in rows)
    together = "" if model_type in APART else combined_hash(wanted)
    ways: dict[tuple[str, str, str], dict[str, list[Measurement]]] = {}  # only losses made in one way are compared
    for m in cache.recordings():
        if m.key.together == together and m.name in adapters and adapters[m.name] == m.adapter_hash:
            ways.setdefault((m.key.settings, m.key.dtype, m.base_hash), {}).setdefault(m.name, []).append(m)
    for (_, _, base_hash), found in ways.items():
        table = _table([found.get(keys[model], []) for model in models], wanted)
        if table is not None:
            losses, dates = table
            here = _base_hash(keys[models[0]])
            return LossTable(
                models=tuple(models),
                losses=losses,
                rows_hash=rows_hash(rows),
                dates=dates,
                recorded=(True,) * len(models),
                other_base=here is not None and here != base_hash,
                format=next(m.format for group in found.values() for m in group),
            )
    return None


def _table(
    found: Sequence[Sequence[Measurement]], wanted: Sequence[str]
) -> tuple[tuple[tuple[float, ...], ...], tuple[str, ...]] | None:
    losses: list[tuple[float, ...]] = []
    dates: list[str] = []
    for measurements in found:
        by_row: Mapping[str, tuple[float, str]] = {
            row: (loss, m.measured_on) for m in measurements for row, loss in zip(m.rows, m.losses, strict=True)
        }
        if not all(row in by_row for row in wanted):
            return None
        losses.append(tuple(by_row[row][0] for row in wanted))
        dates.append(max(by_row[row][1] for row in wanted))
    return tuple(losses), tuple(dates)


def _demo_adapter_hash(key: str) -> str | None:
    """The hash of a demo adapter's file; "" for a base, None when the file is not there."""
    from llm_merge.demo import demo_model

    model = demo_model(key)
    if model.base is None:
        return ""
    file = Path(model.reference) / "adapter_model.safetensors"
    return file_hash(file) if file.is_file() else None


def _base_hash(key: str) -> str | None:
    """The hash of a demo model's base as it is here; None while it is not here."""
    from llm_merge.checkpoint import open_checkpoint
    from llm_merge.demo import demo_model, demo_path, is_prepared

    base = demo_model(key).base or key
    if not is_prepared(base):
        return None
    try:
        return open_checkpoint(demo_path(base), local_only=True).content_hash()
    except CheckpointError:  # it will come from the hub
        return None
