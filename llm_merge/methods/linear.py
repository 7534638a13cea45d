"""The weighted average, also known as a model soup or LM-Cocktail."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from llm_merge.errors import RecipeError
from llm_merge.methods import Parameter, register

if TYPE_CHECKING:
    import torch


@register(
    "linear",
    title="Weighted average",
    paper="Wortsman et al. 2022, arXiv:2203.05482; Xiao et al. 2023 (LM-Cocktail), arXiv:2311.13534",
    formula="Σ wᵢ·xᵢ",
    element_wise=True,
    # Rounding then happens 29 bits below the last bit of a float32, so a model merged with itself gives itself. In a
    # float32 sum a tenth of the entries is off by an ulp at 0.3 / 0.7. Chunks stay in the cache: it costs little.
    precision="float64",
)
def linear(
    tensors: Sequence[torch.Tensor],
    /,
    *,
    weights: Annotated[
        Sequence[float], Parameter("How much of each model goes in; 0 leaves it out.", each=True, key="weight")
    ],
    normalize: Annotated[bool, Parameter("Divide by the sum of the weights.", default=True)],
) -> torch.Tensor:
    """Σ wᵢ·xᵢ for tensors of one shape, added in the order given; `normalize` divides the weights by their sum.

    Starts from the first product, not from zero, so that the sign of a negative zero survives weights (1, 0).
    Raises RecipeError where weights that sum to 0 are to be divided by their sum.
    """
    if normalize:
        # Once, on the weights: dividing the result instead would round every entry a second time.
        total = math.fsum(weights)
        if abs(total) < 1e-8:
            message = "The weights sum to 0, and dividing by their sum is not possible: change a weight, or set "
            raise RecipeError(message + "`normalize: false`.", field="parameters.normalize")
        weights = [weight / total for weight in weights]
    result = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        result.add_(tensor, alpha=weight)
    return result
