"""Hi-Merging's decisions on scorers in closed form: the grid, the types and edits, and every switch."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from llm_merge.contribution_report import ContributionReport
from llm_merge.contributions import Cell, Setup, cells_of, measure_cells, whole_models
from llm_merge.errors import RecipeError
from llm_merge.hi_merging import STEPS, Edit, GridCell, Switches, Trial, decide, resolve, search_pruning
from llm_merge.recipe import Recipe
from tests.closed_form import ClosedForm, Shares, linear, quadratic, setup_of


def result(generator: Generator[Any, None, Any]) -> tuple[list[Any], Any]:
    found = []
    while True:
        try:
            found.append(next(generator))
        except StopIteration as end:
            return found, end.value


def report_of(setup: Setup, gammas: Sequence[Sequence[float]], c: Sequence[Sequence[float]] = ()) -> ContributionReport:
    """γ[layer][task], all from the α before merging, certain to a hundredth; `c` adds to c before and after alike."""
    whole = {(task, which): (0.0, 0.0) for task in setup.tasks for which in ("base", "before", "after")}
    cells = dict.fromkeys(cells_of(setup, [layer.key for layer in setup.layers]), (0.0, 0.0))
    for layer, row in zip(setup.layers, gammas, strict=True):
        for number, (task, gamma) in enumerate(zip(setup.tasks, row, strict=True)):
            more = c[int(layer.key)][number] if c else 0.0
            cells[Cell(task, "before", "delete", layer.key)] = (-gamma - more - 0.01, -gamma - more + 0.01)
            cells[Cell(task, "after", "delete", layer.key)] = (-more, -more)
    return ContributionReport(setup, whole=whole, cells=cells)


def analysed(scorer: ClosedForm) -> ContributionReport:
    setup = scorer.setup
    whole = {(task, which): values for task, which, values in whole_models(setup, scorer)}
    keys = [layer.key for layer in setup.layers]
    return ContributionReport(setup, whole=whole, cells=dict(measure_cells(setup, cells_of(setup, keys), scorer)))


# ── the grid ────────────────────────────────────────────────────────────────────────────────────────────────────────


def grid_scorer(score: Any, setup: Setup | None = None) -> ClosedForm:
    """Worth `score(p, s)` of the specialist "a"."""
    return ClosedForm(setup or setup_of(), lambda shares, task: [score(shares["a", "0"][1], shares["a", "0"][0])] * 2)


def test_the_full_grid_is_ten_by_ten_and_finds_the_best_cell() -> None:
    scorer = grid_scorer(lambda p, s: -((p - 0.3) ** 2) - (s - 0.6) ** 2)
    cells, best = result(search_pruning(scorer.setup, 0, scorer))
    assert best == (0.3, 0.6)
    assert {(cell.p, cell.s) for cell in cells} == {(p, s) for p in STEPS for s in STEPS}
    assert len(cells) == 100
    assert STEPS[0] == 1.0
    assert STEPS[-1] == 0.1
    assert {cell.task for cell in cells} == {"task a"}


@pytest.mark.parametrize("grid", ["full", "coarse"])
def test_ties_go_to_the_least_change(grid: str) -> None:
    _, best = result(search_pruning(setup_of(), 0, grid_scorer(lambda p, s: 1.0), grid))
    assert best == (1.0, 1.0)
    scorer = grid_scorer(lambda p, s: 1.0 if s == 0.4 or (p, s) == (0.4, 1.0) else 0.0)
    _, best = result(search_pruning(setup_of(), 0, scorer, grid))
    assert best == (1.0, 0.4), "the larger p first, then the larger s"


def test_the_coarse_grid_finds_the_best_of_a_smooth_hill_with_fewer_cells() -> None:
    for p, s in ((0.3, 0.6), (1.0, 0.5), (0.1, 0.1), (0.9, 0.9)):
        scorer = grid_scorer(lambda a, b, p=p, s=s: -((a - p) ** 2) - (b - s) ** 2)
        cells, best = result(search_pruning(setup_of(), 0, scorer, "coarse"))
        assert best == (p, s)
        assert len(cells) == len({(cell.p, cell.s) for cell in cells}) < 50


def test_without_a_grid_nothing_is_pruned_and_nothing_asked() -> None:
    scorer = grid_scorer(lambda p, s: 1.0)
    assert result(search_pruning(setup_of(), 0, scorer, "none")) == ([], (1.0, 1.0))
    assert scorer.asked == []


def test_a_specialist_is_searched_on_its_own_task_alone() -> None:
    setup = setup_of()
    scorer = ClosedForm(setup, lambda shares, task: [shares["b", "0"][0], 0.0])
    cells, _ = result(search_pruning(setup, 1, scorer, "coarse"))
    assert {task for _, _, _, task in scorer.asked} == {"task b"}
    assert all(recipe.value(0, "weight", "layers.0.") == 0 for _, recipe, _, _ in scorer.asked)
    assert isinstance(cells[0], GridCell)


# ── one layer ───────────────────────────────────────────────────────────────────────────────────────────────────────

PRUNED = ((0.8, 0.6), (0.4, 1.0))


def decision(
    gammas: Sequence[float], switches: Switches | None = None, c: Sequence[float] = (), models: int = 0, **more: object
) -> tuple[Edit, ...]:
    setup = setup_of(len(gammas), 1, **more)
    return decide(report_of(setup, [gammas], [c] if c else ()), "0", switches or Switches())[0]


def test_a_severe_conflict_keeps_the_larger_contribution() -> None:
    assert decision((1.0, 2.0)) == (Edit(0, 0.0),)
    assert decision((2.0, 1.0)) == (Edit(1, 0.0),)
    assert decision((2.0, 1.0), c=(0.0, 5.0)) == (Edit(0, 0.0),), "the larger c, not the larger γ"
    assert decision((2.0, 1.0), Switches(severe_by="after"), c=(0.0, 0.5)) == (Edit(0, 0.0),)
    assert decision((2.0, 1.0), Switches(severe_by="before"), c=(0.0, 0.5)) == (Edit(1, 0.0),)


def test_a_partial_conflict_halves_the_one_that_gains() -> None:
    assert decision((1.0, -2.0), pruning=PRUNED) == (Edit(1, 0.5 * 1.0 / 2, 0.5 * 0.4),)
    assert decision((-2.0, 1.0), pruning=PRUNED) == (Edit(0, 0.5 * 0.6 / 2, 0.5 * 0.8),)
    assert decision((-2.0, 1.0), pruning=PRUNED, combine="sum") == (Edit(0, 0.5 * 0.6, 0.5 * 0.8),)
    assert decision((-2.0, 1.0), pruning=PRUNED, combine="ties_sum") == (Edit(0, 0.5 * 0.6, 0.5 * 0.8),)
    weakened = Switches(partial_target="weakened")
    assert decision((1.0, -2.0), weakened, pruning=PRUNED) == (Edit(0, 0.5 * 0.6 / 2, 0.5 * 0.8),)


@pytest.mark.parametrize("gammas", [(-1.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_where_models_agree_or_a_gamma_is_exactly_zero_nothing_is_done(gammas: tuple[float, float]) -> None:
    assert decision(gammas) == ()


def test_three_models() -> None:
    assert decision((1.0, 3.0, 2.0)) == (Edit(0, 0.0), Edit(2, 0.0))
    assert decision((1.0, 3.0, -2.0)) == (Edit(0, 0.0),), "the one with γ < 0 is left alone"
    assert decision((1.0, 0.0, 3.0)) == (Edit(0, 0.0),)
    assert decision((-1.0, 3.0, -2.0)) == (Edit(0, 0.5 / 3, 0.5), Edit(2, 0.5 / 3, 0.5))
    assert decision((-1.0, 3.0, 0.0)) == (Edit(0, 0.5 / 3, 0.5),)
    assert decision((0.0, 3.0, 0.0)) == ()
    assert decision((-1.0, -3.0, -2.0)) == ()


def test_what_is_within_noise_can_be_left_alone() -> None:
    """Errors are 0.01: a γ of 0.02 is two of them."""
    assert decision((0.02, 1.0)) == (Edit(0, 0.0),)
    assert decision((0.02, 1.0), Switches(min_gamma_se=1)) == (Edit(0, 0.0),)
    assert decision((0.02, 1.0), Switches(min_gamma_se=3)) == ()
    assert decision((0.02, 0.02), Switches(min_gamma_se=3)) == ()
    assert decision((-0.02, 1.0), Switches(min_gamma_se=3)) == ()


def test_a_layer_that_was_not_measured_cannot_be_decided() -> None:
    with pytest.raises(RecipeError, match="The layer was not analysed"):
        decide(ContributionReport(setup_of()), "0", Switches())


# ── the pass over the layers ────────────────────────────────────────────────────────────────────────────────────────

GAMMAS = [(1.0, 1.0), (3.0, -1.0), (-1.0, -1.0), (4.0, 4.5)]


def passed(
    switches: Switches | None = None, worth: Any = None, setup: Setup | None = None
) -> tuple[list[Trial], Recipe, ClosedForm]:
    setup = setup or setup_of(depth=4)
    scorer = ClosedForm(setup, worth or (lambda shares, task: [0.0, 0.0]))
    trials, recipe = result(resolve(report_of(setup, GAMMAS), scorer, switches))
    return trials, recipe, scorer


def test_layers_come_by_descending_total_and_every_step_is_told() -> None:
    trials, recipe, _ = passed()
    assert [trial.layer for trial in trials] == ["3", "0", "1", "2"]
    assert [trial.step for trial in trials] == [1, 2, 3, 4]
    assert [trial.kind for trial in trials] == ["severe", "severe", "partial", "mutual"]
    assert [trial.changed for trial in trials] == [True, True, True, False]
    assert trials[-1].recipe == recipe
    assert trials[0].action == "keep the layer of task b, drop that of task a"
    assert trials[2].action == "reduce the layer of task b (p 0.5, s 0.5)"
    assert trials[0].total.value == pytest.approx(8.5)
    shares = {layer: [recipe.value(i, "weight", f"layers.{layer}.") for i in (0, 1)] for layer in range(4)}
    assert shares == {0: [0.5, 0.0], 1: [0.5, 0.25], 2: [0.5, 0.5], 3: [0.0, 0.5]}
    assert [recipe.value(1, "density", f"layers.{layer}.") for layer in range(4)] == [1.0, 0.5, 1.0, 1.0]


def test_before_and_after_are_what_the_scorer_says() -> None:
    worth = linear({("task a", "a", "3"): 1.0, ("task b", "a", "3"): -2.0}, rows=1)
    trials, _, _ = passed(worth=worth)
    assert trials[0].before == (-1 + 0.5, -1 - 1.0)
    assert trials[0].after == (-1.0, -1.0)
    assert trials[1].before == trials[0].after


def test_an_edit_that_makes_the_mean_worse_is_undone_if_asked() -> None:
    worth = linear({("task a", "a", "3"): 1.0}, rows=1)
    always, kept, _ = passed(worth=worth)
    assert always[0].accepted
    trials, recipe, _ = passed(Switches(accept="if_better"), worth)
    assert (trials[0].accepted, trials[0].changed) == (False, False)
    assert "undone" in trials[0].action
    assert trials[1].before == trials[0].before
    assert recipe.value(0, "weight", "layers.3.") == 0.5
    assert kept.value(0, "weight", "layers.3.") == 0.0
    assert all(trial.accepted for trial in trials[1:]), "what makes no difference does no harm"


@pytest.mark.parametrize("count", [0, 1, 2, None])
def test_no_more_layers_are_edited_than_asked(count: int | None) -> None:
    trials, recipe, _ = passed(Switches(max_layers=count))
    assert sum(trial.changed for trial in trials) == (3 if count is None else count)
    assert len(trials) == 4
    if count == 0:
        assert recipe == setup_of(depth=4).merged()


def test_no_edit_is_exactly_the_combine_rule() -> None:
    setup = setup_of(depth=2)
    for combine in ("average", "sum", "ties_sum"):
        own = replace(setup, combine=combine)
        _, recipe = result(resolve(report_of(own, [(-1.0, -1.0), (0.0, 0.0)]), ClosedForm(own, lambda s, t: [0.0])))
        assert recipe == own.merged()


def test_one_model_stays_as_it_is() -> None:
    setup = setup_of(1, pruning=((0.5, 0.8),))
    scorer = ClosedForm(setup, quadratic({("task a", "0"): 3.0}))
    trials, recipe = result(resolve(analysed(scorer), scorer))
    assert recipe == setup.specialist(0)
    assert not any(trial.edits for trial in trials)


def test_permuting_the_models_leaves_the_merge_as_it_is() -> None:
    best = {(f"task {task}", str(layer)): 0.3 * layer - 0.2 * number for number, task in enumerate("abc")
            for layer in range(3)}  # fmt: skip
    pruning = {"a": (1.0, 0.7), "b": (0.5, 1.0), "c": (0.3, 0.4)}
    plain, outcomes = [], []
    for order in ("abc", "cab", "bca"):
        setup = Setup("base", tuple(order), tuple(f"task {name}" for name in order), setup_of().layers,
                      tuple(pruning[name] for name in order))  # fmt: skip
        scorer = ClosedForm(setup, quadratic(best))
        _, recipe = result(resolve(analysed(scorer), scorer))
        outcomes.append({place: pytest.approx(pair) for place, pair in scorer.shares(recipe).items()})
        plain.append(scorer.shares(recipe))
    assert plain[0] == outcomes[1]
    assert plain[0] == outcomes[2]
    assert plain[0] != scorer.shares(scorer.setup.merged()), "something was decided"


def test_measuring_again_uses_the_merge_as_it_stands() -> None:
    """Worth only what both layers give together: once the first layer is settled, the second one's γ is another."""

    def worth(shares: Shares, task: str) -> Sequence[float]:
        return [-((sum(weight for weight, _ in shares.values()) - 1) ** 2)] * 2

    setup = setup_of(depth=2, combine="sum")
    scorer = ClosedForm(setup, worth)
    report = analysed(scorer)
    once, _ = result(resolve(report, scorer, Switches()))
    scorer.asked.clear()
    again, _ = result(resolve(report, scorer, Switches(recompute=True)))
    assert once[0] == again[0]
    assert again[0].changed
    measured = [(anchor, layer) for anchor, _, layer, _ in scorer.asked if layer is not None]
    assert {layer for _, layer in measured} == {again[1].layer}
    assert again[0].recipe in {anchor for anchor, _ in measured}, "deleted from the merge as it stands"
    assert [gamma.value for gamma in once[1].gammas] == [8, 8]
    assert [gamma.value for gamma in again[1].gammas] == [4, 4], "with the other layer settled"


def test_without_measuring_again_no_layer_is_measured() -> None:
    _, _, scorer = passed()
    assert all(layer is None for _, _, layer, _ in scorer.asked)


def test_closing_keeps_what_was_reached() -> None:
    setup = setup_of(depth=4)
    steps = resolve(report_of(setup, GAMMAS), ClosedForm(setup, lambda shares, task: [0.0]))
    first = next(steps)
    steps.close()
    assert first.recipe.value(0, "weight", "layers.3.") == 0.0


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"partial_target": "both"}, "partial_target"), ({"severe_by": "size"}, "severe_by"),
        ({"accept": "never"}, "accept"), ({"grid": "fine"}, "grid"), ({"max_layers": -1}, "max_layers"),
        ({"min_gamma_se": -1.0}, "min_gamma_se"), ({"min_gamma_se": float("nan")}, "min_gamma_se"),
    ],
)  # fmt: skip
def test_switches_that_cannot_be(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Switches(**settings)
    assert caught.value.field == field


@pytest.mark.parametrize("name", ["base", "average", "step 3"])
def test_a_task_cannot_be_called_what_results_call_something_else(name: str) -> None:
    with pytest.raises(RecipeError, match="rename it"):
        Setup("base", ("a",), (name,), ())
