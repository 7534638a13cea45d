"""What a merge will be, and everything that stands in its way, before a weight is read.

Headers and configs tell every tensor of the result (shape, type, shard, place in the file), whether the models fit
together, and what it costs in disk and memory. It never reads a tensor and never imports torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from llm_merge import compatibility
from llm_merge.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from llm_merge.compatibility import FLOATS
from llm_merge.errors import IncompatibleModels, MergeError, Problem, RecipeError
from llm_merge.layer_map import layer_map
from llm_merge.methods import Method, get_method
from llm_merge.recipe import Recipe

MAX_SHARD_BYTES = 5_000_000_000  # mergekit's and transformers' old default; one file up to there
CHUNK = 1 << 15  # elements merged at a time; up to this many, torch stays on the calling thread

ITEM_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the result.

    action      "merge", or "copy": the base's bytes as they are (integer and bool buffers)
    dtype       of the result, torch's name for it
    sources     the tensor's name in each model of the plan: not always its own, a tied head is read from the embeddings
    weights     share of each model for this tensor; 0: the model is not read
    shard       file of the result, relative to the folder
    start       offset in bytes inside the shard's data
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    action: str
    sources: tuple[str, ...]
    method: str
    weights: tuple[float, ...]
    shard: str
    start: int
    settings: tuple[tuple[str, Any], ...] = ()  # the method's other parameters; per-model ones as a tuple

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * item_bytes(self.dtype)


@dataclass(frozen=True)
class Shard:
    """One weights file of the result; `nbytes` without its header."""

    file: str
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """A merge that can be run.

    checkpoints         one per model of the recipe, in its order
    weights             one per checkpoint, divided by their sum where the recipe says so; where they differ between
                        layers, those of the tensors that no layer holds
    base                gives config, tokenizer and buffers: the recipe's base_model, else the first model
    tensors             in the order in which they are written: shard by shard, by place in the file
    dtype               of most of the result
    output_bytes        all weights together
    peak_memory_bytes   held at once while merging to a folder, beside the program itself
    separate_head       the output head is a tensor of its own, not the input embeddings
    """

    recipe: Recipe
    checkpoints: tuple[Checkpoint, ...]
    weights: tuple[float, ...]
    base: Checkpoint
    tensors: tuple[TensorPlan, ...]
    shards: tuple[Shard, ...]
    warnings: tuple[Problem, ...]
    dtype: str
    output_bytes: int
    peak_memory_bytes: int
    separate_head: bool

    @property
    def is_task_arithmetic(self) -> bool:
        """Whether the models are read as differences from the base."""
        return get_method(self.recipe.merge_method).uses_base

    def following(self, recipe: Recipe) -> Plan:
        """The plan of another recipe over the same models: nothing is opened or compared again.

        For searches that plan hundreds of merges: tensors that stay as they are keep their plan, and warnings and
        memory are those of this plan. Raises IncompatibleModels and RecipeError as planning does.
        """
        same = (recipe.references, recipe.base_model, recipe.dtype) == (
            self.recipe.references, self.recipe.base_model, self.recipe.dtype)  # fmt: skip
        if not same:
            return make_plan(recipe)
        if problems := compatibility.recipe_problems(recipe):
            raise IncompatibleModels(problems)
        method, depths = get_method(recipe.merge_method), _depths(tuple(tensor.name for tensor in self.tensors))
        tensors = tuple(
            _with_settings(tensor, recipe, method, depth, self.base, self.checkpoints)
            for tensor, depth in zip(self.tensors, depths, strict=True)
        )
        return replace(self, recipe=recipe, weights=_shares(recipe), tensors=tensors)


def check(recipe: Recipe, *, max_shard_bytes: float = MAX_SHARD_BYTES) -> tuple[Plan | None, tuple[Problem, ...]]:
    """The plan, or None if the models cannot be merged; and all problems and warnings, each with its model."""
    problems = compatibility.recipe_problems(recipe)
    opened: dict[str, Checkpoint] = {}
    for reference in dict.fromkeys((recipe.base_model or recipe.references[0], *recipe.references)):
        try:
            opened[reference] = open_checkpoint(reference)
        except MergeError as error:
            problems.append(Problem("problem", reference, error.message))
    if not opened:
        return None, tuple(problems)
    base = next(iter(opened.values()))
    for checkpoint in opened.values():
        problems += compatibility.own_problems(checkpoint)
        if checkpoint is not base:
            problems += compatibility.differences(base, checkpoint)
    if any(problem.severity == "problem" for problem in problems):
        return None, tuple(problems)

    checkpoints = tuple(opened[reference] for reference in recipe.references)
    separate_head = compatibility.has_separate_head([base, *checkpoints])
    try:
        tensors, shards = _lay_out(recipe, base, checkpoints, separate_head, max_shard_bytes)
    except RecipeError as error:  # a list of filters that leaves a tensor without a value
        return None, (*problems, Problem("problem", "", error.message))
    dtype = recipe.dtype or _commonest(tensors) or checkpoints[0].main_dtype
    problems += compatibility.dtype_warnings(checkpoints, dtype)
    plan = Plan(
        recipe=recipe,
        checkpoints=checkpoints,
        weights=_shares(recipe),
        base=base,
        tensors=tensors,
        shards=shards,
        warnings=tuple(problems),
        dtype=dtype,
        output_bytes=sum(shard.nbytes for shard in shards),
        peak_memory_bytes=max((_memory(tensor, checkpoints, base) for tensor in tensors), default=0),
        separate_head=separate_head,
    )
    return plan, plan.warnings


def make_plan(recipe: Recipe, *, max_shard_bytes: float = MAX_SHARD_BYTES) -> Plan:
    """The plan. Raises IncompatibleModels with every problem found."""
    plan, problems = check(recipe, max_shard_bytes=max_shard_bytes)
    if plan is None:
        raise IncompatibleModels([problem for problem in problems if problem.severity == "problem"])
    return plan


def item_bytes(dtype: str) -> int:
    """Bytes of one element; every type of a header that is not listed takes one."""
    return ITEM_BYTES.get(dtype, 1)


def size_text(nbytes: float) -> str:
    """A size as people say it, in powers of ten like a disk's: "513 MB", "1.2 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def _lay_out(
    recipe: Recipe,
    base: Checkpoint,
    checkpoints: Sequence[Checkpoint],
    separate_head: bool,
    max_shard_bytes: float,
) -> tuple[tuple[TensorPlan, ...], tuple[Shard, ...]]:
    """Every tensor with its place. Shards are filled in the base's order, so reading stays sequential."""
    method = get_method(recipe.merge_method)
    drafts: list[TensorPlan] = []
    result = compatibility.result_tensors(base, checkpoints, separate_head)
    for (name, info), depth in zip(result.items(), _depths(tuple(result)), strict=True):
        sources = [compatibility.source_of(name, checkpoint) for checkpoint in checkpoints]
        found = tuple(source for source in sources if source is not None)
        merge = info.is_floating and len(found) == len(sources)
        dtype = _output_dtype(recipe, name, info, checkpoints[0]) if info.is_floating else info.dtype
        draft = TensorPlan(
            name=name,
            shape=tuple(info.shape),
            dtype=dtype,
            action="merge" if merge else "copy",
            sources=found if merge else (),
            method=method.name,
            weights=(),
            shard="",
            start=0,
        )
        drafts.append(_with_settings(draft, recipe, method, depth, base, checkpoints))
    groups = _fill(drafts, max_shard_bytes)
    tensors: list[TensorPlan] = []
    shards: list[Shard] = []
    for index, group in enumerate(groups, start=1):
        one = len(groups) == 1
        file = "model.safetensors" if one else f"model-{index:05d}-of-{len(groups):05d}.safetensors"
        start = 0
        # Wide types first, so that every tensor lies on a multiple of its element size; readers map it as it is.
        for tensor in sorted(group, key=lambda tensor: -item_bytes(tensor.dtype)):
            tensors.append(_placed(tensor, file, start))
            start += tensor.nbytes
        shards.append(Shard(file, start))
    return tuple(tensors), tuple(shards)


def _with_settings(
    tensor: TensorPlan,
    recipe: Recipe,
    method: Method,
    depth: float,
    base: Checkpoint,
    checkpoints: Sequence[Checkpoint],
) -> TensorPlan:
    """The tensor with what the recipe says for it. What cannot differ from the base gets no weight, so is not read."""
    if tensor.action == "copy":
        return tensor
    settings = recipe.settings_for(tensor.name, depth)
    weights: tuple[float, ...] = settings.pop("weight")
    if method.uses_base:
        weights = tuple(0.0 if c is base else w for c, w in zip(checkpoints, weights, strict=True))
        if all(is_unchanged(base, c, source) for c, source in zip(checkpoints, tensor.sources, strict=True)):
            weights = (0.0,) * len(weights)
    elif settings.get("normalize") and abs(math.fsum(weights)) < compatibility.NO_WEIGHT:
        message = (
            f"The weights sum to 0 for {tensor.name}, and dividing by their sum is not possible: change one there."
        )
        raise RecipeError(message, field="models")
    others = tuple(settings.items())
    if (tensor.method, tensor.weights, tensor.settings) == (method.name, weights, others):
        return tensor
    return replace(tensor, method=method.name, weights=weights, settings=others)


def is_unchanged(base: Checkpoint, checkpoint: Checkpoint, source: str) -> bool:
    """True where headers already tell that a model's tensor is the base's: an adapter of it that leaves it alone."""
    same = checkpoint is base or (checkpoint.folder == base.folder and base.adapter is None)
    return same and not checkpoint.changes(source)


@lru_cache(maxsize=8)
def _depths(names: tuple[str, ...]) -> tuple[float, ...]:
    """Where each tensor reads a gradient: 0 in the first block, 1 in the last; outside of the blocks its first value.

    Remembered: a search plans hundreds of merges of the same tensors.
    """
    layers = layer_map(names)
    last = len(layers.blocks) - 1
    places = [layers.group_of(name).layer for name in names]
    return tuple(0.0 if place is None else place / last if last else 1.0 for place in places)


def _shares(recipe: Recipe) -> tuple[float, ...]:
    """The recipe's weights, divided by their sum if it says `normalize`."""
    weights = recipe.weights
    if get_method(recipe.merge_method).uses_base:
        weights = tuple(0.0 if entry.model == recipe.base_model else entry_weight
                        for entry, entry_weight in zip(recipe.models, weights, strict=True))  # fmt: skip
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights) if recipe.normalizes and total else weights


def _fill(tensors: Iterable[TensorPlan], max_shard_bytes: float) -> list[list[TensorPlan]]:
    """Consecutive groups of at most `max_shard_bytes`; a tensor larger than that has a shard to itself."""
    groups: list[list[TensorPlan]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    return groups


def _placed(tensor: TensorPlan, shard: str, start: int) -> TensorPlan:
    return replace(tensor, shard=shard, start=start)


def _output_dtype(recipe: Recipe, name: str, info: TensorInfo, first: Checkpoint) -> str:
    """The recipe's type, else the one that this tensor has in the first model: a mixed checkpoint stays mixed."""
    if recipe.dtype:
        return recipe.dtype
    source = compatibility.source_of(name, first)
    return first.dtype_of(source) if source else info.dtype


def _commonest(tensors: Iterable[TensorPlan]) -> str | None:
    elements: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.dtype in FLOATS:
            elements[tensor.dtype] += tensor.elements
    return elements.most_common(1)[0][0] if elements else None


def _memory(tensor: TensorPlan, checkpoints: Sequence[Checkpoint], base: Checkpoint) -> int:
    """Bytes held while this tensor is made: each model's, the result, and what the method works on in its precision.

    That is a chunk per model where the entries do not depend on each other, else whole tensors, the base's too.
    """
    if tensor.action == "copy":
        return tensor.nbytes
    held = tensor.nbytes
    if not get_method(tensor.method).element_wise:
        held += 4 * tensor.elements * (3 + sum(1 for weight in tensor.weights if weight))
    for checkpoint, source, weight in zip(checkpoints, tensor.sources, tensor.weights, strict=True):
        if weight:
            # An adapter is applied in float32: the base's tensor, its float32 form and the product B·A.
            adapted = 8 * tensor.elements if checkpoint.changes(source) else 0
            held += checkpoint.tensors[source].nbytes + adapted + 8 * CHUNK
    return held
