"""Recipes edited by hand: the same merge in another form, and edits that reach their layer and no other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from llm_merge.errors import RecipeError
from llm_merge.layer_edits import EDITS, as_task_vectors, edit_layers, special_layers
from llm_merge.merge import MemorySink, run
from llm_merge.plan import make_plan
from llm_merge.recipe import ModelEntry, Recipe
from tests.tiny_models import TinyFamily

LAYER_1 = ("model.layers.1.",)


def merged(recipe: Recipe) -> dict[str, torch.Tensor]:
    sink = MemorySink()
    for _ in run(make_plan(recipe), sink):
        pass
    return sink.tensors


def average(family: TinyFamily, weights: tuple[float, ...] = (0.25, 0.75)) -> Recipe:
    tunes = family.references[1:]
    return replace(Recipe.linear(tunes, weights, dtype="float32"), base_model=family.references[0])


@pytest.fixture
def recipe(tiny_llama_float32: TinyFamily) -> Recipe:
    return as_task_vectors(average(tiny_llama_float32), tiny_llama_float32.references[0])


# ---- the same merge, written so that it can be edited ----------------------------------------------------------------


@pytest.mark.parametrize("with_base", [False, True])
def test_a_weighted_average_is_the_same_merge_as_its_task_vectors(
    tiny_llama_float32: TinyFamily, with_base: bool
) -> None:
    base, *tunes = tiny_llama_float32.references
    linear = (
        Recipe.linear([base, *tunes], [0.2, 0.5, 0.3], dtype="float32") if with_base else average(tiny_llama_float32)
    )
    vectors = as_task_vectors(linear, base)
    assert vectors.base_model == base
    assert base not in vectors.references
    one, other = merged(linear), merged(vectors)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-6, atol=1e-6)


def test_weights_that_are_normalised_are_divided_by_their_sum(tiny_llama_float32: TinyFamily) -> None:
    base, *tunes = tiny_llama_float32.references
    linear = replace(Recipe.linear(tunes, [0.25, 0.75], dtype="float32"), normalize=True)
    doubled = replace(linear, models=tuple(replace(entry, weight=2 * entry.weight) for entry in linear.models))  # type: ignore[operator]
    one, other = merged(doubled), merged(as_task_vectors(doubled, base))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-6, atol=1e-6)


def test_a_recipe_of_task_vectors_stays_as_it_is(recipe: Recipe) -> None:
    assert as_task_vectors(recipe, "another base") is recipe


def test_what_has_no_such_form_is_refused_in_one_sentence() -> None:
    half = replace(Recipe.linear(["a", "b"], [0.5, 0.5]), models=(ModelEntry("a", 0.5), ModelEntry("b", 0.4)))
    for odd in (half, replace(half, models=(ModelEntry("a", (0.5, 1.0)), ModelEntry("b", 0.5)))):
        with pytest.raises(RecipeError, match="Only a weighted average whose weights sum to 1"):
            as_task_vectors(replace(odd, normalize=False), "base")
    with pytest.raises(RecipeError, match="nothing but the base"):
        as_task_vectors(Recipe.single("base"), "base")


# ---- edits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "value"), [("set weight", 0.0), ("multiply weight", 0.5), ("set density", 0.2)])
def test_an_edit_reaches_its_layer_and_its_model_only(recipe: Recipe, what: str, value: float) -> None:
    first = recipe.references[0]
    edited = edit_layers(recipe, LAYER_1, [first], what, value)
    before, after = merged(recipe), merged(edited)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith(LAYER_1[0]) for name in moved)
    name = "density" if what == "set density" else "weight"
    expected = {"set weight": 0.0, "multiply weight": 0.125, "set density": 0.2}[what]
    tensor = "model.layers.1.mlp.up_proj.weight"
    assert edited.value(0, name, tensor) == pytest.approx(expected)
    for other in ("weight", "density"):
        assert edited.value(1, other, tensor) == recipe.value(1, other, tensor)


def test_the_numbers_after_an_edit_are_those_of_the_formula(recipe: Recipe, tiny_llama_float32: TinyFamily) -> None:
    first = recipe.references[0]
    after = merged(edit_layers(recipe, LAYER_1, [first], "set weight", -1.5))
    base, one, two = (load_file(folder / "model.safetensors") for folder in tiny_llama_float32.folders)
    for name in after:
        weight = -1.5 if name.startswith(LAYER_1[0]) else 0.25
        expected = base[name] + weight * (one[name] - base[name]) + 0.75 * (two[name] - base[name])
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-6)


def test_edits_add_up_and_can_be_taken_back(recipe: Recipe) -> None:
    edited = edit_layers(recipe, ["layers.0.", "layers.1."], recipe.references, "multiply weight", 0.5)
    edited = edit_layers(edited, ["layers.1."], recipe.references[:1], "multiply weight", 0.5)
    assert edited.value(0, "weight", "layers.1.x") == pytest.approx(0.0625)
    assert edited.value(0, "weight", "layers.0.x") == pytest.approx(0.125)
    assert edited.value(0, "weight", "norm") == pytest.approx(0.25)
    assert (special_layers(recipe), special_layers(edited)) == (0, 2)
    back = edit_layers(edited, ["layers.0.", "layers.1."], recipe.references[:1], "set weight", 0.25)
    back = edit_layers(back, ["layers.0.", "layers.1."], recipe.references[1:], "set weight", 0.75)
    assert special_layers(back) == 0
    assert back == recipe


@pytest.mark.parametrize(
    ("what", "value", "words"),
    [
        ("set weight", 2.01, "Set weight: give a number from -2 to 2."),
        ("set weight", -3, "give a number"),
        ("multiply weight", -0.1, "from 0 to 4"),
        ("set density", 1.5, "from 0 to 1"),
        ("set weight", float("nan"), "give a number"),
        ("set weight", None, "give a number"),
        ("set weight", "0.5", "give a number"),
        ("set weight", True, "give a number"),
        ("halve", 0.5, "`halve` is not known"),
    ],
)
def test_values_outside_of_the_limits_are_refused(recipe: Recipe, what: str, value: object, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        edit_layers(recipe, LAYER_1, recipe.references, what, value)  # type: ignore[arg-type]


def test_no_layer_and_unknown_models_are_refused(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="No layer is selected"):
        edit_layers(recipe, [], recipe.references, EDITS[0], 0.5)
    for models in ([], ["/no/such"], [recipe.references[0], "/no/such"]):
        with pytest.raises(RecipeError, match="not in the recipe"):
            edit_layers(recipe, LAYER_1, models, EDITS[0], 0.5)


def test_an_edited_recipe_survives_its_yaml(recipe: Recipe) -> None:
    edited = edit_layers(recipe, LAYER_1, recipe.references[:1], "set density", 0.3)
    again = Recipe.from_yaml(edited.to_yaml())
    assert again.to_yaml() == edited.to_yaml()
    assert again.value(0, "density", "model.layers.1.x") == 0.3
