"""Analyses on real tiny models: what is opened, which layers there are, estimates, stopping and going on."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from llm_merge.analysis import (
    Analysis,
    AnalysisEvent,
    analyze_contributions,
    iter_contributions,
    open_analysis,
    tasks_of,
)
from llm_merge.cell_store import CellStore
from llm_merge.contribution_report import ContributionReport
from llm_merge.contributions import cells_of
from llm_merge.errors import ExampleError, IncompatibleModels, MergeError, RecipeError, Stopped
from llm_merge.tasks import Task
from tests.tiny_models import TinyFamily, make_family, make_tiny_bert, make_tiny_llama, make_tiny_lora, make_tiny_t5

ROWS: dict[str, list[dict[str, Any]]] = {
    "law": [{"input": f"What is clause {n}?", "output": f"A promise of {n} apples."} for n in range(6)],
    "verse": [{"input": f"Line {n} of rain", "output": f"And it wrote {n} songs on the roof."} for n in range(6)],
}
SEARCH: dict[str, list[dict[str, Any]]] = {
    "law": [{"query": f"clause {n}", "pos": [f"a promise of {n} apples"]} for n in range(6)],
    "verse": [{"query": f"rain {n}", "pos": [f"it wrote {n} songs"]} for n in range(6)],
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    return make_family(make_tiny_llama, tmp_path_factory.mktemp("llama"), dtype="float32", layers=3)


def models_of(family: TinyFamily) -> dict[str, str]:
    return dict(zip(ROWS, family.references[1:], strict=True))


def opened(family: TinyFamily, model_type: str = "decoder", **options: Any) -> Analysis:
    rows = SEARCH if model_type == "encoder" else ROWS
    tasks = tasks_of(rows, models_of(family), model_type)
    return open_analysis(family.references[0], tasks, model_type=model_type, device="cpu", **options)


def finished(events: Generator[AnalysisEvent, None, ContributionReport]) -> tuple[list[AnalysisEvent], Any]:
    found = []
    while True:
        try:
            found.append(next(events))
        except StopIteration as end:
            return found, end.value


# ── opening ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_setup_follows_the_models_not_the_rows(llama: TinyFamily) -> None:
    models = models_of(llama)
    turned = {"verse": ROWS["verse"], "law": ROWS["law"]}
    tasks = tasks_of(turned, models, "decoder")
    assert [task.name for task in tasks] == ["law", "verse"]
    analysis = open_analysis(llama.references[0], tasks, device="cpu")
    assert analysis.setup.models == tuple(llama.references[1:])
    assert analysis.setup.tasks == ("law", "verse")


def test_full_fine_tunes_show_what_lies_outside_of_the_blocks(llama: TinyFamily, tmp_path: Path) -> None:
    keys = [(layer.key, layer.block) for layer in opened(llama).setup.layers]
    assert keys == [("embeddings", False), ("0", True), ("1", True), ("2", True), ("norm", False)]
    base = llama.references[0]
    adapters = {task: f"{base}+{make_tiny_lora(tmp_path / task, n, llama.base)}" for n, task in enumerate(ROWS)}
    analysis = open_analysis(base, tasks_of(ROWS, adapters, "decoder"), device="cpu")
    assert [layer.key for layer in analysis.setup.layers] == ["0", "1", "2"]


def test_tensors_that_no_filter_can_name_alone_are_not_a_layer(llama: TinyFamily, tmp_path: Path) -> None:
    """Saved without the body's prefix, the final norm is `norm.weight`: a part of every block's `…layernorm.weight`."""
    folders = []
    for folder in llama.folders:
        copy = tmp_path / folder.name
        copy.mkdir()
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        tensors = load_file(folder / "model.safetensors")
        bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        save_file(bare, copy / "model.safetensors", metadata={"format": "pt"})
        folders.append(str(copy))
    tasks = tasks_of(ROWS, dict(zip(ROWS, folders[1:], strict=True)), "decoder")
    setup = open_analysis(folders[0], tasks, device="cpu").setup
    assert [layer.key for layer in setup.layers] == ["embeddings", "0", "1", "2"]


def test_general_sets_are_not_analysed_and_held_out_rows_are_made_ready_if_asked(llama: TinyFamily) -> None:
    rows = {**ROWS, "general": ROWS["law"][:4]}
    tasks = tasks_of(rows, models_of(llama), "decoder")
    analysis = open_analysis(llama.references[0], tasks, device="cpu", held_out=1)
    assert analysis.setup.tasks == ("law", "verse")
    assert [task.name for task in analysis.tasks] == ["law", "verse", "general"]
    assert set(analysis.held_out) == {"law", "verse", "general"}
    assert all(len(analysis.scorer.tasks[name]) == 1 for name in analysis.held_out.values())
    assert set(open_analysis(llama.references[0], tasks, device="cpu").held_out) == set()


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"tasks": ()}, ExampleError, "No task belongs to a specialist"),
        ({"rows": ()}, ExampleError, "The task “law” has no rows to analyse"),
        ({"metric": "r@1"}, MergeError, "does not apply to the type decoder"),
        ({"combine": "mean"}, RecipeError, "combine `mean` is not known"),
        ({"pruning": ((2.0, 1.0), (1.0, 1.0))}, RecipeError, "the share kept must be above 0 and at most 1"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(
    llama: TinyFamily, change: dict[str, Any], kind: type[MergeError], words: str
) -> None:
    tasks = change.pop("tasks", tasks_of(ROWS, models_of(llama), "decoder"))
    if "rows" in change:
        tasks = (replace(tasks[0], analysis=change.pop("rows")), tasks[1])
    with pytest.raises(kind, match=words):
        open_analysis(llama.references[0], tasks, device="cpu", **change)


def test_models_that_do_not_fit_and_rows_that_cannot_be_used(llama: TinyFamily, tiny_bert: TinyFamily) -> None:
    tasks = tasks_of(ROWS, {"law": llama.references[1], "verse": tiny_bert.references[1]}, "decoder")
    with pytest.raises(IncompatibleModels, match="two architectures cannot be merged"):
        open_analysis(llama.references[0], tasks, device="cpu")
    tasks = tasks_of(ROWS, models_of(llama), "decoder")
    with pytest.raises(ExampleError, match=r"law: Row 1 \(law\) has no choices: accuracy needs rows with"):
        open_analysis(llama.references[0], tasks, device="cpu", metric="accuracy")


# ── events ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_events_count_up_and_carry_the_report_so_far(llama: TinyFamily) -> None:
    events, report = finished(iter_contributions(opened(llama)))
    phases = list(dict.fromkeys(event.phase for event in events))
    assert phases == ["estimate", "models", "exact", "done"]
    exact = [event for event in events if event.phase == "exact"]
    cells = 4 * 2 * 5
    assert [event.done for event in exact] == list(range(1, cells + 1))
    assert {event.total for event in exact} == {cells}
    assert [len(event.report.cells) for event in exact] == list(range(1, cells + 1))
    assert len(report.cells) == len(report.estimates) == cells
    assert report.seconds > 0
    assert report.headline() == events[-1].message
    assert report.rows.keys() == {"law", "verse"}
    assert ContributionReport.from_dict(json.loads(report.to_json())).headline() == report.headline()


def test_only_the_layers_asked_for_are_measured(llama: TinyFamily) -> None:
    analysis = opened(llama)
    _, report = finished(iter_contributions(analysis, estimate=False, layers=["2"]))
    assert {cell.layer for cell in report.cells} == {"2"}
    _, more = finished(analysis.measure(report, ["0", "2"]))
    assert {cell.layer for cell in more.cells} == {"0", "2"}
    assert {c: v for c, v in more.cells.items() if c.layer == "2"} == report.cells
    assert more.seconds >= report.seconds
    with pytest.raises(RecipeError, match="There is no layer “9”"):
        finished(iter_contributions(analysis, estimate=False, layers=["9"]))
    with pytest.raises(MergeError, match="-1 layers cannot be measured"):
        finished(iter_contributions(analysis, layers=-1))


def test_a_number_of_layers_are_those_that_the_estimate_ranks_highest(llama: TinyFamily) -> None:
    analysis = opened(llama)
    _, report = finished(iter_contributions(analysis, layers=2))
    measured = [layer.key for layer in report.setup.layers if report.is_measured(layer.key)]
    assert set(measured) == set(replace(report, cells={}, whole={}).doubtful()[:2])
    _, nothing = finished(iter_contributions(analysis, layers=0))
    assert nothing.cells == {}
    assert nothing.headline() == "Estimates for 3 layers: nothing is measured yet"


def test_the_order_of_measuring_makes_no_difference(llama: TinyFamily) -> None:
    reports = [finished(iter_contributions(opened(llama), estimate=estimate))[1] for estimate in (True, False)]
    assert reports[0].cells == reports[1].cells
    one = opened(llama, benches=opened(llama).scorer.benches[:1])
    for cell, values in finished(iter_contributions(one, estimate=False))[1].cells.items():
        assert values == pytest.approx(reports[0].cells[cell], abs=1e-5)


# ── stop and go on ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stop_loses_nothing_and_a_second_analysis_goes_on(llama: TinyFamily, tmp_path: Path) -> None:
    stop, done = threading.Event(), list[AnalysisEvent]()
    events = iter_contributions(opened(llama, store=CellStore(tmp_path), stop=stop), estimate=False)
    while not stop.is_set():
        done.append(next(events))
        if done[-1].done == 7:
            stop.set()
    with pytest.raises(Stopped):
        next(events)
    assert len(done[-1].report.cells) == 7
    second = opened(llama, store=CellStore(tmp_path))
    _, report = finished(iter_contributions(second, estimate=False))
    assert second.scorer.measured == 40 - 7
    assert all(report.cells[cell] == values for cell, values in done[-1].report.cells.items())
    third = opened(llama, store=CellStore(tmp_path))
    assert finished(iter_contributions(third, estimate=False))[1].cells == report.cells
    assert third.scorer.measured == 0
    _, alone = finished(iter_contributions(opened(llama), estimate=False))
    for cell, values in alone.cells.items():
        assert report.cells[cell] == pytest.approx(values, abs=1e-5)


def test_a_stop_while_estimating_leaves_the_models_usable(llama: TinyFamily) -> None:
    stop = threading.Event()
    analysis = opened(llama, stop=stop)
    events = iter_contributions(analysis)
    next(events)
    stop.set()
    with pytest.raises(Stopped):
        next(events)
    stop.clear()
    _, report = finished(iter_contributions(analysis, layers=["1"]))
    assert report.is_measured("1")


# ── estimates ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("make", "model_type"),
    [(make_tiny_llama, "decoder"), (make_tiny_bert, "encoder"), (make_tiny_t5, "encoder-decoder")],
)
def test_of_small_deltas_the_estimate_is_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, model_type: str
) -> None:
    """The first-order limit: a thousandth of the other tests' deltas, whose differences need losses in float64."""
    import torch

    from llm_merge.metrics import measure
    from llm_merge.workbench import Workbench

    family = make_family(make, tmp_path, dtype="float32", delta=2e-5)
    analysis = opened(family, model_type)
    setup = analysis.setup
    _, report = finished(analysis.estimate(analysis.report()))
    bench = Workbench(analysis.scorer.benches[0].checkpoint, model_type, "cpu", dtype=torch.float64)

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

    def worth(recipe: Any, task: str) -> float:
        bench.follow(recipe)
        values = measure(bench, analysis.scorer.tasks[task])
        return sum(values) / len(values)

    largest = max(map(abs, report.estimates.values()))
    for cell, estimate in report.estimates.items():
        difference = worth(setup.anchor(cell), cell.task) - worth(setup.variant(cell), cell.task)
        exact = difference if cell.kind == "delete" else -difference
        assert estimate == pytest.approx(exact, rel=0.03, abs=0.005 * largest), cell
    blocks = [value for cell, value in report.estimates.items() if setup.layer(cell.layer).block]
    assert max(map(abs, blocks)) > 0.02 * largest, "far above what is let through"


def test_estimates_and_measurements_rank_the_layers_alike(llama: TinyFamily) -> None:
    _, report = finished(iter_contributions(opened(llama)))
    estimates = replace(report, cells={}, whole={})
    for task in report.setup.tasks:
        pairs = [(estimates.alpha(task, "before", layer.key), report.alpha(task, "before", layer.key))
                 for layer in report.setup.layers]  # fmt: skip
        largest = max(pairs, key=lambda pair: abs(pair[1].value))  # type: ignore[union-attr]
        assert largest[0].value * largest[1].value > 0  # type: ignore[union-attr]


# ── from Python ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_library_function_gives_the_report(llama: TinyFamily) -> None:
    models, base = models_of(llama), llama.references[0]
    report = analyze_contributions(base, models, ROWS, layers=["0"], device="cpu")
    assert report.is_measured("0")
    assert report.estimates == {}
    quick = analyze_contributions(base, models, ROWS, layers=0, device="cpu")
    assert len(quick.estimates) == 40
    assert quick.cells == {}
    one = analyze_contributions(base, {"law": models["law"]}, ROWS["law"], device="cpu")
    assert one.setup.tasks == ("law",)
    gammas = [one.gamma("law", layer.key) for layer in one.setup.layers]
    assert all(gamma is not None and gamma.value == 0 for gamma in gammas)


def test_held_out_rows_are_not_used(llama: TinyFamily) -> None:
    tasks = tuple(
        Task(task, model, tuple(ROWS[task][:3]), tuple(ROWS[task][3:])) for task, model in models_of(llama).items()
    )
    swapped = tuple(Task(t.name, t.model, t.analysis, t.held_out[::-1]) for t in tasks)
    reports = [finished(iter_contributions(open_analysis(llama.references[0], each, device="cpu", held_out=9),
                                           estimate=False, layers=["1"]))[1] for each in (tasks, swapped)]  # fmt: skip
    assert reports[0].cells == reports[1].cells
    assert reports[0].rows == reports[1].rows


def test_cells_are_those_of_the_setup(llama: TinyFamily) -> None:
    _, report = finished(iter_contributions(opened(llama), estimate=False))
    assert set(report.cells) == set(cells_of(report.setup, [layer.key for layer in report.setup.layers]))
