"""Recipes: weights that hold, mergekit's YAML there and back, and the words for what is wrong with either."""

from __future__ import annotations

from typing import Any

import pytest
import yaml as pyyaml
from hypothesis import given
from hypothesis import strategies as st

from llm_merge.errors import RecipeError
from llm_merge.methods import METHODS
from llm_merge.recipe import ModelEntry, Recipe, Rule

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
        ("models: [{model: a, parameters: {weight: .nan}}]", "models[0].parameters.weight", "must be one finite"),
        ("models: [{model: a, parameters: {weight: 1, density: 1}}]", "models[0].parameters.density", "Unknown key"),
        ("models: [{model: a, parameters: {weight: 1}}]\ndtype: [float32]", "dtype", "is not known: use bfloat16"),
        ("models: [{model: a, parameters: {weight: 1}}]\ndtype: int3", "dtype", "dtype `int3` is not known"),
        ("models: [{model: a, parameters: {weight: 1}}]\nnormalize: false", "normalize", "Unknown key `normalize`"),
    ],
)
def test_wrong_yaml_names_the_place(yaml: str, field: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(yaml)
    assert words in caught.value.message
    assert caught.value.field == field


# ── parameters by layers ────────────────────────────────────────────────────────────────────────────────────────────

LAYERED = """
merge_method: ties
base_model: org/base
models:
  - model: org/base
  - model: org/law
    parameters:
      weight:
        - filter: layers.1.
          value: 0
        - filter: mlp
          value: [0, 1]
        - value: 0.5
      density: [1, 0.2]
  - model: org/poems
    parameters: {weight: 2}
parameters: {density: 0.4, normalize: false, lambda: 0.9, int8_mask: true}
"""


def test_numbers_gradients_and_filters_are_read() -> None:
    recipe = Recipe.from_yaml(LAYERED)
    assert recipe.models[1].weight == (Rule(0.0, "layers.1."), Rule((0.0, 1.0), "mlp"), Rule(0.5))
    assert recipe.models[1].parameters == (("density", (1.0, 0.2)),)
    assert recipe.is_layered
    assert recipe.weights == (0.0, 0.5, 2.0)
    assert (recipe.normalizes, recipe.normalize) == (False, False)
    assert not Recipe.from_yaml(YAML).is_layered


def test_a_model_s_own_value_counts_first_then_the_recipe_s_then_the_default() -> None:
    recipe = Recipe.from_yaml(LAYERED)
    up = recipe.settings_for("model.layers.0.mlp.up_proj.weight", 0.25)
    assert up["weight"] == (0.0, 0.25, 2.0)
    assert up["density"] == (0.4, 0.8, 0.4)
    assert (up["lambda"], up["normalize"], up["rescale"]) == (0.9, False, False)
    assert recipe.settings_for("model.layers.1.mlp.up_proj.weight", 1.0)["weight"] == (0.0, 0.0, 2.0)
    assert recipe.settings_for("model.norm.weight")["weight"] == (0.0, 0.5, 2.0)
    assert recipe.settings_for("model.norm.weight")["density"] == (0.4, 1.0, 0.4)
    plain = Recipe.from_yaml(LAYERED.replace("density: 0.4, ", ""))
    assert plain.settings_for("model.norm.weight")["density"] == (1.0, 1.0, 1.0)


def test_where_no_filter_of_the_model_fits_the_recipe_s_own_value_counts() -> None:
    own = "models: [{model: a, parameters: {weight: [{filter: mlp, value: 3}]}}, {model: b}]\nparameters: {weight: 0.5}"
    recipe = Recipe.from_yaml(own)
    assert recipe.settings_for("x.mlp.y")["weight"] == (3.0, 0.5)
    assert recipe.settings_for("x.attn.y")["weight"] == (0.5, 0.5)
    assert recipe.weights == (0.5, 0.5)
    changed = recipe.with_value(0, "weight", ["layers.1."], 7.0)
    assert changed.settings_for("layers.1.mlp")["weight"] == (7.0, 0.5)
    assert changed.settings_for("layers.2.attn")["weight"] == (0.5, 0.5)


def test_a_tensor_without_a_weight_is_named() -> None:
    recipe = Recipe.from_yaml("models: [{model: a, parameters: {weight: [{filter: mlp, value: 3}]}}]")
    with pytest.raises(
        RecipeError, match=r"“a” has no weight for model\.norm\.weight: end its list of filters"
    ) as caught:
        recipe.settings_for("model.norm.weight")
    assert caught.value.field == "models[0].parameters.weight"


def test_what_a_tensor_gets_does_not_hang_on_what_was_asked_before() -> None:
    recipe = Recipe.from_yaml(LAYERED)
    names = [f"model.layers.{n}.{part}" for n in (0, 1, 10) for part in ("mlp.up_proj", "self_attn.q_proj")]
    asked = [(name, depth) for name in [*names, "model.norm.weight"] for depth in (0.0, 0.5, 1.0)]
    for name, depth in asked:
        recipe.settings_for(name, depth).clear()  # a caller may do with it what it likes
    assert [recipe.settings_for(*place) for place in asked] == [
        Recipe.from_yaml(LAYERED).settings_for(*place) for place in asked
    ]


def test_values_of_layers_are_set_and_read() -> None:
    recipe = Recipe((ModelEntry("a", 0.5), ModelEntry("b", 0.5)), "breadcrumbs", "base")
    edited = recipe.with_value(1, "density", ["layers.7."], 0.3).with_value(0, "weight", ["layers.7."], 0.0)
    assert edited.value(1, "density", "layers.7.") == 0.3
    assert edited.value(1, "density", "layers.8.") == edited.value(0, "density", "layers.7.") == 1.0
    assert edited.value(0, "weight", "layers.7.") == 0.0
    assert edited.weights == (0.5, 0.5)
    assert edited.is_layered
    back = edited.with_value(0, "weight", ["layers.7."], 0.5)
    assert back.models[0] == recipe.models[0]
    assert recipe.models[0].weight == 0.5, "the recipe itself is not changed"


_numbers = st.floats(0, 1, allow_nan=False).map(lambda value: round(value, 6))
_gradients = st.lists(_numbers, min_size=1, max_size=3).map(tuple)
_filters = st.sampled_from(["layers.3.", "mlp", "*", "self_attn"])
_rules = st.lists(st.builds(Rule, st.one_of(_numbers, _gradients), _filters), max_size=3).map(
    lambda rules: (*rules, Rule(0.5))
)
_settings = st.one_of(_numbers, _gradients, _rules)


@st.composite
def layered_recipes(draw: st.DrawFn) -> Recipe:
    method = METHODS[draw(st.sampled_from(sorted(METHODS)))]
    each = [name for name, parameter in method.parameters.items() if parameter.each and name != "weight"]
    own = {name: p for name, p in method.parameters.items() if not p.each and name != "normalize"}

    def some(names: list[str]) -> tuple[tuple[str, Any], ...]:
        chosen = draw(st.lists(st.sampled_from(names), unique=True)) if names else []
        return tuple((name, draw(_settings)) for name in chosen)

    def single(kind: type) -> st.SearchStrategy[Any]:
        return st.booleans() if kind is bool else st.integers(0, 99).map(float) if kind is int else _settings

    count = draw(st.integers(1, 3))
    entries = tuple(ModelEntry(f"org/model-{i}", draw(_settings), some(each)) for i in range(count))
    top = tuple((name, draw(single(p.kind))) for name, p in own.items() if draw(st.booleans()))
    base = "org/base" if method.uses_base else None
    dtype = draw(st.sampled_from([None, "float32", "bfloat16"]))
    return Recipe(entries, method.name, base, dtype, draw(st.sampled_from([None, True, False])), (*top, *some(each)))


@given(layered_recipes())
def test_every_recipe_comes_back_from_yaml_as_it_was(recipe: Recipe) -> None:
    text = recipe.to_yaml()
    again = Recipe.from_yaml(text)
    assert again == recipe
    assert again.to_yaml() == text
    for tensor in ("model.layers.3.mlp.up_proj.weight", "model.norm.weight"):
        assert again.settings_for(tensor, 0.3) == recipe.settings_for(tensor, 0.3)


def _ties(**parameters: Any) -> str:
    """A recipe of one model with these parameters; `top` holds those of the whole merge."""
    top = parameters.pop("top", {})
    entry = {"model": "a", "parameters": {"weight": 1, **parameters}}
    return str(pyyaml.safe_dump({"merge_method": "ties", "base_model": "b", "models": [entry], "parameters": top}))


@pytest.mark.parametrize(
    ("yaml", "field", "words"),
    [
        (_ties(density=1.5), "models[0].parameters.density", "is 1.5: it must be between 0 and 1"),
        (_ties(density=[0.5, -1]), "models[0].parameters.density[1]", "is -1: it must be between 0 and 1"),
        (_ties(densty=0.5), "models[0].parameters.densty", "Did you mean `density`?"),
        (_ties(normalize=True), "models[0].parameters.normalize", "belongs to the whole merge: move it to the"),
        (_ties(gamma=0.1), "models[0].parameters.gamma", "Unknown key `gamma`"),
        (_ties(weight=[{"filter": "mlp", "value": "x"}]), "models[0].parameters.weight[0].value", "one finite number"),
        (_ties(top={"normalize": 1}), "parameters.normalize", "normalize must be true or false."),
        (_ties(top={"lamda": 1}), "parameters.lamda", "Did you mean `lambda`?"),
        (_ties(top={"density": 2}), "parameters.density", "is 2: it must be between 0 and 1"),
        (_ties(top={"rescale": [True]}), "parameters.rescale", "rescale must be true or false."),
        (_ties(top={"random_seed": 1}), "parameters.random_seed", "Unknown key `random_seed`"),
        (_ties(top={"random_seed": 1.5}).replace("ties", "dare_ties"), "parameters.random_seed", "one whole number"),
        (_ties(top={"random_seed": -1}).replace("ties", "dare_ties"), "parameters.random_seed", "must be at least 0"),
        (_ties().replace("ties", "tis"), "merge_method", "did you mean `ties`?"),
    ],
)
def test_a_parameter_that_is_wrong_names_its_place(yaml: str, field: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(yaml)
    assert words in caught.value.message
    assert caught.value.field == field
