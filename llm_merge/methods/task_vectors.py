"""Methods that add up what each model changed in a base: task arithmetic, TIES, DARE and Breadcrumbs.

All are one sum over the changes δᵢ = xᵢ − B, as in mergekit: each is thinned out (or not), weighted, put to a vote on
its signs (or not), divided by the weights that took part (or not), and added to the base. They differ in which of these
steps they take. Whole tensors come in, but the sum runs over chunks: of every model only a mask is held beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, TypeAlias

from llm_merge.methods import Parameter, RandomKey, register
from llm_merge.methods.random_masks import random_mask
from llm_merge.methods.sparsify import outlier_free_mask, top_fraction_mask

if TYPE_CHECKING:
    import torch

Choice: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"
"""From a flat change to a bool mask of the entries to keep."""

CHUNK = 1 << 14  # entries summed together; of so few, torch adds up on the calling thread, in one fixed order
NOTHING = 1e-8  # a sum of weights below this counts as 0

Weights = Annotated[
    Sequence[float],
    Parameter("How much of each model's change goes in; 0 leaves it out.", each=True, key="weight"),
]
Density = Annotated[
    Sequence[float],
    Parameter("Share of the entries of each model's change that is kept.", each=True, low=0, high=1, default=1.0),
]
Gamma = Annotated[
    Sequence[float],
    Parameter("Share of the largest changes that is dropped as outliers.", each=True, low=0, high=1, default=0.01),
]
Normalize = Annotated[bool, Parameter("Divide by the sum of the weights that took part.", default=False)]
NormalizeUnlessTold = Annotated[bool, Parameter("Divide by the sum of the weights that took part.", default=True)]
Rescale = Annotated[bool, Parameter("Scale what is kept up to the size of the whole change.", default=False)]
RescaleUnlessTold = Annotated[bool, Parameter("Scale what is kept up to the size of the whole change.", default=True)]
Lambda = Annotated[
    float, Parameter("Factor on the merged change, before the base is added.", default=1.0, key="lambda")
]
Seed = Annotated[int, Parameter("Seed of the random choice; the same seed gives the same model.", low=0, default=0)]


@register(
    "task_arithmetic",
    title="Task arithmetic",
    paper="Ilharco et al. 2023, arXiv:2212.04089",
    formula="B + λ·Σ wᵢ·δᵢ",
    element_wise=True,
    uses_base=True,
)
def task_arithmetic(
    tensors: Sequence[torch.Tensor],
    /,
    *,
    base: torch.Tensor,
    weights: Weights,
    normalize: Normalize,
    lambda_: Lambda,
) -> torch.Tensor:
    """The weighted sum of the changes, added to the base."""
    changes = [_Change(tensor, weight) for tensor, weight in zip(tensors, weights, strict=True)]
    return _sum(changes, base, vote=False, normalize=normalize, lambda_=lambda_)


@register(
    "ties",
    title="TIES",
    paper="Yadav et al. 2023, arXiv:2306.01708",
    formula="B + λ·Σ wᵢ·topₚ(δᵢ), of the elected sign",
    element_wise=False,
    uses_base=True,
)
def ties(
    tensors: Sequence[torch.Tensor],
    /,
    *,
    base: torch.Tensor,
    weights: Weights,
    density: Density,
    normalize: NormalizeUnlessTold,
    rescale: Rescale,
    lambda_: Lambda,
) -> torch.Tensor:
    """The largest changes; where the models disagree about a sign, only those of the sign with more weight.

    With one model, or where no two models change the same entry, `normalize` cancels the weight.
    """
    choices = [partial(top_fraction_mask, density=share) for share in density]
    changes = _thinned(tensors, base, weights, density, choices, rescale=rescale)
    return _sum(changes, base, vote=True, normalize=normalize, lambda_=lambda_)


@register(
    "dare_linear",
    title="DARE",
    paper="Yu et al. 2024, arXiv:2311.03099",
    formula="B + λ·Σ wᵢ·randomₚ(δᵢ)",
    element_wise=False,
    uses_base=True,
    random=True,
)
def dare_linear(
    tensors: Sequence[torch.Tensor],
    /,
    *,
    base: torch.Tensor,
    key: RandomKey,
    weights: Weights,
    density: Density,
    normalize: Normalize,
    rescale: RescaleUnlessTold,
    lambda_: Lambda,
    random_seed: Seed,
) -> torch.Tensor:
    """A random part of each change, scaled up to the L1 norm of the whole (mergekit's rescale; the paper divides by p).

    Which entries are kept depends on the seed, the tensor's name and the model alone.
    """
    choices = _random_choices(density, key, random_seed)
    changes = _thinned(tensors, base, weights, density, choices, rescale=rescale)
    return _sum(changes, base, vote=False, normalize=normalize, lambda_=lambda_)


@register(
    "dare_ties",
    title="DARE with TIES' vote",
    paper="Yu et al. 2024, arXiv:2311.03099; Yadav et al. 2023, arXiv:2306.01708",
    formula="B + λ·Σ wᵢ·randomₚ(δᵢ), of the elected sign",
    element_wise=False,
    uses_base=True,
    random=True,
)
def dare_ties(
    tensors: Sequence[torch.Tensor],
    /,
    *,
    base: torch.Tensor,
    key: RandomKey,
    weights: Weights,
    density: Density,
    normalize: Normalize,
    rescale: RescaleUnlessTold,
    lambda_: Lambda,
    random_seed: Seed,
) -> torch.Tensor:
    """`dare_linear`, of whose entries only those of the sign with more weight are kept."""
    choices = _random_choices(density, key, random_seed)
    changes = _thinned(tensors, base, weights, density, choices, rescale=rescale)
    return _sum(changes, base, vote=True, normalize=normalize, lambda_=lambda_)


@register(
    "breadcrumbs",
    title="Model Breadcrumbs",
    paper="Davari and Belilovsky 2023, arXiv:2312.06795",
    formula="B + λ·Σ wᵢ·bandₚ,ᵧ(δᵢ)",
    element_wise=False,
    uses_base=True,
)
def breadcrumbs(
    tensors: Sequence[torch.Tensor],
    /,
    *,
    base: torch.Tensor,
    weights: Weights,
    density: Density,
    gamma: Gamma,
    normalize: Normalize,
    rescale: Rescale,
    lambda_: Lambda,
) -> torch.Tensor:
    """The largest changes but for the very largest; with gamma 0 the magnitude pruning of Hi-Merging."""
    choices = _band_choices(density, gamma)
    changes = _thinned(tensors, base, weights, density, choices, rescale=rescale)
    return _sum(changes, base, vote=False, normalize=normalize, lambda_=lambda_)


@register(
    "breadcrumbs_ties",
    title="Model Breadcrumbs with TIES' vote",
    paper="Davari and Belilovsky 2023, arXiv:2312.06795; Yadav et al. 2023, arXiv:2306.01708",
    formula="B + λ·Σ wᵢ·bandₚ,ᵧ(δᵢ), of the elected sign",
    element_wise=False,
    uses_base=True,
)
def breadcrumbs_ties(
    tensors: Sequence[torch.Tensor],
    /,
    *,
    base: torch.Tensor,
    weights: Weights,
    density: Density,
    gamma: Gamma,
    normalize: Normalize,
    rescale: Rescale,
    lambda_: Lambda,
) -> torch.Tensor:
    """`breadcrumbs`, of whose entries only those of the sign with more weight are kept."""
    choices = _band_choices(density, gamma)
    changes = _thinned(tensors, base, weights, density, choices, rescale=rescale)
    return _sum(changes, base, vote=True, normalize=normalize, lambda_=lambda_)


@dataclass(frozen=True)
class _Change:
    """What one model brings: its difference from the base, where `kept` (None: everywhere), times weight and scale."""

    model: torch.Tensor
    weight: float
    scale: float = 1.0
    kept: torch.Tensor | None = None


def _random_choices(density: Sequence[float], key: RandomKey, seed: int) -> list[Choice]:
    return [
        partial(random_mask, density=share, seed=seed, tensor=key.tensor, model=model)
        for share, model in zip(density, key.models, strict=True)
    ]


def _band_choices(density: Sequence[float], gamma: Sequence[float]) -> list[Choice]:
    return [
        partial(outlier_free_mask, density=share, gamma=outliers)
        for share, outliers in zip(density, gamma, strict=True)
    ]


def _thinned(
    tensors: Sequence[torch.Tensor],
    base: torch.Tensor,
    weights: Sequence[float],
    density: Sequence[float],
    choices: Sequence[Choice],
    *,
    rescale: bool,
) -> list[_Change]:
    """The changes with what is kept of them; a density of 1 and above keeps a change as it is, outliers too."""
    changes = []
    for model, weight, share, choose in zip(tensors, weights, density, choices, strict=True):
        kept, scale = None, 1.0
        if share < 1:
            delta = (model - base).reshape(-1)
            kept = choose(delta)
            if rescale:
                scale = _growth(delta, kept)
        changes.append(_Change(model, weight, scale, kept))
    return changes


def _growth(delta: torch.Tensor, kept: torch.Tensor) -> float:
    """‖δ‖₁ divided by its share that is kept; 1 where nothing is kept of it, or there is nothing."""
    whole = math.fsum(part.abs().sum().item() for part in delta.split(CHUNK))
    parts = zip(delta.split(CHUNK), kept.split(CHUNK), strict=True)
    rest = math.fsum((part.abs() * mask).sum().item() for part, mask in parts)
    return whole / rest if rest else 1.0


def _sum(
    changes: Sequence[_Change], base: torch.Tensor, *, vote: bool, normalize: bool, lambda_: float
) -> torch.Tensor:
    """B + λΔ in the base's shape, Δ being the sum of the weighted changes.

    vote        of each entry's changes, only those count whose sign is that of their sum (+ where it is 0)
    normalize   divide by the sum of the weights, with a vote of those that count for the entry; a sum of 0 divides by 1
    """
    import torch

    flat_base, models = base.reshape(-1), [change.model.reshape(-1) for change in changes]
    total_weight = math.fsum(change.weight for change in changes)
    result = torch.empty_like(flat_base)
    for start in range(0, flat_base.numel(), CHUNK):
        here = slice(start, start + CHUNK)
        parts = []
        for change, model in zip(changes, models, strict=True):
            part = model[here] - flat_base[here]
            if change.kept is not None:
                part *= change.kept[here]
            parts.append(part.mul_(change.weight * change.scale))
        merged = _total(parts)
        if vote:
            # +1 or -1; adding 0 makes a negative zero a positive one, which votes +. Plain products and a clamp are
            # several times faster than comparing and choosing.
            sign = torch.copysign(torch.ones_like(merged), merged + 0.0)
            parts = [part.mul_(sign).clamp_(min=0) for part in parts]
            merged = _total(parts).mul_(sign)
            if normalize:
                voters = zip(parts, changes, strict=True)
                weights = _total([part.sign_().mul_(change.weight) for part, change in voters])
                merged /= weights.masked_fill_(weights.abs() < NOTHING, 1)
        elif normalize and abs(total_weight) >= NOTHING:
            merged /= total_weight
        torch.add(flat_base[here], merged, alpha=lambda_, out=result[here])
    return result.reshape(base.shape)


def _total(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum in the order given; a tensor of its own."""
    result = parts[0].clone()
    for part in parts[1:]:
        result += part
    return result
