"""Chat and text models: the loss of an answer after its question, in nats per token of the answer.

Mean over examples of the mean over answer tokens (LM-Cocktail's loss, arXiv 2311.13534 §3.2, without its padding to
2048 tokens and its over-weighted last batch). The question is not scored; the end token is.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llm_merge.errors import ExampleError
from llm_merge.families.base import Family, batches, filling, length_limit, padded, row_name, takes, text_of
from llm_merge.prompts import ResolvedFormat, TokenRow, encode_answers, marked_text

if TYPE_CHECKING:
    import torch

    from llm_merge.evaluation import EvaluationSettings
    from llm_merge.workbench import Workbench


class Decoder(Family):
    name = "decoder"
    title = "chat model"
    auto_class = "AutoModelForCausalLM"

    def prepare(
        self, rows: Sequence[Mapping[str, Any]], tokenizer: Any, settings: EvaluationSettings, fmt: ResolvedFormat
    ) -> tuple[tuple[TokenRow, ...], tuple[str, ...]]:
        problems = empty_answers(rows)
        if problems:
            raise ExampleError(problems)
        limit = length_limit(tokenizer, settings.max_input_length)
        pairs = [(row.get("messages") or text_of(row, "input"), text_of(row, "output")) for row in rows]
        encoded = encode_answers(tokenizer, pairs, fmt, limit)
        problems = [
            f"{row_name(index, row)}: its {done.whole} tokens are cut at {limit} and nothing of the answer is left: "
            "shorten the question or raise the longest input."
            for index, (row, done) in enumerate(zip(rows, encoded, strict=True))
            if not any(done.scored[1:])
        ]
        if problems:
            raise ExampleError(problems)
        cut = sum(row.whole > limit for row in encoded)
        notes = (f"{cut} of {len(rows)} answers are cut at {limit} tokens.",) if cut else ()
        return tuple(encoded), notes

    def preview(self, row: TokenRow, tokenizer: Any) -> list[tuple[str, bool]]:
        return marked_text(row, tokenizer.eos_token)

    def batch_plan(self, bench: Workbench, rows: Sequence[TokenRow], settings: EvaluationSettings) -> list[list[int]]:
        """Rows of like length together, fewer where their logits would not fit."""
        can_choose = takes(bench.model, "logits_to_keep")
        row = 4 * int(bench.model.get_output_embeddings().weight.shape[0])
        sizes = [row * len(_places(tokens) if can_choose else tokens.ids) for tokens in rows]
        return batches([len(tokens.ids) for tokens in rows], settings.batch_size, sizes)

    def batch_losses(
        self,
        bench: Workbench,
        rows: Sequence[TokenRow],
        batch: Sequence[int],
        settings: EvaluationSettings,
        stop: threading.Event | None,
    ) -> torch.Tensor:
        import torch

        can_choose = takes(bench.model, "logits_to_keep")
        ids, mask = padded([rows[index].ids for index in batch], filling(bench.tokenizer), bench.device)
        places = [_places(rows[index]) for index in batch]
        counts = [len(row) for row in places]
        # The head is the dearest layer of a small model: apply it only where an answer token is guessed.
        kept = sorted({place for row in places for place in row})
        column = {place: number for number, place in enumerate(kept)}
        options = {"logits_to_keep": torch.tensor(kept, device=bench.device)} if can_choose else {}
        logits = bench.model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
        # One copy to the device for the whole batch: a GPU would have to wait for each.
        columns = torch.tensor([column[place] if can_choose else place for row in places for place in row])
        tokens = torch.tensor([rows[i].ids[at + 1] for i, row in zip(batch, places, strict=True) for at in row])
        where, targets = columns.to(bench.device).split(counts), tokens.to(bench.device).split(counts)
        return torch.stack([mean_loss(logits[n, where[n]], targets[n]) for n in range(len(batch))])


def mean_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats, computed in float32. logits [tokens, vocabulary], targets [tokens]."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits.float(), targets)


def _places(row: TokenRow) -> list[int]:
    """The positions whose next token is scored."""
    return [at - 1 for at, scored in enumerate(row.scored) if scored and at > 0]


def empty_answers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each row without an answer."""
    return [
        f"{row_name(index, row)} has an empty answer: fill in its output or remove the row."
        for index, row in enumerate(rows)
        if not text_of(row, "output").strip()
    ]
