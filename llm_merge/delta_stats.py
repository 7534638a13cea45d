"""What fine-tunes changed, and where they pull apart: statistics of their deltas, per layer and kind of module.

Read from the checkpoints alone, one tensor of each model at a time; no example row, no evaluation. A delta is the
fine-tune minus the base. Every figure is exact over all entries: float64 sums that add up from tensors to kinds, from
kinds to layers and to the whole model. How these are drawn is not known here.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from typing import TYPE_CHECKING, Any

from llm_merge.compatibility import ALIASES, HEAD, short_name
from llm_merge.errors import CheckpointError, MergeError, RecipeError, Stopped
from llm_merge.layer_map import kind_of, layer_map
from llm_merge.plan import Plan, TensorPlan, make_plan
from llm_merge.recipe import Recipe

if TYPE_CHECKING:
    import torch

KINDS = ("q", "k", "v", "qkv", "o", "gate", "up", "down", "mlp", "norm", "embeddings", "head", "other")
"""All that `kind_of` says, in the order in which a block computes them."""
CHUNK = 1 << 15  # entries of all models at a time: in the processor's cache, and torch stays on the calling thread


@dataclass(frozen=True)
class DeltaProgress:
    """How far it is: tensors done of all, and the one just done."""

    tensor: str
    done: int
    total: int


@dataclass(frozen=True)
class DeltaSums:
    """Sums over some tensors for M models, and the figures they give. Sums of several tensors are added with `+`.

    entries       how many numbers the tensors have
    base_square   Σ base²
    changed       per model: entries that differ from the base's
    kept          per model: non-zero entries of the delta that top-p keeps, tensor by tensor
    kept_square   per model: Σ δ² over these
    dots          [M, M]: Σ δᵢ·δⱼ, symmetric; Σ δ² on the diagonal
    both          [M, M]: entries that both models change
    conflicts     [M, M]: those of them that one model makes larger and the other smaller
    """

    entries: int
    base_square: float
    changed: tuple[int, ...]
    kept: tuple[int, ...]
    kept_square: tuple[float, ...]
    dots: tuple[tuple[float, ...], ...]
    both: tuple[tuple[int, ...], ...]
    conflicts: tuple[tuple[int, ...], ...]

    def __add__(self, other: DeltaSums) -> DeltaSums:
        return DeltaSums(
            self.entries + other.entries,
            self.base_square + other.base_square,
            _added(self.changed, other.changed),
            _added(self.kept, other.kept),
            _added(self.kept_square, other.kept_square),
            tuple(map(_added, self.dots, other.dots)),
            tuple(map(_added, self.both, other.both)),
            tuple(map(_added, self.conflicts, other.conflicts)),
        )

    def relative_norm(self, model: int) -> float:
        """‖δ‖ / ‖base‖. 0 for no change; NaN where something was added to a base of zeros."""
        square = self.dots[model][model]
        if self.base_square == 0:
            return 0.0 if square == 0 else math.nan
        return math.sqrt(square / self.base_square)

    def changed_share(self, model: int) -> float:
        """Share of the entries that differ from the base's, 0 to 1."""
        return self.changed[model] / self.entries

    def density(self, model: int) -> float:
        """Share of the entries whose delta top-p keeps non-zero, 0 to 1: p, or less where fewer changed."""
        return self.kept[model] / self.entries

    def energy(self, model: int) -> float:
        """Share of Σ δ² that the kept entries hold, 0 to 1; NaN for no change."""
        square = self.dots[model][model]
        return min(1.0, self.kept_square[model] / square) if square else math.nan

    def cosine(self, one: int, other: int) -> float:
        """Between two models' deltas, −1 to 1; NaN where one of them changed nothing."""
        norms = math.sqrt(self.dots[one][one]) * math.sqrt(self.dots[other][other])
        return max(-1.0, min(1.0, self.dots[one][other] / norms)) if norms else math.nan

    def conflict_share(self, one: int, other: int) -> float:
        """Share of opposite signs among the entries that both change, 0 to 1 (chance: 0.5); NaN if there are none."""
        both = self.both[one][other]
        return self.conflicts[one][other] / both if both else math.nan


@dataclass(frozen=True)
class GroupDeltas:
    """One block, or what lies outside of blocks: key, title and layer as in `layer_map.Group`; sums by kind."""

    key: str
    title: str
    layer: int | None
    kinds: tuple[tuple[str, DeltaSums], ...]

    @cached_property
    def total(self) -> DeltaSums:
        """All kinds together."""
        return reduce(add, (sums for _, sums in self.kinds))


@dataclass(frozen=True)
class DeltaStats:
    """Deltas of M models to one base, by group and kind.

    base, models    references, in order: a model's index here is what the figures are asked by
    top             the share of entries of largest magnitude that top-p keeps, of each tensor
    groups          in order of depth, as `layer_map` gives them
    known           False: the naming scheme was not recognised, and everything is in one group
    """

    base: str
    models: tuple[str, ...]
    top: float
    groups: tuple[GroupDeltas, ...]
    known: bool = True

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that occur, in the order of `KINDS`."""
        return tuple(sorted({kind for group in self.groups for kind, _ in group.kinds}, key=KINDS.index))

    @cached_property
    def total(self) -> DeltaSums:
        """The whole model."""
        return reduce(add, (group.total for group in self.groups))

    def of(self, group: str, kind: str = "") -> DeltaSums | None:
        """The sums of one kind in one group, of all kinds without `kind`; None if there are no such tensors."""
        return self._cells.get((group, kind))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: numbers, strings, lists."""
        groups = [
            {"key": group.key, "title": group.title, "layer": group.layer,
             "kinds": {kind: {**vars(sums)} for kind, sums in group.kinds}}
            for group in self.groups
        ]  # fmt: skip
        head = {"base": self.base, "models": list(self.models), "top": self.top, "known": self.known}
        return {**head, "groups": _listed(groups)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DeltaStats:
        """Read what `to_dict` gave, also after JSON. Raises MergeError for anything else."""
        try:
            groups = tuple(
                GroupDeltas(
                    str(group["key"]), str(group["title"]), group["layer"],
                    tuple((KINDS[KINDS.index(kind)], DeltaSums(**_tupled(sums)))
                          for kind, sums in group["kinds"].items()),
                )
                for group in data["groups"]
            )  # fmt: skip
            return cls(str(data["base"]), tuple(data["models"]), float(data["top"]), groups, bool(data["known"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MergeError("These are not delta statistics: compute them again.", field="deltas") from error

    @cached_property
    def _cells(self) -> Mapping[tuple[str, str], DeltaSums]:
        cells = {(group.key, kind): sums for group in self.groups for kind, sums in group.kinds}
        return cells | {(group.key, ""): group.total for group in self.groups}


def delta_statistics(
    base: str, models: Sequence[str], *, top: float = 0.2, stop: threading.Event | None = None
) -> Generator[DeltaProgress, None, DeltaStats]:
    """Compare every tensor of `models` with the base's; an event per tensor, the statistics as return value.

    top: the share p of a tensor's entries that top-p keeps, int(p·n) and at least 1, largest magnitude first
    (Hi-Merging's pruning, arXiv 2506.12379). An output head that is the input embeddings is counted once, as these;
    buffers of integers are not counted. Holds one tensor of each model, and one of the deltas in float32.
    Raises RecipeError (no models, a top outside of (0, 1]), IncompatibleModels before anything is read, CheckpointError
    for values that are not finite, and Stopped soon after `stop` is set.
    """
    if not models:
        raise RecipeError("Statistics of deltas need at least one fine-tune beside the base: add one.", field="models")
    if not 0 < top <= 1:
        raise RecipeError(f"The share to keep is {top}: give one above 0 and up to 1.", field="top")
    plan = make_plan(Recipe.linear([base, *models], [1 / (len(models) + 1)] * (len(models) + 1)))
    tensors = weight_tensors(plan)
    places = layer_map(tensors)
    sums: dict[tuple[str, str], DeltaSums] = {}
    for done, (name, tensor) in enumerate(tensors.items(), start=1):
        cell = (places.group_of(name).key, kind_of(name))
        found = _tensor_sums(tensor, read_all(plan, tensor), plan.recipe.references, top, stop)
        sums[cell] = sums[cell] + found if cell in sums else found
        yield DeltaProgress(name, done, len(tensors))
    groups = tuple(
        GroupDeltas(group.key, group.title, group.layer,
                    tuple((kind, sums[group.key, kind]) for kind in KINDS if (group.key, kind) in sums))
        for group in places.groups
    )  # fmt: skip
    return DeltaStats(base, tuple(models), top, groups, places.known)


def weight_tensors(plan: Plan) -> dict[str, TensorPlan]:
    """The plan's tensors of weights by name, sorted; what is stored a second time is left out."""
    merged = {tensor.name: tensor for tensor in plan.tensors if tensor.action == "merge" and tensor.elements}
    return {
        name: merged[name]
        for name in sorted(merged)
        if name == HEAD or not any(alias in merged for alias in ALIASES.get(name, ()))
    }


def read_all(plan: Plan, tensor: TensorPlan) -> list[torch.Tensor]:
    """One tensor of every model of the plan, as stored. What an adapter leaves as it is in its base is read once."""
    read: dict[Any, torch.Tensor] = {}
    parts = []
    for checkpoint, source in zip(plan.checkpoints, tensor.sources, strict=True):
        changed = checkpoint.reference if checkpoint.changes(source) else ""
        key = (checkpoint.tensors[source], changed)
        if key not in read:
            read[key] = checkpoint.read(source)
        parts.append(read[key])
    return parts


def _tensor_sums(
    tensor: TensorPlan, parts: Sequence[torch.Tensor], references: Sequence[str], top: float,
    stop: threading.Event | None,
) -> DeltaSums:  # fmt: skip
    """The sums of one tensor. `parts` are the base's and the models', of one shape."""
    import torch

    base, *tunes = (part.reshape(-1) for part in parts)
    count, models = base.numel(), len(tunes)
    base_square = 0.0
    dots = torch.zeros(models, models, dtype=torch.float64)
    both, signs = torch.zeros_like(dots), torch.zeros_like(dots)
    step = max(1, CHUNK // models)
    for start in range(0, count, step):
        if stop is not None and stop.is_set():
            raise Stopped
        before = base[start : start + step].to(torch.float64)
        deltas = torch.stack([tune[start : start + step].to(torch.float64) for tune in tunes]) - before
        base_square += float(before.square().sum())
        dots += _products(deltas)
        directions = deltas.sign().to(torch.float32)  # sums of ±1 over a chunk are exact in it
        both += _products(directions.abs())
        signs += _products(directions)  # agreements minus conflicts
    for reference, square in zip(references, [base_square, *dots.diagonal().tolist()], strict=True):
        if not math.isfinite(square):
            message = f"“{short_name(reference)}” has values in {tensor.name} that are not finite: choose a checkpoint "
            raise CheckpointError(message + "from before its training broke.", field=reference)
    changed = tuple(int(value) for value in both.diagonal().tolist())
    keep = max(1, int(top * count))
    kept_square = []
    for index, tune in enumerate(tunes):
        square = float(dots[index, index])
        kept_square.append(square if changed[index] <= keep else _largest_square(base, tune, keep, stop))
    return DeltaSums(
        entries=count,
        base_square=base_square,
        changed=changed,
        kept=tuple(min(keep, value) for value in changed),
        kept_square=tuple(kept_square),
        dots=_tupled(dots.tolist()),
        both=_whole(both),
        conflicts=_whole((both - signs) / 2),
    )


def _products(rows: torch.Tensor) -> torch.Tensor:
    """[M, M] inner products in float64. Not by BLAS: for so few rows it waits longer for its threads than it works."""
    import torch

    found = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for one in range(len(rows)):
        for other in range(one + 1):
            found[one, other] = found[other, one] = float((rows[one] * rows[other]).sum())
    return found


def _largest_square(base: torch.Tensor, tune: torch.Tensor, keep: int, stop: threading.Event | None) -> float:
    """Σ δ² over the `keep` entries of largest magnitude of two flat tensors."""
    import torch

    magnitudes = torch.empty(base.numel(), dtype=torch.float32)
    for start in range(0, base.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        magnitudes[part] = (tune[part].to(torch.float64) - base[part].to(torch.float64)).abs_()
    if stop is not None and stop.is_set():
        raise Stopped
    values = magnitudes.numpy()
    values.partition(len(values) - keep)  # in place and in linear time; which of several equal ones is kept is the same
    largest = magnitudes[len(values) - keep :]
    return math.fsum(float(part.to(torch.float64).square().sum()) for part in largest.split(CHUNK))


def _added(one: Sequence[Any], other: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(map(add, one, other))


def _whole(matrix: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(round(value) for value in row) for row in matrix.tolist())


def _tupled(value: Any) -> Any:
    """Lists as tuples, all the way down."""
    if isinstance(value, Mapping):
        return {key: _tupled(part) for key, part in value.items()}
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def _listed(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, Mapping):
        return {key: _listed(part) for key, part in value.items()}
    return list(map(_listed, value)) if isinstance(value, Iterable) and not isinstance(value, str) else value
