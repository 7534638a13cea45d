"""What a measurement is remembered by: the content of model, rows and of everything that decides how rows are read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llm_merge.evaluation import EvaluationSettings
from llm_merge.examples import rows_hash
from llm_merge.families.pooling import read_search
from llm_merge.hashing import combined_hash, file_hash
from llm_merge.methods import get_method

if TYPE_CHECKING:
    from llm_merge.checkpoint import Checkpoint
    from llm_merge.plan import Plan
    from llm_merge.prompts import ResolvedFormat

Row = Mapping[str, Any]
APART = ("decoder", "encoder-decoder")
"""Model types where a row's loss does not depend on the other rows."""


def default_settings(model_type: str) -> EvaluationSettings:
    """What the page measures with: an embedding model's query competes with the passages of 32 rows."""
    return EvaluationSettings() if model_type in APART else EvaluationSettings(batch_size=32)


def reading_hash(first: Checkpoint, model_type: str, settings: EvaluationSettings, fmt: ResolvedFormat) -> str:
    """Hash of all that decides how rows become tokens and losses, beside the weights."""
    parts = [model_type, settings.key(model_type), first.tokenizer_hash()]
    if model_type in APART:
        return combined_hash([*parts, fmt.kind, fmt.template or "", fmt.eos or ""])
    if model_type == "reranker":
        return combined_hash(parts)
    return combined_hash([*parts, repr(replace(read_search(first.folder), notes=()))])


def content_of(plan: Plan) -> str:
    """What the plan's values come from: the model's own content, or that of all models with their shares."""
    if plan.recipe.is_layered or plan.is_task_arithmetic:
        return recipe_content(plan)
    if len(plan.checkpoints) == 1 and plan.dtype == plan.base.main_dtype:
        return plan.checkpoints[0].content_hash()
    parts = [plan.recipe.merge_method, plan.dtype]
    for checkpoint, weight in zip(plan.checkpoints, plan.weights, strict=True):
        parts += [checkpoint.content_hash(), f"{weight:.9g}"]
    return combined_hash(parts)


def recipe_content(plan: Plan, more: Sequence[str] = ()) -> str:
    """Hash of the recipe with each model's content in the place of its name, and of `more`.

    Models that take no part are left out: a specialist alone is the same whatever else lies beside it.
    """
    taking_part = [
        (checkpoint.content_hash(), entry)
        for checkpoint, entry in zip(plan.checkpoints, plan.recipe.models, strict=True)
        if entry.weight != 0 and not (plan.is_task_arithmetic and checkpoint is plan.base)
    ]
    if not taking_part:
        return combined_hash([plan.base.content_hash(), plan.dtype, *more])
    if get_method(plan.recipe.merge_method).random:  # what is drawn hangs on names, too
        more = [*(f"{entry.model} {entry.weight != 0}" for entry in plan.recipe.models), *more]
    recipe = replace(plan.recipe, base_model=None, models=tuple(
        replace(entry, model=content) for content, entry in taking_part))  # fmt: skip
    return combined_hash([plan.base.content_hash(), plan.dtype, json.dumps(recipe.to_dict()), *more])


def row_hash(row: Row) -> str:
    """The task is a label for people and changes no loss."""
    return rows_hash([{key: value for key, value in row.items() if key != "task"}])


def name_of(checkpoint: Checkpoint) -> str:
    from llm_merge.demo import DEMO_MODELS, demo_path

    for model in DEMO_MODELS:
        if demo_path(model.key) == checkpoint.reference:
            return model.key
    return checkpoint.reference.rsplit("/", 1)[-1]


def adapter_hash(checkpoint: Checkpoint) -> str:
    return file_hash(checkpoint.adapter.file) if checkpoint.adapter is not None else ""
