"""Laws that every merge obeys, on real checkpoints of every model type."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llm_merge.merge import MemorySink, merged_tensors, run
from llm_merge.output import FolderSink
from llm_merge.plan import make_plan
from llm_merge.recipe import Recipe
from tests.tiny_models import TinyFamily, make_tiny_llama, make_tiny_lora

FAMILIES = ["tiny_llama", "tiny_llama_float32", "tiny_bert", "tiny_reranker", "tiny_t5"]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> TinyFamily:
    models: TinyFamily = request.getfixturevalue(request.param)
    return models


def merge(recipe: Recipe) -> dict[str, torch.Tensor]:
    sink = MemorySink()
    for _ in run(make_plan(recipe), sink):
        pass
    return sink.tensors


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(bits(left[name]), bits(right[name])) for name in left
    )


def ulps(left: torch.Tensor, right: torch.Tensor) -> int:
    """Largest distance in representable values of the tensors' type, for values of one sign."""
    kind = {2: torch.int16, 4: torch.int32}[left.element_size()]
    distance = left.contiguous().view(kind).long() - right.contiguous().view(kind).long()
    return int(distance.abs().max()) if left.numel() else 0


def close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Within one ulp; where the models cancel each other, within the last digits of double precision."""
    return left.keys() == right.keys() and all(
        torch.allclose(left[name].double(), right[name].double(), rtol=torch.finfo(left[name].dtype).eps, atol=1e-15)
        for name in left
    )


def average(folders: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    """The obvious slow way: whole state dicts, in double precision."""
    states = [stored(folder) for folder in folders]
    return {
        name: sum(w * state[name].double() for w, state in zip(weights, states, strict=True)).to(first.dtype)
        for name, first in states[0].items()
    }


def test_weights_one_and_zero_give_the_first_model_bit_for_bit(family: TinyFamily) -> None:
    merged = merge(Recipe.linear(family.references, [1, 0, 0]))
    assert same_bits(merged, stored(family.base))


def test_weights_zero_and_one_give_the_last_model_bit_for_bit(family: TinyFamily) -> None:
    merged = merge(Recipe.linear(family.references, [0, 0, 1]))
    assert same_bits(merged, stored(family.fine_tunes[-1]))


def test_negative_zeros_and_values_that_are_not_numbers_elsewhere_survive_weights_one_and_zero(tmp_path: Path) -> None:
    first = make_tiny_llama(tmp_path / "first", seed=0)
    second = make_tiny_llama(tmp_path / "second", seed=1)
    change(first, lambda tensor: tensor.reshape(-1)[:3].copy_(torch.tensor([-0.0, 0.0, 1.0])))
    change(second, lambda tensor: tensor.reshape(-1)[:3].fill_(float("nan")))
    merged = merge(Recipe.linear([str(first), str(second)], [1, 0]))
    assert same_bits(merged, stored(first))
    assert torch.signbit(merged["model.norm.weight"][0])


@pytest.mark.parametrize("weights", [(0.3, 0.7), (0.1, 0.9), (1 / 3, 2 / 3), (1.7, -0.7)])
def test_a_model_merged_with_itself_is_itself_to_one_ulp(family: TinyFamily, weights: tuple[float, float]) -> None:
    merged = merge(Recipe.linear([str(family.base)] * 2, weights))
    own = stored(family.base)
    assert merged.keys() == own.keys()
    assert max(ulps(merged[name], own[name]) for name in own) <= 1


def test_streamed_is_in_memory_is_a_plain_state_dict_average(family: TinyFamily, tmp_path: Path) -> None:
    weights = [0.2, 0.3, 0.5]
    recipe = Recipe.linear(family.references, weights)
    for _ in run(make_plan(recipe), FolderSink(tmp_path / "out")):
        pass
    in_memory = merge(recipe)
    assert same_bits(stored(tmp_path / "out"), in_memory)
    assert same_bits(dict(merged_tensors(make_plan(recipe))), in_memory)
    assert close(in_memory, average(list(family.folders), weights))


def test_the_same_recipe_gives_the_same_bits_with_any_number_of_threads(tiny_llama_float32: TinyFamily) -> None:
    references, weights = tiny_llama_float32.references, [0.2, 0.3, 0.5]
    recipe = Recipe.linear(references, weights)
    expected = merge(recipe)
    assert same_bits(expected, merge(recipe))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert same_bits(expected, merge(recipe))
    finally:
        torch.set_num_threads(threads)
    assert close(expected, merge(Recipe.linear(references[::-1], weights[::-1])))


def test_an_adapter_in_a_merge_is_the_base_plus_its_share_of_the_change(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base", seed=0, dtype="float32")
    adapter = make_tiny_lora(tmp_path / "adapter", 1, base, rank=4, alpha=8.0, targets=("q_proj",))
    merged = merge(Recipe.linear([str(base), f"{base}+{adapter}"], [0.75, 0.25]))
    name = "model.layers.0.self_attn.q_proj"
    parts = load_file(adapter / "adapter_model.safetensors")
    a, b = (parts[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    own = stored(base)
    expected = own[f"{name}.weight"].double() + 0.25 * (8.0 / 4) * (b @ a)
    assert torch.allclose(merged[f"{name}.weight"].double(), expected, rtol=0, atol=1e-7)
    assert not torch.equal(merged[f"{name}.weight"], own[f"{name}.weight"])
    unchanged = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(merged[unchanged], own[unchanged])


def change(folder: Path, edit: object) -> None:
    """Edit the final norm of a checkpoint in place."""
    from safetensors.torch import save_file

    tensors = stored(folder)
    edit(tensors["model.norm.weight"])  # type: ignore[operator]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
