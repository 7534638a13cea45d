"""Metrics: higher is better for each, every number is the one its definition says, and errors are those of pairs."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_merge import metrics, text_metrics
from llm_merge.errors import ExampleError, MergeError, Stopped
from llm_merge.evaluation import EvaluationSettings, losses, prepare, resolve_format
from llm_merge.generation import GenerationSettings, generate
from llm_merge.metrics import (
    METRICS,
    PreparedMetric,
    figure_of,
    get_metric,
    measure,
    metrics_for,
    paired_difference,
    prepare_metric,
    row_values,
)
from llm_merge.prompts import PLAIN
from llm_merge.recipe import Recipe
from llm_merge.retrieval import retrieval
from llm_merge.workbench import Workbench, bench_for
from tests.tiny_models import TinyFamily

ROWS: list[dict[str, Any]] = [
    {"input": "Capital of France?", "output": "Paris", "choices": ["Rome", "Paris", "Bern"], "answer": 1, "task": ""},
    {"input": "2 + 2?", "output": "four", "choices": ["four", "a number above nine"], "answer": 0, "task": ""},
    {"input": "Opposite of hot?", "output": "cold", "choices": ["hot", "warm", "wet", "cold"], "answer": 3, "task": ""},
]
SEARCH: list[dict[str, Any]] = [
    {"query": "harbour", "pos": ["a place where ships are sheltered"], "neg": ["a city", "a wind"]},
    {"query": "the capital of France", "pos": ["Paris"], "neg": []},
    {"query": "gladness", "pos": ["in my heart"], "neg": []},
]


@pytest.fixture(scope="module")
def llama(tiny_llama: TinyFamily) -> Workbench:
    return bench_for(Recipe.single(str(tiny_llama.base)), "decoder", "cpu")


@pytest.fixture(scope="module")
def t5(tiny_t5: TinyFamily) -> Workbench:
    return bench_for(Recipe.single(str(tiny_t5.base)), "encoder-decoder", "cpu")


@pytest.fixture(scope="module")
def bert(tiny_bert: TinyFamily) -> Workbench:
    return bench_for(Recipe.single(str(tiny_bert.base)), "encoder", "cpu")


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_default_comes_first_and_each_kind_of_model_has_its_own() -> None:
    text = ["-loss", "accuracy", "exact_match", "rouge_l", "chrf", "bleu"]
    assert [metric.name for metric in metrics_for("decoder")] == text
    assert [metric.name for metric in metrics_for("encoder-decoder")] == text
    assert [metric.name for metric in metrics_for("encoder")] == ["-loss", "r@1", "mrr", "ndcg@10"]
    assert metrics_for("reranker") == ()
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert all(metric.help.endswith(".") for metric in METRICS)


@pytest.mark.parametrize(
    ("name", "model_type", "sentence"),
    [
        ("loss", "decoder", "The metric “loss” is not known: did you mean “-loss”? There are -loss, accuracy,"),
        ("acuracy", "decoder", "did you mean “accuracy”?"),
        ("zzz", "encoder", "The metric “zzz” is not known: There are -loss, r@1, mrr, ndcg@10."),
        ("mrr", "decoder", "MRR does not apply to the type decoder: use -loss, accuracy"),
        ("-loss", "reranker", "Models of the type reranker cannot be measured yet"),
    ],
)
def test_a_metric_that_is_not_there_is_said(name: str, model_type: str, sentence: str) -> None:
    with pytest.raises(MergeError) as caught:
        get_metric(name, model_type)
    assert sentence in caught.value.message
    assert caught.value.field == "metric"


# ── losses and choices ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_minus_loss_is_the_loss_with_its_sign_turned(name: str, request: pytest.FixtureRequest) -> None:
    bench = request.getfixturevalue(name)
    rows = SEARCH if name == "bert" else ROWS
    expected = dict(losses(bench, prepare(rows, bench.model_type, bench.tokenizer)))
    assert row_values(bench, rows, "-loss") == tuple(-expected[index] for index in range(len(rows)))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_accuracy_takes_the_choice_of_lowest_loss(name: str, request: pytest.FixtureRequest) -> None:
    bench = request.getfixturevalue(name)
    fmt = resolve_format([bench.checkpoint])
    expected = []
    for row in ROWS:
        tried = [{**row, "output": text} for text in row["choices"]]
        found = dict(losses(bench, prepare(tried, bench.model_type, bench.tokenizer, fmt=fmt)))
        expected.append(min(found, key=lambda index: found[index]))
    right = [{**row, "answer": best} for row, best in zip(ROWS, expected, strict=True)]
    wrong = [{**row, "answer": (row["answer"] + 1) % len(row["choices"])} for row in right]
    settings = EvaluationSettings(batch_size=2)
    assert row_values(bench, right, "accuracy", settings=settings, fmt=fmt) == (1.0, 1.0, 1.0)
    assert row_values(bench, wrong, "accuracy", settings=settings, fmt=fmt) == (0.0, 0.0, 0.0)


def test_prepared_rows_are_read_once_for_all_models(
    llama: Workbench, tiny_llama: TinyFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = prepare_metric(ROWS, "accuracy", "decoder", llama.tokenizer)
    assert len(ready) == len(ROWS)
    monkeypatch.setattr(metrics, "prepare", None)
    for folder in tiny_llama.fine_tunes:
        assert len(measure(bench_for(Recipe.single(str(folder)), "decoder", "cpu"), ready)) == len(ROWS)
    assert measure(llama, ready) == measure(llama, ready)


def values_of(row_losses: list[float]) -> tuple[float, ...]:
    ready = PreparedMetric(get_metric("accuracy", "decoder"), "decoder", tuple(ROWS[:2]), EvaluationSettings(), PLAIN)
    return ready.values_of(row_losses)


def test_ties_go_to_the_first_choice_and_no_number_never_wins() -> None:
    assert values_of([2.0, 1.0, 3.0, 1.0, 2.0]) == (1.0, 1.0)
    assert values_of([1.0, 1.0, 1.0, 1.0, 1.0]) == (0.0, 1.0)
    assert values_of([math.nan, 1.0, 3.0, math.nan, math.nan]) == (1.0, 0.0)
    assert values_of([math.inf] * 5) == (0.0, 0.0)


def test_rows_that_a_metric_cannot_use_are_named(llama: Workbench) -> None:
    def problems(rows: list[dict[str, Any]], metric: str, **settings: Any) -> list[str]:
        with pytest.raises(ExampleError) as caught:
            prepare_metric(rows, metric, "decoder", llama.tokenizer, EvaluationSettings(**settings))
        return list(caught.value.problems)

    plain = {"input": "a", "output": "b", "task": "verse"}
    sentence = "Row 2 (verse) has no choices: accuracy needs rows with input, choices and answer."
    assert problems([ROWS[0], plain], "accuracy") == [sentence]
    assert problems([ROWS[0], {**plain, "choices": ["a", "b"], "answer": 2}], "accuracy") == [sentence]
    long = {**ROWS[1], "input": "word " * 50}
    assert [problem.partition(":")[0] for problem in problems([ROWS[0], long], "accuracy", max_input_length=40)] == [
        "Row 2"
    ]
    assert problems([{"input": "a", "output": " "}], "bleu") == [
        "Row 1 needs a question and a reference answer: fill in input and output or remove the row."
    ]
    for metric in metrics_for("decoder"):
        assert problems([], metric.name) == ["There are no example rows: paste some or choose a demo set."]


def test_equal_preparations_have_equal_keys(llama: Workbench) -> None:
    def key(rows: list[dict[str, Any]] = ROWS, metric: str = "accuracy", **more: Any) -> str:
        return prepare_metric(rows, metric, "decoder", llama.tokenizer, **more).key

    assert key() == key()
    settings = EvaluationSettings(batch_size=1)
    assert key() == key(settings=settings)  # which changes no loss
    longer = GenerationSettings(max_new_tokens=200)
    assert key(generation=longer) == key()
    others = [key(ROWS[:2]), key(metric="-loss"), key(metric="bleu"), key(metric="bleu", generation=longer)]
    others.append(key(fmt=resolve_format([llama.checkpoint], "chat")))
    assert len({key(), *others}) == 6


# ── generated answers ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generated_metrics_compare_the_greedy_answer(name: str, request: pytest.FixtureRequest) -> None:
    bench = request.getfixturevalue(name)
    short = GenerationSettings(greedy=True, repetition_penalty=1.0, max_new_tokens=8)
    answers = [[*generate(bench, row["input"], short), ""][-2:][0] for row in ROWS]
    own = [
        {**row, "output": answer if answer.strip() else "nothing"} for row, answer in zip(ROWS, answers, strict=True)
    ]
    drawn = GenerationSettings(repetition_penalty=1.0, max_new_tokens=8)  # greedy all the same
    assert row_values(bench, own, "exact_match", generation=drawn) == tuple(
        text_metrics.exact_match(answer, row["output"]) for answer, row in zip(answers, own, strict=True)
    )
    for metric in ("exact_match", "rouge_l", "chrf", "bleu"):
        compare = getattr(text_metrics, metric)
        assert row_values(bench, ROWS, metric, generation=drawn) == tuple(
            compare(answer, row["output"]) for answer, row in zip(answers, ROWS, strict=True)
        )


def test_a_conversation_is_answered_whole(llama: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fake(bench: Any, question: Any, *_: Any) -> Iterator[str]:
        asked.append(question)
        yield from ("Pa", "Paris")

    monkeypatch.setattr(metrics, "generate", fake)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital of France?"}]
    assert row_values(llama, [{**ROWS[0], "messages": turns}, ROWS[0]], "exact_match") == (1.0, 1.0)
    assert asked == [turns, "Capital of France?"]


def test_a_question_without_room_for_an_answer_is_named(llama: Workbench) -> None:
    with pytest.raises(ExampleError, match=r"^Row 2 \(verse\): The prompt has .* leaves no room"):
        row_values(
            llama,
            [ROWS[0], {**ROWS[0], "input": "word " * 800, "task": "verse"}],
            "chrf",
            generation=GenerationSettings(max_new_tokens=2),
        )


@pytest.mark.parametrize("metric", ["-loss", "accuracy", "chrf"])
def test_stop_ends_a_measurement(llama: Workbench, metric: str) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        row_values(llama, ROWS, metric, stop=stop)


def test_texts_are_compared_as_published() -> None:
    assert text_metrics.exact_match(" a  b\n", "a b") == 1.0
    assert text_metrics.exact_match("A b", "a b") == 0.0
    # Longest common subsequence "the cat": precision 2/3, recall 2/4.
    assert text_metrics.rouge_l("the black cat", "The cat sat down.") == pytest.approx(2 * (2 / 3) * (1 / 2) / (7 / 6))
    # 3 of 4 characters in order, on both sides.
    assert text_metrics.rouge_l("我爱北京", "我爱南京") == pytest.approx(0.75)
    assert text_metrics.tokens_of("Go_to 北京 2nd カフェ!") == ["go", "to", "北", "京", "2nd", "カ", "フ", "ェ"]
    # Unigrams 2/3, bigrams 1/2, trigrams smoothed to 1/2 of 1: the orders that three words have.
    assert text_metrics.bleu("the black cat", "the black dog") == pytest.approx((2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3))
    # By characters four unigrams, of which three are right; as one word nothing would be.
    assert text_metrics.bleu("我爱北京", "我爱南京") > 0.3
    assert text_metrics.chrf("abc", "xyz") == 0.0
    assert text_metrics.chrf("kitten", "sitting") > text_metrics.chrf("kitten", "xyz")


@given(text=st.text(st.sampled_from("ab cd京东 .,!?1"), min_size=1, max_size=30), other=st.text(max_size=30))
def test_every_comparison_lies_between_0_and_1_and_is_1_for_the_same_text(text: str, other: str) -> None:
    for compare in (text_metrics.exact_match, text_metrics.rouge_l, text_metrics.chrf, text_metrics.bleu):
        assert 0.0 <= compare(other, text) <= 1.0
        assert compare("", text) in (0.0, float(not text.strip() and compare is text_metrics.exact_match))
        if text_metrics.tokens_of(text):
            assert compare(text, text) == pytest.approx(1.0)


# ── retrieval ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_retrieval_metrics_come_from_the_ranks(bert: Workbench) -> None:
    ranks = retrieval(bert, SEARCH).ranks
    assert row_values(bert, SEARCH, "r@1") == tuple(float(rank == 1) for rank in ranks)
    assert row_values(bert, SEARCH, "mrr") == tuple(1 / rank for rank in ranks)
    assert row_values(bert, SEARCH, "ndcg@10") == tuple(
        1 / math.log2(1 + rank) if rank <= 10 else 0.0 for rank in ranks
    )
    with pytest.raises(ExampleError, match="Row 1 needs a query and a passage to find"):
        prepare_metric([{"query": "a", "pos": []}], "mrr", "encoder", bert.tokenizer)


# ── figures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_figures_know_their_error_and_their_rows() -> None:
    figure = figure_of([1.0, 3.0])
    assert (figure.mean, figure.error, figure.n) == (2.0, 1.0, 2)
    one = figure_of([1.0])
    assert (one.mean, one.n) == (1.0, 1)
    assert math.isnan(one.error)
    with pytest.raises(ExampleError, match="There are no rows"):
        figure_of([])


def test_a_difference_is_taken_row_by_row() -> None:
    easy_and_hard = [0.0, 10.0, -10.0]
    better = [value + 1 for value in easy_and_hard]
    figure = paired_difference(better, easy_and_hard)
    assert (figure.mean, figure.error, figure.n) == (1.0, 0.0, 3)
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0], [1.0, 2.0])
