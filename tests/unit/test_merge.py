"""Running a plan: the events, the types, the buffers, and what stopping leaves."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_merge.checkpoint import open_checkpoint
from llm_merge.merge import MemorySink, merged_tensor, rounding_loss, rounding_warning, run
from llm_merge.methods import METHODS, get_method
from llm_merge.plan import Plan, TensorPlan, make_plan
from llm_merge.recipe import ModelEntry, Recipe
from tests.tiny_models import TinyFamily, make_tiny_llama, make_tiny_lora


@dataclass
class RecordingSink:
    """Writes down what it is asked to do; `fails_at` makes the write of that tensor fail."""

    fails_at: int = 10**9
    calls: list[str] = field(default_factory=list)

    def open(self, plan: Plan) -> None:
        self.calls.append("open")

    def write(self, tensor_plan: TensorPlan, tensor: torch.Tensor) -> None:
        if len(self.calls) > self.fails_at:
            raise OSError("the disk is gone")
        self.calls.append(tensor_plan.name)

    def finish(self) -> None:
        self.calls.append("finish")

    def discard(self) -> None:
        self.calls.append("discard")


@pytest.fixture
def plan(tiny_llama: TinyFamily) -> Plan:
    return make_plan(Recipe.linear(tiny_llama.references, [0.2, 0.3, 0.5]))


def test_events_count_tensors_and_bytes_up_to_the_total(plan: Plan) -> None:
    sink = RecordingSink()
    events = list(run(plan, sink))
    assert [event.phase for event in events] == ["merging"] * (len(plan.tensors) + 1) + ["finishing", "done"]
    assert [event.done for event in events[: len(plan.tensors) + 1]] == list(range(len(plan.tensors) + 1))
    assert [event.tensor for event in events[1:-2]] == [tensor.name for tensor in plan.tensors]
    sizes = [event.bytes_done for event in events]
    assert sizes == sorted(sizes)
    assert sizes[-1] == events[0].bytes_total == plan.output_bytes
    assert sink.calls == ["open", *(tensor.name for tensor in plan.tensors), "finish"]


def test_closing_the_generator_discards_once(plan: Plan) -> None:
    sink = RecordingSink()
    events = run(plan, sink)
    next(events)
    next(events)
    events.close()
    assert sink.calls == ["open", plan.tensors[0].name, "discard"]


def test_an_error_while_writing_discards_and_is_not_swallowed(plan: Plan) -> None:
    sink = RecordingSink(fails_at=3)
    with pytest.raises(OSError, match="the disk is gone"):
        list(run(plan, sink))
    assert sink.calls[-1] == "discard"
    assert "finish" not in sink.calls


def test_a_memory_sink_forgets_what_was_stopped(plan: Plan) -> None:
    sink = MemorySink()
    events = run(plan, sink)
    for _ in range(4):
        next(events)
    assert len(sink.tensors) == 3
    events.close()
    assert sink.tensors == {}


def test_the_type_asked_for_is_the_type_of_every_floating_tensor(tiny_llama: TinyFamily) -> None:
    recipe = Recipe.linear(tiny_llama.references, [0.2, 0.3, 0.5], dtype="float32")
    sink = MemorySink()
    list(run(make_plan(recipe), sink))
    assert {tensor.dtype for tensor in sink.tensors.values()} == {torch.float32}


def test_values_are_rounded_once_at_the_end(tiny_llama: TinyFamily) -> None:
    """0.33·a + 0.67·b in bfloat16 arithmetic differs from the rounded exact sum (merge-methods, mergekit's 2.4375)."""
    references = tiny_llama.references[:2]
    sink = MemorySink()
    list(run(make_plan(Recipe.linear(references, [0.33, 0.67])), sink))
    a, b = (load_file(Path(reference) / "model.safetensors") for reference in references)
    name = "model.layers.0.mlp.up_proj.weight"
    exact = (0.33 * a[name].double() + 0.67 * b[name].double()).to(torch.bfloat16)
    rounded_early = (
        torch.tensor(0.33, dtype=torch.bfloat16) * a[name] + torch.tensor(0.67, dtype=torch.bfloat16) * b[name]
    )
    assert torch.equal(sink.tensors[name], exact)
    assert not torch.equal(rounded_early, exact)


def test_integer_and_bool_buffers_are_the_first_models(tmp_path: Path) -> None:
    folders = [make_tiny_llama(tmp_path / name, seed) for seed, name in enumerate(("first", "second"))]
    for number, folder in enumerate(folders):
        tensors = load_file(folder / "model.safetensors")
        tensors["model.position_ids"] = torch.arange(4) + number
        tensors["model.mask"] = torch.tensor([True, bool(number)])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    plan = make_plan(Recipe.linear([str(folder) for folder in folders], [0.5, 0.5]))
    actions = {tensor.name: tensor.action for tensor in plan.tensors}
    assert actions["model.position_ids"] == actions["model.mask"] == "copy"
    sink = MemorySink()
    list(run(plan, sink))
    assert sink.tensors["model.position_ids"].tolist() == [0, 1, 2, 3]
    assert sink.tensors["model.mask"].tolist() == [True, False]


def test_normalised_weights_are_divided_by_their_sum(tiny_llama_float32: TinyFamily) -> None:
    entries = tuple(
        ModelEntry(reference, weight)
        for reference, weight in zip(tiny_llama_float32.references, (2, 1, 1), strict=True)
    )
    halves = make_plan(Recipe(models=entries))
    same = make_plan(Recipe.linear(tiny_llama_float32.references, [0.5, 0.25, 0.25]))
    assert halves.weights == same.weights
    tensor = halves.tensors[0]
    assert torch.equal(merged_tensor(halves, tensor), merged_tensor(same, tensor))


def test_a_head_of_its_own_beside_a_tied_one_is_averaged_with_the_embeddings(tmp_path: Path) -> None:
    tied = make_tiny_llama(tmp_path / "tied", 0, dtype="float32")
    free = make_tiny_llama(tmp_path / "free", 1, dtype="float32", tied=False)
    plan = make_plan(Recipe.linear([str(tied), str(free)], [0.5, 0.5]))
    assert plan.separate_head
    sink = MemorySink()
    list(run(plan, sink))
    embeddings = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    head = load_file(free / "model.safetensors")["lm_head.weight"]
    expected = 0.5 * embeddings + 0.5 * head
    assert torch.allclose(sink.tensors["lm_head.weight"], expected, rtol=0, atol=1e-7)


def test_a_stored_copy_of_a_tied_head_is_left_out(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "model", 0)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    plan = make_plan(Recipe.linear([str(folder)] * 2, [0.5, 0.5]))
    assert "lm_head.weight" not in {tensor.name for tensor in plan.tensors}
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True


def test_rounding_loss_is_the_share_of_changed_entries_that_fall_back_to_the_base(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base", 0)
    tensors = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        tensors[name] = torch.ones_like(tensor)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    # At 1.0 bfloat16 steps by 2⁻⁷: a quarter of a step is lost, three quarters are not; untouched entries do not count.
    other = make_tiny_llama(tmp_path / "other", 0, dtype="float32")
    for name, tensor in tensors.items():
        changed = torch.ones(tensor.shape, dtype=torch.float32)
        flat = changed.reshape(-1)
        flat[0::4] += 0.25 * 2**-7
        flat[1::4] += 0.75 * 2**-7
        tensors[name] = changed
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe.linear([str(base), str(other)], [0, 1])
    assert rounding_loss(make_plan(recipe)) == 0.5
    warning = rounding_warning(make_plan(recipe))
    assert warning is not None
    assert warning.message == "Rounding to bfloat16 puts 50 % of the changed weights back to the base's value."
    assert warning.fix == "Choose float32 as the type to keep them."
    exact = make_plan(recipe.with_dtype("float32"))
    assert rounding_loss(exact) == 0
    assert rounding_warning(exact) is None


def test_rounding_loss_of_adapters_is_counted_against_the_base_without_them(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base", 0)
    adapters = [make_tiny_lora(tmp_path / f"adapter-{n}", n, base, alpha=1e-6) for n in (1, 2)]
    recipe = Recipe.linear([f"{base}+{adapter}" for adapter in adapters], [0.5, 0.5])
    plan = make_plan(recipe)
    assert rounding_loss(plan) > 0.99
    assert rounding_loss(plan, base=open_checkpoint(str(base))) == rounding_loss(plan)


def test_every_method_says_what_a_person_should_know() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert method.title
        assert method.paper
        assert method.formula
        assert all(parameter.help.endswith(".") for parameter in method.parameters.values())
    assert get_method("linear").parameters["weights"].each
