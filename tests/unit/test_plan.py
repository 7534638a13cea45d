"""What headers and configs tell: the layout of the result, and every problem in its own words."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_merge.errors import IncompatibleModels, Problem
from llm_merge.merge import MemorySink, run
from llm_merge.plan import check, make_plan, size_text
from llm_merge.plan_changes import changed_tensors, differs
from llm_merge.recipe import ModelEntry, Recipe, Rule
from tests.tiny_models import TinyFamily, make_tiny_llama, make_tiny_lora

REPOSITORY = Path(__file__).resolve().parents[2]


def problems_of(
    *models: Path | str, weights: list[float] | None = None, dtype: str | None = None
) -> tuple[Problem, ...]:
    shares = weights or [1 / len(models)] * len(models)
    plan, problems = check(Recipe.linear([str(model) for model in models], shares, dtype=dtype))
    assert (plan is None) == any(problem.severity == "problem" for problem in problems)
    return problems


def edit_config(folder: Path, **values: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


def edit_tensors(folder: Path, add: dict[str, torch.Tensor] | None = None, remove: tuple[str, ...] = ()) -> Path:
    tensors = load_file(folder / "model.safetensors") | (add or {})
    for name in remove:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "llama", 0)


# ── the layout ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_models_that_fit_have_a_plan_and_nothing_to_complain_about(tiny_llama: TinyFamily) -> None:
    assert problems_of(*tiny_llama.folders) == ()
    plan = make_plan(Recipe.linear(tiny_llama.references, [0.2, 0.3, 0.5]))
    own = load_file(tiny_llama.base / "model.safetensors")
    assert {tensor.name: tensor.shape for tensor in plan.tensors} == {name: tuple(t.shape) for name, t in own.items()}
    assert plan.dtype == "bfloat16"
    assert plan.output_bytes == sum(tensor.nbytes for tensor in own.values())
    assert plan.output_bytes < plan.peak_memory_bytes < 10 * 2**20
    assert [shard.file for shard in plan.shards] == ["model.safetensors"]


def test_shards_are_filled_in_order_and_none_is_larger_than_asked(tiny_llama: TinyFamily) -> None:
    recipe = Recipe.linear(tiny_llama.references, [0.2, 0.3, 0.5])
    largest = max(tensor.nbytes for tensor in make_plan(recipe).tensors)
    plan = make_plan(recipe, max_shard_bytes=largest)
    count = len(plan.shards)
    assert count > 1
    assert [shard.file for shard in plan.shards] == [
        f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    for shard in plan.shards:
        inside = [tensor for tensor in plan.tensors if tensor.shard == shard.file]
        assert shard.nbytes == sum(tensor.nbytes for tensor in inside) <= largest
        assert [tensor.start for tensor in inside] == [
            sum(tensor.nbytes for tensor in inside[:position]) for position in range(len(inside))
        ]


def test_wide_types_come_first_so_that_every_tensor_is_aligned(llama: Path) -> None:
    edit_tensors(llama, add={"model.odd": torch.zeros(3, dtype=torch.bool), "model.ids": torch.arange(3)})
    plan = make_plan(Recipe.linear([str(llama)] * 2, [0.5, 0.5]))
    assert all(tensor.start % (tensor.nbytes // max(1, tensor.elements)) == 0 for tensor in plan.tensors)
    assert plan.tensors[0].name == "model.ids"
    assert plan.tensors[-1].name == "model.odd"


def test_without_a_type_every_tensor_keeps_the_first_models(tmp_path: Path) -> None:
    first, second = (make_tiny_llama(tmp_path / name, seed) for seed, name in enumerate(("first", "second")))
    norm = "model.norm.weight"
    edit_tensors(first, add={norm: load_file(first / "model.safetensors")[norm].float()})
    plan = make_plan(Recipe.linear([str(first), str(second)], [0.5, 0.5]))
    kinds = {tensor.name: tensor.dtype for tensor in plan.tensors}
    assert kinds.pop(norm) == "float32"
    assert set(kinds.values()) == {"bfloat16"}
    assert plan.dtype == "bfloat16"


def test_a_base_model_gives_the_config_and_need_not_be_mixed(tiny_llama: TinyFamily) -> None:
    entries = tuple(ModelEntry(str(folder), 0.5) for folder in tiny_llama.fine_tunes)
    plan = make_plan(Recipe(models=entries, base_model=str(tiny_llama.base)))
    assert plan.base.folder == tiny_llama.base
    assert [checkpoint.folder for checkpoint in plan.checkpoints] == list(tiny_llama.fine_tunes)


def test_planning_reads_no_weight_and_imports_no_torch(tiny_llama: TinyFamily) -> None:
    code = (
        "import sys\n"
        "from llm_merge import tensor_file\n"
        "from llm_merge.plan import make_plan\n"
        "from llm_merge.recipe import Recipe\n"
        "tensor_file.read_tensor = None\n"
        f"plan = make_plan(Recipe.linear({tiny_llama.references!r}, [0.2, 0.3, 0.5]))\n"
        "print(len(plan.tensors), sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.stdout.split() == ["20", "[]"], done.stderr


def test_the_memory_promised_covers_what_a_merge_holds(tiny_llama: TinyFamily) -> None:
    recipe = Recipe.linear(tiny_llama.references, [0.2, 0.3, 0.5])
    plan = make_plan(recipe)
    largest = max(plan.tensors, key=lambda tensor: tensor.nbytes)
    assert plan.peak_memory_bytes >= (len(plan.checkpoints) + 1) * largest.nbytes
    one = make_plan(Recipe.linear(tiny_llama.references, [1, 0, 0]))
    assert one.peak_memory_bytes < plan.peak_memory_bytes


# ── problems ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_two_architectures(tiny_llama: TinyFamily, tiny_bert: TinyFamily) -> None:
    (problem,) = problems_of(tiny_llama.base, tiny_bert.fine_tunes[0])
    assert str(problem) == (
        "“tune-1” is an embedding model, BertModel, but “base” is a chat model, LlamaForCausalLM: two architectures "
        "cannot be merged. Choose fine-tunes of one base."
    )
    assert problem.model == str(tiny_bert.fine_tunes[0])


def test_other_numbers_of_layers_and_other_widths(tmp_path: Path, llama: Path) -> None:
    deeper = make_tiny_llama(tmp_path / "deeper", 1, layers=3)
    (problem,) = problems_of(llama, deeper)
    assert str(problem) == "“deeper” has 3 layers, “llama” has 2. Choose models of the same size."
    wider = make_tiny_llama(tmp_path / "wider", 1, hidden=48)
    (problem,) = problems_of(llama, wider)
    assert str(problem) == ("“wider” has 48 hidden values per token, “llama” has 32. Choose models of the same size.")


def test_another_vocabulary(tmp_path: Path, llama: Path) -> None:
    other = make_tiny_llama(tmp_path / "other", 1)
    rows = load_file(other / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(other, add={"model.embed_tokens.weight": torch.cat([rows, rows[:2]])})
    edit_config(other, vocab_size=len(rows) + 2)
    (problem,) = problems_of(llama, other)
    assert str(problem) == (
        f"“other” has a vocabulary of {len(rows) + 2} tokens, “llama” of {len(rows)}: the rows of their embeddings do "
        "not mean the same tokens. Choose models with the same tokenizer."
    )


def test_missing_tensors_extra_tensors_and_other_shapes_are_all_said_at_once(tmp_path: Path, llama: Path) -> None:
    other = make_tiny_llama(tmp_path / "other", 1)
    edit_tensors(
        other,
        add={"model.extra.weight": torch.ones(2), "model.norm.weight": torch.ones(31, dtype=torch.bfloat16)},
        remove=("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
    )
    assert [str(problem) for problem in problems_of(llama, other)] == [
        "“other” lacks 2 tensors (model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight) of “llama”. "
        "Check that it is complete and of the same architecture.",
        "“other” has the tensor model.extra.weight that “llama” does not have. "
        "Choose the model it was trained from as the base.",
        "“other” has tensors of other shapes: model.norm.weight is 31 there and 32 in “llama”. "
        "Choose models of the same size.",
    ]


def test_problems_of_all_models_are_collected(tmp_path: Path, llama: Path, tiny_bert: TinyFamily) -> None:
    deeper = make_tiny_llama(tmp_path / "deeper", 1, layers=3)
    missing = tmp_path / "nowhere"
    found = problems_of(llama, deeper, tiny_bert.base, missing)
    assert [problem.model for problem in found] == [str(missing), str(deeper), str(tiny_bert.base)]
    with pytest.raises(IncompatibleModels) as error:
        make_plan(Recipe.linear([str(m) for m in (llama, deeper, tiny_bert.base, missing)], [0.25] * 4))
    assert error.value.problems == found
    assert error.value.message.count("\n") == 2


def test_a_folder_that_does_not_exist(llama: Path, tmp_path: Path) -> None:
    (problem,) = problems_of(llama, tmp_path / "nowhere")
    assert problem.message == f"There is no folder “{tmp_path / 'nowhere'}”."


def test_a_pickle_checkpoint(llama: Path, tmp_path: Path) -> None:
    other = make_tiny_llama(tmp_path / "other", 1)
    (other / "model.safetensors").rename(other / "pytorch_model.bin")
    (problem,) = problems_of(llama, other)
    assert "holds its weights as a pickle (pytorch_model.bin)" in problem.message
    assert "convert it once" in problem.message


def test_an_adapter_for_another_base(tmp_path: Path, llama: Path) -> None:
    adapter = make_tiny_lora(tmp_path / "adapter", 1, llama, base_model_name_or_path="org/another-model")
    edit_config(llama, _name_or_path="org/this-model")
    (problem,) = problems_of(llama, f"{llama}+{adapter}")
    assert str(problem) == (
        "The adapter “adapter” was made for “org/another-model”, and the chosen base is “org/this-model”. "
        "Choose “org/another-model” as base, or another adapter."
    )


def test_an_unknown_method_and_weights_that_cancel(llama: Path) -> None:
    recipe = Recipe(models=(ModelEntry(str(llama), 1.0), ModelEntry(str(llama), -1.0)), merge_method="lineer")
    _, found = check(recipe)
    assert [str(problem) for problem in found] == [
        "There is no merge method `lineer`: did you mean `linear`?",
        "The weights sum to 0, and dividing by their sum is not possible. Change a weight, or set `normalize: false`.",
    ]


def test_packed_weights(tmp_path: Path, llama: Path) -> None:
    other = make_tiny_llama(tmp_path / "other", 1)
    edit_tensors(other, add={"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)})
    (problem,) = problems_of(llama, other)
    assert problem.message == "“other” is quantised (float8_e4m3fn): such weights cannot be mixed."


# ── warnings ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_warnings_do_not_forbid_the_merge(tmp_path: Path, llama: Path) -> None:
    other = edit_config(make_tiny_llama(tmp_path / "other", 1), rms_norm_eps=1e-3)
    (warning,) = problems_of(llama, other)
    assert str(warning) == (
        "“other” was trained with other settings: rms_norm_eps (0.001 instead of 1e-06). "
        "The merge computes with those of “llama”."
    )
    assert warning.severity == "warning"


def test_other_tokenizer_files_of_the_same_size(tmp_path: Path, llama: Path) -> None:
    other = make_tiny_llama(tmp_path / "other", 1)
    file = other / "tokenizer.json"
    file.write_text(file.read_text() + " ")
    (warning,) = problems_of(llama, other)
    assert str(warning) == (
        "“other” has other tokenizer files than “llama”, with as many tokens. "
        "The merge uses those of “llama”: check that both number their tokens alike."
    )


def test_a_tied_head_beside_one_of_its_own(tmp_path: Path, llama: Path) -> None:
    free = make_tiny_llama(tmp_path / "free", 1, tied=False)
    (warning,) = problems_of(llama, free)
    assert str(warning) == (
        "“free” has an output head of its own, “llama” uses its input embeddings as the head. "
        "The result gets a head of its own."
    )


def test_types_that_hold_less_than_a_models_own(tmp_path: Path, llama: Path) -> None:
    precise = make_tiny_llama(tmp_path / "precise", 1, dtype="float32")
    (warning,) = problems_of(llama, precise)
    assert str(warning) == (
        "“precise” is stored in float32 and the result in bfloat16: it is rounded. "
        "Choose float32 as the type to keep every digit."
    )
    (warning,) = problems_of(llama, llama, dtype="float16")
    assert warning.message == "“llama” is stored in bfloat16, whose values may be too large for float16."
    assert problems_of(llama, precise, dtype="float32") == ()


def test_a_pooler_that_one_model_lacks_is_the_first_models(tiny_bert: TinyFamily, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_bert.base, other)
    edit_tensors(other, remove=("pooler.dense.weight", "pooler.dense.bias"))
    assert problems_of(tiny_bert.base, other) == ()
    sink = MemorySink()
    list(run(make_plan(Recipe.linear([str(tiny_bert.base), str(other)], [0.5, 0.5])), sink))
    own = load_file(tiny_bert.base / "model.safetensors")
    assert torch.equal(sink.tensors["pooler.dense.weight"], own["pooler.dense.weight"])


def test_sizes_are_written_as_people_say_them() -> None:
    assert [size_text(n) for n in (12, 513_000_000, 1_234_000_000, 999_900_000, 5e12)] == [
        "12 bytes",
        "513 MB",
        "1.23 GB",
        "1 GB",
        "5 TB",
    ]


# ── task vectors and layers ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs"])
def test_task_vectors_need_a_base_and_that_is_said_once(tiny_llama: TinyFamily, method: str) -> None:
    recipe = Recipe(tuple(ModelEntry(model, 0.5) for model in tiny_llama.references), method)
    plan, problems = check(recipe)
    assert plan is None
    (problem,) = problems
    assert str(problem) == (
        f"{method} adds what each model learned to a base, and the recipe names none. Add `base_model:`."
    )
    with pytest.raises(IncompatibleModels, match="Add `base_model:`"):
        make_plan(recipe)


def layered(family: TinyFamily) -> list[Recipe]:
    """Recipes over the same models that differ in method, layers and parameters."""
    base, one, two = family.references
    plain = Recipe((ModelEntry(one, 0.5), ModelEntry(two, 0.5)), "breadcrumbs", base, normalize=False)
    return [
        plain,
        plain.with_value(0, "weight", ["layers.1."], 0.0),
        plain.with_value(0, "weight", ["layers.1."], 0.0).with_value(1, "density", ["layers.0."], 0.25),
        replace(plain, merge_method="ties", parameters=(("lambda", 0.5),)),
        replace(plain, merge_method="linear", normalize=True),
        replace(plain, models=(ModelEntry(one, (0.0, 1.0)), ModelEntry(two, (Rule(0.25, "mlp"), Rule(1.0))))),
        plain,
    ]


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_t5"])
def test_a_plan_made_from_another_is_the_plan(family: str, request: pytest.FixtureRequest) -> None:
    recipes = layered(request.getfixturevalue(family))
    plan = make_plan(recipes[0])
    for recipe in recipes:
        plan, fresh = plan.following(recipe), make_plan(recipe)
        assert plan.tensors == fresh.tensors
        assert (plan.recipe, plan.weights, plan.dtype, plan.shards, plan.separate_head) == (
            fresh.recipe, fresh.weights, fresh.dtype, fresh.shards, fresh.separate_head,
        )  # fmt: skip
        assert plan.is_task_arithmetic == (recipe.merge_method != "linear")
        assert not differs(plan, fresh)


def test_tensors_that_stay_as_they_are_keep_their_plan(tiny_llama: TinyFamily) -> None:
    first, second, *_ = layered(tiny_llama)
    plan = make_plan(first)
    other = plan.following(second)
    kept = [one is two for one, two in zip(plan.tensors, other.tensors, strict=True)]
    assert kept == [".layers.1." not in tensor.name for tensor in plan.tensors]
    assert [tensor.name for tensor in changed_tensors(plan, other)] == [
        tensor.name for tensor in plan.tensors if ".layers.1." in tensor.name
    ]


def test_another_recipe_s_models_are_opened(tiny_llama: TinyFamily) -> None:
    base, one, two = tiny_llama.references
    plan = make_plan(Recipe((ModelEntry(one, 1.0),), "task_arithmetic", base))
    for recipe in (Recipe((ModelEntry(two, 1.0),), "task_arithmetic", base),
                   Recipe((ModelEntry(one, 1.0),), "task_arithmetic", two),
                   Recipe((ModelEntry(one, 1.0),), "task_arithmetic", base, dtype="float32")):  # fmt: skip
        assert plan.following(recipe).tensors == make_plan(recipe).tensors
    with pytest.raises(IncompatibleModels):
        make_plan(Recipe((ModelEntry(one, 1.0),))).following(Recipe((ModelEntry(one, 1.0),), "task_arithmetic"))


def test_weights_that_cancel_in_one_layer_are_a_problem_of_that_layer(tiny_llama: TinyFamily) -> None:
    entries = (ModelEntry(tiny_llama.references[0], (Rule(-0.5, "layers.1.mlp.up"), Rule(0.5))),
               ModelEntry(tiny_llama.references[1], 0.5))  # fmt: skip
    plan, problems = check(Recipe(entries))
    assert plan is None
    (problem,) = problems
    assert problem.message == (
        "The weights sum to 0 for model.layers.1.mlp.up_proj.weight, and dividing by their sum is not possible: "
        "change one there."
    )
    assert check(Recipe(entries, normalize=False))[0] is not None


def test_weights_for_named_tensors_alone_are_enough(tiny_llama: TinyFamily) -> None:
    """Every tensor is named: that there is no weight for the rest is no problem."""
    rules = (Rule(0.5, "layers."), Rule(0.25, "embed_tokens"), Rule(1.0, "model.norm"))
    plan = make_plan(Recipe(tuple(ModelEntry(model, rules) for model in tiny_llama.references[:2])))
    assert {tensor.weights for tensor in plan.tensors} == {(0.5, 0.5), (0.25, 0.25), (1.0, 1.0)}


def test_a_tensor_without_a_value_is_a_problem(tiny_llama: TinyFamily) -> None:
    recipe = Recipe((ModelEntry(tiny_llama.references[0], (Rule(1.0, "mlp"),)),))
    plan, problems = check(recipe)
    assert plan is None
    assert "has no weight for model." in problems[-1].message
    assert "end its list of filters with one `- value:`" in problems[-1].message
