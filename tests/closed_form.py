"""A scorer that answers in closed form: what a merge is worth is a formula of its weights per layer and model.

Stands for resident models where deciders are tested: every α, β, c, γ and Γ can be worked out by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from llm_merge.contributions import Layer, Setup, Values
from llm_merge.recipe import Recipe

Shares = Mapping[tuple[str, str], tuple[float, float]]
"""(model, layer) → weight and density."""


@dataclass
class ClosedForm:
    """`worth` takes a merge's shares and a task and returns the values of the task's rows.

    asked   every question: (anchor, variant, layer, task), the anchor and the layer None for whole models
    """

    setup: Setup
    worth: Callable[[Shares, str], Sequence[float]]
    asked: list[tuple[Recipe | None, Recipe, str | None, str]] = field(default_factory=list)

    def whole(self, recipe: Recipe, task: str) -> Values:
        self.asked.append((None, recipe, None, task))
        return tuple(self.worth(self.shares(recipe), task))

    def changed(self, anchor: Recipe, variant: Recipe, layer: str, task: str) -> Values:
        """Also looks whether the two differ in that layer only, as the real scorer relies on."""
        before, after = self.shares(anchor), self.shares(variant)
        differ = {place for place in before if (before[place], after[place]) != (before[place],) * 2}
        assert {key for _, key in differ if before[_, key][0] or after[_, key][0]} <= {layer}
        self.asked.append((anchor, variant, layer, task))
        return tuple(self.worth(after, task))

    def shares(self, recipe: Recipe) -> Shares:
        return {
            (entry.model, layer.key): (
                recipe.value(index, "weight", layer.filters[0]), recipe.value(index, "density", layer.filters[0])
            )
            for index, entry in enumerate(recipe.models)
            for layer in self.setup.layers
        }  # fmt: skip


def layers(count: int) -> tuple[Layer, ...]:
    return tuple(Layer(str(number), f"Layer {number}", (f"layers.{number}.",)) for number in range(count))


def setup_of(models: int = 2, depth: int = 3, **more: object) -> Setup:
    """Specialists "a", "b", … of the base "base" with the tasks "task a", "task b", …"""
    names = tuple("abcd"[:models])
    return Setup("base", names, tuple(f"task {name}" for name in names), layers(depth), **more)  # type: ignore[arg-type]


def linear(slopes: Mapping[tuple[str, str, str], float], rows: int = 3) -> Callable[[Shares, str], Sequence[float]]:
    """Worth Σ slope·weight over the layers and models, slopes by (task, model, layer); row r has it r + 1 times.

    Then α = β = slope·weight for a layer of one model.
    """

    def worth(shares: Shares, task: str) -> Sequence[float]:
        total = sum(slopes.get((task, model, layer), 0.0) * weight for (model, layer), (weight, _) in shares.items())
        return [-1.0 + (row + 1) * total for row in range(rows)]

    return worth


def quadratic(best: Mapping[tuple[str, str], float], rows: int = 2) -> Callable[[Shares, str], Sequence[float]]:
    """Worth −Σ over the layers of (sum of all models' weights there − the task's best)², the same for every row."""

    def worth(shares: Shares, task: str) -> Sequence[float]:
        keys = dict.fromkeys(layer for _, layer in shares)
        sums = {key: sum(weight for (_, layer), (weight, _) in shares.items() if layer == key) for key in keys}
        return [-sum((sums[key] - best.get((task, key), 0.0)) ** 2 for key in keys)] * rows

    return worth
