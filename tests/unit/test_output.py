"""The folder: loads with transformers and sentence-transformers, is whole or not there, and refuses in clear words."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llm_merge.card import Provenance
from llm_merge.checkpoint import open_checkpoint
from llm_merge.errors import CheckpointError, IncompatibleModels, OutputError
from llm_merge.merge import MemorySink, merged_tensor, run
from llm_merge.methods import METHODS
from llm_merge.output import FolderSink, check_output
from llm_merge.plan import Plan, make_plan
from llm_merge.recipe import ModelEntry, Recipe, Rule
from tests.tiny_models import TinyFamily, make_tiny_bert, make_tiny_llama

WEIGHTS = [0.2, 0.3, 0.5]
Usage = namedtuple("Usage", "total used free")


def plan_of(family: TinyFamily, **settings: float) -> Plan:
    return make_plan(Recipe.linear(family.references, WEIGHTS), **settings)


def save(plan: Plan, folder: Path, provenance: Provenance | None = None) -> Path:
    for _ in run(plan, FolderSink(folder, provenance=provenance)):
        pass
    return folder


def whole(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ── what is in it ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_transformers_loads_the_folder_with_the_values_of_the_merge(tiny_llama: TinyFamily, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plan = plan_of(tiny_llama)
    folder = save(plan, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    state = model.state_dict()
    for tensor in plan.tensors:
        assert torch.equal(state[tensor.name], merged_tensor(plan, tensor)), tensor.name
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    tokens = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False
    )
    assert "<|im_start|>user" in tokens


def test_every_file_of_the_first_model_that_a_model_needs_is_there(tiny_llama: TinyFamily, tmp_path: Path) -> None:
    folder = save(plan_of(tiny_llama), tmp_path / "out")
    assert set(whole(folder)) == set(whole(tiny_llama.base)) | {"README.md", "mergekit_config.yml"}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (folder / name).read_bytes() == (tiny_llama.base / name).read_bytes()


def test_shards_and_their_index_load_like_one_file(tiny_llama: TinyFamily, tmp_path: Path) -> None:
    one, many = save(plan_of(tiny_llama), tmp_path / "one"), tmp_path / "many"
    plan = plan_of(tiny_llama, max_shard_bytes=20_000)
    save(plan, many)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == plan.output_bytes
    files = sorted(set(index["weight_map"].values()))
    assert len(files) == len(plan.shards) > 1
    tensors = {name: tensor for file in files for name, tensor in load_file(many / file).items()}
    assert {name: file for file in files for name in load_file(many / file)} == index["weight_map"]
    expected = load_file(one / "model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert open_checkpoint(str(many)).tensors.keys() == expected.keys()


def test_odd_sizes_and_types_in_one_file_can_be_read_back(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "model", 0)
    odd = {"model.flags": torch.tensor([True, False, True]), "model.ids": torch.arange(5), "model.one": torch.tensor(7)}
    odd["model.nothing"] = torch.zeros(0, 3)
    save_file(load_file(folder / "model.safetensors") | odd, folder / "model.safetensors", metadata={"format": "pt"})
    out = save(make_plan(Recipe.linear([str(folder)] * 2, [0.5, 0.5])), tmp_path / "out")
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, value in odd.items():
            assert torch.equal(file.get_tensor(name), value)


def test_the_config_is_the_bases_with_the_type_of_the_result(tmp_path: Path) -> None:
    tied = make_tiny_llama(tmp_path / "tied", 0)
    free = make_tiny_llama(tmp_path / "free", 1, tied=False)
    config = json.loads((tied / "config.json").read_text()) | {"_name_or_path": "org/base", "torch_dtype": "bfloat16"}
    (tied / "config.json").write_text(json.dumps(config))
    out = save(make_plan(Recipe.linear([str(tied), str(free)], [0.5, 0.5], dtype="float32")), tmp_path / "out")
    written = json.loads((out / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == "float32"
    assert written["tie_word_embeddings"] is False
    assert "_name_or_path" not in written
    changed = {"dtype", "torch_dtype", "tie_word_embeddings", "_name_or_path"}
    assert {k: v for k, v in written.items() if k not in changed} == {
        k: v for k, v in config.items() if k not in changed
    }


def test_the_recipe_in_the_folder_is_the_recipe(tiny_llama: TinyFamily, tmp_path: Path) -> None:
    plan = plan_of(tiny_llama)
    folder = save(plan, tmp_path / "out")
    assert Recipe.from_yaml((folder / "mergekit_config.yml").read_text()) == plan.recipe


def test_the_model_card_says_what_the_model_is_made_of(tiny_llama: TinyFamily, tmp_path: Path) -> None:
    origin = Provenance(losses=(2.5, 1.25, 1.5), temperature=5.0, rows=32, rows_hash="ab" * 32, seed=0)
    folder = save(plan_of(tiny_llama), tmp_path / "out", origin)
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mergekit", "merge"],
    }
    for reference, weight, loss in zip(tiny_llama.references, WEIGHTS, origin.losses, strict=True):
        assert f"`{reference}` | {weight:.4f} | {loss:.4f} |" in body
    assert f"softmax(−loss / 5) of the models' mean losses on 32 example rows (SHA-256 `{'ab' * 32}`), seed 0." in body
    assert (folder / "mergekit_config.yml").read_text() in body
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() in body


def test_the_card_names_models_of_the_hub_and_no_folder_of_this_machine(tmp_path: Path) -> None:
    known = make_tiny_llama(tmp_path / "known", 0)
    config = json.loads((known / "config.json").read_text()) | {"_name_or_path": "org/known-model"}
    (known / "config.json").write_text(json.dumps(config))
    unknown = make_tiny_llama(tmp_path / "unknown", 1)
    out = save(make_plan(Recipe.linear([str(known), str(unknown)], [0.5, 0.5])), tmp_path / "out")
    front = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])
    assert front["base_model"] == ["org/known-model"]
    assert front["base_model_relation"] == "merge"


# ── embedding models ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("cls", True), ("mean", False)])
def test_sentence_transformers_pools_the_merge_as_the_model_itself(
    tmp_path: Path, pooling: str, normalize: bool
) -> None:
    from sentence_transformers import SentenceTransformer

    base = make_tiny_bert(tmp_path / "base", 0, pooling=pooling, normalize=normalize)  # type: ignore[arg-type]
    other = tmp_path / "other"
    shutil.copytree(base, other)
    out = save(make_plan(Recipe.linear([str(base), str(other)], [0.5, 0.5])), tmp_path / "out")
    texts = ["What is the capital of France?", "And he said unto them", "a"]
    mine, theirs = (SentenceTransformer(str(folder), device="cpu").encode(texts) for folder in (out, base))
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6)
    lengths = np.linalg.norm(mine, axis=1)
    assert np.allclose(lengths, 1, atol=1e-5) == normalize


def test_an_embedding_model_without_modules_gets_the_pooling_that_was_used(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    base = make_tiny_bert(tmp_path / "base", 0)
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (base / name).unlink()
    shutil.rmtree(base / "1_Pooling")
    out = save(make_plan(Recipe.linear([str(base)] * 2, [0.5, 0.5])), tmp_path / "out")
    assert {"modules.json", "1_Pooling/config.json"} <= set(whole(out))
    model = SentenceTransformer(str(out), device="cpu")
    vectors = model.encode(["hello", "a longer sentence, with more words in it"])
    single, hidden = model.encode(["hello"]), model[0](model.tokenize(["hello"]))["token_embeddings"].detach().numpy()
    mean = hidden.mean(axis=1)
    np.testing.assert_allclose(single, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-5)
    assert vectors.shape == (2, 32)


def with_dense(folder: Path, seed: int) -> Path:
    modules = json.loads((folder / "modules.json").read_text())
    modules[2] = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "2_Dense").mkdir()
    activation = "torch.nn.modules.linear.Identity"
    config = {"in_features": 32, "out_features": 8, "bias": True, "activation_function": activation}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(config))
    noise = torch.Generator().manual_seed(seed)
    values = {"linear.weight": torch.randn(8, 32, generator=noise), "linear.bias": torch.randn(8, generator=noise)}
    save_file(values, folder / "2_Dense" / "model.safetensors")
    return folder


def test_weights_inside_a_module_are_merged(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    base = make_tiny_bert(tmp_path / "base", 0)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    folders = [with_dense(base, 1), with_dense(other, 2)]
    out = save(make_plan(Recipe.linear([str(folder) for folder in folders], [0.25, 0.75])), tmp_path / "out")
    merged, first, second = (load_file(folder / "2_Dense" / "model.safetensors") for folder in (out, *folders))
    for name in first:
        torch.testing.assert_close(merged[name], 0.25 * first[name] + 0.75 * second[name])
    assert SentenceTransformer(str(out), device="cpu").encode(["hello"]).shape == (1, 8)
    (other / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(IncompatibleModels, match="“other” lacks the weights of the module 2_Dense"):
        make_plan(Recipe.linear([str(base), str(other)], [0.5, 0.5]))


def test_weights_inside_a_module_are_merged_as_task_vectors_too(tmp_path: Path) -> None:
    base = make_tiny_bert(tmp_path / "base", 0)
    one, two = (Path(shutil.copytree(base, tmp_path / name)) for name in ("one", "two"))
    folders = [with_dense(folder, seed) for seed, folder in enumerate((base, one, two))]
    entries = (ModelEntry(str(base)), ModelEntry(str(one), 0.5, (("density", 0.25),)),
               ModelEntry(str(two), (Rule(0.1, "2_Dense.linear.bias"), Rule(0.75))))  # fmt: skip
    recipe = Recipe(entries, "breadcrumbs", str(base), normalize=False, parameters=(("gamma", 0.0),))
    out = save(make_plan(recipe), tmp_path / "out")
    merged, own, first, second = (load_file(folder / "2_Dense" / "model.safetensors") for folder in (out, *folders))
    for name, share in (("linear.weight", 0.75), ("linear.bias", 0.1)):
        expected = METHODS["breadcrumbs"].apply(
            [first[name], second[name]], {"weight": (0.5, share), "density": (0.25, 1.0), "gamma": (0.0, 0.0)},
            base=own[name],
        )  # fmt: skip
        assert torch.equal(merged[name], expected)
    nothing = save(make_plan(replace(recipe, models=tuple(replace(e, weight=0.0) for e in entries))), tmp_path / "same")
    kept = load_file(nothing / "2_Dense" / "model.safetensors")
    assert all(torch.equal(kept[name], own[name]) for name in own)


def test_a_layered_recipe_stands_in_the_folder_and_gives_the_same_folder_again(
    tiny_llama: TinyFamily, tmp_path: Path
) -> None:
    base, one, two = tiny_llama.references
    recipe = Recipe((ModelEntry(one, 0.5), ModelEntry(two, 0.5)), "breadcrumbs", base, normalize=False)
    recipe = recipe.with_value(0, "weight", ["layers.1."], 0.0).with_value(1, "density", ["layers.0."], 0.25)
    out = save(make_plan(recipe), tmp_path / "out")
    written = (out / "mergekit_config.yml").read_text()
    assert Recipe.from_yaml(written) == recipe
    assert yaml.safe_load(written)["models"][0]["parameters"]["weight"] == [
        {"filter": "layers.1.", "value": 0}, {"value": 0.5},
    ]  # fmt: skip
    assert written in (out / "README.md").read_text()
    again = save(make_plan(Recipe.from_yaml(written)), tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (out, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_modules_file_that_points_out_of_the_folder_writes_nothing_there(tmp_path: Path) -> None:
    base = make_tiny_bert(tmp_path / "base", 0)
    modules = json.loads((base / "modules.json").read_text())
    modules[1]["path"] = "../outside"
    (base / "modules.json").write_text(json.dumps(modules))
    shutil.copytree(base / "1_Pooling", tmp_path / "outside")
    with pytest.raises(CheckpointError, match="outside of the model"):
        save(make_plan(Recipe.linear([str(base)] * 2, [0.5, 0.5])), tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


# ── whole, or not there ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stop_after", [1, 5, 21])
def test_a_merge_that_is_stopped_leaves_nothing(tiny_llama: TinyFamily, tmp_path: Path, stop_after: int) -> None:
    target = tmp_path / "new" / "deep" / "out"
    events = run(plan_of(tiny_llama, max_shard_bytes=20_000), FolderSink(target))
    for _ in range(stop_after):
        next(events)
    assert not target.exists()
    events.close()
    assert list(tmp_path.iterdir()) == []


def test_stopping_leaves_what_was_there_before(tiny_llama: TinyFamily, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "neighbour").write_text("mine")
    events = run(plan_of(tiny_llama), FolderSink(tmp_path / "out"))
    next(events)
    events.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["neighbour", "out"]


def test_an_error_at_the_last_step_leaves_nothing(
    tiny_llama: TinyFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llm_merge.output.model_card", broken)
    target = tmp_path / "out"
    with pytest.raises(OutputError) as error:
        save(plan_of(tiny_llama), target)
    assert error.value.message == (
        f"Writing {target} failed: No space left on device. Nothing was left behind; free some space or choose another "
        "folder."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_the_wrong_length_is_never_called_whole(tiny_llama: TinyFamily, tmp_path: Path) -> None:
    plan = plan_of(tiny_llama)
    sink = FolderSink(tmp_path / "out")
    sink.open(plan)
    sink.write(plan.tensors[0], merged_tensor(plan, plan.tensors[0]))
    with pytest.raises(RuntimeError, match="lacks"):
        sink.finish()
    sink.discard()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_taken(tiny_llama: TinyFamily, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    save(plan_of(tiny_llama), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_merges_of_one_recipe_are_the_same_bytes(tiny_llama: TinyFamily, tmp_path: Path) -> None:
    first, second = (save(plan_of(tiny_llama), tmp_path / number / "out") for number in ("1", "2"))
    assert whole(first) == whole(second)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in whole(first))


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────────────


def refusal(path: Path | str, plan: Plan) -> str:
    with pytest.raises(OutputError) as error:
        check_output(path, plan)
    assert error.value.field == "output_path"
    return error.value.message


def test_a_folder_with_something_in_it(tiny_llama: TinyFamily, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    plan = plan_of(tiny_llama)
    message = f"The output folder {tmp_path} exists and is not empty: choose another name, or empty it."
    assert refusal(tmp_path, plan) == message
    with pytest.raises(OutputError):
        save(plan, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_file_and_a_folder_inside_a_file(tiny_llama: TinyFamily, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    plan = plan_of(tiny_llama)
    assert refusal(file, plan) == f"{file} is a file: give the name of a folder that does not exist yet."
    assert refusal(file / "out", plan) == (
        f"{file} is a file, so there can be no folder {file / 'out'}: choose another place."
    )


def test_no_name_and_impossible_names(tiny_llama: TinyFamily) -> None:
    plan = plan_of(tiny_llama)
    assert refusal("  ", plan) == (
        "No output folder is named: give the folder that the merged model is to be written to."
    )
    assert "cannot be used as an output folder: File name too long." in refusal("x" * 300, plan)
    assert refusal("a\0b", plan) == (
        "The name of the output folder contains a character that no name can have: write it again."
    )


def test_a_disk_that_is_too_small(tiny_llama: TinyFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 1_200_000))
    assert refusal(tmp_path / "out", plan_of(tiny_llama)) == (
        f"The disk of {tmp_path} has 1.2 MB free and the merged model needs 20.1 MB: free some space or choose another "
        "disk."
    )


def test_a_place_that_may_not_be_written(
    tiny_llama: TinyFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # as root, every folder can be written
    assert refusal(tmp_path / "out", plan_of(tiny_llama)) == (
        f"The folder {tmp_path} cannot be written to: choose one in which you may write."
    )


def test_memory_and_folder_hold_the_same(tiny_t5: TinyFamily, tmp_path: Path) -> None:
    plan = plan_of(tiny_t5)
    sink = MemorySink()
    list(run(plan, sink))
    written = load_file(save(plan, tmp_path / "out") / "model.safetensors")
    assert written.keys() == sink.tensors.keys()
    assert all(torch.equal(written[name], sink.tensors[name]) for name in written)
