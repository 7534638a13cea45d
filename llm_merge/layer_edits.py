"""Recipes edited by hand, layer by layer: set or multiply a weight, set a density.

Recipe in, Recipe out. A weighted average becomes the same merge written as task vectors first, because only those have
a density. Nothing is measured and no model is opened here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from llm_merge.errors import RecipeError
from llm_merge.methods import get_method
from llm_merge.recipe import ModelEntry, Recipe, Rule

EDITS = ("set weight", "multiply weight", "set density")
LIMITS = {"set weight": (-2.0, 2.0), "multiply weight": (0.0, 4.0), "set density": (0.0, 1.0)}


def as_task_vectors(recipe: Recipe, base: str) -> Recipe:
    """The merge written as base + Σ wᵢ·δᵢ, equal up to rounding; a recipe of a task-vector method as it is.

    Raises RecipeError for a weighted average whose weights do not sum to 1: it has no such form.
    """
    if get_method(recipe.merge_method).uses_base:
        return recipe
    total = math.fsum(recipe.weights)
    if recipe.merge_method != "linear" or recipe.is_layered or (not recipe.normalizes and abs(total - 1) > 1e-3):
        raise RecipeError("Only a weighted average whose weights sum to 1 can be edited by layers.", field="models")
    scale = total if recipe.normalizes else 1.0
    entries = tuple(
        ModelEntry(m, w / scale) for m, w in zip(recipe.references, recipe.weights, strict=True) if m != base
    )
    if not entries:
        raise RecipeError("There is nothing but the base in this merge: choose a fine-tune.", field="models")
    return Recipe(entries, "breadcrumbs", base, recipe.dtype, normalize=False, parameters=(("gamma", 0.0),))


def edit_layers(recipe: Recipe, filters: Sequence[str], models: Sequence[str], what: str, value: float) -> Recipe:
    """The recipe with an edit of `EDITS` made for these models in the layers whose filters are given.

    Raises RecipeError for a value outside of `LIMITS`, for no layer, and for a model that is not in the recipe.
    """
    if what not in EDITS:
        raise RecipeError(f"The edit `{what}` is not known: use {', '.join(EDITS)}.", field="edit")
    low, high = LIMITS[what]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise RecipeError(f"{what.capitalize()}: give a number from {low:g} to {high:g}.", field="value")
    if not filters:
        raise RecipeError("No layer is selected: click or brush layers in the map first.", field="layers")
    places = [place for place, entry in enumerate(recipe.models) if entry.model in models]
    if not places or len(places) < len(set(models)):
        raise RecipeError("This model is not in the recipe: choose one of the fine-tunes in it.", field="models")
    for place in places:
        for name in filters:
            if what == "set density":
                recipe = recipe.with_value(place, "density", [name], value)
            else:
                now = recipe.value(place, "weight", name)
                recipe = recipe.with_value(place, "weight", [name], value if what == "set weight" else now * value)
    return recipe


def special_layers(recipe: Recipe) -> int:
    """How many filters the recipe has for single layers: what a person edited."""
    names: set[str] = set()
    for entry in recipe.models:
        for setting in (entry.weight, *(value for _, value in entry.parameters)):
            if isinstance(setting, tuple):
                names |= {rule.filter for rule in setting if isinstance(rule, Rule) and rule.filter} - {"*"}
    return len(names)
