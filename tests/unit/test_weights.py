"""Laws of softmax(−loss / T), and the words for what it cannot use."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_merge.errors import RecipeError
from llm_merge.weights import loss_spread, shares, softmax_weights, weights_from_losses

finite = st.floats(allow_nan=False, allow_infinity=False)
some_losses = st.lists(finite, min_size=1, max_size=8)
temperatures = st.floats(min_value=1e-6, max_value=1e6)


@given(some_losses, temperatures)
def test_weights_sum_to_one(losses: list[float], temperature: float) -> None:
    weights = softmax_weights(losses, temperature)
    assert math.fsum(weights) == pytest.approx(1, abs=1e-12)
    assert all(0 <= weight <= 1 for weight in weights)


@given(some_losses, temperatures)
def test_a_higher_loss_never_gets_more_weight(losses: list[float], temperature: float) -> None:
    ordered = softmax_weights(sorted(losses), temperature)
    assert all(better >= worse for better, worse in itertools.pairwise(ordered))


@given(st.permutations([1.93, 1.14, 1.84, 2.5]), temperatures)
def test_the_order_of_the_models_does_not_matter(losses: list[float], temperature: float) -> None:
    weights = dict(zip(losses, softmax_weights(losses, temperature), strict=True))
    straight = softmax_weights([1.14, 1.84, 1.93, 2.5], temperature)
    assert [weights[loss] for loss in (1.14, 1.84, 1.93, 2.5)] == pytest.approx(straight)


@given(st.lists(st.floats(min_value=-100, max_value=100), min_size=2, max_size=8))
def test_a_high_temperature_makes_shares_equal(losses: list[float]) -> None:
    assert softmax_weights(losses, 1e9) == pytest.approx([1 / len(losses)] * len(losses), abs=1e-6)


def test_a_low_temperature_takes_the_best_model_alone() -> None:
    assert softmax_weights([1.93, 1.14, 1.84], 1e-6) == (0.0, 1.0, 0.0)


def test_extreme_losses_stay_finite() -> None:
    assert softmax_weights([1e6, -1e6], 1.0) == (0.0, 1.0)
    assert softmax_weights([1e6, 1e6, 1e6, 1e6], 0.01) == (0.25,) * 4
    assert softmax_weights([1.7e308, -1.7e308], 5e-324) == (0.0, 1.0)


def test_lm_cocktails_own_figures() -> None:
    """The design notes' observation of LM-Cocktail: losses 2.0 and 2.1 at its default, and at 0.1."""
    assert softmax_weights([2.0, 2.1]) == pytest.approx([0.505, 0.495], abs=1e-4)
    assert softmax_weights([2.0, 2.1], 0.1) == pytest.approx([0.731, 0.269], abs=1e-3)


def test_at_the_spread_the_best_weighs_e_times_the_worst() -> None:
    losses = [1.93, 1.14, 1.84]
    weights = softmax_weights(losses, loss_spread(losses))
    assert max(weights) / min(weights) == pytest.approx(math.e)


def test_a_model_left_out_has_share_zero_and_the_rest_is_renormalised() -> None:
    kept = softmax_weights([1.14, 1.84], 0.5)
    assert shares([1.93, 1.14, 1.84], 0.5, [False, True, True]) == (0.0, *kept)


@pytest.mark.parametrize("temperature", [0, -1, math.nan, math.inf, "warm", True])
def test_the_words_for_a_bad_temperature(temperature: float) -> None:
    with pytest.raises(RecipeError) as error:
        softmax_weights([1.0, 2.0], temperature)
    words = f"The temperature is {temperature}: it must be a number above 0 (LM-Cocktail's default is 5)."
    assert (error.value.message, error.value.field) == (words, "temperature")


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([1.0, math.nan], "The loss of model 2 is nan, so it has no weight: measure it again, or leave it out."),
        ([math.inf, 1.0], "The loss of model 1 is inf, so it has no weight: measure it again, or leave it out."),
        ([], "There are no losses to compute weights from: measure at least one model."),
    ],
)
def test_the_words_for_bad_losses(losses: list[float], words: str) -> None:
    with pytest.raises(RecipeError) as error:
        softmax_weights(losses, 1.0)
    assert (error.value.message, error.value.field) == (words, "losses")


def test_a_recipe_mixes_exactly_the_models_passed() -> None:
    recipe = weights_from_losses(["a", "b"], [1.0, 2.0], 1.0, dtype="bfloat16")
    assert recipe.references == ("a", "b")
    assert recipe.weights == softmax_weights([1.0, 2.0], 1.0)
    assert recipe.dtype == "bfloat16"
    with pytest.raises(RecipeError, match=r"There are 2 models but 1 losses: measure every model, or leave it out\."):
        weights_from_losses(["a", "b"], [1.0])
