"""What an analysis is said to cost: more for more to do, told without loading anything."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llm_merge.analysis_cost import AnalysisCost, analysis_cost
from llm_merge.checkpoint import Checkpoint, open_checkpoint
from llm_merge.tasks import Task
from tests.tiny_models import TinyFamily, make_tiny_llama

PARTS = ("estimate", "exact", "full_grid", "coarse_grid", "layer_pass")


def tasks(models: int = 2, rows: int = 8, words: int = 10) -> list[Task]:
    own = tuple({"input": "word " * words, "output": f"answer {n}"} for n in range(rows))
    return [Task(f"task {m}", f"model {m}", own, own) for m in range(models)]


@pytest.fixture
def base(tiny_llama: TinyFamily) -> Checkpoint:
    return open_checkpoint(tiny_llama.references[0])


def grows(less: AnalysisCost, more: AnalysisCost) -> bool:
    return all(getattr(more, part) > getattr(less, part) > 0 for part in PARTS)


def test_it_grows_with_rows_models_and_the_length_of_the_rows(base: Checkpoint) -> None:
    cost = analysis_cost(base, tasks())
    assert grows(cost, analysis_cost(base, tasks(rows=16)))
    assert grows(cost, analysis_cost(base, tasks(models=3)))
    assert grows(cost, analysis_cost(base, tasks(words=40)))


def test_it_grows_with_the_layers(base: Checkpoint, tmp_path: Path) -> None:
    deep = open_checkpoint(str(make_tiny_llama(tmp_path / "deep", 0, layers=6)))
    less, more = analysis_cost(base, tasks()), analysis_cost(deep, tasks())
    assert (less.layers, more.layers) == (2, 6)
    assert grows(less, more)
    some = analysis_cost(deep, tasks(), layers=2)
    assert some.exact < more.exact
    assert (some.evaluations, more.evaluations) == (2 * 4 * 2, 2 * 4 * 6)


def test_an_estimate_is_quicker_than_measuring_and_a_coarse_search_than_a_full_one(base: Checkpoint) -> None:
    cost = analysis_cost(base, tasks(rows=32))
    assert cost.coarse_grid < cost.full_grid
    assert cost.hi_merge("none") < cost.hi_merge("coarse") < cost.hi_merge("full")
    assert cost.hi_merge("none") == pytest.approx(cost.exact + cost.layer_pass)


def test_held_out_rows_and_general_sets_cost_in_the_pass_only(base: Checkpoint) -> None:
    general = Task("general", "", (), tasks()[0].held_out)
    plain, beside = analysis_cost(base, tasks()), analysis_cost(base, [*tasks(), general], held_out=8)
    assert beside.layer_pass > plain.layer_pass
    assert (beside.exact, beside.estimate) == (plain.exact, plain.estimate)


def test_a_gpu_is_faster(base: Checkpoint) -> None:
    assert grows(analysis_cost(base, tasks(), gpu=True), analysis_cost(base, tasks()))


def test_nothing_is_loaded_for_it(base: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(Checkpoint, "read", refuse)
    analysis_cost(base, tasks())
    assert "llm_merge.analysis" in sys.modules or "llm_merge.analysis" not in analysis_cost.__globals__
