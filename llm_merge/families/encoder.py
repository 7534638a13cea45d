"""Embedding models: the model's own pooling and prefixes, and how well a query finds its passage among others.

The loss is the contrastive cross-entropy that such models are trained with (LM-Cocktail's, arXiv 2311.13534 §3.2):
cosine similarity divided by 0.05, each query against every passage of its batch. How a model pools is read from its
sentence-transformers files and never guessed silently.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_merge.errors import ExampleError
from llm_merge.families.base import Family, batches, check_stop, filling, padded, row_name, takes, text_of
from llm_merge.families.pooling import Pooling, Search, pool, read_search, sentence_transformers_files
from llm_merge.prompts import ResolvedFormat

if TYPE_CHECKING:
    import torch

    from llm_merge.checkpoint import Checkpoint
    from llm_merge.evaluation import EvaluationSettings
    from llm_merge.workbench import Workbench

SIMILARITY_SCALE = 0.05
"""Cosine similarities are divided by this before the softmax, as in LM-Cocktail."""


@dataclass(frozen=True)
class SearchRow:
    """A query with its passage and the passages that it must not find, as they are embedded (prefixes included).

    batch   number of the batch whose passages the query competes with
    """

    query: str
    positive: str
    negatives: tuple[str, ...]
    batch: int


class Encoder(Family):
    name = "encoder"
    title = "embedding model"
    auto_class = "AutoModel"
    optional = ("pooler.",)  # BERT's pooler feeds tasks that embedding does not have

    def load_tokenizer(self, checkpoint: Checkpoint) -> Any:
        """The tokenizer, with what the model's sentence-transformers files say about texts as `tokenizer.search`."""
        tokenizer = super().load_tokenizer(checkpoint)
        tokenizer.search = read_search(checkpoint.folder)
        return tokenizer

    def extra_files(self, checkpoint: Checkpoint) -> Mapping[str, Path | str]:
        """The tokenizer and the sentence-transformers files: the model's own, else ones that say what was used."""
        return {**super().extra_files(checkpoint), **sentence_transformers_files(checkpoint)}

    def prepare(
        self, rows: Sequence[Mapping[str, Any]], tokenizer: Any, settings: EvaluationSettings, fmt: ResolvedFormat
    ) -> tuple[tuple[SearchRow, ...], tuple[str, ...]]:
        search = search_of(tokenizer)
        problems = [problem for index, row in enumerate(rows) for problem in _problems(index, row)]
        if problems:
            raise ExampleError(problems)
        drawn = [_negatives(index, row, settings) for index, row in enumerate(rows)]
        groups = contrast_groups([len(negatives) for negatives in drawn], settings.batch_size)
        number = {index: batch for batch, group in enumerate(groups) for index in group}
        prepared = tuple(
            SearchRow(
                search.query_prefix + text_of(row, "query"),
                search.passage_prefix + positive_of(row),
                tuple(search.passage_prefix + text for text in drawn[index]),
                number[index],
            )
            for index, row in enumerate(rows)
        )
        if any(len(group) == 1 and not drawn[group[0]] for group in groups):
            raise ExampleError(
                ["One row without negatives has nothing to compete with: add rows or give it negatives."]
            )
        return prepared, (competition(prepared), *search.notes)

    def preview(self, row: SearchRow, tokenizer: Any) -> list[tuple[str, bool]]:
        """Query, passage (scored: it has to be found), then the negatives, one a line."""
        return [(row.query + "\n", False), (row.positive, True), *((f"\n{text}", False) for text in row.negatives)]

    def batch_plan(self, bench: Workbench, rows: Sequence[SearchRow], settings: EvaluationSettings) -> list[list[int]]:
        """The rows whose passages compete with each other, as `prepare` put them together."""
        groups: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(row.batch, []).append(index)
        return [groups[number] for number in sorted(groups)]

    def batch_losses(
        self,
        bench: Workbench,
        rows: Sequence[SearchRow],
        batch: Sequence[int],
        settings: EvaluationSettings,
        stop: threading.Event | None,
    ) -> torch.Tensor:
        import torch
        from torch.nn.functional import cross_entropy, normalize

        passages: list[str] = []
        targets = []
        for index in batch:
            targets.append(len(passages))
            passages += [rows[index].positive, *rows[index].negatives]
        vectors = self._vectors(bench, [*(rows[index].query for index in batch), *passages], "", 32, stop)
        vectors = normalize(vectors, dim=-1)
        scores = vectors[: len(batch)] @ vectors[len(batch) :].T / SIMILARITY_SCALE
        return cross_entropy(scores, torch.tensor(targets, device=scores.device), reduction="none")

    def embed(
        self,
        bench: Workbench,
        texts: Sequence[str],
        *,
        prefix: str = "",
        batch_size: int = 32,
        stop: threading.Event | None = None,
    ) -> torch.Tensor:
        """Vectors [texts, dimensions] in float32, pooled and normalised as the model says. `texts` with `prefix`."""
        import torch

        with torch.inference_mode():
            return self._vectors(bench, texts, prefix, batch_size, stop)

    def _vectors(
        self, bench: Workbench, texts: Sequence[str], prefix: str, batch_size: int, stop: threading.Event | None
    ) -> torch.Tensor:
        """As `embed`, differentiable where gradients are on."""
        import torch

        search = search_of(bench.tokenizer)
        limit = search.max_length or 512
        tokens = bench.tokenizer([_clean(text, search) for text in texts], truncation=True, max_length=limit)[
            "input_ids"
        ]
        skip = len(bench.tokenizer(prefix)["input_ids"]) - 1 if prefix and not search.pooling.include_prompt else 0
        # A chat model made into an embedding model would fill a cache that nothing reads.
        options = {"use_cache": False} if takes(bench.model, "use_cache") else {}
        result: list[torch.Tensor | None] = [None] * len(texts)
        for batch in batches([len(row) for row in tokens], batch_size):
            check_stop(stop)
            ids, mask = padded([tokens[index] for index in batch], filling(bench.tokenizer), bench.device)
            hidden = bench.model(input_ids=ids, attention_mask=mask, **options).last_hidden_state
            vectors = pool(hidden.float(), mask, search.pooling, skip)
            for index, vector in zip(batch, vectors, strict=True):
                result[index] = vector
        return torch.stack([vector for vector in result if vector is not None])


def search_of(tokenizer: Any) -> Search:
    """What the model's files say about texts; sentence-transformers' defaults for a tokenizer loaded elsewhere."""
    found = getattr(tokenizer, "search", None)
    return found if isinstance(found, Search) else Search(Pooling())


def positive_of(row: Mapping[str, Any]) -> str:
    """The passage to be found: the first of `pos`."""
    return texts_of(row, "pos")[0]


def contrast_groups(negatives: Sequence[int], size: int) -> list[list[int]]:
    """Row numbers in the order given, `size` to a batch. `negatives`: how many each row has.

    A last batch of one row without negatives is joined to the one before: alone, its loss would always be 0.
    """
    groups = [list(range(start, min(start + size, len(negatives)))) for start in range(0, len(negatives), max(size, 1))]
    if len(groups) > 1 and len(groups[-1]) == 1 and not negatives[groups[-1][0]]:
        last = groups.pop()
        groups[-1] += last
    return groups


def competition(rows: Sequence[SearchRow]) -> str:
    """How many passages each query has to tell apart, in one sentence."""
    sizes: dict[int, int] = {}
    for row in rows:
        sizes[row.batch] = sizes.get(row.batch, 0) + 1 + len(row.negatives)
    low, high = min(sizes.values(), default=0), max(sizes.values(), default=0)
    return f"Each query competes with {high if low == high else f'{low} to {high}'} passages."


def _negatives(index: int, row: Mapping[str, Any], settings: EvaluationSettings) -> list[str]:
    """At most `neg_number` of the row's negatives, drawn by the seed, the same for every model."""
    negatives = texts_of(row, "neg")
    if len(negatives) <= settings.neg_number:
        return negatives
    return random.Random(f"{settings.seed}:{index}").sample(negatives, settings.neg_number)


def _problems(index: int, row: Mapping[str, Any]) -> list[str]:
    name, problems = row_name(index, row), []
    if not text_of(row, "query").strip():
        problems.append(f"{name} has an empty query: fill in its query or remove the row.")
    if not texts_of(row, "pos") or not positive_of(row).strip():
        problems.append(f"{name} has no passage to find: fill in its pos or remove the row.")
    return problems


def texts_of(row: Mapping[str, Any], key: str) -> list[str]:
    value = row.get(key)
    if isinstance(value, str):
        return [value]
    return [text for text in value if isinstance(text, str)] if isinstance(value, (list, tuple)) else []


def _clean(text: str, search: Search) -> str:
    text = text.strip()
    return text.lower() if search.lower_case else text
