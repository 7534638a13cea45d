"""Which layer helps and which hurts each task: Hi-Merging's contribution analysis, before and after merging.

A *contribution* compares recipes that differ in one layer's task vector; what a recipe is worth on a task is asked of a
`Scorer`, so that a test can answer in closed form. Nothing here loads a model or knows how it is measured.
Source: Fu et al., "Training-free LLM Merging for Multi-task Learning", ACL 2025, arXiv:2506.12379, and its released
scripts. That both sides use the pruned and scaled deltas is inferred from the scripts, not the paper's word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from llm_merge.errors import RecipeError
from llm_merge.recipe import ModelEntry, Recipe

Values = tuple[float, ...]
"""A metric on each row of a task, higher is better."""

Side = Literal["before", "after"]
Kind = Literal["delete", "add"]
SIDES: tuple[Side, ...] = ("before", "after")
KINDS: tuple[Kind, ...] = ("delete", "add")
RESERVED = ("base", "average")  # what results call the merges that every other is compared with
COMBINES = ("average", "sum", "ties_sum")


class Scorer(Protocol):
    """What a recipe is worth on a task's analysis rows, row by row."""

    def whole(self, recipe: Recipe, task: str) -> Values:
        """The merge that the recipe describes."""
        ...

    def changed(self, anchor: Recipe, variant: Recipe, layer: str, task: str) -> Values:
        """`variant`, which differs from `anchor` in the layer with this key only: below it nothing changes."""
        ...


@dataclass(frozen=True)
class Layer:
    """A transformer block, or what lies outside of the blocks: its key, its name, and what its tensors' names contain.

    key       "7", "embeddings"
    filters   mergekit's filters that match its tensors and no others
    block     False for embeddings, final norm and head, which are shown but not edited
    """

    key: str
    title: str
    filters: tuple[str, ...]
    block: bool = True


@dataclass(frozen=True)
class Setup:
    """What is analysed: M specialists of one base, each with its task.

    models      references of the specialists
    tasks       one name per specialist
    layers      in order of depth
    pruning     (p, s) per specialist: the share of entries of largest magnitude that is kept, and the scale; (1, 1) for
                the task vectors as they are
    combine     "average" θ_F + 1/M Σ δ', "sum" θ_F + Σ δ', "ties_sum" the sum after TIES' sign election [open in the
                paper's text; the released README names mergekit's TIES with the consensus method sum]
    dtype       that the compared models are rounded to; float32, since small deltas drown in 16 bits
    edited      the merge as it stands after some layers were edited; None: as `combine` makes it
    """

    base: str
    models: tuple[str, ...]
    tasks: tuple[str, ...]
    layers: tuple[Layer, ...]
    pruning: tuple[tuple[float, float], ...] = ()
    combine: str = "average"
    dtype: str | None = "float32"
    edited: Recipe | None = None

    def __post_init__(self) -> None:
        if not self.models:
            raise RecipeError("There is no specialist to analyse: choose at least one fine-tune.", field="models")
        if len(self.tasks) != len(self.models) or len(set(self.tasks)) != len(self.tasks):
            raise RecipeError(
                f"{len(self.models)} specialists need as many different tasks, and there are "
                f"{len(set(self.tasks))}: give each its own.",
                field="tasks",
            )
        taken = next((task for task in self.tasks if task in RESERVED or task.startswith("step ")), None)
        if taken is not None:
            raise RecipeError(
                f"A task cannot be called “{taken}”, which results call something else: rename it.", field="tasks"
            )
        if self.combine not in COMBINES:
            raise RecipeError(f"combine `{self.combine}` is not known: use {', '.join(COMBINES)}.", field="combine")
        if not self.pruning:
            object.__setattr__(self, "pruning", ((1.0, 1.0),) * len(self.models))
        if len(self.pruning) != len(self.models):
            raise RecipeError(
                f"There are {len(self.models)} specialists and {len(self.pruning)} pairs of p and s: give each one.",
                field="pruning",
            )
        for p, s in self.pruning:
            if not 0 < p <= 1 or not s > 0:
                raise RecipeError(
                    f"p = {p:g}, s = {s:g}: the share kept must be above 0 and at most 1, the scale above 0.",
                    field="pruning",
                )

    def layer(self, key: str) -> Layer:
        """Raises RecipeError for a key that no layer has."""
        found = next((layer for layer in self.layers if layer.key == key), None)
        if found is None:
            known = f"{self.layers[0].key} to {self.layers[-1].key}" if self.layers else "none"
            raise RecipeError(f"There is no layer “{key}” in these models: the layers are {known}.", field="layers")
        return found

    def with_pruning(self, pruning: Sequence[tuple[float, float]]) -> Setup:
        return replace(self, pruning=tuple(pruning))

    # ── the recipes that an analysis compares ────────────────────────────────────────────────────────────────────

    def base_recipe(self) -> Recipe:
        """θ_F: nothing of any specialist."""
        return self._breadcrumbs([0.0] * len(self.models), [1.0] * len(self.models))

    def specialist(self, index: int) -> Recipe:
        """θ_m = θ_F + s_m · TopP(δ_m)."""
        weights = [self.pruning[i][1] if i == index else 0.0 for i in range(len(self.models))]
        return self._breadcrumbs(weights, [p for p, _ in self.pruning])

    def share(self, index: int, scale: float = 1.0) -> float:
        """A specialist's weight in the merge, s/M or s, with `scale` times its s."""
        return scale * self.pruning[index][1] / (len(self.models) if self.combine == "average" else 1)

    def merged(self) -> Recipe:
        """θ_G, by the rule that `combine` names: weight s/M or s, and density p, per model."""
        if self.edited is not None:
            return self.edited
        weights = [self.share(index) for index in range(len(self.models))]
        densities = [p for p, _ in self.pruning]
        if self.combine != "ties_sum":
            return self._breadcrumbs(weights, densities)
        return replace(self._breadcrumbs(weights, densities), merge_method="ties", parameters=())

    def anchor(self, cell: Cell) -> Recipe:
        """The whole model that a cell's variant differs from in one layer."""
        return self.base_recipe() if cell.kind == "add" else self._model(cell)

    def variant(self, cell: Cell) -> Recipe:
        """θ_x without the layer's delta, or θ_F with it alone."""
        recipe, filters = self._model(cell), self.layer(cell.layer).filters
        if cell.kind == "delete":
            return without_layer(recipe, filters)
        return only_layer(recipe, filters)

    def _model(self, cell: Cell) -> Recipe:
        return self.merged() if cell.side == "after" else self.specialist(self.tasks.index(cell.task))

    def _breadcrumbs(self, weights: Sequence[float], densities: Sequence[float]) -> Recipe:
        entries = tuple(
            ModelEntry(model, weight, () if density >= 1 else (("density", density),))
            for model, weight, density in zip(self.models, weights, densities, strict=True)
        )
        return Recipe(
            models=entries,
            merge_method="breadcrumbs",
            base_model=self.base,
            dtype=self.dtype,
            normalize=False,
            parameters=(("gamma", 0.0),),
        )


@dataclass(frozen=True)
class Cell:
    """One evaluation: on a task's rows, before or after merging, one layer's delta deleted or added alone."""

    task: str
    side: Side
    kind: Kind
    layer: str


def without_layer(recipe: Recipe, filters: Sequence[str]) -> Recipe:
    """The recipe with every model's share of one layer set to 0: θ_x − δ_x^l."""
    for index in range(len(recipe.models)):
        recipe = recipe.with_value(index, "weight", filters, 0.0)
    return recipe


def only_layer(recipe: Recipe, filters: Sequence[str]) -> Recipe:
    """The recipe with every model's share set to 0 but in one layer: θ_F + δ_x^l."""
    alone = replace(recipe, models=tuple(replace(entry, weight=0.0) for entry in recipe.models))
    for index in range(len(recipe.models)):
        for name in filters:
            alone = alone.with_value(index, "weight", [name], recipe.value(index, "weight", name))
    return alone


def cells_of(setup: Setup, layers: Iterable[str], sides: Iterable[Side] = SIDES) -> Iterator[Cell]:
    """The work for these layers, one anchor after the other: each specialist, the base, the merge."""
    keys, wanted = list(layers), tuple(sides)
    if "before" in wanted:
        yield from (Cell(task, "before", "delete", key) for task in setup.tasks for key in keys)
    yield from (Cell(task, side, "add", key) for task in setup.tasks for side in wanted for key in keys)
    if "after" in wanted:
        yield from (Cell(task, "after", "delete", key) for key in keys for task in setup.tasks)


def measure_cells(setup: Setup, cells: Iterable[Cell], scorer: Scorer) -> Iterator[tuple[Cell, Values]]:
    """Each cell with its values, as they are measured."""
    for cell in cells:
        anchor, variant = setup.anchor(cell), setup.variant(cell)
        yield cell, scorer.changed(anchor, variant, cell.layer, cell.task)


def whole_models(setup: Setup, scorer: Scorer) -> Iterator[tuple[str, str, Values]]:
    """(task, "base" | "before" | "after", values) of the whole models: the base, each specialist on its task, θ_G."""
    base, merged = setup.base_recipe(), setup.merged()
    for index, task in enumerate(setup.tasks):
        yield task, "base", scorer.whole(base, task)
        yield task, "before", scorer.whole(setup.specialist(index), task)
        yield task, "after", scorer.whole(merged, task)
