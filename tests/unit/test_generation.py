"""Answers: greedy ones are transformers' own, seeds repeat, ends end, and closing stops before another token."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_merge.checkpoint import open_checkpoint
from llm_merge.errors import MergeError
from llm_merge.evaluation import resolve_format
from llm_merge.generation import GenerationSettings, generate
from llm_merge.prompts import ResolvedFormat
from llm_merge.recipe import Recipe
from llm_merge.workbench import Workbench, bench_for
from tests.tiny_models import TinyFamily

GREEDY = GenerationSettings(greedy=True, max_new_tokens=24, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def bench(tiny_llama: TinyFamily) -> Workbench:
    return bench_for(Recipe.single(str(tiny_llama.base)), "decoder", "cpu")


@pytest.fixture(scope="module")
def chat(bench: Workbench) -> ResolvedFormat:
    return resolve_format([bench.checkpoint], "chat")


@pytest.fixture
def forwards(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each forward pass of the model."""
    calls: list[int] = []
    forward = bench.model.forward

    def counted(*args: Any, **inputs: Any) -> Any:
        calls.append(1)
        return forward(*args, **inputs)

    monkeypatch.setattr(bench.model, "forward", counted)
    return calls


def whole(answer: Iterator[str]) -> str:
    return list(answer)[-1]


def test_a_greedy_answer_is_transformers_own(bench: Workbench, chat: ResolvedFormat) -> None:
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = bench.tokenizer(text, return_tensors="pt")["input_ids"]
    expected = bench.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
    answer = bench.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert whole(generate(bench, "Hi", GREEDY, chat)) == answer.rstrip("�")
    assert whole(generate(bench, [{"role": "user", "content": "Hi"}], GREEDY, chat)) == answer.rstrip("�")


def test_the_answer_grows(bench: Workbench, chat: ResolvedFormat) -> None:
    parts = list(generate(bench, "Hi", GenerationSettings(temperature=1.5, max_new_tokens=12), chat))
    assert len(parts) > 2
    assert all(not part.endswith("�") for part in parts)


def test_the_same_seed_repeats_and_another_does_not(bench: Workbench, chat: ResolvedFormat) -> None:
    def answer(seed: int) -> str:
        return whole(generate(bench, "Hi", GenerationSettings(temperature=1.5, seed=seed), chat))

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_columns_drawn_side_by_side_do_not_disturb_each_other(bench: Workbench, tiny_llama: TinyFamily) -> None:
    other = bench_for(Recipe.single(str(tiny_llama.fine_tunes[0])), "decoder", "cpu")
    settings = GenerationSettings(temperature=1.5, seed=7, max_new_tokens=10)
    alone = [list(generate(model, "Hi", settings)) for model in (bench, other)]
    together: list[list[str]] = [[], []]
    running = [generate(model, "Hi", settings) for model in (bench, other)]
    for _ in range(10):
        for column, answer in enumerate(running):
            together[column] += [part for part in (next(answer, None),) if part is not None]
    assert together == alone


def test_draws_follow_the_model_s_probabilities(bench: Workbench) -> None:
    """Gumbel-max is a fair draw: over 400 seeds the first token comes as often as its probability says."""
    from llm_merge.generation import _drawing

    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    settings = [GenerationSettings(temperature=1.0, top_p=1.0, seed=seed) for seed in range(400)]
    drawn = []
    for one in settings:
        scores = logits
        for step in _drawing(one):
            scores = step(None, scores)
        drawn.append(int(scores.argmax()))
    shares = [drawn.count(token) / 400 for token in range(4)]
    assert shares == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.08)  # three standard errors of the largest


def test_top_p_leaves_unlikely_tokens_out(bench: Workbench) -> None:
    from llm_merge.generation import _drawing

    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    for seed in range(50):
        scores = logits
        for step in _drawing(GenerationSettings(temperature=1.0, top_p=0.75, seed=seed)):
            scores = step(None, scores)
        assert int(scores.argmax()) in (0, 1)


def test_closing_ends_before_another_token(bench: Workbench, forwards: list[int]) -> None:
    answer = generate(bench, "Hi", GenerationSettings(temperature=1.5, max_new_tokens=200))
    next(answer)
    before = len(forwards)
    answer.close()  # type: ignore[attr-defined]
    assert len(forwards) == before
    assert not [thread for thread in threading.enumerate() if thread.name == "generate"]


def test_nothing_is_computed_before_it_is_asked_for(bench: Workbench, forwards: list[int]) -> None:
    answer = generate(bench, "Hi", GenerationSettings(temperature=1.5, max_new_tokens=200))
    assert not forwards
    next(answer)
    assert len(forwards) <= 3  # a token without text of its own asks for the next


def test_the_stop_switch_keeps_what_is_there(bench: Workbench, forwards: list[int]) -> None:
    stop = threading.Event()
    answer = generate(bench, "Hi", GenerationSettings(temperature=1.5, max_new_tokens=200), stop=stop)
    first = next(answer)
    stop.set()
    assert all(part.startswith(first) for part in answer)
    assert len(forwards) <= 4


def test_every_end_token_ends_the_answer(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(GREEDY, repetition_penalty=5.0)  # or the tiny model says one token for ever
    free = whole(generate(bench, "Hi", settings))
    ids = bench.tokenizer("Hi", return_tensors="pt")["input_ids"]
    options = {"do_sample": False, "repetition_penalty": 5.0, "max_new_tokens": 24}
    answer = bench.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
    assert len(set(answer)) > 10
    monkeypatch.setattr(bench.model.generation_config, "eos_token_id", [9999, answer[10]])
    cut = whole(generate(bench, "Hi", settings))
    assert cut == bench.tokenizer.decode(answer[: answer.index(answer[10])], skip_special_tokens=True).rstrip("�")
    assert free.startswith(cut)
    assert len(cut) < len(free)


def test_an_error_while_generating_reaches_the_caller(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **inputs: Any) -> Any:
        raise RuntimeError("no room on the device")

    monkeypatch.setattr(bench.model, "forward", broken)
    with pytest.raises(RuntimeError, match="no room on the device"):
        list(generate(bench, "Hi"))


def test_an_encoder_decoder_answers(tiny_t5: TinyFamily) -> None:
    bench = bench_for(Recipe.single(str(tiny_t5.base)), "encoder-decoder", "cpu")
    ids = bench.tokenizer("Hi", return_tensors="pt")["input_ids"]
    expected = bench.model.generate(ids, do_sample=False, max_new_tokens=24)
    text = bench.tokenizer.decode(expected[0, 1:], skip_special_tokens=True)
    assert whole(generate(bench, "Hi", GREEDY)) == text.rstrip("�")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"temperature": 0.0},
            "temperature is 0.0: it must be above 0 and at most 5. For no randomness choose greedy.",
        ),
        ({"temperature": float("nan")}, "temperature is nan: it must be above 0 and at most 5."),
        ({"top_p": 1.5}, "top_p is 1.5: it must be above 0 and at most 1."),
        ({"max_new_tokens": 0}, "The answer must have at least 1 token."),
    ],
)
def test_settings_that_cannot_be_are_told(change: dict[str, Any], words: str) -> None:
    with pytest.raises(MergeError) as caught:
        GenerationSettings(**change)
    assert caught.value.message.startswith(words)


def test_prompts_that_cannot_be_are_told(bench: Workbench) -> None:
    with pytest.raises(MergeError, match="The prompt is empty: write something first"):
        next(generate(bench, "  "))
    with pytest.raises(MergeError, match=r"The prompt has \d+ tokens and leaves no room for an answer: shorten it"):
        next(generate(bench, "word " * 600))


def test_a_model_s_own_recommendation_is_read(tmp_path: Path) -> None:
    assert GenerationSettings.of_model(tmp_path) == GenerationSettings()
    stated = {"do_sample": False, "temperature": 0.7, "top_p": 0.8, "eos_token_id": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    assert GenerationSettings.of_model(tmp_path) == GenerationSettings(temperature=0.7, top_p=0.8, greedy=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": -1}))
    assert GenerationSettings.of_model(tmp_path) == GenerationSettings()


def test_the_prepared_demo_base_uses_the_documented_defaults(tiny_llama: TinyFamily) -> None:
    assert GenerationSettings.of_model(open_checkpoint(str(tiny_llama.base)).folder) == GenerationSettings()
