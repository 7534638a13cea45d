"""What every kind of model can do, and the empty skeleton that a merge is poured into.

A family knows its transformers class, its example rows, its loss and the files it needs beside its weights. It knows
nothing of recipes, and it holds no model: a `Workbench` does.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llm_merge.errors import CheckpointError, MergeError, Stopped
from llm_merge.prompts import ResolvedFormat, load_tokenizer

if TYPE_CHECKING:
    import torch

    from llm_merge.checkpoint import Checkpoint
    from llm_merge.evaluation import EvaluationSettings
    from llm_merge.workbench import Workbench

LOGIT_BYTES = 512 * 1024**2
"""Logits held at once while measuring; a batch that would need more is split, which changes no loss."""


class Family:
    """One kind of model. `name` is the API's word, `title` the page's."""

    name: ClassVar[str]
    title: ClassVar[str]
    auto_class: ClassVar[str]
    """Name of the transformers class that loads it, and that `mix_models` returns."""

    optional: ClassVar[tuple[str, ...]] = ()
    """Parameters (by the start of their name) that a checkpoint may lack because nothing here uses them."""

    # ── the model ────────────────────────────────────────────────────────────────────────────────────────────────

    def config(self, checkpoint: Checkpoint) -> Any:
        """The transformers config. Raises CheckpointError for a model that transformers does not know."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(str(checkpoint.folder), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{checkpoint.reference} is not a model that transformers knows: its config.json names "
                f"{checkpoint.config.get('model_type') or 'no model_type'}.",
                field=checkpoint.reference,
            ) from error

    def skeleton(self, checkpoint: Checkpoint) -> Any:
        """The model without its weights: parameters on the meta device, computed buffers (rotary tables) real."""
        import transformers

        config = self.config(checkpoint)
        auto = getattr(transformers, self.auto_class)
        try:
            with _empty_on_meta():
                model = auto.from_config(config, trust_remote_code=False)
        except (ValueError, ImportError) as error:
            raise CheckpointError(
                f"{checkpoint.reference} cannot be loaded as {self.article_title}: {type(config).__name__} has no "
                f"{self.auto_class}. Choose another model type.",
                field=checkpoint.reference,
            ) from error
        return model.eval().requires_grad_(False)

    @property
    def article_title(self) -> str:
        return f"{'an' if self.title[0] in 'aeiou' else 'a'} {self.title}"

    def load_tokenizer(self, checkpoint: Checkpoint) -> Any:
        return load_tokenizer(checkpoint)

    def extra_files(self, checkpoint: Checkpoint) -> Mapping[str, Path | str]:
        """What to save beside weights and config: name in the output folder → the file to copy, or its text."""
        files: dict[str, Path | str] = {path.name: path for path in checkpoint.tokenizer_files()}
        generation = checkpoint.folder / "generation_config.json"
        if generation.is_file():
            files[generation.name] = generation
        return files

    # ── examples and losses ──────────────────────────────────────────────────────────────────────────────────────

    def prepare(
        self, rows: Sequence[Mapping[str, Any]], tokenizer: Any, settings: EvaluationSettings, fmt: ResolvedFormat
    ) -> tuple[tuple[Any, ...], tuple[str, ...]]:
        """The rows as tokens, and notes for the reader. Raises ExampleError naming every row that cannot be used."""
        raise MergeError(f"Examples cannot weigh {self.article_title} yet: give the weights yourself.")

    def preview(self, row: Any, tokenizer: Any) -> list[tuple[str, bool]]:
        """The exact text of a prepared row, in pieces, each with whether it is scored."""
        raise NotImplementedError

    def batch_plan(self, bench: Workbench, rows: Sequence[Any], settings: EvaluationSettings) -> list[list[int]]:
        """The numbers of the rows that go through the model together, each row in exactly one batch."""
        raise NotImplementedError

    def batch_losses(
        self,
        bench: Workbench,
        rows: Sequence[Any],
        batch: Sequence[int],
        settings: EvaluationSettings,
        stop: threading.Event | None,
    ) -> torch.Tensor:
        """The losses of one batch of the plan in nats, shape [rows of the batch], float32.

        Differentiable where gradients are on. Raises Stopped when asked to stop.
        """
        raise NotImplementedError

    def losses(
        self, bench: Workbench, rows: Sequence[Any], settings: EvaluationSettings, stop: threading.Event | None
    ) -> Iterator[tuple[int, float]]:
        """(row, loss in nats), in any order. Raises Stopped when asked to stop."""
        import torch

        for batch in self.batch_plan(bench, rows, settings):
            check_stop(stop)
            with torch.inference_mode():
                values = self.batch_losses(bench, rows, batch, settings, stop)
            yield from zip(batch, values.tolist(), strict=True)


def row_name(index: int, row: Mapping[str, Any]) -> str:
    """How messages call a row: counted from 1, with its task."""
    task = row.get("task")
    return f"Row {index + 1} ({task})" if task else f"Row {index + 1}"


def text_of(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return value if isinstance(value, str) else ""


def check_stop(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        raise Stopped


def length_limit(tokenizer: Any, wanted: int) -> int:
    """Tokens per row: what the settings allow, and no more than the tokenizer says its model can read."""
    own = getattr(tokenizer, "model_max_length", None)
    return min(wanted, int(own)) if isinstance(own, int) and 0 < own < 10**9 else wanted


def padded(rows: Sequence[Sequence[int]], fill: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [batch, longest] filled up on the right, and the mask that tells real tokens (1) from filling (0).

    The mask is made from lengths, never from the ids: a real end token may have the id of the filling.
    """
    import torch

    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), fill, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[index, : len(row)] = 1
    return ids.to(device), mask.to(device)


def filling(tokenizer: Any) -> int:
    """The id to fill up with; without a pad token any id will do, since the mask hides it."""
    return int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else 0


def batches(lengths: Sequence[int], size: int, row_bytes: Sequence[int] | None = None) -> list[list[int]]:
    """Row numbers from short to long, at most `size` together, fewer where their logits would not fit."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    result: list[list[int]] = []
    for index in order:
        largest = max((row_bytes[i] for i in [*result[-1], index]), default=0) if row_bytes and result else 0
        if not result or len(result[-1]) >= size or largest * (len(result[-1]) + 1) > LOGIT_BYTES:
            result.append([])
        result[-1].append(index)
    return result


def takes(model: Any, parameter: str) -> bool:
    """Whether the model's forward has this parameter."""
    return parameter in inspect.signature(model.forward).parameters


def _empty_on_meta() -> Any:
    """`torch.empty` on the meta device, all else as it is: weights cost nothing, computed buffers come out right.

    A function mode belongs to its thread, unlike transformers' own way of skipping the initialisation.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class EmptyOnMeta(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if function is torch.empty:
                kwargs["device"] = "meta"
            return function(*args, **kwargs)

    return EmptyOnMeta()
