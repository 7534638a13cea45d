"""The table of the recipe in use beside its parents: names, paired last line, costs, and what is missing."""

from __future__ import annotations

import pytest

from components.session import Session
from components.settings import Settings
from components.views import layer_scores as view
from llm_merge.errors import MergeError
from llm_merge.held_out import HeldOutTable
from llm_merge.recipe import Recipe

ROWS = tuple({"input": f"q{i}", "output": "a", "task": task} for i in range(24) for task in ("law", "poems"))
CHOSEN = Session().with_models("decoder", "base", ("one", "two")).with_rows(ROWS, "Your text", ())
VALUES = {
    ("Base", "law"): (1.0, 2.0, 4.0),
    (view.AVERAGE, "law"): (1.0, 1.0, 1.0),
    (view.IN_USE, "law"): (3.0, 3.1, 2.9),
}
TABLE = HeldOutTable("-loss", "nats", ("Base", view.AVERAGE, view.IN_USE), ("law",), VALUES)


def test_the_recipe_in_use_stands_beside_its_parents_and_their_average() -> None:
    layered = Recipe.linear(["one", "two"], [0.3, 0.7])
    recipes = view.recipes_of(CHOSEN.with_layered(layered, "Hi-Merging"))
    assert list(recipes) == ["Base", "one", "two", view.AVERAGE, view.IN_USE]
    assert recipes[view.AVERAGE].weights == (0.5, 0.5)
    assert recipes[view.IN_USE] == layered


def test_without_models_there_is_nothing_to_score() -> None:
    with pytest.raises(MergeError, match="no recipe to score"):
        view.recipes_of(Session())


def test_the_last_line_is_paired_with_the_plain_average() -> None:
    html = view.table_html(TABLE)
    last = html[html.index("in use − plain average") :]
    assert "+2.000 ± 0.058" in last
    assert "3 of law" in html
    assert "nats" in html


def test_a_difference_within_two_errors_is_called_noise() -> None:
    values = VALUES | {(view.IN_USE, "law"): (0.0, 1.0, 2.1)}
    assert "(noise)" in view.table_html(HeldOutTable("-loss", "nats", TABLE.names, TABLE.sets, values))


def test_what_is_not_measured_yet_is_a_dot() -> None:
    html = view.table_html(HeldOutTable("-loss", "nats", TABLE.names, ("law", "<img src=x>"), VALUES))
    assert "<td>·</td>" in html
    assert "<img" not in html


def test_only_generated_metrics_have_a_price() -> None:
    assert view.seconds(CHOSEN, Settings(), "-loss", 32) is None
    price = view.seconds(CHOSEN, Settings(), "rouge_l", 32)
    assert price is not None
    assert price > 0


def test_the_metrics_are_those_of_the_model_type() -> None:
    assert ("ROUGE-L", "rouge_l") in view.metric_choices(CHOSEN)
    encoder = Session().with_models("encoder", "base", ("one",))
    assert [name for _, name in view.metric_choices(encoder)] == ["-loss", "r@1", "mrr", "ndcg@10"]
