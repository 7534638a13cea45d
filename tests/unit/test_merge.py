"""Running a plan: the events, the types, the buffers, and what stopping leaves."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_merge.checkpoint import Checkpoint, open_checkpoint
from llm_merge.merge import MemorySink, merged_tensor, rounding_loss, rounding_warning, run
from llm_merge.methods import METHODS, RandomKey, get_method
from llm_merge.output import FolderSink
from llm_merge.plan import Plan, TensorPlan, make_plan
from llm_merge.recipe import ModelEntry, Recipe, Rule
from tests.tiny_models import TinyFamily, make_family, make_tiny_llama, make_tiny_lora


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
    assert get_method("linear").parameters["weight"].each


# ── task vectors ────────────────────────────────────────────────────────────────────────────────────────────────────

Q, UP, NORM = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
SETTINGS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"lambda": 0.9},
    "ties": {"density": (0.3, 0.7), "normalize": True},
    "dare_linear": {"density": (0.5, 0.8), "random_seed": 3},
    "dare_ties": {"density": (0.5, 0.8)},
    "breadcrumbs": {"density": (0.5, 1.0), "gamma": (0.1, 0.0)},
    "breadcrumbs_ties": {"density": (0.5, 0.8), "gamma": (0.1, 0.0)},
}


def task_vectors(family: TinyFamily, method: str, weights: tuple[float, float] = (0.7, -0.4)) -> Recipe:
    settings = SETTINGS[method]
    each = {name: value for name, value in settings.items() if isinstance(value, tuple)}
    entries = tuple(
        ModelEntry(model, weights[index], tuple((name, value[index]) for name, value in each.items()))
        for index, model in enumerate(family.references[1:])
    )
    top = tuple((name, float(v)) for name, v in settings.items() if name not in each and not isinstance(v, bool))
    return Recipe(entries, method, family.references[0], normalize=settings.get("normalize"), parameters=top)


def merged(recipe: Recipe) -> dict[str, torch.Tensor]:
    sink = MemorySink()
    list(run(make_plan(recipe), sink))
    return sink.tensors


def states(family: TinyFamily) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / "model.safetensors") for folder in family.folders]


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_llama_float32", "tiny_bert", "tiny_t5"])
def test_a_merge_is_the_method_on_whole_state_dicts(
    method: str, family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    models: TinyFamily = request.getfixturevalue(family)
    recipe = task_vectors(models, method)
    found, chosen = merged(recipe), METHODS[method]
    base, *tunes = states(models)
    assert found.keys() == base.keys()
    names = tuple(f"{model}#0" for model in models.references[1:])
    for name, tensor in found.items():
        settings = {"weight": (0.7, -0.4), **SETTINGS[method]}
        expected = chosen.apply([tune[name].float() for tune in tunes], settings, base=base[name].float(),
                                key=RandomKey(name, names))  # fmt: skip
        assert torch.equal(tensor, expected.to(tensor.dtype)), name
    for _ in run(make_plan(recipe), FolderSink(tmp_path / "out")):
        pass
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == found.keys()
    assert all(torch.equal(saved[name], found[name]) for name in found)


def test_the_base_among_the_models_changes_nothing(tiny_llama: TinyFamily) -> None:
    for method in ("task_arithmetic", "ties", "breadcrumbs"):
        recipe = task_vectors(tiny_llama, method)
        listed = replace(recipe, models=(ModelEntry(tiny_llama.references[0]), *recipe.models))
        expected, found = merged(recipe), merged(listed)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert make_plan(listed).weights == (0.0, *make_plan(recipe).weights)


def test_weight_zero_everywhere_is_the_base_to_the_bit(tiny_llama: TinyFamily) -> None:
    for method in SETTINGS:
        found, base = merged(task_vectors(tiny_llama, method, (0.0, 0.0))), states(tiny_llama)[0]
        assert all(torch.equal(found[name], base[name]) for name in base)


def test_a_layer_s_weight_and_density_reach_that_layer_alone(tiny_llama_float32: TinyFamily) -> None:
    plain = task_vectors(tiny_llama_float32, "breadcrumbs")
    changed = plain.with_value(0, "weight", ["layers.1."], 0.0).with_value(1, "density", ["layers.1."], 0.2)
    before, after = merged(plain), merged(changed)
    differ = {name for name in before if not torch.equal(before[name], after[name])}
    assert differ
    assert all(".layers.1." in name for name in differ)
    base, _, two = states(tiny_llama_float32)
    kept = METHODS["breadcrumbs"].apply([two[UP]], {"weight": (-0.4,), "density": (0.2,), "gamma": (0.0,)},
                                        base=base[UP])  # fmt: skip
    assert torch.equal(after[UP], kept)


def test_a_gradient_goes_from_the_first_block_to_the_last_and_embeddings_take_the_first(tmp_path: Path) -> None:
    """mergekit's: what lies outside of the blocks gets the first value, a single block the last one."""
    deep = make_family(make_tiny_llama, tmp_path / "deep", fine_tunes=1, dtype="float32", layers=3)
    recipe = Recipe((ModelEntry(deep.references[1], (0.0, 1.0)),), "task_arithmetic", deep.references[0])
    shares = {tensor.name: tensor.weights for tensor in make_plan(recipe).tensors}
    for layer, share in ((0, 0.0), (1, 0.5), (2, 1.0)):
        assert {w for name, w in shares.items() if f"layers.{layer}." in name} == {(share,)}
    assert shares["model.embed_tokens.weight"] == shares[NORM] == (0.0,)
    flat = make_family(make_tiny_llama, tmp_path / "flat", fine_tunes=1, dtype="float32", layers=1)
    recipe = Recipe((ModelEntry(flat.references[1], (0.0, 1.0)),), "task_arithmetic", flat.references[0])
    shares = {tensor.name: tensor.weights for tensor in make_plan(recipe).tensors}
    assert shares["model.layers.0.mlp.up_proj.weight"] == (1.0,)
    assert shares["model.embed_tokens.weight"] == (0.0,)


def test_a_weighted_average_by_layers(tiny_llama_float32: TinyFamily) -> None:
    refs = tiny_llama_float32.references
    recipe = Recipe((ModelEntry(refs[0], (Rule(1.0, "mlp"), Rule(0.0))), ModelEntry(refs[1], 1.0)))
    found, (base, one, _) = merged(recipe), states(tiny_llama_float32)
    assert torch.equal(found[UP], ((base[UP].double() + one[UP].double()) / 2).float()), "divided by its own sum"
    assert torch.equal(found[Q], one[Q])


def test_adapters_are_merged_as_what_they_add(tmp_path: Path, tiny_llama_float32: TinyFamily) -> None:
    base, folder = tiny_llama_float32.references[0], tiny_llama_float32.base
    made = [make_tiny_lora(tmp_path / str(n), n, folder, targets=("q_proj",)) for n in (1, 2)]
    models = [f"{base}+{adapter}" for adapter in made]
    found = merged(Recipe(tuple(ModelEntry(model, 0.5) for model in models), "task_arithmetic", base))
    own = load_file(folder / "model.safetensors")
    tuned = [open_checkpoint(model).read(Q) for model in models]
    expected = own[Q] + 0.5 * (tuned[0] - own[Q]) + 0.5 * (tuned[1] - own[Q])
    assert torch.allclose(found[Q], expected, rtol=0, atol=1e-7)
    assert not torch.equal(found[Q], own[Q])
    assert all(torch.equal(found[name], tensor) for name, tensor in own.items() if "q_proj" not in name)


@pytest.mark.parametrize("method", SETTINGS)
def test_what_an_adapter_leaves_alone_is_not_read_from_it(
    tmp_path: Path, tiny_llama: TinyFamily, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    base = tiny_llama.references[0]
    made = [make_tiny_lora(tmp_path / str(n), n, tiny_llama.base, targets=("q_proj",)) for n in (1, 2)]
    models = TinyFamily(tiny_llama.base, tuple(Path(f"{base}+{adapter}") for adapter in made))
    plan = make_plan(task_vectors(models, method))
    reads: list[tuple[str, str]] = []
    own = Checkpoint.read

    def counted(self: Checkpoint, name: str) -> torch.Tensor:
        reads.append((self.reference, name))
        return own(self, name)

    monkeypatch.setattr(Checkpoint, "read", counted)
    list(run(plan, MemorySink()))
    assert {name for reference, name in reads if reference != base} == {n for n in own_names(plan) if "q_proj" in n}
    assert len(reads) == len(set(reads)), "each tensor once"


def own_names(plan: Plan) -> set[str]:
    return {tensor.name for tensor in plan.tensors}


def test_the_seed_and_the_model_s_name_decide_what_is_drawn(tiny_llama: TinyFamily) -> None:
    recipe = task_vectors(tiny_llama, "dare_linear")
    first = merged(recipe)
    assert all(torch.equal(first[name], tensor) for name, tensor in merged(recipe).items())
    other = merged(replace(recipe, parameters=(("random_seed", 4.0),)))
    assert not torch.equal(first[UP], other[UP])
    turned = merged(replace(recipe, models=recipe.models[::-1]))
    assert torch.allclose(first[UP].float(), turned[UP].float(), rtol=0, atol=1e-2)


@pytest.mark.parametrize("method", SETTINGS)
def test_rounding_loss_of_task_vectors(tiny_llama: TinyFamily, method: str) -> None:
    assert rounding_loss(make_plan(task_vectors(tiny_llama, method, (0.0, 0.0)))) == 0, "left out is not lost"
    kept = rounding_loss(make_plan(task_vectors(tiny_llama, method, (1.0, 0.0))))
    assert kept < 1
    if method == "task_arithmetic":
        assert kept < 0.05
    recipe = task_vectors(tiny_llama, method, (1e-6, 1e-6))
    assert (rounding_loss(make_plan(recipe)) > 0.95) == (method not in ("ties",)), "ties divides its weights away"


def test_rounding_loss_where_a_layer_has_no_share_at_all(tiny_llama: TinyFamily) -> None:
    """A layer of zeros is a strange wish, but no reason to fail."""
    entries = tuple(ModelEntry(model, (Rule(0.0, "layers.1."), Rule(0.5))) for model in tiny_llama.references[:2])
    assert 0 <= rounding_loss(make_plan(Recipe(entries, normalize=False))) < 1


def test_rounding_loss_on_a_base_with_an_adapter(tmp_path: Path, tiny_llama: TinyFamily) -> None:
    base = f"{tiny_llama.base}+{make_tiny_lora(tmp_path / 'a', 1, tiny_llama.base, alpha=64.0)}"
    recipe = Recipe((ModelEntry(tiny_llama.references[1], 1.0),), "task_arithmetic", base)
    whole, plan = merged(recipe), make_plan(recipe)
    assert rounding_loss(plan) < 0.2
    own = open_checkpoint(base)
    delta = open_checkpoint(tiny_llama.references[1]).read(Q).float() - own.read(Q)
    assert torch.equal(whole[Q], (own.read(Q) + delta).to(torch.bfloat16))


def test_what_a_method_prunes_is_not_lost_to_rounding(tiny_llama_float32: TinyFamily) -> None:
    base, *tunes = tiny_llama_float32.references
    entries = tuple(ModelEntry(tune, 0.5, (("density", 0.1),)) for tune in tunes)
    recipe = Recipe(entries, "breadcrumbs", base, dtype="float32", normalize=False, parameters=(("gamma", 0.0),))
    assert rounding_loss(make_plan(recipe)) == 0.0
    assert rounding_warning(make_plan(recipe)) is None
