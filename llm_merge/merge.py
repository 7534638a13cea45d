"""Runs a plan: reads one tensor of each model at a time, merges it, hands it to a sink, and tells how far it is.

The arithmetic is the method's, in its own precision, with one cast to the output type at the end. Where the result goes
is the sink's business; this module knows no files.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from llm_merge import compatibility
from llm_merge.errors import Problem
from llm_merge.methods import get_method
from llm_merge.methods.random_masks import RandomKey
from llm_merge.plan import CHUNK, Plan, TensorPlan

if TYPE_CHECKING:
    import torch

    from llm_merge.checkpoint import Checkpoint

Reader: TypeAlias = "Callable[[Checkpoint, str], torch.Tensor]"
"""Reads one tensor of a model by its name there."""

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


def merged_tensor(plan: Plan, tensor_plan: TensorPlan, read: Reader | None = None) -> torch.Tensor:
    """One tensor of the result, in its output type and shape.

    A model of weight 0 is not read: (1, 0) gives the first model bit for bit, whatever the second one holds. `read`
    takes the place of `Checkpoint.read`, for callers that keep what they have read.
    """
    import torch

    read = read or _read
    if tensor_plan.action == "copy":
        return read(plan.base, tensor_plan.name).to(getattr(torch, tensor_plan.dtype))
    parts = [
        read(checkpoint, source) if weight else None
        for checkpoint, source, weight in zip(plan.checkpoints, tensor_plan.sources, tensor_plan.weights, strict=True)
    ]
    base = read(plan.base, base_source(plan, tensor_plan)) if plan.is_task_arithmetic else None
    return combined(plan, tensor_plan, parts, base)


def base_source(plan: Plan, tensor_plan: TensorPlan) -> str:
    """The tensor's name in the base, which a tied head has in the embeddings."""
    return compatibility.source_of(tensor_plan.name, plan.base) or tensor_plan.name


def combined(
    plan: Plan, tensor_plan: TensorPlan, parts: Sequence[torch.Tensor | None], base: torch.Tensor | None
) -> torch.Tensor:
    """The method over tensors of one shape, one per model, in the output type; what has no weight may be None.

    `parts` and `base` may be a sample of the tensor's entries where the method is element-wise.
    """
    import torch

    dtype: torch.dtype = getattr(torch, tensor_plan.dtype)
    method = get_method(tensor_plan.method)
    base = base if method.uses_base else None
    used = [index for index, weight in enumerate(tensor_plan.weights) if weight and parts[index] is not None]
    tensors = [part for index, part in enumerate(parts) if index in used and part is not None]
    if not tensors:
        like = next((part.shape for part in parts if part is not None), tensor_plan.shape)
        return base.to(dtype) if base is not None else torch.zeros(like, dtype=dtype)
    settings: dict[str, Any] = {"weight": tuple(tensor_plan.weights[index] for index in used)}
    for name, value in tensor_plan.settings:
        settings[name] = tuple(value[index] for index in used) if method.parameters[name].each else value
    key = random_key(plan, tensor_plan, used) if method.random else None
    precision: torch.dtype = getattr(torch, method.precision)
    # Where every density is 1 nothing is chosen by magnitude: the task-vector methods are element-wise, too.
    chunked = method.element_wise or (method.uses_base and all(d >= 1 for d in settings.get("density", (0,))))
    if not chunked:
        whole = None if base is None else base.to(precision)
        return method.apply([part.to(precision) for part in tensors], settings, base=whole, key=key).to(dtype)
    shape, count = tensors[0].shape, tensors[0].numel()
    flat = [part.reshape(-1) for part in tensors]
    flat_base = None if base is None else base.reshape(-1)
    result = torch.empty(count, dtype=dtype)
    for start in range(0, count, CHUNK):
        piece = slice(start, start + CHUNK)
        chunk_base = None if flat_base is None else flat_base[piece].to(precision)
        result[piece] = method.apply([part[piece].to(precision) for part in flat], settings, base=chunk_base, key=key)
    return result.reshape(shape)


def _read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    return checkpoint.read(name)


def random_key(plan: Plan, tensor_plan: TensorPlan, used: Sequence[int]) -> RandomKey:
    """What a random mask is drawn from: the same model listed twice gets two masks."""
    references = plan.recipe.references
    names = [f"{name}#{references[:index].count(name)}" for index, name in enumerate(references)]
    return RandomKey(tensor_plan.name, tuple(names[index] for index in used))


def rounding_loss(plan: Plan, *, base: Checkpoint | None = None) -> float:
    """Share of the changed entries that rounding to the output type puts back to the base's value, from 0 to 1.

    Counted on a sample of tensors: an entry is changed if any model's differs from the base's and the merge does, too,
    before rounding (what a method prunes is not lost to it); it is lost if both are the same in the output type. `base`
    is by default the plan's, without its adapter if it has one.
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
        method = get_method(tensor_plan.method)
        unrounded = replace(tensor_plan, dtype=method.precision)
        if method.element_wise:
            base_name = base_source(plan, tensor_plan)
            own = plan.base.read(base_name).reshape(-1)[::stride] if plan.base.changes(base_name) else before
            exact = combined(plan, unrounded, parts, own)
        else:
            exact = merged_tensor(plan, unrounded).reshape(-1)[::stride]
        differs &= exact.double() != before.double()
        dtype: torch.dtype = getattr(torch, tensor_plan.dtype)
        same = exact.to(dtype) == before.to(dtype)
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
