"""Recipes: weights that hold, mergekit's YAML there and back, and the words for what is wrong with either."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_merge.errors import RecipeError
from llm_merge.recipe import ModelEntry, Recipe

YAML = """
merge_method: linear
models:
  - model: org/one@main
    parameters: {weight: 0.25}
  - model: base+./adapter
    parameters: {weight: 3}
base_model: org/base
parameters: {normalize: true, int8_mask: true}
dtype: bf16
"""


def test_mergekits_yaml_is_read() -> None:
    recipe = Recipe.from_yaml(YAML)
    assert recipe.models == (ModelEntry("org/one@main", 0.25), ModelEntry("base+./adapter", 3.0))
    assert (recipe.base_model, recipe.dtype, recipe.normalize) == ("org/base", "bfloat16", True)


@given(
    st.lists(st.floats(0, 1, exclude_min=True), min_size=1, max_size=8),
    st.sampled_from([None, "float32", "float16", "bfloat16"]),
)
def test_yaml_and_back_is_the_same_recipe(shares: list[float], dtype: str | None) -> None:
    total = sum(shares)
    recipe = Recipe.linear([f"org/model-{i}" for i in range(len(shares))], [s / total for s in shares], dtype=dtype)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([0.5, 0.4], "The weights sum to 0.9, not 1: change them so that they sum to 1."),
        ([0.6, 0.6], "The weights sum to 1.2, not 1: change them so that they sum to 1."),
        ([-3.0, 1.0], "The weights sum to -2, not 1: change them so that they sum to 1."),
        ([float("nan"), 1.0], "Weight 1 is nan: every weight must be a finite number."),
        ([1.0, float("inf")], "Weight 2 is inf: every weight must be a finite number."),
        ([1.0], "There are 2 models but 1 weights: give one weight per model."),
    ],
)
def test_wrong_weights_in_words(weights: list[float], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.linear(["a", "b"], weights)
    assert caught.value.message == words


@pytest.mark.parametrize(
    ("yaml", "field", "words"),
    [
        ("a: [", "yaml", "The recipe is not valid YAML"),
        ("[]", "", "the recipe must be a mapping of keys to values."),
        ("merge_method: linear", "models", "The recipe lists no models"),
        ("merge_metod: linear\nmodels: []", "merge_metod", "Did you mean `merge_method`?"),
        ("models: [{model: a, parameters: {wieght: 1}}]", "models[0].parameters.wieght", "Did you mean `weight`?"),
        ("models: [{model: a}]", "models[0].parameters.weight", "models[0] has no weight"),
        ("models: [{parameters: {weight: 1}}]", "models[0].model", "models[0] has no model"),
        ("models: [{model: a, parameters: {weight: [0, 1]}}]", "models[0].parameters.weight", "must be one finite"),
        ("models: [{model: a, parameters: {weight: 1}}]\ndtype: int3", "dtype", "dtype `int3` is not known"),
        ("models: [{model: a, parameters: {weight: 1}}]\nnormalize: false", "normalize", "Unknown key `normalize`"),
    ],
)
def test_wrong_yaml_names_the_place(yaml: str, field: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(yaml)
    assert words in caught.value.message
    assert caught.value.field == field
