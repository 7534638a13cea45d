"""Merges side by side on held-out rows: each merge's own numbers, paired differences, and what is missing in words."""

from __future__ import annotations

import math

import pytest

from llm_merge.cell_store import CellStore
from llm_merge.errors import ExampleError, MergeError
from llm_merge.evaluation import resolve_format
from llm_merge.held_out import HeldOutTable, score_held_out
from llm_merge.metrics import row_values
from llm_merge.recipe import Recipe
from llm_merge.tasks import Task
from llm_merge.workbench import bench_for
from tests.tiny_models import TinyFamily

WORDS = ("the lord said", "unto the king", "and he went", "to the city")
ROWS = tuple({"input": word, "output": f"{word} again", "task": "law"} for word in WORDS)


def table_of(family: TinyFamily, metric: str, store: CellStore | None = None) -> HeldOutTable:
    recipes = {
        "base": Recipe.single(family.references[0]),
        "average": Recipe.linear(family.references[1:], [0.5, 0.5]),
    }
    tasks = [Task("law", family.references[1], (), ROWS), Task("none", "", (), ())]
    events = score_held_out(recipes, tasks, metric, device="cpu", store=store)
    while True:
        try:
            next(events)
        except StopIteration as end:
            table: HeldOutTable = end.value
            return table


@pytest.mark.parametrize("metric", ["-loss", "chrf"])
def test_scores_are_those_of_the_merge_alone(tiny_llama: TinyFamily, metric: str) -> None:
    table = table_of(tiny_llama, metric)
    assert table.sets == ("law",), "a task without held-out rows has no column"
    bench = bench_for(Recipe.linear(tiny_llama.references[1:], [0.5, 0.5]), "decoder", "cpu")
    alone = row_values(bench, ROWS, metric, fmt=resolve_format(bench.plan.checkpoints if bench.plan else ()))
    assert table.values["average", "law"] == pytest.approx(alone, abs=1e-6)


def test_differences_are_paired(tiny_llama: TinyFamily) -> None:
    table = table_of(tiny_llama, "-loss")
    stat = table.against("average", "base", "law")
    pairs = list(zip(table.values["average", "law"], table.values["base", "law"], strict=True))
    mean = sum(a - b for a, b in pairs) / len(pairs)
    spread = math.sqrt(sum((a - b - mean) ** 2 for a, b in pairs) / (len(pairs) - 1) / len(pairs))
    assert stat is not None
    assert (stat.value, stat.error) == pytest.approx((mean, spread))


def test_nothing_is_measured_twice(tiny_llama: TinyFamily) -> None:
    store = CellStore(None)
    first = table_of(tiny_llama, "-loss", store)
    known = dict(store._values)
    assert table_of(tiny_llama, "-loss", store) == first
    assert store._values == known


def test_what_cannot_be_scored_is_said(tiny_llama: TinyFamily) -> None:
    recipes = {"base": Recipe.single(tiny_llama.references[0])}
    with pytest.raises(ExampleError, match="No task has held-out rows"):
        next(score_held_out(recipes, [Task("law", "", ROWS, ())], "-loss"))
    with pytest.raises(MergeError, match="did you mean"):
        next(score_held_out(recipes, [Task("law", "", (), ROWS)], "rouge"))
