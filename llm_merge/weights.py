"""Losses in, weights out: softmax(−loss / T), as in LM-Cocktail.

A loss is a model's mean over the examples, in nats, lower is better; the temperature is in the loss's unit. This module
knows numbers and names only: it measures nothing and opens no model.
Source: Xiao et al., "LM-Cocktail: Resilient Tuning of Language Models via Model Merging", 2023, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llm_merge.errors import RecipeError
from llm_merge.recipe import Recipe

if TYPE_CHECKING:
    from typing import TypeGuard

DEFAULT_TEMPERATURE = 5.0  # LM-Cocktail's
TEMPERATURE_RANGE = (0.01, 10.0)  # what the page's slider spans; the library takes any temperature above 0


def softmax_weights(losses: Sequence[float], temperature: float = DEFAULT_TEMPERATURE) -> tuple[float, ...]:
    """One weight per loss, wᵢ = exp(−lossᵢ / T) / Σⱼ exp(−lossⱼ / T): they sum to 1, a higher loss never weighs more.

    Any finite losses work: only differences from the lowest are exponentiated, so nothing overflows.
    Raises RecipeError with field "temperature" (not a finite number above 0) or "losses" (none, NaN, infinite).
    """
    validate_temperature(temperature)
    validate_losses(losses)
    lowest = min(losses)
    powers = [math.exp(-(loss - lowest) / temperature) for loss in losses]
    total = math.fsum(powers)
    return tuple(power / total for power in powers)


def weights_from_losses(
    models: Sequence[str],
    losses: Sequence[float],
    temperature: float = DEFAULT_TEMPERATURE,
    *,
    dtype: str | None = None,
) -> Recipe:
    """The linear recipe that mixes exactly these models, each by its loss; `models` are references, in order.

    Raises RecipeError as `softmax_weights` does, and when there are not as many losses as models.
    """
    if len(models) != len(losses):
        raise RecipeError(
            f"There are {len(models)} models but {len(losses)} losses: measure every model, or leave it out.",
            field="losses",
        )
    return Recipe.linear(models, softmax_weights(losses, temperature), dtype=dtype)


def shares(losses: Sequence[float], temperature: float, included: Sequence[bool]) -> tuple[float, ...]:
    """`softmax_weights` over the included models, 0 for the others: what the page shows when the base is left out."""
    if len(included) != len(losses):
        raise RecipeError(f"There are {len(losses)} losses but {len(included)} switches.", field="losses")
    if not any(included):
        raise RecipeError("No model is included: include at least one.", field="models")
    weights = iter(softmax_weights([x for x, use in zip(losses, included, strict=True) if use], temperature))
    return tuple(next(weights) if use else 0.0 for use in included)


def loss_spread(losses: Sequence[float]) -> float:
    """Highest loss minus lowest: at this temperature the best model weighs e ≈ 2.7 times the worst."""
    return max(losses) - min(losses) if losses else 0.0


def validate_temperature(temperature: object) -> None:
    """Raise RecipeError unless the temperature is a finite number above 0."""
    if not _is_number(temperature) or not math.isfinite(temperature) or temperature <= 0:
        raise RecipeError(
            f"The temperature is {temperature}: it must be a number above 0 (LM-Cocktail's default is 5).",
            field="temperature",
        )


def validate_losses(losses: Sequence[float]) -> None:
    """Raise RecipeError unless there is at least one loss and all are finite numbers."""
    if not losses:
        raise RecipeError("There are no losses to compute weights from: measure at least one model.", field="losses")
    for position, loss in enumerate(losses, start=1):
        if not _is_number(loss) or not math.isfinite(loss):
            raise RecipeError(
                f"The loss of model {position} is {loss}, so it has no weight: measure it again, or leave it out.",
                field="losses",
            )


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
