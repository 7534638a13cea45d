"""How well a model in memory does on example rows: losses in nats, and embeddings with their similarities.

One entry for every kind of model; what differs between them is in `families/`. Nothing here changes a weight, reads a
file or keeps a result: measuring many models, and remembering, is `measurements.py`'s business.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_merge.errors import ExampleError, MergeError
from llm_merge.families import get_family
from llm_merge.families.encoder import Encoder, SearchRow, search_of
from llm_merge.prompts import FORMATS, PLAIN, ResolvedFormat, TokenRow, resolve_format

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llm_merge.workbench import Workbench

__all__ = [
    "FORMATS",
    "EvaluationSettings",
    "Prepared",
    "ResolvedFormat",
    "embed",
    "losses",
    "mean_and_error",
    "prepare",
    "preview",
    "resolve_format",
    "saturation",
    "similarity",
]

SATURATED = 0.02
"""An embedding loss below this share of chance (ln of the passages) has nothing left to tell models apart by."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How rows are read and measured.

    format              "auto" | "chat" | "plain", see `prompts.resolve_format`
    max_input_length    tokens of a whole row; what is longer is cut at the end
    batch_size          rows at a time. A chat model's losses do not depend on it; an embedding model's do, since each
                        query competes with the passages of its batch
    neg_number          at most this many of a row's negatives, drawn by `seed`
    """

    format: str = "auto"
    max_input_length: int = 2048
    batch_size: int = 8
    neg_number: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.max_input_length < 2 or self.neg_number < 0:
            raise MergeError("The batch size must be at least 1, the longest input 2 tokens, the negatives 0.")

    def key(self, model_type: str = "encoder") -> str:
        """Equal keys: equal losses. Names only what changes them, so that a cache serves every batch size it can."""
        shared = f"format={self.format};length={self.max_input_length}"
        if model_type in ("decoder", "encoder-decoder"):
            return shared
        return f"{shared};batch={self.batch_size};negatives={self.neg_number};seed={self.seed}"


@dataclass(frozen=True)
class Prepared:
    """Rows turned into what a model reads, once for all models of a run. `notes`: what the reader should know."""

    model_type: str
    settings: EvaluationSettings
    format: ResolvedFormat
    rows: tuple[Any, ...]
    tokenizer: Any
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)


def prepare(
    rows: Sequence[Mapping[str, Any]],
    model_type: str,
    tokenizer: Any,
    settings: EvaluationSettings | None = None,
    fmt: ResolvedFormat | None = None,
) -> Prepared:
    """Turn rows into tokens. Raises ExampleError with a sentence for every row that cannot be used."""
    settings, fmt = settings or EvaluationSettings(), fmt or PLAIN
    if not rows:
        raise ExampleError(["There are no example rows: paste some or choose a demo set."])
    done, notes = get_family(model_type).prepare(rows, tokenizer, settings, fmt)
    return Prepared(model_type, settings, fmt, done, tokenizer, notes)


def preview(prepared: Prepared, index: int) -> list[tuple[str, bool]]:
    """The exact text of one row in pieces, each with whether the loss is taken over it."""
    return get_family(prepared.model_type).preview(prepared.rows[index], prepared.tokenizer)


def losses(bench: Workbench, prepared: Prepared, stop: threading.Event | None = None) -> Iterator[tuple[int, float]]:
    """(row, loss) as they come, each row once, in any order.

    Chat and encoder-decoder models: mean nats per token of the answer, its end token included. Embedding models:
    contrastive nats of the row's query. The bench's lock is the caller's. Raises Stopped when asked to stop.
    """
    yield from get_family(prepared.model_type).losses(bench, prepared.rows, prepared.settings, stop)


def embed(
    bench: Workbench, texts: Sequence[str], kind: str = "passage", stop: threading.Event | None = None
) -> NDArray[np.float32]:
    """Vectors [texts, dimensions] as sentence-transformers gives them. kind: "query" | "passage" chooses the prefix."""
    import numpy as np

    family = bench.family
    if not isinstance(family, Encoder):
        raise MergeError(f"Only embedding models embed texts, and this is {family.article_title}.")
    if not texts:
        return np.zeros((0, 0), dtype=np.float32)
    prefix = search_of(bench.tokenizer).prefix(kind)
    vectors = family.embed(bench, [prefix + text for text in texts], prefix=prefix, stop=stop)
    return np.asarray(vectors.cpu().numpy(), dtype=np.float32)


def similarity(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosine similarities [left rows, right rows], from -1 to 1."""
    import numpy as np

    def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
        return np.asarray(vectors / np.maximum(lengths, 1e-12), dtype=np.float32)

    return np.asarray(unit(left) @ unit(right).T, dtype=np.float32)


def saturation(prepared: Prepared, mean_losses: Sequence[float]) -> str:
    """One sentence when every embedding model finds nearly every passage, so that the losses say little; else ""."""
    rows = [row for row in prepared.rows if isinstance(row, SearchRow)]
    if not rows or not mean_losses:
        return ""
    sizes: dict[int, int] = {}
    for row in rows:
        sizes[row.batch] = sizes.get(row.batch, 0) + 1 + len(row.negatives)
    chance = math.fsum(math.log(sizes[row.batch]) for row in rows) / len(rows)
    if max(mean_losses) >= SATURATED * chance:
        return ""
    return (
        f"Every model finds nearly every passage (losses below {SATURATED * chance:.2f}, chance is {chance:.2f}): "
        "use more rows to a batch, or harder negatives, to tell the models apart."
    )


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of one value is not known (NaN)."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def answer_tokens(prepared: Prepared) -> int:
    """How many tokens the losses are taken over, for an estimate of the time it takes."""
    return sum(sum(row.scored) for row in prepared.rows if isinstance(row, TokenRow))
