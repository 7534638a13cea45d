"""Runs a plan: reads one tensor of each model at a time, merges it, hands it to a sink, and tells how far it is.

The arithmetic is the method's, in its own precision, with one cast to the output type at the end. Where the result goes
is the sink's business; this module knows no files.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from llm_merge.errors import Problem
from llm_merge.methods import get_method
from llm_merge.plan import CHUNK, Plan, TensorPlan

if TYPE_CHECKING:
    import torch

    from llm_merge.checkpoint import Checkpoint

NOTABLE_LOSS = 0.1  # of the changed entries
SAMPLED_TENSORS = 6
SAMPLED_ENTRIES = 1 << 16  # of each sampled tensor
LARGEST_SAMPLE = 1 << 24  # elements; larger tensors are not read for a sample


@dataclass(frozen=True)
class Progress:
    """How far a merge is. `done` and `total` count tensors, `tensor` is the one just written."""

    phase: str  # "merging" | "finishing" | "done"
    tensor: str
    done: int
    total: int
    bytes_done: int
    bytes_total: int


class Sink(Protocol):
    """Where merged tensors go, in the plan's order. After `open`, either `finish` or `discard` is called, once."""

    def open(self, plan: Plan) -> None: ...

    def write(self, tensor_plan: TensorPlan, tensor: torch.Tensor) -> None: ...

    def finish(self) -> None: ...

    def discard(self) -> None: ...


class MemorySink:
    """Keeps the merged tensors in `tensors`, by name."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def open(self, plan: Plan) -> None:
        self.tensors = {}

    def write(self, tensor_plan: TensorPlan, tensor: torch.Tensor) -> None:
        self.tensors[tensor_plan.name] = tensor

    def finish(self) -> None:
        """Nothing is left to do."""

    def discard(self) -> None:
        self.tensors = {}


def run(plan: Plan, sink: Sink) -> Generator[Progress, None, None]:
    """Merge everything into the sink, with an event after each tensor.

    Closing the generator, or any error, makes the sink discard what it has: a merge is whole or it is not there.
    """
    total, bytes_total, written = len(plan.tensors), plan.output_bytes, 0
    finished = False
    try:
        sink.open(plan)
        yield Progress("merging", "", 0, total, 0, bytes_total)
        for done, tensor_plan in enumerate(plan.tensors, start=1):
            sink.write(tensor_plan, merged_tensor(plan, tensor_plan))
            written += tensor_plan.nbytes
            yield Progress("merging", tensor_plan.name, done, total, written, bytes_total)
        yield Progress("finishing", "", total, total, written, bytes_total)
        sink.finish()
        finished = True
    finally:
        if not finished:
            sink.discard()
    yield Progress("done", "", total, total, written, bytes_total)


def merged_tensors(plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the result with its name, in the plan's order, one at a time."""
    for tensor_plan in plan.tensors:
        yield tensor_plan.name, merged_tensor(plan, tensor_plan)


def merged_tensor(plan: Plan, tensor_plan: TensorPlan) -> torch.Tensor:
    """One tensor of the result, in its output type and shape.

    A model of weight 0 is not read: (1, 0) gives the first model bit for bit, whatever the second one holds.
    """
    import torch

    if tensor_plan.action == "copy":
        return plan.base.read(tensor_plan.name).to(getattr(torch, tensor_plan.dtype))
    parts = [
        checkpoint.read(source).reshape(-1) if weight else None
        for checkpoint, source, weight in zip(plan.checkpoints, tensor_plan.sources, tensor_plan.weights, strict=True)
    ]
    return _combined(tensor_plan, parts).reshape(tensor_plan.shape)


def _combined(tensor_plan: TensorPlan, parts: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """The method over flat tensors, one per model, in the output type; what has no weight may be None."""
    import torch

    dtype: torch.dtype = getattr(torch, tensor_plan.dtype)
    weights = [weight for weight in tensor_plan.weights if weight]
    used = [part for part, weight in zip(parts, tensor_plan.weights, strict=True) if weight and part is not None]
    if not used:
        return torch.zeros(tensor_plan.elements, dtype=dtype)
    method = get_method(tensor_plan.method)
    precision: torch.dtype = getattr(torch, method.precision)
    count = used[0].numel()
    result = torch.empty(count, dtype=dtype)
    step = CHUNK if method.element_wise else max(1, count)
    for start in range(0, count, step):
        chunks = [part[start : start + step].to(precision) for part in used]
        result[start : start + step] = method.function(chunks, weights=weights)
    return result


def rounding_loss(plan: Plan, *, base: Checkpoint | None = None) -> float:
    """Share of the changed entries that rounding to the output type puts back to the base's value, from 0 to 1.

    Counted on a sample of tensors: an entry is changed if any model's differs from the base's, and lost if the merged
    value and the base's are the same once both are in the output type. `base` is by default the plan's, without its
    adapter if it has one.
    """
    import torch

    original = replace(base or plan.base, adapter=None)
    changed = lost = 0
    for tensor_plan in _sample(plan, original):
        stride = max(1, tensor_plan.elements // SAMPLED_ENTRIES)
        before = original.read(tensor_plan.name).reshape(-1)[::stride]
        parts = [
            checkpoint.read(source).reshape(-1)[::stride] if _may_differ(checkpoint, source, original) else before
            for checkpoint, source in zip(plan.checkpoints, tensor_plan.sources, strict=True)
        ]
        differs = torch.zeros_like(before, dtype=torch.bool)
        for part in parts:
            differs |= part.double() != before.double()
        if get_method(tensor_plan.method).element_wise:
            merged = _combined(tensor_plan, parts)
        else:
            merged = merged_tensor(plan, tensor_plan).reshape(-1)[::stride]
        same = merged == before.to(merged.dtype)
        changed += int(differs.sum())
        lost += int((differs & same).sum())
    return lost / changed if changed else 0.0


def rounding_warning(plan: Plan, *, base: Checkpoint | None = None) -> Problem | None:
    """A sentence with the share that rounding erases, or None if it is small. Reads a sample of the weights."""
    share = rounding_loss(plan, base=base)
    if share < NOTABLE_LOSS:
        return None
    return Problem(
        "warning",
        "",
        f"Rounding to {plan.dtype} puts {share:.0%} of the changed weights back to the base's value.".replace(
            "%", " %"
        ),
        "Choose float32 as the type to keep them.",
    )


def _may_differ(checkpoint: Checkpoint, source: str, original: Checkpoint) -> bool:
    """False where headers already tell that a model's tensor is the original's."""
    return checkpoint.changes(source) or checkpoint.folder != original.folder


def _sample(plan: Plan, original: Checkpoint) -> list[TensorPlan]:
    """A few changed matrices spread over the depth of the model, small enough to be read while someone waits."""
    matrices = [
        tensor
        for tensor in plan.tensors
        if tensor.action == "merge" and len(tensor.shape) > 1 and tensor.elements <= LARGEST_SAMPLE
        if tensor.name in original.tensors
        if any(_may_differ(c, source, original) for c, source in zip(plan.checkpoints, tensor.sources, strict=True))
    ]
    if len(matrices) <= SAMPLED_TENSORS:
        return matrices
    return [matrices[index * len(matrices) // SAMPLED_TENSORS] for index in range(SAMPLED_TENSORS)]
