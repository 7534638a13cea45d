"""mix_models and its sisters: signatures, results, words. The original's snippets run as they are written."""

from __future__ import annotations

import gc
import inspect
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import llm_merge
from llm_merge import mix_models, mix_models_by_layers, mix_models_with_data
from llm_merge.checkpoint import open_checkpoint
from llm_merge.errors import ExampleError, IncompatibleModels, MergeError, OutputError, RecipeError
from llm_merge.evaluation import EvaluationSettings, losses, prepare, resolve_format
from llm_merge.recipe import Recipe
from llm_merge.weights import softmax_weights
from llm_merge.workbench import Workbench
from tests.tiny_models import TinyFamily

REPOSITORY = Path(__file__).resolve().parents[2]
WEIGHTS = [0.2, 0.3, 0.5]
TYPES = [
    ("tiny_llama", "decoder", "LlamaForCausalLM"),
    ("tiny_bert", "encoder", "BertModel"),
    ("tiny_reranker", "reranker", "BertForSequenceClassification"),
    ("tiny_t5", "encoder-decoder", "T5ForConditionalGeneration"),
]
ROWS = [
    {"input": "Define the word: harbour.", "output": "A place where ships are sheltered."},
    {"input": "What is the capital of France?", "output": "Paris"},
]
SEARCH_ROWS = [
    {"query": "harbour", "pos": ["A place where ships are sheltered."], "neg": ["Three models were mixed.", "Go ye."]},
    {"query": "gospel", "pos": ["preach the gospel to every creature"], "neg": ["ships", "wind", "waves"]},
]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own folder for temporary files, to see what is left in it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_the_signatures_are_the_originals_and_additions_are_keyword_only() -> None:
    def positional(function: Callable[..., Any]) -> str:
        kept = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]
        return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in kept)

    assert positional(mix_models) == "model_names_or_paths, model_type, weights, output_path=None"
    assert positional(mix_models_by_layers) == "model_names_or_paths, model_type, weights, output_path=None"
    assert positional(mix_models_with_data) == (
        "model_names_or_paths, model_type, example_data, temperature=5.0, batch_size=2, max_input_length=2048, "
        "neg_number=7, output_path=None"
    )


@pytest.mark.parametrize(("fixture", "model_type", "class_name"), TYPES)
@pytest.mark.parametrize("mix", [mix_models, mix_models_by_layers])
def test_every_model_type_returns_the_transformers_model_of_the_average(
    request: pytest.FixtureRequest, tmp_path: Path, mix: Any, fixture: str, model_type: str, class_name: str
) -> None:
    family: TinyFamily = request.getfixturevalue(fixture)
    model = mix(family.references, model_type, WEIGHTS)
    assert type(model).__name__ == class_name
    assert not model.training
    states = [load_file(folder / "model.safetensors") for folder in family.folders]
    state = model.state_dict()
    for name, first in states[0].items():
        expected = sum(w * s[name].double() for w, s in zip(WEIGHTS, states, strict=True)).to(first.dtype)
        eps = torch.finfo(first.dtype).eps
        torch.testing.assert_close(state[name], expected, rtol=eps, atol=1e-15)
    saved = mix(family.references, model_type, WEIGHTS, str(tmp_path / "out"))
    assert (tmp_path / "out" / "README.md").is_file()
    assert all(torch.equal(value, state[name]) for name, value in saved.state_dict().items())


def test_without_an_output_path_the_folder_goes_away_with_the_model(tiny_llama: TinyFamily, temporary: Path) -> None:
    model = mix_models_by_layers(tiny_llama.references, "decoder", WEIGHTS)
    (folder,) = temporary.iterdir()
    assert (folder / "merged" / "model.safetensors").is_file()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weight = model.state_dict()["model.norm.weight"]
    del model
    gc.collect()
    assert list(temporary.iterdir()) == []
    assert torch.equal(weight, before["model.norm.weight"])  # a tensor that outlives its model stays valid


def test_a_merge_that_fails_leaves_no_temporary_folder(
    tiny_llama: TinyFamily, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llm_merge.output.model_card", broken)
    with pytest.raises(OutputError):
        mix_models_by_layers(tiny_llama.references, "decoder", WEIGHTS)
    assert list(temporary.iterdir()) == []


def test_repeating_a_merge_changes_nothing(tiny_llama: TinyFamily) -> None:
    first = mix_models(tiny_llama.references, "decoder", WEIGHTS).state_dict()
    again = mix_models(tiny_llama.references, "decoder", WEIGHTS).state_dict()
    assert all(torch.equal(again[name], value) for name, value in first.items())


# ── with data ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fixture", "model_type", "rows"),
    [("tiny_llama", "decoder", ROWS), ("tiny_bert", "encoder", SEARCH_ROWS), ("tiny_t5", "encoder-decoder", ROWS)],
)
def test_weights_from_data_are_softmax_of_the_measured_losses(
    request: pytest.FixtureRequest, tmp_path: Path, fixture: str, model_type: str, rows: list[dict[str, Any]]
) -> None:
    family: TinyFamily = request.getfixturevalue(fixture)
    references, temperature = family.references[:2], 0.05
    model = mix_models_with_data(
        references, model_type, rows, temperature=temperature, neg_number=2, output_path=str(tmp_path / "out")
    )
    recipe = Recipe.from_yaml((tmp_path / "out" / "mergekit_config.yml").read_text())

    checkpoints = [open_checkpoint(reference) for reference in references]
    bench = Workbench(checkpoints[0], model_type, "cpu")
    settings = EvaluationSettings(batch_size=2, neg_number=2)
    prepared = prepare(rows, model_type, bench.tokenizer, settings, resolve_format(checkpoints))
    means = []
    for reference in references:
        bench.follow(Recipe.single(reference))
        values = [loss for _, loss in losses(bench, prepared)]
        means.append(math.fsum(values) / len(rows))
    assert recipe.weights == pytest.approx(softmax_weights(means, temperature), abs=1e-6)
    assert means[0] != means[1]
    expected = mix_models(references, model_type, recipe.weights)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{means[0]:.4f}" in card
    assert "softmax(−loss / 0.05) of the models' mean losses on 2 example rows" in card


def test_a_model_listed_twice_is_measured_once_and_counts_twice(tiny_llama: TinyFamily, tmp_path: Path) -> None:
    base, tune = tiny_llama.references[:2]
    mix_models_with_data([base, base, tune], "decoder", ROWS, output_path=str(tmp_path / "out"))
    weights = Recipe.from_yaml((tmp_path / "out" / "mergekit_config.yml").read_text()).weights
    assert weights[0] == weights[1]
    assert math.fsum(weights) == pytest.approx(1)


def test_rows_that_cannot_be_used_are_named_and_nothing_is_written(tiny_llama: TinyFamily, tmp_path: Path) -> None:
    with pytest.raises(ExampleError, match="Row 2"):
        mix_models_with_data(
            tiny_llama.references, "decoder", [ROWS[0], {"input": "x", "output": ""}], output_path=str(tmp_path / "out")
        )
    assert list(tmp_path.iterdir()) == []


# ── words ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def words(call: Callable[[], object], kind: type[MergeError] = RecipeError) -> tuple[str, str]:
    with pytest.raises(kind) as error:
        call()
    return error.value.message, error.value.field


def test_one_model_only(tiny_llama: TinyFamily) -> None:
    one = tiny_llama.references[:1]
    expected = ("Mixing takes at least two models, and 1 was given: add another one.", "model_names_or_paths")
    assert words(lambda: mix_models(one, "decoder", [1.0])) == expected
    assert words(lambda: mix_models_by_layers(one, "decoder", [1.0])) == expected
    assert words(lambda: mix_models_with_data(one, "decoder", ROWS)) == expected
    message, _ = words(lambda: mix_models([], "decoder", []))
    assert message == "Mixing takes at least two models, and none was given: add another one."
    message, _ = words(lambda: mix_models("org/model", "decoder", [1.0]))
    assert message == "model_names_or_paths is one name, “org/model”: give a list of at least two models."


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.2, 0.3, 0.4], "The weights sum to 0.9, not 1: change them so that they sum to 1."),
        ([0.2, 0.3, 0.6], "The weights sum to 1.1, not 1: change them so that they sum to 1."),
        ([0.2, 0.3, float("nan")], "Weight 3 is nan: every weight must be a finite number."),
        ([0.5, 0.5], "There are 3 models but 2 weights: give one weight per model."),
    ],
)
@pytest.mark.parametrize("mix", [mix_models, mix_models_by_layers])
def test_weights(tiny_llama: TinyFamily, mix: Any, weights: list[float], message: str) -> None:
    assert words(lambda: mix(tiny_llama.references, "decoder", weights))[0] == message


@pytest.mark.parametrize("temperature", [0, -1, float("nan")])
def test_a_temperature_that_is_not_above_zero(tiny_llama: TinyFamily, temperature: float) -> None:
    message, field = words(
        lambda: mix_models_with_data(tiny_llama.references, "decoder", ROWS, temperature=temperature)
    )
    assert message == (f"The temperature is {temperature}: it must be a number above 0 (LM-Cocktail's default is 5).")
    assert field == "temperature"


def test_a_model_type_that_is_unknown_or_another(tiny_llama: TinyFamily, tiny_bert: TinyFamily) -> None:
    message, field = words(lambda: mix_models(tiny_llama.references, "decoders", WEIGHTS))
    assert message == (
        "The model type `decoders` is not known: use one of decoder, encoder, reranker, encoder-decoder."
    )
    assert field == "model_type"
    message, _ = words(lambda: mix_models(tiny_bert.references, "decoder", WEIGHTS))
    assert message == "“base” is an embedding model (BertModel), not a chat model: pass model_type='encoder'."


def test_a_language_model_may_be_mixed_as_an_embedding_model(tiny_llama: TinyFamily) -> None:
    model = mix_models(tiny_llama.references, "encoder", WEIGHTS)
    assert type(model).__name__ == "LlamaModel"


def test_rerankers_from_data_come_later(tiny_reranker: TinyFamily) -> None:
    message, field = words(lambda: mix_models_with_data(tiny_reranker.references, "reranker", SEARCH_ROWS))
    assert message == "Weights from example data are not there yet for rerankers: give the weights to mix_models."
    assert field == "model_type"


def test_models_that_do_not_fit_are_all_named_before_anything_is_written(
    tiny_llama: TinyFamily, tiny_bert: TinyFamily, tmp_path: Path
) -> None:
    models = [str(tiny_llama.base), str(tiny_bert.base), str(tmp_path / "nowhere")]
    with pytest.raises(IncompatibleModels) as error:
        mix_models(models, "decoder", WEIGHTS, str(tmp_path / "out"))
    assert [problem.model for problem in error.value.problems] == [models[2], models[1]]
    assert list(tmp_path.iterdir()) == []


def test_a_full_output_folder_is_refused_before_the_models_are_measured(
    tiny_llama: TinyFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_text("")
    monkeypatch.setattr("llm_merge.workbench.Workbench.__init__", None)
    with pytest.raises(OutputError, match="exists and is not empty"):
        mix_models_with_data(tiny_llama.references, "decoder", ROWS, output_path=str(tmp_path))


# ── the face ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_everything_exported_exists_and_the_list_is_sorted() -> None:
    assert llm_merge.__all__ == sorted(llm_merge.__all__)
    for name in llm_merge.__all__:
        assert getattr(llm_merge, name).__name__ == name
    assert set(llm_merge.__all__) <= set(dir(llm_merge))
    with pytest.raises(AttributeError, match="no attribute 'mix_model'"):
        _ = llm_merge.mix_model  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", ["llm_merge", "llm_merge.main", "LLM_Merge", "llm_merge.output"])
def test_importing_brings_in_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print({{'torch', 'transformers', 'gradio', 'numpy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "set()"


def test_the_originals_snippet_runs_as_it_is_written(tiny_llama: TinyFamily, tmp_path: Path) -> None:
    """README of the original, "Mix models", with model names that exist."""
    snippet = """
from LLM_Merge.main import mix_models, mix_models_with_data

# mix LLMs and save it to output_path: ./mixed_model_1
model = mix_models(
    model_names_or_paths=["meta-llama/Llama-3.1-8b", "llama3-ag-news"],
    model_type='decoder',
    weights=[0.7, 0.3],
    output_path='./mixed_llm')

from LLM_Merge import mix_models_by_layers
import LLM_Merge, llm_merge.main
assert LLM_Merge.main is llm_merge.main
print(type(model).__name__)
"""
    names = {"meta-llama/Llama-3.1-8b": tiny_llama.references[0], "llama3-ag-news": tiny_llama.references[1]}
    for name, path in names.items():
        snippet = snippet.replace(name, path)
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
    )
    assert done.stdout.strip() == "LlamaForCausalLM", done.stderr
    assert (tmp_path / "mixed_llm" / "model.safetensors").is_file()
