"""Families: the empty skeleton, an embedding model's own pooling against sentence-transformers, and what is saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_merge.checkpoint import open_checkpoint
from llm_merge.errors import CheckpointError, MergeError, RecipeError
from llm_merge.evaluation import EvaluationSettings, embed, losses, prepare
from llm_merge.families import FAMILIES, get_family
from llm_merge.families.pooling import Pooling, pool, read_search
from llm_merge.families.reranker import Reranker
from llm_merge.recipe import Recipe
from llm_merge.workbench import bench_for
from tests.tiny_models import TinyFamily, make_tiny_bert

TEXTS = [
    "And he said unto them, Go ye into all the world.",
    "short",
    "  The capital of France is Paris, and the harbour is where ships are sheltered from wind and waves.  ",
]


def test_there_is_a_family_for_each_of_the_api_s_model_types() -> None:
    assert list(FAMILIES) == ["decoder", "encoder", "reranker", "encoder-decoder"]


def test_unknown_model_type_names_the_known_ones() -> None:
    with pytest.raises(RecipeError) as caught:
        get_family("chatbot")
    assert caught.value.message == (
        "The model type `chatbot` is not known: use one of decoder, encoder, reranker, encoder-decoder."
    )


def test_a_skeleton_has_no_weights_but_its_computed_buffers(tiny_llama: TinyFamily) -> None:
    model = FAMILIES["decoder"].skeleton(open_checkpoint(str(tiny_llama.base)))
    assert sum(p.numel() for p in model.parameters() if p.device.type != "meta") <= 32 * 5  # norms made of ones
    assert torch.isfinite(model.model.rotary_emb.inv_freq).all()
    assert model.model.rotary_emb.inv_freq[0] == 1


def test_wrong_model_type_is_told(tiny_bert: TinyFamily) -> None:
    with pytest.raises(CheckpointError) as caught:
        FAMILIES["encoder-decoder"].skeleton(open_checkpoint(str(tiny_bert.base)))
    assert "cannot be loaded as an encoder-decoder model: BertConfig has no AutoModelForSeq2SeqLM" in str(caught.value)


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("cls", True), ("mean", False)])
def test_vectors_are_those_of_sentence_transformers(tmp_path: Path, pooling: Any, normalize: bool) -> None:
    from sentence_transformers import SentenceTransformer

    folder = make_tiny_bert(tmp_path, 3, pooling=pooling, normalize=normalize)
    prompts = {"prompts": {"query": "query: ", "document": "passage: "}, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    theirs = SentenceTransformer(str(folder), device="cpu")
    bench = bench_for(Recipe.single(str(folder)), "encoder", "cpu")
    for kind, prompt in (("query", "query"), ("passage", "document")):
        expected = theirs.encode(TEXTS, prompt_name=prompt, show_progress_bar=False)
        assert embed(bench, TEXTS, kind) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("mode", ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
@pytest.mark.parametrize("include_prompt", [True, False])
def test_pooling_gives_sentence_transformers_numbers(mode: Any, include_prompt: bool) -> None:
    from sentence_transformers.models import Pooling as Theirs

    hidden = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 4 + [0] * 3])
    theirs = Theirs(5, pooling_mode=mode, include_prompt=include_prompt)
    features = {"token_embeddings": hidden, "attention_mask": mask, "prompt_length": 2}
    expected = theirs(features)["sentence_embedding"]
    mine = pool(hidden, mask, Pooling((mode,), normalize=False), 0 if include_prompt else 2)
    assert torch.allclose(mine, expected, atol=1e-6)


def test_a_model_without_modules_is_mean_pooled_and_says_so(tiny_reranker: TinyFamily) -> None:
    search = read_search(tiny_reranker.base)
    assert search.pooling == Pooling(("mean",), normalize=True)
    assert search.notes == ("The model has no sentence-transformers files: mean pooling is assumed.",)
    assert search.max_length == 128  # as many positions as it has


def test_a_module_that_cannot_be_computed_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_bert(tmp_path, 0)
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "3_LSTM", "type": "sentence_transformers.models.LSTM"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match="module of type LSTM, which cannot be computed here"):
        read_search(folder)


def test_files_beside_an_embedding_model_make_it_load_with_the_same_pooling(
    tmp_path: Path, tiny_reranker: TinyFamily
) -> None:
    """A bare BERT, here a reranker's folder without its head, gets the files that say what was used."""
    from sentence_transformers import SentenceTransformer

    checkpoint = open_checkpoint(str(tiny_reranker.base))
    bench = bench_for(Recipe.single(checkpoint.reference), "encoder", "cpu")
    bench.model.save_pretrained(tmp_path)
    for name, content in FAMILIES["encoder"].extra_files(checkpoint).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content.read_bytes())
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert embed(bench, TEXTS) == pytest.approx(loaded.encode(TEXTS, show_progress_bar=False), abs=1e-6)


def test_reranker_scores_are_transformers_own(tiny_reranker: TinyFamily) -> None:
    from transformers import AutoModelForSequenceClassification

    bench = bench_for(Recipe.single(str(tiny_reranker.base)), "reranker", "cpu")
    assert isinstance(bench.family, Reranker)
    pairs = [("what is a harbour", "a place where ships are sheltered"), ("Paris", "France")]
    theirs = AutoModelForSequenceClassification.from_pretrained(tiny_reranker.base)
    expected = []
    for query, passage in pairs:
        with torch.no_grad():
            expected.append(float(theirs(**bench.tokenizer(query, passage, return_tensors="pt")).logits[0, 0]))
    assert bench.family.scores(bench, pairs) == pytest.approx(expected, abs=1e-6)


def test_rows_for_a_reranker_are_declined_in_words(tiny_reranker: TinyFamily) -> None:
    tokenizer = FAMILIES["reranker"].load_tokenizer(open_checkpoint(str(tiny_reranker.base)))
    with pytest.raises(MergeError) as caught:
        prepare([{"query": "a", "pos": ["b"]}], "reranker", tokenizer)
    assert caught.value.message == "Examples cannot weigh a reranker yet: give the weights yourself."


@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder-decoder"])
def test_a_batch_s_losses_are_those_of_the_run_and_can_be_derived(
    kind: str, tiny_llama_float32: TinyFamily, tiny_bert: TinyFamily, tiny_t5: TinyFamily
) -> None:
    family = {"decoder": tiny_llama_float32, "encoder": tiny_bert, "encoder-decoder": tiny_t5}[kind]
    bench = bench_for(Recipe.single(str(family.base)), kind, "cpu")
    pairs = [{"query": text, "pos": [text[::-1]], "input": text, "output": text[::-1]} for text in (*TEXTS, "a", "b")]
    rows = prepare(pairs, kind, bench.tokenizer, EvaluationSettings(batch_size=2))
    plan = bench.family.batch_plan(bench, rows.rows, rows.settings)
    assert sorted(index for batch in plan for index in batch) == list(range(len(pairs)))
    assert len(plan) > 1
    whole = dict(losses(bench, rows))
    bench.model.requires_grad_(True)
    for batch in plan:
        values = bench.family.batch_losses(bench, rows.rows, batch, rows.settings, None)
        assert values.shape == (len(batch),)
        assert values.dtype == torch.float32
        assert values.tolist() == pytest.approx([whole[index] for index in batch], rel=1e-6)
        torch.autograd.backward(values.sum())
    assert all(parameter.grad is not None for parameter in bench.model.get_input_embeddings().parameters())


def test_a_module_outside_of_the_model_is_refused(tiny_bert: TinyFamily, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_bert.base, folder)
    modules = json.loads((folder / "modules.json").read_text())
    for module in modules:
        if module["type"].endswith("Pooling"):
            module["path"] = "../elsewhere"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=r"names the folder \.\./elsewhere, outside of the model"):
        read_search(folder)
