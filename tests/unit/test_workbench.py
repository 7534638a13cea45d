"""The workbench's laws: it becomes what the recipe says, to the bit, however often, and the sources stay the same."""

from __future__ import annotations

import hashlib
import math
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import llm_merge.merge
from llm_merge import plan_changes, workbench
from llm_merge.checkpoint import open_checkpoint
from llm_merge.errors import CheckpointError, MergeError, Stopped
from llm_merge.merge import Reader, merged_tensor
from llm_merge.plan import Plan, TensorPlan, make_plan
from llm_merge.recipe import ModelEntry, Recipe
from llm_merge.workbench import Workbench, bench_for, choose_device, choose_dtype
from tests.tiny_models import TinyFamily, make_tiny_llama

IDS = torch.tensor([[1, 40, 41, 42, 2]])


def values(bench: Workbench) -> dict[str, torch.Tensor]:
    return {name: parameter.clone() for name, parameter in bench.model.named_parameters()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_one_model_computes_exactly_what_transformers_loads(tiny_llama_float32: TinyFamily) -> None:
    from transformers import AutoModelForCausalLM

    bench = bench_for(Recipe.single(tiny_llama_float32.references[1]), "decoder", "cpu")
    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama_float32.fine_tunes[0]).eval()
    with torch.inference_mode():
        assert torch.equal(bench.model(IDS).logits, theirs(IDS).logits)


def test_a_merge_is_the_rounded_average_of_the_state_dicts(tiny_llama: TinyFamily) -> None:
    from transformers import AutoModelForCausalLM

    recipe = Recipe.linear(tiny_llama.references, [0.2, 0.5, 0.3])
    bench = bench_for(recipe, "decoder", "cpu")
    assert bench.dtype == torch.float32
    models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).state_dict() for f in tiny_llama.folders]
    for name, parameter in bench.model.named_parameters():
        average = sum(weight * model[name].double() for weight, model in zip(recipe.weights, models, strict=True))
        assert isinstance(average, torch.Tensor)
        rounded = parameter.to(torch.bfloat16)
        assert torch.equal(rounded.float(), parameter), "what is tried must be what bfloat16 saves"
        assert torch.allclose(rounded.double(), average, rtol=2**-8, atol=1e-9)


def test_a_hundred_merges_change_nothing(tiny_llama: TinyFamily) -> None:
    recipes = [
        Recipe.linear(tiny_llama.references[1:], [0.3, 0.7]),
        Recipe.single(tiny_llama.references[0]),
        Recipe.linear(tiny_llama.references, [0.4, -0.4, 1.0]),
    ]
    bench = bench_for(recipes[0], "decoder", "cpu")
    first = values(bench)
    places = [parameter.data_ptr() for parameter in bench.model.parameters()]
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in _files(tiny_llama)}
    for turn in range(99):
        bench.follow(recipes[(turn + 1) % 3])
    bench.follow(recipes[0])
    assert same(first, values(bench))
    assert places == [parameter.data_ptr() for parameter in bench.model.parameters()], "memory must not grow"
    assert before == {path: hashlib.sha256(path.read_bytes()).digest() for path in _files(tiny_llama)}


def test_following_the_same_recipe_again_computes_nothing(
    tiny_llama: TinyFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def counted(plan: Plan, tensor: TensorPlan, read: Reader) -> torch.Tensor:
        made.append(tensor.name)
        return merged_tensor(plan, tensor, read)

    monkeypatch.setattr(llm_merge.merge, "merged_tensor", counted)
    recipe = Recipe.linear(tiny_llama.references, [0.2, 0.5, 0.3])
    bench = bench_for(recipe, "decoder", "cpu")
    tensors = len(make_plan(recipe).tensors)
    assert len(made) == tensors
    bench.follow(recipe)
    assert len(made) == tensors
    bench.follow(Recipe.linear(tiny_llama.references, [0.5, 0.5, 0.0]))
    assert len(made) == 2 * tensors
    bench.follow(Recipe.linear(tiny_llama.references[:2], [0.5, 0.5]))  # a model without a share makes no difference
    assert len(made) == 2 * tensors


def test_tied_weights_stay_tied(tiny_llama: TinyFamily) -> None:
    bench = bench_for(Recipe.linear(tiny_llama.references[1:], [0.3, 0.7]), "decoder", "cpu")
    assert bench.model.lm_head.weight is bench.model.model.embed_tokens.weight
    assert bench.nbytes == sum(parameter.nbytes for parameter in bench.model.parameters())


def test_a_head_of_its_own_unties_the_result(tmp_path: Path, tiny_llama: TinyFamily) -> None:
    free = make_tiny_llama(tmp_path / "free", 5, tied=False)
    recipe = Recipe.linear([str(tiny_llama.base), str(free)], [0.5, 0.5])
    bench = bench_for(recipe, "decoder", "cpu")
    head, embeddings = bench.model.lm_head.weight, bench.model.model.embed_tokens.weight
    assert head is not embeddings
    plan = make_plan(recipe)
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    assert torch.equal(head, merged_tensor(plan, tensors["lm_head.weight"]).float())
    assert torch.equal(embeddings, merged_tensor(plan, tensors["model.embed_tokens.weight"]).float())


def test_an_interrupted_merge_is_made_again_in_full(tiny_llama: TinyFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Recipe.single(tiny_llama.references[1]), Recipe.single(tiny_llama.references[2])
    expected = values(bench_for(first, "decoder", "cpu"))
    bench = bench_for(first, "decoder", "cpu")
    stop = threading.Event()
    made: list[str] = []

    def stopping(plan: Plan, tensor: TensorPlan, read: Reader) -> torch.Tensor:
        made.append(tensor.name)
        if len(made) == 5:
            stop.set()
        return merged_tensor(plan, tensor, read)

    monkeypatch.setattr(llm_merge.merge, "merged_tensor", stopping)
    with pytest.raises(Stopped):
        bench.follow(second, stop)
    assert len(made) == 5
    assert bench.plan is None
    assert not same(values(bench), expected)
    bench.follow(first)
    assert same(values(bench), expected)


def test_names_with_the_body_s_prefix_and_an_unused_head_are_found(tmp_path: Path, tiny_bert: TinyFamily) -> None:
    """Many BERT checkpoints were saved with a language model's head: `bert.encoder…`, `cls.predictions…`."""
    from transformers import BertForMaskedLM, BertModel

    model = BertForMaskedLM.from_pretrained(tiny_bert.base, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path)
    for path in (*tiny_bert.base.glob("token*.json"), *tiny_bert.base.glob("*_*.json")):
        shutil.copy(path, tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert any(name.startswith("bert.") for name in checkpoint.tensors)
    bench = bench_for(Recipe.single(str(tmp_path)), "encoder", "cpu")
    body = BertModel.from_pretrained(tiny_bert.base).state_dict()
    for name, parameter in bench.model.named_parameters():
        if not name.startswith("pooler."):
            assert torch.equal(parameter, body[name]), name


def test_experts_that_are_stored_apart_are_put_together(tmp_path: Path, tiny_llama: TinyFamily) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    for path in tiny_llama.base.glob("token*"):
        shutil.copy(path, tmp_path)
    bench = bench_for(Recipe.single(str(tmp_path)), "decoder", "cpu")
    with torch.inference_mode():
        assert torch.equal(bench.model(IDS).logits, model(IDS).logits)


def test_a_model_can_be_another_for_a_while(tiny_llama: TinyFamily) -> None:
    bench = bench_for(Recipe.linear(tiny_llama.references, [0.2, 0.5, 0.3]), "decoder", "cpu")
    before, plan = values(bench), bench.plan
    other = make_plan(Recipe.linear(tiny_llama.references, [0.5, 0.2, 0.3]))
    assert bench.differs(other)
    with bench.swapped(other):
        assert bench.plan is other
        assert not bench.differs(other)
        assert same(values(bench), values(bench_for(other.recipe, "decoder", "cpu")))
    assert bench.plan is plan
    assert same(values(bench), before)


def test_it_is_itself_again_after_an_error_inside(tiny_llama: TinyFamily) -> None:
    bench = bench_for(Recipe.single(tiny_llama.references[0]), "decoder", "cpu")
    before, plan = values(bench), bench.plan
    with pytest.raises(ZeroDivisionError), bench.swapped(make_plan(Recipe.single(tiny_llama.references[1]))):
        raise ZeroDivisionError
    assert bench.plan is plan
    assert same(values(bench), before)


def test_it_is_itself_again_after_a_stop_while_it_changes(
    tiny_llama: TinyFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_for(Recipe.single(tiny_llama.references[0]), "decoder", "cpu")
    before, plan, stop, made = values(bench), bench.plan, threading.Event(), list[str]()

    def stopping(plan: Plan, tensor: TensorPlan, read: Reader) -> torch.Tensor:
        made.append(tensor.name)
        if len(made) == 5:
            stop.set()
        return merged_tensor(plan, tensor, read)

    monkeypatch.setattr(llm_merge.merge, "merged_tensor", stopping)
    with pytest.raises(Stopped), bench.swapped(make_plan(Recipe.single(tiny_llama.references[1])), stop):
        pytest.fail("it was asked to stop")
    assert len(made) == 5
    assert bench.plan is plan
    assert same(values(bench), before)


def test_only_what_differs_is_computed_and_kept(tiny_llama: TinyFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    base, one, two = tiny_llama.references
    recipe = Recipe((ModelEntry(one, 0.5), ModelEntry(two, 0.5)), "task_arithmetic", base)
    bench = bench_for(recipe, "decoder", "cpu")
    made: list[str] = []

    def counted(plan: Plan, tensor: TensorPlan, read: Reader) -> torch.Tensor:
        made.append(tensor.name)
        return merged_tensor(plan, tensor, read)

    monkeypatch.setattr(llm_merge.merge, "merged_tensor", counted)
    assert bench.plan is not None
    with bench.swapped(bench.plan.following(recipe.with_value(0, "weight", ["layers.1."], 0.0))):
        pass
    assert made
    assert all(".layers.1." in name for name in made)
    assert len(made) == len({name for name in bench.checkpoint.tensors if ".layers.1." in name})


def test_a_model_that_follows_nothing_cannot_be_changed_for_a_while(tiny_llama: TinyFamily) -> None:
    bench = Workbench(open_checkpoint(tiny_llama.references[0]), "decoder", "cpu")
    plan = make_plan(Recipe.single(tiny_llama.references[0]))
    assert bench.differs(plan)
    with pytest.raises(MergeError, match="call follow first"), bench.swapped(plan):
        pytest.fail("there is nothing to go back to")


def test_a_model_whose_weights_are_arranged_anew_is_itself_again_too(tmp_path: Path, tiny_llama: TinyFamily) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=64,
    )  # fmt: skip
    for number, name in enumerate(("one", "two")):
        torch.manual_seed(number)
        MixtralForCausalLM(config).save_pretrained(tmp_path / name)
        for path in tiny_llama.base.glob("token*"):
            shutil.copy(path, tmp_path / name)
    recipes = [Recipe.linear([str(tmp_path / "one"), str(tmp_path / "two")], [w, 1 - w]) for w in (0.25, 0.75)]
    bench = bench_for(recipes[0], "decoder", "cpu")
    before = values(bench)
    expected = values(bench_for(recipes[1], "decoder", "cpu"))
    with bench.swapped(make_plan(recipes[1])):
        assert same(values(bench), expected)
    assert same(values(bench), before)
    with pytest.raises(ZeroDivisionError), bench.swapped(make_plan(recipes[1])):
        raise ZeroDivisionError
    assert same(values(bench), before)


def test_places_of_a_model_with_a_head_of_its_own(tmp_path: Path, tiny_llama: TinyFamily) -> None:
    """Giving the head weights of its own changes which parameter is where."""
    free = make_tiny_llama(tmp_path / "free", 5, tied=False)
    bench = bench_for(Recipe.single(str(tiny_llama.base)), "decoder", "cpu")
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    places = bench.places(names)
    assert places[names[0]] is places[names[1]]
    bench.follow(Recipe.linear([str(tiny_llama.base), str(free)], [0.5, 0.5]))
    places = bench.places([*names, "nothing"])
    assert places.keys() == set(names)
    assert places[names[1]] is bench.model.lm_head.weight
    assert places[names[0]] is bench.model.model.embed_tokens.weight
    assert places[names[0]] is not places[names[1]]


def test_another_model_s_random_choice_is_another_merge(tiny_llama: TinyFamily) -> None:
    """The same model twice in a recipe draws two masks: leaving the first one out is not leaving the second one out."""
    base, one, _ = tiny_llama.references

    def plan(*weights: float) -> Plan:
        entries = tuple(ModelEntry(one, weight, (("density", 0.5),)) for weight in weights)
        return make_plan(Recipe(entries, "dare_linear", base))

    assert plan_changes.differs(plan(1.0, 0.0), plan(0.0, 1.0))
    assert not plan_changes.differs(plan(1.0, 0.0), plan(1.0, 0.0))


def test_weights_that_the_model_needs_and_the_files_lack_are_named(tiny_bert: TinyFamily) -> None:
    with pytest.raises(CheckpointError) as caught:
        bench_for(Recipe.single(str(tiny_bert.base)), "reranker", "cpu")
    assert "has no weights for classifier.bias, classifier.weight, which a reranker needs" in str(caught.value)


@pytest.mark.parametrize(
    ("device", "words"),
    [("cud", "The device `cud` is not known: use auto, cpu, cuda, cuda:1 or mps."),
     ("cuda:77", "The device `cuda:77` is not on this machine: use auto or cpu.")],
)  # fmt: skip
def test_a_device_that_is_not_there(device: str, words: str) -> None:
    with pytest.raises(MergeError) as caught:
        choose_device(device)
    assert str(caught.value) == words


def test_the_processor_computes_in_float32_while_it_fits(
    tiny_llama: TinyFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama.base))
    elements = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    monkeypatch.setattr(workbench, "free_memory", lambda: elements * 6)
    assert choose_dtype(checkpoint, "cpu") == torch.float32
    monkeypatch.setattr(workbench, "free_memory", lambda: elements * 3)
    assert choose_dtype(checkpoint, "cpu") == torch.bfloat16
    monkeypatch.setattr(workbench, "free_memory", lambda: elements * 2)
    with pytest.raises(MergeError, match=r"needs .* kB of memory and .* kB are free: close other programs or choose"):
        choose_dtype(checkpoint, "cpu")


def test_cuda_computes_in_the_checkpoint_s_type(tiny_llama: TinyFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(str(tiny_llama.base))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    assert choose_dtype(checkpoint, "cuda") == torch.bfloat16
    assert choose_dtype(SimpleNamespace(main_dtype="float32", tensors={}), "cuda") == torch.float32  # type: ignore[arg-type]


def _files(family: TinyFamily) -> list[Path]:
    return [path for folder in family.folders for path in folder.glob("*.safetensors")]
