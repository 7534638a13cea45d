"""Encoder-decoder models such as T5: the question goes to the encoder, the answer's tokens are the labels.

The same loss as a chat model's, nats per token of the answer, the end token included; always in the plain form, since
these models have two separate inputs and no turns.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_merge.errors import ExampleError
from llm_merge.families.base import Family, batches, filling, length_limit, padded, row_name, text_of
from llm_merge.families.decoder import empty_answers, mean_loss
from llm_merge.prompts import ResolvedFormat

if TYPE_CHECKING:
    import torch

    from llm_merge.evaluation import EvaluationSettings
    from llm_merge.workbench import Workbench


@dataclass(frozen=True)
class LabelledRow:
    """Token ids of the question and of the answer."""

    question: tuple[int, ...]
    answer: tuple[int, ...]


class EncoderDecoder(Family):
    name = "encoder-decoder"
    title = "encoder-decoder model"
    auto_class = "AutoModelForSeq2SeqLM"

    def prepare(
        self, rows: Sequence[Mapping[str, Any]], tokenizer: Any, settings: EvaluationSettings, fmt: ResolvedFormat
    ) -> tuple[tuple[LabelledRow, ...], tuple[str, ...]]:
        problems = empty_answers(rows)
        problems += [
            f"{row_name(index, row)} has an empty question: fill in its input or remove the row."
            for index, row in enumerate(rows)
            if not text_of(row, "input").strip()
        ]
        if problems:
            raise ExampleError(problems)
        limit = length_limit(tokenizer, settings.max_input_length)
        cut = 0
        prepared = []
        for row in rows:
            question = list(tokenizer(text_of(row, "input"))["input_ids"])
            answer = list(tokenizer(text_target=text_of(row, "output"))["input_ids"])
            if tokenizer.eos_token_id is not None and answer[-1:] != [tokenizer.eos_token_id]:
                answer.append(tokenizer.eos_token_id)
            cut += len(question) > limit or len(answer) > limit
            prepared.append(LabelledRow(tuple(question[:limit]), tuple(answer[:limit])))
        notes = (f"{cut} of {len(rows)} rows are cut at {limit} tokens.",) if cut else ()
        return tuple(prepared), notes

    def preview(self, row: LabelledRow, tokenizer: Any) -> list[tuple[str, bool]]:
        return [(tokenizer.decode(row.question), False), (tokenizer.decode(row.answer), True)]

    def batch_plan(
        self, bench: Workbench, rows: Sequence[LabelledRow], settings: EvaluationSettings
    ) -> list[list[int]]:
        """Rows of like length together, fewer where their logits would not fit."""
        vocabulary = int(bench.model.get_output_embeddings().weight.shape[0])
        sizes = [4 * vocabulary * len(row.answer) for row in rows]
        return batches([len(row.question) + len(row.answer) for row in rows], settings.batch_size, sizes)

    def batch_losses(
        self,
        bench: Workbench,
        rows: Sequence[LabelledRow],
        batch: Sequence[int],
        settings: EvaluationSettings,
        stop: threading.Event | None,
    ) -> torch.Tensor:
        import torch

        fill = filling(bench.tokenizer)
        ids, mask = padded([rows[index].question for index in batch], fill, bench.device)
        labels, real = padded([rows[index].answer for index in batch], fill, bench.device)
        labels = labels.masked_fill(real == 0, -100)
        logits = bench.model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).logits
        lengths = [len(rows[index].answer) for index in batch]
        return torch.stack([mean_loss(logits[n, :length], labels[n, :length]) for n, length in enumerate(lengths)])
