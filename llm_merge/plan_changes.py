"""In which tensors two plans give different values, told without computing any."""

from __future__ import annotations

from collections.abc import Iterator

from llm_merge.merge import random_key
from llm_merge.methods import METHODS
from llm_merge.plan import Plan, TensorPlan


def changed_tensors(before: Plan | None, plan: Plan) -> Iterator[TensorPlan]:
    """The tensors of `plan` that `before` does not already give."""
    if before is plan:
        return
    if before is None or before.separate_head != plan.separate_head:
        yield from plan.tensors
        return
    known = {tensor.name: tensor for tensor in before.tensors}
    alike = (before.checkpoints, before.base, before.recipe.merge_method) == (
        plan.checkpoints, plan.base, plan.recipe.merge_method)  # fmt: skip
    for tensor in plan.tensors:
        old = known.get(tensor.name)
        if old is None or not ((alike and old == tensor) or _step(before, old) == _step(plan, tensor)):
            yield tensor


def differs(before: Plan | None, plan: Plan) -> bool:
    """Whether any tensor changes."""
    return next(changed_tensors(before, plan), None) is not None


def _step(plan: Plan, tensor: TensorPlan) -> tuple[object, ...]:
    """What decides a tensor's values: models with a share of it, their shares, the method and the type.

    A tensor that no model has a share of is the base's, whatever the method and its settings.
    """
    shared = [index for index, weight in enumerate(tensor.weights) if weight]
    sources = tuple((plan.checkpoints[i].reference, tensor.sources[i], tensor.weights[i]) for i in shared)
    if not sources:
        kind = "base" if plan.is_task_arithmetic or tensor.action == "copy" else "zero"
        return (kind, tensor.dtype, plan.base.reference)
    settings = tuple(
        (name, tuple(value[i] for i in shared) if isinstance(value, tuple) else value)
        for name, value in tensor.settings
    )
    # Which numbers a method draws depends on which model of the recipe it is.
    draws = random_key(plan, tensor, shared).models if METHODS[tensor.method].random else ()
    return (tensor.action, tensor.method, tensor.dtype, sources, settings, plan.base.reference, draws)
