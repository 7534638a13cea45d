"""The gradient's products with deltas: autograd's own by hand, a finite difference, and nothing left behind."""

from __future__ import annotations

import copy
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_merge.chain import stacks_of
from llm_merge.checkpoint import open_checkpoint
from llm_merge.errors import MergeError, Stopped
from llm_merge.evaluation import EvaluationSettings, Prepared, losses, prepare, resolve_format
from llm_merge.gradients import layer_products
from llm_merge.recipe import Recipe
from llm_merge.workbench import Workbench, bench_for
from tests.tiny_models import TinyFamily, make_tiny_llama

ROWS: list[dict[str, Any]] = [
    {
        "query": "harbour",
        "pos": ["where ships are sheltered"],
        "input": "Define harbour",
        "output": "A sheltered one",
    },
    {"query": "capital", "pos": ["Paris"], "neg": ["wind", "waves"], "input": "Capital of France?", "output": "Paris."},
    {"query": "gospel", "pos": ["preach to every creature"], "input": "What is preached?", "output": "The gospel " * 5},
    {"query": "corn", "pos": ["their corn increased"], "input": "What increased?", "output": "corn and wine"},
    {"query": "wind", "pos": ["wind and waves"], "input": "Wind and?", "output": "waves"},
]
KINDS = ["decoder", "encoder", "encoder-decoder"]
Table = dict[tuple[str, str], float]


@pytest.fixture(scope="module", params=KINDS)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """A resident model of each family with a loss, in float32, following its first fine-tune."""
    fixtures = {"decoder": "tiny_llama_float32", "encoder": "tiny_bert", "encoder-decoder": "tiny_t5"}
    family: TinyFamily = request.getfixturevalue(fixtures[request.param])
    return bench_for(Recipe.single(family.references[1]), request.param, "cpu")


def prepared(bench: Workbench, batch_size: int = 2) -> Prepared:
    fmt = resolve_format([bench.checkpoint], "plain")
    return prepare(ROWS, bench.model_type, bench.tokenizer, EvaluationSettings(batch_size=batch_size), fmt)


def groups_of(bench: Workbench) -> dict[str, str]:
    """Every tensor of the checkpoint by the number of its block, or "other"."""
    result = {}
    for name in bench.checkpoint.tensors:
        numbers = [part for part in name.split(".") if part.isdigit()]
        result[name] = f"{name.split('.')[0]} {numbers[0]}" if numbers else "other"
    return result


def random_deltas(bench: Workbench, keys: str = "AB", only: str = "") -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return {
        key: {
            name: 0.01 * torch.randn(info.shape, generator=generator)
            for name, info in bench.checkpoint.tensors.items()
            if only in name
        }
        for key in keys
    }


def readers(deltas: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, Callable[[str], torch.Tensor | None]]:
    return {key: tensors.get for key, tensors in deltas.items()}


def by_hand(bench: Workbench, rows: Prepared, deltas: Mapping[str, Mapping[str, torch.Tensor]]) -> Table:
    """The gradient of −(mean loss) by plain autograd on a copy of the model, all rows in one graph."""
    twin = copy.copy(bench)
    twin.model = copy.deepcopy(bench.model).requires_grad_(True)
    family = bench.family
    plan = family.batch_plan(twin, rows.rows, rows.settings)
    values = [family.batch_losses(twin, rows.rows, batch, rows.settings, None) for batch in plan]
    torch.autograd.backward(-torch.cat(values).mean())
    result: Table = {}
    places = twin.places(bench.checkpoint.tensors)
    for key, tensors in deltas.items():
        for name, group in groups_of(bench).items():
            result.setdefault((key, group), 0.0)
            gradient = places[name].grad if name in places else None
            if name in tensors and gradient is not None:
                result[key, group] += float((gradient.double() * tensors[name].double()).sum())
    return result


def clean(bench: Workbench) -> bool:
    hooks = any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in bench.model.modules())
    parameters = list(bench.model.parameters())
    return not hooks and all(p.grad is None and not p.requires_grad for p in parameters)


@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.parametrize("budget", [0, 30_000, 2**30])
def test_products_are_autograds_own(bench: Workbench, checkpointing: bool | None, budget: int) -> None:
    rows, deltas, groups = prepared(bench), random_deltas(bench), groups_of(bench)
    expected = by_hand(bench, rows, deltas)
    found = layer_products(bench, rows, readers(deltas), groups, checkpointing=checkpointing, budget_bytes=budget)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert list(found) == [(key, group) for key in "AB" for group in dict.fromkeys(groups.values())]
    assert any(found.values())
    assert clean(bench)


def test_products_are_what_a_small_step_does(bench: Workbench) -> None:
    rows, step = prepared(bench), 0.01
    exact = Workbench(bench.checkpoint, bench.model_type, "cpu", dtype=torch.float64)
    assert bench.plan is not None
    exact.follow(bench.plan)
    deltas = random_deltas(exact, "A")
    whole = dict.fromkeys(exact.checkpoint.tensors, "all")
    (slope,) = layer_products(exact, rows, readers(deltas), whole).values()
    places = exact.places(whole)
    ends = []
    for sign in (1, -1):
        exact.plan = None
        exact.follow(bench.plan)
        for name, place in places.items():
            place.add_(sign * step * deltas["A"][name])
        ends.append(-sum(loss for _, loss in losses(exact, rows)) / len(rows))
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-2)


def test_deltas_that_fit_are_read_once_and_others_again(bench: Workbench) -> None:
    rows, deltas, asked = prepared(bench), random_deltas(bench, "A"), list[str]()

    def read(name: str) -> torch.Tensor | None:
        asked.append(name)
        return deltas["A"].get(name)

    found = layer_products(bench, rows, {"A": read}, groups_of(bench))
    assert len(asked) == len(set(asked))
    asked.clear()
    assert layer_products(bench, rows, {"A": read}, groups_of(bench), budget_bytes=0) == pytest.approx(found, rel=1e-4)
    batches = len(bench.family.batch_plan(bench, rows.rows, rows.settings))
    assert batches > 1
    assert max(asked.count(name) for name in asked) == 1 + batches  # is there one, and once for each batch


def test_weights_without_a_delta_get_no_gradient(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a LoRA adapter: only one kind of tensor differs, and only those are kept for the backward pass."""
    rows = prepared(bench)
    kind = {"decoder": "q_proj", "encoder": "attention.self.query", "encoder-decoder": "SelfAttention.q"}
    deltas = random_deltas(bench, only=kind[bench.model_type])
    seen: set[str] = set()
    forward = bench.model.forward

    def watched(**inputs: Any) -> Any:
        seen.update(name for name, parameter in bench.model.named_parameters() if parameter.requires_grad)
        return forward(**inputs)

    monkeypatch.setattr(bench.model, "forward", watched)
    found = layer_products(bench, rows, readers(deltas), groups_of(bench))
    monkeypatch.undo()
    assert seen
    assert all(kind[bench.model_type] in name for name in seen)
    assert found == pytest.approx(by_hand(bench, rows, deltas), rel=1e-4, abs=1e-7)
    assert found["A", "other"] == 0.0


def test_no_delta_needs_no_pass(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.model, "forward", None)
    found = layer_products(bench, prepared(bench), {"A": lambda _: None}, groups_of(bench))
    assert set(found.values()) == {0.0}


def test_checkpointing_runs_blocks_again_and_only_when_it_must(bench: Workbench) -> None:
    rows, deltas, counts = prepared(bench), random_deltas(bench, "A"), []
    blocks = [block for stack in stacks_of(bench.model) for block in stack.blocks]
    inner = [next(iter(block.children())) for block in blocks]
    for checkpointing, budget in ((False, 0), (None, 2**30), (None, 0), (True, 2**30)):
        calls: list[int] = []
        handles = [module.register_forward_hook(lambda *_, calls=calls: calls.append(1)) for module in inner]
        layer_products(bench, rows, readers(deltas), groups_of(bench), checkpointing=checkpointing, budget_bytes=budget)
        for handle in handles:
            handle.remove()
        counts.append(len(calls))
    once, enough, none, always = counts
    assert once == enough
    assert none == always == 2 * once


def test_a_separate_head_and_a_tied_one(tmp_path: Path) -> None:
    """Tied: one parameter with both gradients, once. A name for each in the file: the first counts."""
    for tied in (True, False):
        folder = make_tiny_llama(tmp_path / str(tied), 1, dtype="float32", tied=tied)
        bench = bench_for(Recipe.single(str(folder)), "decoder", "cpu")
        rows, deltas = prepared(bench), random_deltas(bench)
        found = layer_products(bench, rows, readers(deltas), groups_of(bench))
        assert found == pytest.approx(by_hand(bench, rows, deltas), rel=1e-4, abs=1e-7)
    both = tmp_path / "both"
    shutil.copytree(tmp_path / "True", both)
    tensors = load_file(both / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, both / "model.safetensors", metadata={"format": "pt"})
    bench = bench_for(Recipe.single(str(both)), "decoder", "cpu")
    deltas = {"A": {name: torch.ones(info.shape) for name, info in bench.checkpoint.tensors.items()}}
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    found = layer_products(bench, prepared(bench), readers(deltas), dict(zip(names, ("in", "out"), strict=True)))
    assert found["A", "in"] != 0.0
    assert found["A", "out"] == 0.0


def test_tensors_that_the_model_does_not_use_count_as_nothing(bench: Workbench) -> None:
    groups = {**groups_of(bench), "classifier.weight": "unused"}
    deltas = {"A": lambda name: torch.ones(bench.checkpoint.tensors[name].shape) if name in groups_of(bench) else None}
    assert layer_products(bench, prepared(bench), deltas, groups)["A", "unused"] == 0.0


def test_weights_that_no_file_s_tensor_reaches_are_told(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    found = bench.places(bench.checkpoint.tensors)
    lost = max(found, key=lambda name: found[name].numel())
    monkeypatch.setattr(bench, "places", lambda _: {name: place for name, place in found.items() if name != lost})
    with pytest.raises(MergeError, match=r"There is no estimate for .*: its files arrange .* otherwise"):
        layer_products(bench, prepared(bench), readers(random_deltas(bench)), groups_of(bench))
    assert clean(bench)


@pytest.mark.parametrize("after", [0, 1, 5, 40, 60])
def test_a_stop_leaves_the_bench_as_it_was(bench: Workbench, after: int) -> None:
    """Stopped while deltas are looked at, at the first batch, or amid a backward pass."""
    rows, deltas, stop = prepared(bench), random_deltas(bench, "A"), threading.Event()
    count = 0

    def read(name: str) -> torch.Tensor | None:
        nonlocal count
        count += 1
        if count > after:
            stop.set()
        return deltas["A"].get(name)

    before = [loss for _, loss in losses(bench, rows)]
    with pytest.raises(Stopped):
        layer_products(bench, rows, {"A": read}, groups_of(bench), stop=stop, budget_bytes=0)
    assert clean(bench)
    assert [loss for _, loss in losses(bench, rows)] == before


def test_16_bit_weights_are_estimated_too(tiny_llama: TinyFamily) -> None:
    checkpoint = open_checkpoint(str(tiny_llama.base))
    bench = Workbench(checkpoint, "decoder", "cpu", dtype=torch.bfloat16)
    bench.follow(Recipe.single(str(tiny_llama.base)))
    rows, deltas = prepared(bench), random_deltas(bench, "A")
    found = layer_products(bench, rows, readers(deltas), groups_of(bench))
    assert found == pytest.approx(by_hand(bench, rows, deltas), rel=0.1, abs=1e-3)
