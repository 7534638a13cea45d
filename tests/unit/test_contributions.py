"""Contribution analysis in closed form: which recipes are compared, and what comes of it by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest

from llm_merge.contribution_report import ContributionReport
from llm_merge.contributions import (
    Cell,
    Setup,
    cells_of,
    measure_cells,
    only_layer,
    whole_models,
    without_layer,
)
from llm_merge.errors import RecipeError
from llm_merge.recipe import ModelEntry, Recipe, Rule
from tests.closed_form import ClosedForm, layers, linear, quadratic, setup_of


def analysed(scorer: ClosedForm, setup: Setup | None = None) -> ContributionReport:
    setup = setup or scorer.setup
    whole = {(task, which): values for task, which, values in whole_models(setup, scorer)}
    keys = [layer.key for layer in setup.layers]
    return ContributionReport(setup, whole=whole, cells=dict(measure_cells(setup, cells_of(setup, keys), scorer)))


def value(report: ContributionReport, name: str, *where: str) -> float:
    stat = getattr(report, name)(*where)
    assert stat is not None
    return float(stat.value)


def test_a_quadratic_by_hand() -> None:
    """One layer, two models, weight 1 and 1/2: −(w − t)² with the optimum t = 1 of "task a" and 0.25 of "task b"."""
    setup = setup_of(depth=1)
    report = analysed(ClosedForm(setup, quadratic({("task a", "0"): 1.0, ("task b", "0"): 0.25})))
    # before: θ_F + δ has the sum 1; after: 1/2 + 1/2, also 1. Without the layer: 0.
    for task, gain in (("task a", 1.0), ("task b", -(0.75**2) + 0.25**2)):
        for side in ("before", "after"):
            assert value(report, "alpha", task, side, "0") == pytest.approx(gain)
            assert value(report, "beta", task, side, "0") == pytest.approx(gain)
            assert value(report, "contribution", task, side, "0") == pytest.approx(2 * gain)
        assert value(report, "gamma", task, "0") == 0
    summed = analysed(ClosedForm(setup, quadratic({("task a", "0"): 1.0, ("task b", "0"): 0.25})),
                      setup_of(depth=1, combine="sum"))  # fmt: skip
    # after: 1 + 1 = 2, so −(2 − t)² instead of −t² without it
    assert value(summed, "alpha", "task a", "after", "0") == pytest.approx(-1 + 1)
    assert value(summed, "gamma", "task a", "0") == pytest.approx(2 * 1.0 - 2 * 0.0)
    assert value(summed, "gamma", "task b", "0") == pytest.approx(2 * (-(0.75**2) + 0.0625) - 2 * (-(1.75**2) + 0.0625))
    assert value(summed, "total", "0") == pytest.approx(
        value(summed, "gamma", "task a", "0") + value(summed, "gamma", "task b", "0")
    )


def test_deleting_and_adding_differ_where_layers_work_together() -> None:
    """Worth w₀·w₁: alone a layer brings nothing, and without it everything is lost."""
    setup = setup_of(models=1, depth=2)
    scorer = ClosedForm(setup, lambda shares, task: [shares["a", "0"][0] * shares["a", "1"][0]])
    report = analysed(scorer)
    assert value(report, "alpha", "task a", "before", "0") == 1
    assert value(report, "beta", "task a", "before", "0") == 0
    assert value(report, "contribution", "task a", "before", "0") == 1


def test_pruning_and_scaling_hold_on_both_sides() -> None:
    setup = setup_of(pruning=((0.5, 0.8), (1.0, 0.4)))
    scorer = ClosedForm(setup, linear({("task a", "a", "1"): 1.0, ("task a", "b", "1"): -0.5}, rows=1))
    report = analysed(scorer)
    assert value(report, "alpha", "task a", "before", "1") == pytest.approx(0.8)
    assert value(report, "beta", "task a", "after", "1") == pytest.approx(0.8 / 2 - 0.5 * 0.4 / 2)
    assert value(report, "gamma", "task a", "1") == pytest.approx(2 * 0.8 - 2 * (0.4 - 0.1))
    assert value(report, "gamma", "task a", "0") == 0
    densities = {scorer.shares(variant)["a", "1"] for _, variant, layer, task in scorer.asked if layer == "1"}
    assert all(density == 0.5 for weight, density in densities if weight)


def test_one_specialist_has_no_conflicts_and_the_merge_is_itself() -> None:
    setup = setup_of(models=1)
    report = analysed(ClosedForm(setup, quadratic({("task a", "0"): 0.3, ("task a", "2"): 2.0})))
    assert setup.merged() == setup.specialist(0)
    assert [value(report, "gamma", "task a", layer.key) for layer in setup.layers] == [0, 0, 0]
    assert {report.conflict(layer.key).kind for layer in setup.layers} == {"mutual"}


def test_a_specialist_that_is_the_base_contributes_nothing() -> None:
    scorer = ClosedForm(setup_of(), linear({("task a", "a", "1"): 1.0}))  # nothing depends on b's weights
    report = analysed(scorer)
    for layer in scorer.setup.layers:
        assert value(report, "alpha", "task b", "before", layer.key) == 0
        assert value(report, "beta", "task b", "before", layer.key) == 0


def test_permuting_the_models_permutes_the_tables() -> None:
    slopes = {(f"task {t}", m, str(n)): (ord(t) * 7 + ord(m) * 3 + n * 5) % 11 - 5.0
              for t in "abc" for m in "abc" for n in range(3)}  # fmt: skip
    setup = setup_of(3, pruning=((1.0, 0.5), (0.7, 1.0), (0.3, 0.2)))
    turned = Setup("base", ("c", "a", "b"), ("task c", "task a", "task b"), layers(3),
                   ((0.3, 0.2), (1.0, 0.5), (0.7, 1.0)))  # fmt: skip
    one, other = (analysed(ClosedForm(s, linear(slopes))) for s in (setup, turned))
    for layer in setup.layers:
        assert value(one, "total", layer.key) == pytest.approx(value(other, "total", layer.key))
        for task in setup.tasks:
            assert value(one, "gamma", task, layer.key) == pytest.approx(value(other, "gamma", task, layer.key))
    assert one.ranking() == other.ranking()
    weights = [{e.model: e.weight for e in s.merged().models} for s in (setup, turned)]
    assert weights[0] == weights[1]


def test_the_combine_rules() -> None:
    plain = {combine: setup_of(combine=combine).merged() for combine in ("average", "sum", "ties_sum")}
    assert [recipe.weights for recipe in plain.values()] == [(0.5, 0.5), (1.0, 1.0), (1.0, 1.0)]
    assert [recipe.merge_method for recipe in plain.values()] == ["breadcrumbs", "breadcrumbs", "ties"]
    assert all(recipe.normalize is False and recipe.base_model == "base" for recipe in plain.values())
    assert dict(plain["average"].parameters) == {"gamma": 0.0}
    pruned = setup_of(combine="sum", pruning=((0.3, 0.5), (1.0, 0.2))).merged()
    assert [entry.get("density") for entry in pruned.models] == [0.3, None]
    assert pruned.weights == (0.5, 0.2)


def test_a_layer_taken_out_and_a_layer_alone() -> None:
    recipe = setup_of(pruning=((0.5, 0.8), (1.0, 0.4))).merged()
    out, alone = without_layer(recipe, ["layers.1."]), only_layer(recipe, ["layers.1."])
    assert [out.value(0, "weight", f"layers.{n}.") for n in range(3)] == [0.4, 0.0, 0.4]
    assert [alone.value(1, "weight", f"layers.{n}.") for n in range(3)] == [0.0, 0.2, 0.0]
    assert alone.value(0, "density", "layers.1.") == 0.5
    assert out.models[0].weight == (Rule(0.0, "layers.1."), Rule(0.4))
    assert without_layer(out, ["layers.1."]) == out
    edited = recipe.with_value(0, "weight", ["layers.1."], 0.1).with_value(0, "density", ["layers.1."], 0.25)
    assert only_layer(edited, ["layers.1."]).value(0, "weight", "layers.1.") == 0.1
    assert only_layer(edited, ["layers.2."]).value(0, "weight", "layers.1.") == 0.0


def test_every_cell_is_asked_once_anchor_by_anchor() -> None:
    setup = setup_of(3, 2)
    cells = list(cells_of(setup, ["0", "1"]))
    assert len(cells) == len(set(cells)) == 4 * 3 * 2
    anchors = [setup.anchor(cell) for cell in cells]
    changes = sum(one != two for one, two in pairwise(anchors))
    assert changes == len(setup.models) + 1, "specialists, base, merge: each is needed once, in a row"
    assert set(cells_of(setup, ["0"], ["after"])) == {c for c in cells if c.layer == "0" and c.side == "after"}


def test_the_merge_as_it_stands_takes_the_place_of_the_first_one() -> None:
    edited = Recipe((ModelEntry("a", 0.1), ModelEntry("b", 0.2)), "breadcrumbs", "base", normalize=False)
    setup = setup_of(edited=edited)
    assert setup.merged() is edited
    assert setup.anchor(Cell("task a", "after", "delete", "0")) is edited
    assert setup.anchor(Cell("task a", "before", "delete", "0")) == setup_of().specialist(0)


@pytest.mark.parametrize(
    ("settings", "field", "words"),
    [
        ({"models": ()}, "models", "There is no specialist to analyse"),
        ({"tasks": ("one",)}, "tasks", "2 specialists need as many different tasks, and there are 1"),
        ({"tasks": ("one", "one")}, "tasks", "2 specialists need as many different tasks, and there are 1"),
        ({"combine": "mean"}, "combine", "combine `mean` is not known: use average, sum, ties_sum."),
        ({"pruning": ((1.0, 1.0),)}, "pruning", "There are 2 specialists and 1 pairs of p and s"),
        ({"pruning": ((0.0, 1.0), (1.0, 1.0))}, "pruning", "p = 0, s = 1: the share kept must be above 0"),
        ({"pruning": ((0.5, 0.0), (1.0, 1.0))}, "pruning", "the scale above 0"),
    ],
)
def test_setups_that_cannot_be(settings: dict[str, object], field: str, words: str) -> None:
    given = {"base": "base", "models": ("a", "b"), "tasks": ("one", "two"), "layers": layers(1)} | settings
    with pytest.raises(RecipeError) as caught:
        Setup(**given)  # type: ignore[arg-type]
    assert words in caught.value.message
    assert caught.value.field == field


def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(RecipeError, match=r"There is no layer “7” in these models: the layers are 0 to 2\."):
        setup_of().layer("7")
