"""Rerankers: one score for a pair of a query and a passage. They can be loaded, mixed, tried and saved.

Weights from examples (cross-entropy of the positive's score against its negatives', which LM-Cocktail does not have)
come later; until then `prepare` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llm_merge.families.base import Family, batches, filling, length_limit, padded

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llm_merge.workbench import Workbench


class Reranker(Family):
    name = "reranker"
    title = "reranker"
    auto_class = "AutoModelForSequenceClassification"

    def scores(
        self, bench: Workbench, pairs: Sequence[tuple[str, str]], *, batch_size: int = 32, max_length: int = 512
    ) -> NDArray[np.float32]:
        """The logit of each (query, passage), shape [pairs]; of several labels the last, which means "relevant"."""
        import numpy as np
        import torch

        limit = length_limit(bench.tokenizer, max_length)
        rows = [bench.tokenizer(query, passage, truncation=True, max_length=limit) for query, passage in pairs]
        result = np.zeros(len(rows), dtype=np.float32)
        for batch in batches([len(row["input_ids"]) for row in rows], batch_size):
            ids, mask = padded([rows[index]["input_ids"] for index in batch], filling(bench.tokenizer), bench.device)
            inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
            if "token_type_ids" in rows[batch[0]]:
                types = [rows[index]["token_type_ids"] for index in batch]
                inputs["token_type_ids"] = padded(types, 0, bench.device)[0]
            with torch.inference_mode():
                logits = bench.model(**inputs).logits
            result[batch] = logits[:, -1].float().cpu().numpy()
        return result
