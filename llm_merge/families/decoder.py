"""Chat and text models: the loss of an answer after its question, in nats per token of the answer.

Mean over examples of the mean over answer tokens (LM-Cocktail's loss, arXiv 2311.13534 §3.2, without its padding to
2048 tokens and its over-weighted last batch). The question is not scored; the end token is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llm_merge.errors import ExampleError
from llm_merge.families.base import Family, batches, check_stop, filling, length_limit, padded, row_name, takes, text_of
from llm_merge.prompts import ResolvedFormat, TokenRow, encode_answers, marked_text

if TYPE_CHECKING:
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

    def losses(
        self, bench: Workbench, rows: Sequence[TokenRow], settings: EvaluationSettings, stop: threading.Event | None
    ) -> Iterator[tuple[int, float]]:
        import torch

        fill, can_choose = filling(bench.tokenizer), takes(bench.model, "logits_to_keep")
        vocabulary = int(bench.model.get_output_embeddings().weight.shape[0])
        places = [[at - 1 for at, scored in enumerate(row.scored) if scored and at > 0] for row in rows]
        sizes = [4 * vocabulary * len(row.ids if not can_choose else at) for row, at in zip(rows, places, strict=True)]
        for batch in batches([len(row.ids) for row in rows], settings.batch_size, sizes):
            check_stop(stop)
            ids, mask = padded([rows[index].ids for index in batch], fill, bench.device)
            # The head is the dearest layer of a small model: apply it only where an answer token is guessed.
            kept = sorted({place for index in batch for place in places[index]})
            column = {place: number for number, place in enumerate(kept)}
            options = {"logits_to_keep": torch.tensor(kept, device=bench.device)} if can_choose else {}
            with torch.inference_mode():
                logits = bench.model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
            for number, index in enumerate(batch):
                where = [column[place] if can_choose else place for place in places[index]]
                targets = torch.tensor([rows[index].ids[place + 1] for place in places[index]], device=bench.device)
                yield index, mean_loss(logits[number, where], targets)


def mean_loss(logits: Any, targets: Any) -> float:
    """Mean cross-entropy in nats, computed in float32. logits [tokens, vocabulary], targets [tokens]."""
    from torch.nn.functional import cross_entropy

    return float(cross_entropy(logits.float(), targets))


def empty_answers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each row without an answer."""
    return [
        f"{row_name(index, row)} has an empty answer: fill in its output or remove the row."
        for index, row in enumerate(rows)
        if not text_of(row, "output").strip()
    ]
