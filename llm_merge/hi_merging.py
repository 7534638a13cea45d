"""Hi-Merging's decisions: how far to prune and scale each specialist, and what to do where layers fight.

First a grid over (p, s) for each specialist on its own task, then one pass over the layers by descending Γ. Every
decision is a `Trial` that can be shown, and the result is an ordinary `Recipe`. What a recipe is worth is asked of a
`Scorer`; nothing here measures anything.
Source: Fu et al., "Training-free LLM Merging for Multi-task Learning", ACL 2025, arXiv:2506.12379. Where the paper's
text leaves something open, a switch says so, and its default is our reading.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace

from llm_merge.contribution_report import PARTIAL, SEVERE, ContributionReport, Stat, kind_of_signs, mean_stat
from llm_merge.contributions import Scorer, Setup, cells_of, measure_cells
from llm_merge.errors import RecipeError
from llm_merge.recipe import Recipe

STEPS = tuple(round(0.1 * step, 1) for step in range(10, 0, -1))
"""The grid's values of p and of s, the least change first."""
COARSE = (1.0, 0.7, 0.4, 0.1)
HALF = 0.5
"""A partial conflict keeps this part of the model-wise p and s [the paper: half; from the raw delta: our reading]."""


@dataclass(frozen=True)
class Switches:
    """What the published description leaves open, and what is ours. The defaults are the method as we read it.

    partial_target  which side of a partial conflict is reduced: "enhanced" (γ < 0, it gains at the other's cost) or
                    "weakened" (γ > 0) [open]
    severe_by       the contribution that decides which model keeps a layer: "before" merging (c of θ_m) or "after" it
                    (c of θ_G) [open]
    recompute       measure the after-merge side of the remaining layers again after every edit [open: measured once]
    max_layers      edit at most so many layers; None: all
    accept          "always", or "if_better": undo an edit after which the mean metric over the tasks is lower [ours]
    min_gamma_se    act only where γ is more than so many standard errors from 0; 0 is the published method [ours]
    grid            "full" 10 × 10, "coarse" 4 × 4 and then around the best, or "none": p = s = 1
    """

    partial_target: str = "enhanced"
    severe_by: str = "before"
    recompute: bool = False
    max_layers: int | None = None
    accept: str = "always"
    min_gamma_se: float = 0.0
    grid: str = "full"

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                message = f"{name} `{getattr(self, name)}` is not known: use {' or '.join(known)}."
                raise RecipeError(message, field=name)
        if self.max_layers is not None and (self.max_layers < 0 or not isinstance(self.max_layers, int)):
            raise RecipeError(f"max_layers is {self.max_layers}: give a number of layers, or none.", field="max_layers")
        if not (math.isfinite(self.min_gamma_se) and self.min_gamma_se >= 0):
            raise RecipeError(
                f"min_gamma_se is {self.min_gamma_se:g}: give a number of standard errors, 0 for none.",
                field="min_gamma_se",
            )


CHOICES: Mapping[str, tuple[str, ...]] = {
    "partial_target": ("enhanced", "weakened"),
    "severe_by": ("before", "after"),
    "accept": ("always", "if_better"),
    "grid": ("full", "coarse", "none"),
}


@dataclass(frozen=True)
class GridCell:
    """What one specialist is worth on its own task with the share p of its delta kept and scaled by s."""

    task: str
    p: float
    s: float
    score: Stat


@dataclass(frozen=True)
class Edit:
    """A model's weight and density in one layer from now on; `density` None leaves it."""

    model: int
    weight: float
    density: float | None = None


@dataclass(frozen=True)
class Trial:
    """One layer's turn, in order.

    total, gammas   Γ and γ per task as they were when it was decided
    kind            severe | partial | mutual | none; `uncertain`: it rests on noise
    action          what was done, in words
    before, after   the mean metric per task, on the analysis rows, before and after the edit
    accepted        False: the edit was undone
    recipe          the merge after this step
    """

    step: int
    layer: str
    title: str
    total: Stat
    gammas: tuple[Stat, ...]
    kind: str
    uncertain: bool
    action: str
    edits: tuple[Edit, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    accepted: bool
    recipe: Recipe

    @property
    def changed(self) -> bool:
        return bool(self.edits) and self.accepted


def search_pruning(
    setup: Setup, index: int, scorer: Scorer, grid: str = "full"
) -> Generator[GridCell, None, tuple[float, float]]:
    """Every cell as it is scored; the best (p, s) of one specialist on its own task as the generator's result.

    Equal scores go to the larger p, then the larger s: the least change.
    """
    task = setup.tasks[index]
    found: dict[tuple[float, float], Stat] = {}

    def score(cells: Sequence[tuple[float, float]]) -> Generator[GridCell, None, None]:
        for p, s in cells:
            if (p, s) in found:
                continue
            pruning = [(p, s) if i == index else pair for i, pair in enumerate(setup.pruning)]
            found[p, s] = mean_stat(scorer.whole(setup.with_pruning(pruning).specialist(index), task))
            yield GridCell(task, p, s, found[p, s])

    if grid == "none":
        return 1.0, 1.0
    if grid == "full":
        yield from score([(p, s) for p in STEPS for s in STEPS])
    else:
        yield from score([(p, s) for p in COARSE for s in COARSE])
        best = None
        while best != (best := _best(found)):  # until the neighbours of the best cell are known and none is better
            yield from score(_around(best))
    return _best(found)


def resolve(
    report: ContributionReport, scorer: Scorer, switches: Switches | None = None
) -> Generator[Trial, None, Recipe]:
    """One pass over the layers by descending Γ: every step as a `Trial`, the merge reached as the generator's result.

    Closing the generator keeps what was yielded: the last trial's recipe is the merge reached so far.
    """
    switches = switches or Switches()
    setup, recipe = report.setup, report.setup.merged()
    scores = tuple(_mean(scorer.whole(recipe, task)) for task in setup.tasks)
    waiting, step, edited = list(report.ranking()), 0, 0
    while waiting:
        key = waiting.pop(0)
        step += 1
        edits, action = decide(report, key, switches)
        if edits and switches.max_layers is not None and edited >= switches.max_layers:
            edits, action = (), f"left: {edited} layers are edited already"
        after, accepted, reached = scores, True, recipe
        if edits:
            reached = _edited(recipe, edits, setup.layer(key).filters)
            after = tuple(_mean(scorer.whole(reached, task)) for task in setup.tasks)
            accepted = switches.accept == "always" or math.fsum(after) >= math.fsum(scores)
            edited += accepted
        recipe = reached if accepted else recipe
        yield _trial(report, key, step, edits, action, scores, after, accepted, recipe)
        if edits and accepted:
            scores = after
            if switches.recompute and waiting:
                report = _measured_again(report, recipe, waiting, scorer)
                order = report.ranking()
                waiting.sort(key=order.index)
    return recipe


def decide(report: ContributionReport, key: str, switches: Switches) -> tuple[tuple[Edit, ...], str]:
    """What to do in one layer, and in words. A γ within `min_gamma_se` standard errors counts as 0."""
    setup = report.setup
    gammas = [_known(report.gamma(task, key)) for task in setup.tasks]
    acting = [gamma.value if gamma.beyond(switches.min_gamma_se) else 0.0 for gamma in gammas]
    kind = kind_of_signs(acting)
    if kind == SEVERE:
        side = "before" if switches.severe_by == "before" else "after"
        fighting = [index for index, gamma in enumerate(acting) if gamma > 0]
        worth = {i: _known(report.contribution(setup.tasks[i], side, key)).value for i in fighting}  # type: ignore[arg-type]
        kept = max(fighting, key=lambda index: worth[index])
        dropped = [index for index in fighting if index != kept]
        words = f"keep the layer of {setup.tasks[kept]}, drop that of {_names(setup, dropped)}"
        return tuple(Edit(index, 0.0) for index in dropped), words
    if kind == PARTIAL:
        wanted = -1 if switches.partial_target == "enhanced" else 1
        reduced = [index for index, gamma in enumerate(acting) if gamma * wanted > 0]
        edits = tuple(Edit(i, setup.share(i, HALF), HALF * setup.pruning[i][0]) for i in reduced)
        halves = ", ".join(f"p {HALF * setup.pruning[i][0]:.2g}, s {HALF * setup.pruning[i][1]:.2g}" for i in reduced)
        return edits, f"reduce the layer of {_names(setup, reduced)} ({halves})"
    if any(gamma.value for gamma in gammas) and not any(acting):
        return (), "nothing: every γ is within the noise"
    return (), "nothing: the models agree here" if not any(value > 0 for value in acting) else "nothing: one γ is 0"


def _edited(recipe: Recipe, edits: Sequence[Edit], filters: Sequence[str]) -> Recipe:
    for edit in edits:
        recipe = recipe.with_value(edit.model, "weight", filters, edit.weight)
        if edit.density is not None:
            recipe = recipe.with_value(edit.model, "density", filters, edit.density)
    return recipe


def _measured_again(
    report: ContributionReport, recipe: Recipe, layers: Sequence[str], scorer: Scorer
) -> ContributionReport:
    """The report with the after-merge side of these layers measured on the merge as it stands."""
    setup = replace(report.setup, edited=recipe)
    whole = {**report.whole, **{(task, "after"): scorer.whole(recipe, task) for task in setup.tasks}}
    fresh = dict(measure_cells(setup, cells_of(setup, layers, ("after",)), scorer))
    kept = {cell: values for cell, values in report.cells.items() if cell.side == "before" or cell.layer not in layers}
    return replace(report, setup=setup, whole=whole, cells={**kept, **fresh})


def _trial(
    report: ContributionReport,
    key: str,
    step: int,
    edits: tuple[Edit, ...],
    action: str,
    before: tuple[float, ...],
    after: tuple[float, ...],
    accepted: bool,
    recipe: Recipe,
) -> Trial:
    conflict = report.conflict(key)
    return Trial(
        step=step,
        layer=key,
        title=report.setup.layer(key).title,
        total=_known(report.total(key)),
        gammas=tuple(_known(report.gamma(task, key)) for task in report.setup.tasks),
        kind=conflict.kind,
        uncertain=conflict.uncertain,
        action=action if accepted else f"{action}: undone, the mean over the tasks fell",
        edits=edits,
        before=before,
        after=after,
        accepted=accepted,
        recipe=recipe,
    )


def _best(found: Mapping[tuple[float, float], Stat]) -> tuple[float, float]:
    return max(found, key=lambda cell: (found[cell].value, *cell))


def _around(cell: tuple[float, float]) -> list[tuple[float, float]]:
    steps = [[value for value in STEPS if abs(value - centre) < 0.15] for centre in cell]
    return [(p, s) for p in steps[0] for s in steps[1]]


def _known(stat: Stat | None) -> Stat:
    if stat is None:
        raise RecipeError("The layer was not analysed: measure its contributions first.", field="layers")
    return stat


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _names(setup: Setup, indices: Sequence[int]) -> str:
    return " and ".join(setup.tasks[index] for index in indices)
