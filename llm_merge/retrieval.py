"""How often an embedding model finds the right passage: rank of each query's passage among all passages of the rows.

One pool of all distinct passages, positives and negatives alike. Ranks are kept per row, so that two models are
compared row by row; the summaries are the usual ones (R@1, MRR, nDCG@10).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_merge.errors import ExampleError
from llm_merge.evaluation import EvaluationSettings, embed, mean_and_error, similarity
from llm_merge.families.base import row_name, text_of
from llm_merge.families.encoder import texts_of

if TYPE_CHECKING:
    from llm_merge.workbench import Workbench


@dataclass(frozen=True)
class Score:
    """A mean over rows with its standard error, and the rows' own values in order."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean_and_error(self.values)[0]

    @property
    def error(self) -> float:
        return mean_and_error(self.values)[1]


@dataclass(frozen=True)
class Retrieval:
    """ranks: for each row, 1 + how many other passages are nearer to its query. pool: passages in all."""

    ranks: tuple[int, ...]
    pool: int

    @property
    def recall_at_1(self) -> Score:
        return Score(tuple(float(rank == 1) for rank in self.ranks))

    @property
    def mrr(self) -> Score:
        return Score(tuple(1 / rank for rank in self.ranks))

    @property
    def ndcg_at_10(self) -> Score:
        """With one passage to find, nDCG@10 is 1 / log2(1 + rank) up to rank 10, then 0."""
        return Score(tuple(1 / math.log2(1 + rank) if rank <= 10 else 0.0 for rank in self.ranks))


def retrieval(
    bench: Workbench,
    rows: Sequence[Mapping[str, Any]],
    settings: EvaluationSettings | None = None,
    stop: threading.Event | None = None,
) -> Retrieval:
    """Rank each row's passage (of several in `pos` the nearest; the others do not compete) among all passages.

    Equally near passages count as nearer: a model that gives every text the same vector finds nothing. Raises
    ExampleError naming rows without a query or passage.
    """
    check_searchable(rows)
    pool = list(dict.fromkeys(text for row in rows for key in ("pos", "neg") for text in texts_of(row, key)))
    place = {text: index for index, text in enumerate(pool)}
    passages = embed(bench, pool, "passage", stop)
    queries = embed(bench, [text_of(row, "query") for row in rows], "query", stop)
    scores = similarity(queries, passages)
    ranks = []
    for row, line in zip(rows, scores, strict=True):
        right = [place[text] for text in texts_of(row, "pos")]
        best = max(float(line[index]) for index in right)
        nearer = int((line >= best).sum()) - sum(float(line[index]) >= best for index in right)
        ranks.append(1 + nearer)
    return Retrieval(tuple(ranks), len(pool))


def check_searchable(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises ExampleError naming the rows without a query or a passage to find."""
    problems = [
        f"{row_name(index, row)} needs a query and a passage to find: fill in query and pos or remove the row."
        for index, row in enumerate(rows)
        if not text_of(row, "query").strip() or not any(text.strip() for text in texts_of(row, "pos"))
    ]
    if problems or not rows:
        raise ExampleError(problems or ["There are no example rows: paste some or choose a demo set."])
