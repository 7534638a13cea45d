"""Hi-Merging from models to a recipe, on a tiny trio: what it says is what it did, and held-out rows never decide."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm_merge.analysis import Analysis, open_analysis, tasks_of
from llm_merge.cell_store import CellStore
from llm_merge.contribution_report import mean_stat
from llm_merge.errors import Stopped
from llm_merge.hi_merging import Switches
from llm_merge.hierarchical import HiMergeEvent, HiMergeResult, hi_merge, iter_hi_merge, summary
from llm_merge.merge import run
from llm_merge.output import FolderSink
from llm_merge.plan import make_plan
from llm_merge.recipe import Recipe
from tests.tiny_models import TinyFamily, make_family, make_tiny_llama

ROWS: dict[str, list[dict[str, Any]]] = {
    "law": [{"input": f"What is clause {n}?", "output": f"A promise of {n} apples."} for n in range(6)],
    "verse": [{"input": f"Line {n} of rain", "output": f"And it wrote {n} songs on the roof."} for n in range(6)],
    "general": [{"input": f"{n} + 1?", "output": f"{n + 1}"} for n in range(6)],
}
COARSE, NONE = Switches(grid="coarse"), Switches(grid="none")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    return make_family(make_tiny_llama, tmp_path_factory.mktemp("trio"), dtype="float32", delta=0.1)


@pytest.fixture(scope="module")
def store() -> CellStore:
    """Shared: the tests ask for the same numbers."""
    return CellStore(None)


def opened(family: TinyFamily, store: CellStore, **options: Any) -> Analysis:
    tasks = tasks_of(ROWS, dict(zip(ROWS, family.references[1:], strict=False)), "decoder")
    return open_analysis(family.references[0], tasks, device="cpu", held_out=2, store=store, **options)


def finished(analysis: Analysis, switches: Switches, **more: Any) -> tuple[list[HiMergeEvent], HiMergeResult]:
    events, found = iter_hi_merge(analysis, switches, **more), []
    while True:
        try:
            found.append(next(events))
        except StopIteration as end:
            return found, end.value


@pytest.mark.parametrize("combine", ["average", "sum", "ties_sum"])
def test_the_recipe_saves_the_very_tensors_that_were_measured(
    family: TinyFamily, store: CellStore, tmp_path: Path, combine: str
) -> None:
    analysis = opened(family, store, combine=combine)
    _, result = finished(analysis, COARSE, dtype="float32")
    assert any(trial.changed for trial in result.trials)
    again = Recipe.from_yaml(result.recipe.to_yaml())
    assert again == result.recipe
    list(run(make_plan(again), FolderSink(tmp_path / "out")))
    saved = load_file(tmp_path / "out" / "model.safetensors")
    with analysis.scorer.holding(result.trials[-1].recipe) as bench:
        held = bench.places(saved)
        assert held.keys() == saved.keys()
        assert all(torch.equal(held[name], tensor) for name, tensor in saved.items())
    assert Recipe.from_yaml((tmp_path / "out" / "mergekit_config.yml").read_text()) == again
    assert again.to_yaml() in (tmp_path / "out" / "README.md").read_text()


def test_held_out_rows_never_decide(family: TinyFamily, store: CellStore) -> None:
    analysis = opened(family, store)
    _, first = finished(analysis, COARSE)
    tasks = tuple(
        replace(task, held_out=({"input": "Something else", "output": f"entirely {task.name}", "task": task.name},))
        for task in analysis.tasks
    )
    other = open_analysis(family.references[0], tasks, device="cpu", held_out=2, store=store)
    _, second = finished(other, COARSE)
    without = open_analysis(family.references[0], tasks, device="cpu", store=store)
    _, third = finished(without, COARSE)
    assert first.recipe == second.recipe == third.recipe
    assert first.trials == second.trials == third.trials
    assert [point.analysis for point in first.points] == [point.analysis for point in second.points]
    assert [point.held_out for point in first.points] != [point.held_out for point in second.points]
    assert all(point.held_out == {} for point in third.points)


def test_every_step_is_an_event_with_everything_so_far(family: TinyFamily, store: CellStore) -> None:
    events, result = finished(opened(family, store), COARSE)
    assert list(dict.fromkeys(event.phase for event in events)) == ["grid", "models", "exact", "layers", "done"]
    grid = [event for event in events if event.phase == "grid"]
    assert [len(event.grid) for event in grid] == list(range(1, len(grid) + 1)) == [event.done for event in grid]
    assert all(event.done <= event.total for event in events)
    last = events[-1]
    assert (last.recipe, last.trials, last.points, last.grid) == (
        result.recipe, result.trials, result.points, result.grid,
    )  # fmt: skip
    assert last.message == summary(result)
    names = [point.name for point in result.points]
    changed = [f"step {trial.step}" for trial in result.trials if trial.changed]
    assert names == ["base", "law", "verse", "average", "step 0", *changed]
    assert set(result.points[0].held_out) == {"law", "verse", "general"}
    assert {cell.task for cell in result.grid} == {"law", "verse"}


def test_points_are_what_the_scorer_says(family: TinyFamily, store: CellStore) -> None:
    analysis = opened(family, store)
    _, result = finished(analysis, NONE)
    average, start = result.points[3], result.points[4]
    for task in ("law", "verse"):
        assert average.analysis[task] == mean_stat(analysis.scorer.whole(analysis.setup.merged(), task))
        assert start.analysis == average.analysis, "nothing is pruned: the start is the plain average"
    trial = result.trials[-1]
    assert result.points[-1].analysis["law"].value == pytest.approx(trial.after[0])


def test_the_pruning_that_was_found_is_the_pruning_that_is_analysed(family: TinyFamily, store: CellStore) -> None:
    _, result = finished(opened(family, store), COARSE)
    assert result.report.setup.pruning == result.pruning
    for index, task in enumerate(result.report.setup.tasks):
        own = [cell for cell in result.grid if cell.task == task]
        best = max(own, key=lambda cell: (cell.score.value, cell.p, cell.s))
        assert result.pruning[index] == (best.p, best.s)
        # The report's specialist is the grid's best cell.
        assert mean_stat(result.report.whole[task, "before"]).value == pytest.approx(best.score.value)


def test_without_edits_it_is_the_combine_rule(family: TinyFamily, store: CellStore) -> None:
    analysis = opened(family, store)
    _, result = finished(analysis, Switches(grid="none", max_layers=0), dtype="bfloat16")
    assert result.recipe == analysis.setup.merged().with_dtype("bfloat16")
    assert result.pruning == ((1.0, 1.0), (1.0, 1.0))
    assert len(result.trials) == 2, "the layers are shown all the same"


def test_one_model_becomes_its_pruned_self(family: TinyFamily) -> None:
    result = hi_merge(family.references[0], {"law": family.references[1]}, {"law": ROWS["law"]}, switches=COARSE,
                      device="cpu", dtype="float32")  # fmt: skip
    assert result.recipe == result.report.setup.specialist(0)
    assert [trial.kind for trial in result.trials] == ["mutual", "mutual"]


def test_a_stop_keeps_the_merge_reached(family: TinyFamily, store: CellStore) -> None:
    stop = threading.Event()
    analysis = opened(family, store, stop=stop)
    seen: list[HiMergeEvent] = []
    events = iter_hi_merge(analysis, NONE)
    while not seen or not seen[-1].points:
        seen.append(next(events))
    stop.set()
    with pytest.raises(Stopped):
        list(events)
    assert seen[-1].recipe == analysis.setup.merged().with_dtype(None)
    assert seen[-1].report is not None
    assert all(seen[-1].report.is_measured(layer.key) for layer in analysis.setup.layers)


def test_a_second_run_measures_nothing(family: TinyFamily, tmp_path: Path) -> None:
    first = opened(family, CellStore(tmp_path))
    _, one = finished(first, NONE)
    assert first.scorer.measured > 0
    second = opened(family, CellStore(tmp_path))
    _, other = finished(second, NONE)
    assert second.scorer.measured == 0
    assert one.recipe == other.recipe
    assert one.points == other.points
