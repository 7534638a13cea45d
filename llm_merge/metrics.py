"""What a model is judged by: one number per row, higher is always better.

Rows are prepared once and then measured with as many models as come; who makes those models, and what is decided from
the numbers, is not known here. The negative loss is the default. Every metric is one entry of `METRICS`.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llm_merge.errors import ExampleError, MergeError
from llm_merge.evaluation import EvaluationSettings, Prepared, losses, mean_and_error, prepare
from llm_merge.examples import rows_hash
from llm_merge.families.base import check_stop, row_name, text_of
from llm_merge.generation import GenerationSettings, generate
from llm_merge.prompts import PLAIN, ResolvedFormat
from llm_merge.retrieval import check_searchable, retrieval

if TYPE_CHECKING:
    from llm_merge.workbench import Workbench

Row = Mapping[str, Any]
TEXT_TYPES = ("decoder", "encoder-decoder")
LOSS = "-loss"
GREEDY = GenerationSettings(greedy=True, repetition_penalty=1.0, max_new_tokens=128)
"""How answers are generated that are then compared with a reference."""


@dataclass(frozen=True)
class Metric:
    """One way to judge a model, higher is better.

    name         what the library and the command line call it
    title        what the page calls it
    unit         of its values; "" for shares from 0 to 1
    kind         "loss" | "choice" | "generated" | "retrieval": what has to be computed for it
    model_types  the kinds of model that it applies to
    help         one sentence for a reader
    """

    name: str
    title: str
    unit: str
    kind: str
    model_types: tuple[str, ...]
    help: str


METRICS: tuple[Metric, ...] = (
    Metric(
        LOSS,
        "−loss",
        "nats",
        "loss",
        (*TEXT_TYPES, "encoder"),
        "The negative loss: how surprised the model is by the right answer, per token of it (for embedding models: "
        "by the right passage among the others).",
    ),
    Metric(
        "accuracy",
        "Accuracy",
        "",
        "choice",
        TEXT_TYPES,
        "The share of multiple-choice rows whose right choice is the likeliest, by mean log-probability per token of "
        "the choice's text.",
    ),
    Metric(
        "exact_match",
        "Exact match",
        "",
        "generated",
        TEXT_TYPES,
        "The share of generated answers that are the reference, white space aside.",
    ),
    Metric(
        "rouge_l",
        "ROUGE-L",
        "",
        "generated",
        TEXT_TYPES,
        "How much of the reference the generated answer says in the same order (F1 over words, Chinese by character).",
    ),
    Metric(
        "chrf", "chrF", "", "generated", TEXT_TYPES, "How many short runs of characters answer and reference share."
    ),
    Metric(
        "bleu",
        "BLEU",
        "",
        "generated",
        TEXT_TYPES,
        "How many short runs of words the generated answer shares with the reference, row by row.",
    ),
    Metric("r@1", "R@1", "", "retrieval", ("encoder",), "The share of queries whose passage is the nearest of all."),
    Metric(
        "mrr", "MRR", "", "retrieval", ("encoder",), "The mean of 1 / rank of the right passage among all passages."
    ),
    Metric(
        "ndcg@10",
        "nDCG@10",
        "",
        "retrieval",
        ("encoder",),
        "1 for a passage found first, less the later it comes, 0 after the tenth place.",
    ),
)


def metrics_for(model_type: str) -> tuple[Metric, ...]:
    """The metrics that apply to a kind of model, the default first; none for rerankers, which are not measured yet."""
    return tuple(metric for metric in METRICS if model_type in metric.model_types)


def get_metric(name: str, model_type: str) -> Metric:
    """The metric called `name`. Raises MergeError for one that is not known or does not apply to the model type."""
    offered = {metric.name: metric for metric in metrics_for(model_type)}
    if not offered:
        raise MergeError(
            f"Models of the type {model_type} cannot be measured yet: choose decoder, encoder-decoder or encoder.",
            field="metric",
        )
    if name in offered:
        return offered[name]
    names = ", ".join(offered)
    known = next((metric for metric in METRICS if metric.name == name), None)
    if known is not None:
        raise MergeError(f"{known.title} does not apply to the type {model_type}: use {names}.", field="metric")
    close = difflib.get_close_matches(str(name).lower(), list(offered), n=1, cutoff=0.5)
    meant = f"did you mean “{close[0]}”? " if close else ""
    raise MergeError(f"The metric “{name}” is not known: {meant}There are {names}.", field="metric")


@dataclass(frozen=True)
class PreparedMetric:
    """Rows made ready for one metric, once for all models of a run.

    rows        the rows as they came
    prepared    "loss": the rows as tokens; "choice": all choices of the first row, then of the second, …; else None
    generation  how answers are generated, greedily; only for "generated"
    """

    metric: Metric
    model_type: str
    rows: tuple[Row, ...]
    settings: EvaluationSettings
    format: ResolvedFormat
    prepared: Prepared | None = None
    generation: GenerationSettings = GREEDY

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader should know about how the rows were read."""
        return self.prepared.notes if self.prepared is not None else ()

    @property
    def key(self) -> str:
        """Equal keys and equal tokenizers: equal values of equal models. SHA-256 of metric, rows and settings."""
        parts = [self.metric.name, self.model_type, rows_hash(self.rows), self.settings.key(self.model_type)]
        parts += [self.format.kind, self.format.template or "", self.format.eos or ""]
        if self.metric.kind == "generated":
            parts.append(repr(self.generation))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def values_of(self, row_losses: Sequence[float]) -> tuple[float, ...]:
        """One value per row from the loss of every prepared row (kinds "loss" and "choice"), however it was computed.

        A choice's score is −loss, its mean log-probability per token with the end token; of equal ones the first is
        taken, and a loss that is not a number never wins.
        """
        if self.metric.kind == "loss":
            return tuple(-loss for loss in row_losses)
        values, start = [], 0
        for row in self.rows:
            scores = [
                math.inf if math.isnan(loss) else loss for loss in row_losses[start : start + len(row["choices"])]
            ]
            start += len(scores)
            best = min(scores)
            values.append(float(math.isfinite(best) and scores.index(best) == row["answer"]))
        return tuple(values)


def prepare_metric(
    rows: Sequence[Row],
    metric: str | Metric,
    model_type: str,
    tokenizer: Any,
    settings: EvaluationSettings | None = None,
    fmt: ResolvedFormat | None = None,
    generation: GenerationSettings | None = None,
) -> PreparedMetric:
    """Make rows ready to be measured with many models; the tokenizer is that of all of them.

    Of multiple-choice rows the choices' texts are scored after the question, also where a data set names them by
    letters (MedQA, CMExam). Raises MergeError as `get_metric` does, and ExampleError with a sentence for every row
    that cannot be used.
    """
    chosen = get_metric(metric if isinstance(metric, str) else metric.name, model_type)
    settings, fmt = settings or EvaluationSettings(), fmt or PLAIN
    done = PreparedMetric(chosen, model_type, tuple(rows), settings, fmt)
    if not rows:
        raise ExampleError(["There are no example rows: paste some or choose a demo set."])
    if chosen.kind == "loss":
        return replace(done, prepared=prepare(rows, model_type, tokenizer, settings, fmt))
    if chosen.kind == "choice":
        return replace(done, prepared=_prepare_choices(rows, model_type, tokenizer, settings, fmt))
    if chosen.kind == "retrieval":
        check_searchable(rows)
        return done
    problems = [
        f"{row_name(index, row)} needs a question and a reference answer: fill in input and output or remove the row."
        for index, row in enumerate(rows)
        if not text_of(row, "output").strip() or not (row.get("messages") or text_of(row, "input").strip())
    ]
    if problems:
        raise ExampleError(problems)
    return replace(done, generation=replace(generation or GREEDY, greedy=True))


def measure(bench: Workbench, prepared: PreparedMetric, stop: threading.Event | None = None) -> tuple[float, ...]:
    """One value per row, in the rows' order, for the model that the bench holds now; its lock is the caller's.

    Raises Stopped when asked to stop, ExampleError for a row whose question leaves no room for an answer.
    """
    kind = prepared.metric.kind
    if kind == "generated":
        return tuple(_generated(bench, prepared, index, stop) for index in range(len(prepared)))
    if kind == "retrieval":
        found = retrieval(bench, prepared.rows, prepared.settings, stop)
        return {"r@1": found.recall_at_1, "mrr": found.mrr, "ndcg@10": found.ndcg_at_10}[prepared.metric.name].values
    assert prepared.prepared is not None
    by_row = dict(losses(bench, prepared.prepared, stop))
    return prepared.values_of([by_row[index] for index in range(len(by_row))])


def row_values(
    bench: Workbench,
    rows: Sequence[Row],
    metric: str | Metric,
    *,
    settings: EvaluationSettings | None = None,
    fmt: ResolvedFormat | None = None,
    stop: threading.Event | None = None,
    generation: GenerationSettings | None = None,
) -> tuple[float, ...]:
    """`prepare_metric` and `measure` in one: for rows that are measured with one model only."""
    ready = prepare_metric(rows, metric, bench.model_type, bench.tokenizer, settings, fmt, generation)
    return measure(bench, ready, stop)


def _prepare_choices(
    rows: Sequence[Row], model_type: str, tokenizer: Any, settings: EvaluationSettings, fmt: ResolvedFormat
) -> Prepared:
    problems = [
        f"{row_name(index, row)} has no choices: accuracy needs rows with input, choices and answer."
        for index, row in enumerate(rows)
        if not _has_choices(row)
    ]
    if problems:
        raise ExampleError(problems)
    pairs = [(index, {**row, "output": text}) for index, row in enumerate(rows) for text in row["choices"]]
    try:
        return prepare([row for _, row in pairs], model_type, tokenizer, settings, fmt)
    except ExampleError as error:  # it counts the choices of all rows; a reader counts rows
        by_row: dict[int, str] = {}
        for problem in error.problems:
            if found := re.match(r"Row (\d+)", problem):
                index = pairs[int(found[1]) - 1][0]
                by_row.setdefault(index, f"Row {index + 1}{problem[found.end() :]}")
        raise ExampleError(list(by_row.values()) or error.problems) from error


def _has_choices(row: Row) -> bool:
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, (list, tuple)) or not isinstance(answer, int):
        return False
    return len(choices) > 1 and 0 <= answer < len(choices)


def _generated(bench: Workbench, prepared: PreparedMetric, index: int, stop: threading.Event | None) -> float:
    from llm_merge import text_metrics

    row = prepared.rows[index]
    answer = ""
    check_stop(stop)
    try:
        # An encoder-decoder reads the question alone, for its losses too: it knows neither turns nor chat formats.
        alone = prepared.model_type == "encoder-decoder"
        question = text_of(row, "input") if alone else row.get("messages") or text_of(row, "input")
        fmt = PLAIN if alone else prepared.format
        for part in generate(bench, question, prepared.generation, fmt, stop):
            answer = part
    except MergeError as error:
        raise ExampleError([f"{row_name(index, row)}: {error.message}"]) from error
    check_stop(stop)
    compare = {
        "exact_match": text_metrics.exact_match,
        "rouge_l": text_metrics.rouge_l,
        "chrf": text_metrics.chrf,
        "bleu": text_metrics.bleu,
    }[prepared.metric.name]
    return compare(answer, text_of(row, "output"))


# ---- figures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A mean over `n` rows with its standard error (NaN for one row), in the metric's unit."""

    mean: float
    error: float
    n: int


def figure_of(values: Sequence[float]) -> Figure:
    """Mean, standard error and number of a model's values. Raises ExampleError when there are none."""
    if not values:
        raise ExampleError(["There are no rows to take a mean of: measure at least one."])
    return Figure(*mean_and_error(values), len(values))


def paired_difference(values: Sequence[float], others: Sequence[float]) -> Figure:
    """How much better `values` are than `others` on the same rows in the same order: the mean of the differences.

    Its error is that of the differences, so that easy and hard rows do not count as noise.
    """
    return figure_of([value - other for value, other in zip(values, others, strict=True)])
