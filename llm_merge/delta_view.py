"""One tensor's delta as a small picture: its entries averaged over bins of rows and columns.

What Hi-Merging's released notebook draws entry by entry, made small enough for a page. Reads one tensor of two
checkpoints; colours and axes are the chart's business.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from llm_merge.compatibility import short_name
from llm_merge.delta_stats import read_all, weight_tensors
from llm_merge.errors import MergeError
from llm_merge.plan import make_plan
from llm_merge.recipe import Recipe

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BinnedDelta:
    """A delta (model minus base) averaged over bins.

    shape       of the tensor as drawn: rows and columns; a vector is one row, leading dimensions are laid one below
                another
    row_edges, column_edges     where the bins begin, and after them the number of rows or columns
    mean        [row bins][column bins]: mean of the delta, with its sign
    magnitude   [row bins][column bins]: mean of its absolute value
    low, high   smallest and largest of `mean`
    """

    model: str
    tensor: str
    shape: tuple[int, int]
    row_edges: tuple[int, ...]
    column_edges: tuple[int, ...]
    mean: tuple[tuple[float, ...], ...]
    magnitude: tuple[tuple[float, ...], ...]

    @property
    def low(self) -> float:
        return min(map(min, self.mean))

    @property
    def high(self) -> float:
        return max(map(max, self.mean))


def tensor_names(base: str, model: str) -> tuple[str, ...]:
    """The tensors that `binned_delta` can draw. Raises IncompatibleModels. Reads headers only."""
    return tuple(weight_tensors(make_plan(Recipe.linear([base, model], [0.5, 0.5]))))


def binned_delta(base: str, model: str, tensor: str, bins: tuple[int, int] = (64, 64)) -> BinnedDelta:
    """The delta of one tensor over at most `bins` rows × columns of bins, whose sizes differ by one at most.

    Computed in float64. Raises IncompatibleModels, and MergeError for a tensor that the models do not have, with the
    names nearest to it.
    """
    import torch

    if min(bins) < 1:
        raise MergeError(f"{bins[0]} × {bins[1]} bins cannot be drawn: give at least one each way.", field="bins")
    plan = make_plan(Recipe.linear([base, model], [0.5, 0.5]))
    tensors = weight_tensors(plan)
    if tensor not in tensors:
        raise MergeError(_unknown(tensor, tensors, model), field="tensor")
    before, after = (_flat(part) for part in read_all(plan, tensors[tensor]))
    rows, columns = before.shape
    row_edges, column_edges = _edges(rows, bins[0]), _edges(columns, bins[1])
    widths = torch.tensor(column_edges).diff()
    mean: list[tuple[float, ...]] = []
    magnitude: list[tuple[float, ...]] = []
    for start, end in pairwise(row_edges):
        delta = after[start:end].to(torch.float64) - before[start:end].to(torch.float64)
        for found, values in ((mean, delta), (magnitude, delta.abs())):
            sums = torch.stack([part.sum() for part in values.sum(dim=0).split(widths.tolist())])
            found.append(tuple((sums / widths / (end - start)).tolist()))
    return BinnedDelta(model, tensor, (rows, columns), row_edges, column_edges, tuple(mean), tuple(magnitude))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """As rows and columns."""
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.reshape(1, -1)


def _edges(count: int, bins: int) -> tuple[int, ...]:
    bins = min(bins, count)
    return tuple(count * place // bins for place in range(bins + 1))


def _unknown(tensor: str, names: Iterable[str], model: str) -> str:
    names = list(names)
    near = difflib.get_close_matches(tensor, names, n=3, cutoff=0.4)
    advice = f"nearest are {', '.join(near)}" if near else f"its first is {names[0]}" if names else "it has none"
    return f"“{short_name(model)}” has no weights called “{tensor}”: {advice}."
