"""The quick way is the naive way: a layer swapped in place above kept states gives what a fresh whole model gives."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_merge import layer_scorer
from llm_merge.analysis import Analysis, open_analysis
from llm_merge.cell_store import CellStore
from llm_merge.contributions import Cell, cells_of, measure_cells, whole_models
from llm_merge.errors import Stopped
from llm_merge.merge import MemorySink, run
from llm_merge.metrics import PreparedMetric, measure
from llm_merge.plan import make_plan
from llm_merge.recipe import Recipe
from llm_merge.tasks import Task
from llm_merge.workbench import Workbench
from tests.tiny_models import TinyFamily, make_family, make_tiny_llama, make_tiny_lora

TEXT: list[dict[str, Any]] = [
    {"input": "Capital of France?", "output": "Paris", "choices": ["Rome", "Paris", "Bern"], "answer": 1},
    {"input": "What is 2 + 2, in words please?", "output": "four", "choices": ["nine", "four"], "answer": 1},
    {"input": "Opposite of hot?", "output": "cold", "choices": ["hot", "wet", "cold"], "answer": 2},
]
SEARCH: list[dict[str, Any]] = [
    {"query": "harbour", "pos": ["a place where ships are sheltered"], "neg": ["a city", "a wind"]},
    {"query": "the capital of France", "pos": ["Paris"], "neg": []},
    {"query": "gladness", "pos": ["in my heart"], "neg": []},
]
CASES = [
    ("deep_llama", "decoder", "-loss"),
    ("deep_llama", "decoder", "accuracy"),
    ("tiny_bert", "encoder", "-loss"),
    ("tiny_bert", "encoder", "r@1"),
    ("tiny_t5", "encoder-decoder", "-loss"),
    ("tiny_t5", "encoder-decoder", "accuracy"),
]


@pytest.fixture(scope="module")
def deep_llama(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    """Four blocks, so that there are some to start between; float32, every tensor changed."""
    return make_family(make_tiny_llama, tmp_path_factory.mktemp("deep"), dtype="float32", layers=4, delta=0.05)


@pytest.fixture(params=CASES, ids=["-".join(case) for case in CASES])
def case(request: pytest.FixtureRequest) -> tuple[TinyFamily, str, str]:
    name, model_type, metric = request.param
    return request.getfixturevalue(name), model_type, metric


def tasks_for(models: Sequence[str], model_type: str, rows: int = 3) -> tuple[Task, ...]:
    source = SEARCH if model_type == "encoder" else TEXT
    mine, theirs = (tuple({**row, "task": name} for row in source[:rows]) for name in ("one", "two"))
    return Task("one", models[0], mine, mine), Task("two", models[1], theirs[::-1], theirs)


def opened(family: TinyFamily, model_type: str, metric: str, **options: Any) -> Analysis:
    tasks = tasks_for(family.references[1:], model_type)
    return open_analysis(family.references[0], tasks, model_type=model_type, metric=metric, device="cpu", **options)


def naive(analysis: Analysis, recipe: Recipe, task: str) -> tuple[float, ...]:
    """A merge of its own, poured into a model of its own, and a full pass."""
    own = analysis.scorer.benches[0]
    bench = Workbench(own.checkpoint, own.model_type, "cpu", dtype=own.dtype)
    bench.follow(recipe)
    return measure(bench, analysis.scorer.tasks[task])


def bits(bench: Workbench) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def everything(analysis: Analysis) -> dict[Cell, tuple[float, ...]]:
    setup = analysis.setup
    list(whole_models(setup, analysis.scorer))
    cells = cells_of(setup, [layer.key for layer in setup.layers])
    return dict(measure_cells(setup, cells, analysis.scorer))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every pass over a model."""
    calls: list[int] = []

    def counted(bench: Workbench, prepared: PreparedMetric, stop: threading.Event | None = None) -> tuple[float, ...]:
        calls.append(len(prepared))
        return measure(bench, prepared, stop)

    monkeypatch.setattr(layer_scorer, "measure", counted)
    return calls


def test_every_cell_is_the_naive_way_s(case: tuple[TinyFamily, str, str]) -> None:
    """Blocks, and what lies outside of them: the fine-tunes changed every tensor."""
    family, model_type, metric = case
    analysis = opened(family, model_type, metric, pruning=((0.5, 0.8), (1.0, 1.2)))
    setup = analysis.setup
    keys = [layer.key for layer in setup.layers]
    assert "embeddings" in keys
    found = everything(analysis)
    assert len(found) == 4 * 2 * len(keys)
    for cell, values in found.items():
        assert values == pytest.approx(naive(analysis, setup.variant(cell), cell.task), abs=1e-5), cell
    if metric == "-loss":
        anchors = {cell: analysis.scorer.whole(setup.anchor(cell), cell.task) for cell in found}
        idle = {"head"} if model_type == "encoder" else set()  # the pooler, which mean pooling passes by
        assert {cell.layer for cell, values in found.items() if anchors[cell] == values} == idle


@pytest.mark.parametrize(("benches", "state_bytes"), [(1, 10**9), (2, 10**9), (4, 0), (1, 0), (4, 3_000)])
def test_neither_the_number_of_models_nor_the_memory_matters(
    deep_llama: TinyFamily, benches: int, state_bytes: int
) -> None:
    analysis = opened(deep_llama, "decoder", "-loss")
    expected = everything(analysis)
    own = analysis.scorer.benches
    scorer = layer_scorer.LayerScorer(own[:benches], analysis.scorer.tasks, state_bytes=state_bytes)
    analysis.scorer = scorer
    for cell, values in everything(analysis).items():
        assert values == pytest.approx(expected[cell], abs=1e-5), cell


def test_adapters_are_measured_like_the_models_they_make(tmp_path: Path, deep_llama: TinyFamily) -> None:
    base = deep_llama.references[0]
    models = [f"{base}+{make_tiny_lora(tmp_path / str(n), n, deep_llama.base)}" for n in (1, 2)]
    analysis = open_analysis(base, tasks_for(models, "decoder"), device="cpu")
    setup = analysis.setup
    assert [layer.key for layer in setup.layers] == ["0", "1", "2", "3"], "adapters leave the rest alone"
    for cell, values in everything(analysis).items():
        assert values == pytest.approx(naive(analysis, setup.variant(cell), cell.task), abs=1e-5), cell


def test_the_models_are_the_anchors_to_the_bit_afterwards(deep_llama: TinyFamily) -> None:
    analysis = opened(deep_llama, "decoder", "-loss")
    setup, scorer = analysis.setup, analysis.scorer
    anchors = [setup.base_recipe(), setup.specialist(0), setup.specialist(1), setup.merged()]
    everything(analysis)
    for anchor in anchors:
        with scorer.holding(anchor) as bench:
            now = bits(bench)
        fresh = Workbench(bench.checkpoint, "decoder", "cpu", dtype=bench.dtype)
        fresh.follow(anchor)
        assert same(now, bits(fresh))


def test_nothing_is_measured_twice(deep_llama: TinyFamily, measured: list[int]) -> None:
    analysis = opened(deep_llama, "decoder", "-loss")
    first = everything(analysis)
    passes = [rows for rows in measured if rows == 3]
    cells, wholes = len(first), 2 * 3
    assert len(passes) == cells + wholes
    assert analysis.scorer.measured == cells + wholes
    measured.clear()
    assert everything(analysis) == first
    assert measured == []


def test_another_scorer_on_the_same_store_measures_nothing(
    tmp_path: Path, deep_llama: TinyFamily, measured: list[int]
) -> None:
    first = everything(opened(deep_llama, "decoder", "-loss", store=CellStore(tmp_path)))
    measured.clear()
    second = opened(deep_llama, "decoder", "-loss", store=CellStore(tmp_path))
    assert everything(second) == first
    assert measured == []
    assert second.scorer.measured == 0
    assert all(bench.plan is None for bench in second.scorer.benches), "no model was even poured"


def test_a_layer_without_a_delta_is_the_anchor_s_value(tmp_path: Path, deep_llama: TinyFamily) -> None:
    """A specialist that is the base, and tensors that an adapter leaves alone, cost no pass and contribute nothing."""
    base = deep_llama.references[0]
    models = [base, deep_llama.references[1]]
    analysis = open_analysis(base, tasks_for(models, "decoder"), device="cpu")
    setup = analysis.setup
    report = analysis.report().with_cells(everything(analysis).items())
    for layer in setup.layers:
        cell = Cell("one", "before", "delete", layer.key)
        assert report.cells[cell] == analysis.scorer.whole(setup.base_recipe(), "one")
        assert report.cells[Cell("one", "before", "add", layer.key)] == report.cells[cell]


def test_equal_content_is_measured_once_whatever_it_is_called(tmp_path: Path, measured: list[int]) -> None:
    """Copies of the models elsewhere, and another task name, ask for the same numbers."""
    family = make_family(make_tiny_llama, tmp_path / "a", dtype="float32")
    copy = make_family(make_tiny_llama, tmp_path / "b", dtype="float32")
    store = CellStore(tmp_path / "cells")
    first = everything(opened(family, "decoder", "-loss", store=store))
    measured.clear()
    assert everything(opened(copy, "decoder", "-loss", store=store)) == first
    assert measured == []


def test_other_rows_another_metric_and_another_density_have_other_keys(deep_llama: TinyFamily) -> None:
    analysis = opened(deep_llama, "decoder", "-loss")
    other = opened(deep_llama, "decoder", "accuracy")
    setup = analysis.setup
    cells = list(cells_of(setup, ["0", "1"]))
    keys = [analysis.scorer.key(setup.variant(cell), cell.task) for cell in cells]
    assert len(set(keys)) == len(keys)
    assert not {other.scorer.key(setup.variant(cell), cell.task) for cell in cells} & set(keys)
    pruned = setup.with_pruning([(0.5, 1.0), (1.0, 1.0)])
    changed = [analysis.scorer.key(pruned.variant(cell), cell.task) for cell in cells]
    assert [a == b for a, b in zip(keys, changed, strict=True)] == [
        cell.task == "two" and cell.side == "before" for cell in cells
    ], "a specialist alone is the same whatever else lies beside it"


def test_stop_raises_and_what_was_measured_stays(tmp_path: Path, deep_llama: TinyFamily) -> None:
    stop = threading.Event()
    analysis = opened(deep_llama, "decoder", "-loss", store=CellStore(tmp_path), stop=stop)
    setup = analysis.setup
    cells = measure_cells(setup, cells_of(setup, [layer.key for layer in setup.layers]), analysis.scorer)
    done = dict(next(cells) for _ in range(5))
    holding = [(bench, bench.plan, bits(bench)) for bench in analysis.scorer.benches if bench.plan is not None]
    stop.set()
    with pytest.raises(Stopped):
        next(cells)
    for bench, plan, before in holding:
        assert bench.plan is plan
        assert same(before, bits(bench))
    again = opened(deep_llama, "decoder", "-loss", store=CellStore(tmp_path))
    for cell, values in done.items():
        assert again.scorer.store.get(again.scorer.key(setup.variant(cell), cell.task)) == values


def test_a_stop_in_the_middle_of_a_pass_leaves_the_anchor(
    deep_llama: TinyFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = threading.Event()
    analysis = opened(deep_llama, "decoder", "-loss", stop=stop)
    setup, scorer = analysis.setup, analysis.scorer
    expected = scorer.whole(setup.specialist(0), "one")
    cell = Cell("one", "before", "delete", "2")

    def interrupted(bench: Workbench, prepared: PreparedMetric, event: threading.Event | None) -> tuple[float, ...]:
        stop.set()
        return measure(bench, prepared, event)

    with monkeypatch.context() as patched:
        patched.setattr(layer_scorer, "measure", interrupted)
        with pytest.raises(Stopped):
            scorer.changed(setup.anchor(cell), setup.variant(cell), "2", "one")
    stop.clear()
    assert scorer.store.get(scorer.key(setup.variant(cell), "one")) is None
    with scorer.holding(setup.specialist(0)) as bench:
        assert measure(bench, scorer.tasks["one"]) == expected
    assert scorer.changed(setup.anchor(cell), setup.variant(cell), "2", "one") == pytest.approx(
        naive(analysis, setup.variant(cell), "one"), abs=1e-5
    )


def test_a_model_that_somebody_else_changed_is_poured_again(deep_llama: TinyFamily) -> None:
    """Resident models are lent: what is on them when the analysis comes back may be another merge."""
    analysis = opened(deep_llama, "decoder", "-loss")
    setup, scorer = analysis.setup, analysis.scorer
    scorer.whole(setup.specialist(0), "one")
    for bench in scorer.benches:
        bench.follow(setup.specialist(1))
    for layer in ("0", "3"):
        cell = Cell("one", "before", "delete", layer)
        assert scorer.changed(setup.anchor(cell), setup.variant(cell), layer, "one") == pytest.approx(
            naive(analysis, setup.variant(cell), "one"), abs=1e-5
        )


def test_models_that_hold_a_merge_already_are_not_poured_again(
    deep_llama: TinyFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    analysis = opened(deep_llama, "decoder", "-loss")
    setup, benches = analysis.setup, analysis.scorer.benches
    anchors = [setup.merged(), setup.specialist(1), setup.base_recipe(), setup.specialist(0)]
    for bench, anchor in zip(benches, anchors, strict=True):
        bench.follow(anchor)
    fresh = layer_scorer.LayerScorer(benches, analysis.scorer.tasks)
    monkeypatch.setattr(Workbench, "_pour", lambda *_: pytest.fail("poured"))
    for anchor in anchors[::-1]:
        fresh.whole(anchor, "one")


def test_nothing_is_opened_or_planned_anew_for_a_cell(deep_llama: TinyFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_merge import plan

    analysis = opened(deep_llama, "decoder", "-loss")
    setup, planned = analysis.setup, list[Recipe]()
    own = plan.Plan.following

    def following(self: plan.Plan, recipe: Recipe) -> plan.Plan:
        planned.append(recipe)
        return own(self, recipe)

    monkeypatch.setattr(plan.Plan, "following", following)
    monkeypatch.setattr(plan, "open_checkpoint", lambda *_, **__: pytest.fail("opened"))
    everything(analysis)
    assert len(planned) == len(set(planned)), "each merge is planned once"
    assert len(planned) <= len({setup.variant(cell) for cell in cells_of(setup, [x.key for x in setup.layers])}) + 4


def test_rows_that_are_only_reported_take_no_memory(deep_llama: TinyFamily) -> None:
    analysis = opened(deep_llama, "decoder", "-loss", held_out=2)
    assert set(analysis.held_out) == {"one", "two"}
    scorer = analysis.scorer
    for task in analysis.held_out.values():
        scorer.whole(analysis.setup.merged(), task)
    assert sum(cache.nbytes for cache in scorer._caches) == 0
    scorer.whole(analysis.setup.merged(), "one")
    assert sum(cache.nbytes for cache in scorer._caches) > 0


def test_the_plans_tensors_are_the_merge_s(deep_llama: TinyFamily) -> None:
    """What the scorer measures is what the recipe would save."""
    analysis = opened(deep_llama, "decoder", "-loss", pruning=((0.5, 0.8), (1.0, 1.2)))
    setup = analysis.setup
    cell = Cell("one", "after", "delete", "1")
    with analysis.scorer.holding(setup.variant(cell)) as bench:
        sink = MemorySink()
        list(run(make_plan(setup.variant(cell)), sink))
        places = bench.places(sink.tensors)
        assert all(torch.equal(places[name], tensor) for name, tensor in sink.tensors.items())


def test_setups_of_other_keys_start_at_the_bottom(deep_llama: TinyFamily) -> None:
    analysis = opened(deep_llama, "decoder", "-loss")
    analysis.scorer.plan(analysis.setup.merged())
    starts = {key: analysis.scorer._start_of(key) for key in ("embeddings", "0", "3", "norm", "head", "other")}
    assert starts == {"embeddings": 0, "0": 0, "3": 3, "norm": 4, "head": 0, "other": 0}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
