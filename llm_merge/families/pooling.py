"""How an embedding model makes one vector of many: read from its sentence-transformers files, and computed.

Reads `modules.json`, the pooling module's config, `sentence_bert_config.json` and `config_sentence_transformers.json`.
A model without these files gets sentence-transformers' own default, mean pooling, and a note that says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_merge.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from llm_merge.checkpoint import Checkpoint

MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
"""In the order in which sentence-transformers joins them when a model uses several."""

_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class Pooling:
    """Which token vectors become the text's, and whether it is brought to length 1."""

    modes: tuple[str, ...] = ("mean",)
    normalize: bool = True
    include_prompt: bool = True

    def __str__(self) -> str:
        names = {"cls": "first token", "lasttoken": "last token", "weightedmean": "weighted mean"}
        text = " + ".join(names.get(mode, mode) for mode in self.modes)
        return text + (", normalised" if self.normalize else "")


@dataclass(frozen=True)
class Search:
    """What a model's files say about the texts it embeds.

    query_prefix, passage_prefix    written before each text, "" for none
    max_length                      tokens; None: not said
    notes                           what the reader should know, one sentence each
    """

    pooling: Pooling
    query_prefix: str = ""
    passage_prefix: str = ""
    max_length: int | None = None
    lower_case: bool = False
    notes: tuple[str, ...] = ()

    def prefix(self, kind: str) -> str:
        return self.query_prefix if kind == "query" else self.passage_prefix


def read_search(folder: Path) -> Search:
    """Pooling, prefixes and length of the model in `folder`. Raises CheckpointError for modules not known here."""
    modules = _json(folder / "modules.json")
    notes: tuple[str, ...] = ()
    if isinstance(modules, list):
        pooling = _pooling(folder, modules)
    else:
        pooling = Pooling(normalize=True)
        notes = ("The model has no sentence-transformers files: mean pooling is assumed.",)
    bert = _json(folder / "sentence_bert_config.json") or {}
    texts = _json(folder / "config_sentence_transformers.json") or {}
    prompts = texts.get("prompts") or {}
    default = prompts.get(texts.get("default_prompt_name") or "", "")
    passage = next((prompts[key] for key in ("passage", "document") if prompts.get(key)), default)
    length = bert.get("max_seq_length")
    if not isinstance(length, int):
        length = _model_length(folder)
    return Search(
        pooling=pooling,
        query_prefix=prompts.get("query") or default,
        passage_prefix=passage,
        max_length=length,
        lower_case=bool(bert.get("do_lower_case")),
        notes=notes,
    )


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: Pooling, skip: int = 0) -> torch.Tensor:
    """One vector a text. hidden [batch, tokens, dimensions], mask [batch, tokens], filled up on the right.

    `skip`: tokens of the prefix that do not count. The same numbers as sentence-transformers' `Pooling`.
    """
    import torch
    from torch.nn.functional import normalize

    counted = mask.clone()
    counted[:, :skip] = 0
    weights = counted.unsqueeze(-1).to(hidden.dtype)
    rows = torch.arange(len(hidden), device=hidden.device)
    last = mask.sum(dim=1) - 1
    vectors = []
    for mode in pooling.modes:
        if mode == "cls":
            vectors.append(hidden[:, min(skip, hidden.shape[1] - 1)])
        elif mode == "lasttoken":
            vectors.append(hidden[rows, last])
        elif mode == "max":
            vectors.append(hidden.masked_fill(weights == 0, float("-inf")).amax(dim=1))
        elif mode == "weightedmean":
            rising = weights * torch.arange(1, hidden.shape[1] + 1, device=hidden.device).view(1, -1, 1)
            vectors.append((hidden * rising).sum(dim=1) / rising.sum(dim=1).clamp(min=1e-9))
        else:
            count = weights.sum(dim=1).clamp(min=1e-9)
            vectors.append((hidden * weights).sum(dim=1) / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count))
    joined = torch.cat(vectors, dim=-1)
    return normalize(joined, dim=-1) if pooling.normalize else joined


def sentence_transformers_files(checkpoint: Checkpoint) -> Mapping[str, Path | str]:
    """The files that make a saved model load in sentence-transformers with the pooling used here.

    The model's own where it has them; its modules' weights (`2_Dense/model.safetensors`) are left to the merge.
    """
    folder = checkpoint.folder
    modules = _json(folder / "modules.json")
    if isinstance(modules, list):
        files: dict[str, Path | str] = {"modules.json": folder / "modules.json"}
        for name in ("sentence_bert_config.json", "config_sentence_transformers.json"):
            if (folder / name).is_file():
                files[name] = folder / name
        for module in modules:
            path = str(module.get("path") or "")
            if path and (_inside(folder, module) / "config.json").is_file():
                files[f"{path}/config.json"] = folder / path / "config.json"
        return files
    search = read_search(folder)
    library = "sentence_transformers.models"
    steps = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": f"{library}.{kind}"}
        for number, (path, kind) in enumerate(steps[: 3 if search.pooling.normalize else 2])
    ]
    flags: dict[str, Any] = {flag: mode in search.pooling.modes for flag, mode in _FLAGS.items()}
    dimension = checkpoint.config.get("hidden_size")
    return {
        "modules.json": _text(listed),
        "1_Pooling/config.json": _text({"word_embedding_dimension": dimension, **flags}),
        "sentence_bert_config.json": _text({"max_seq_length": search.max_length or 512, "do_lower_case": False}),
    }


def _pooling(folder: Path, modules: list[Any]) -> Pooling:
    modes: tuple[str, ...] = ("mean",)
    normalize = False
    include_prompt = True
    for module in modules:
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            config = _json(_inside(folder, module) / "config.json") or {}
            modes, include_prompt = _modes(config), bool(config.get("include_prompt", True))
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise CheckpointError(
                f"{folder.name} ends in a sentence-transformers module of type {kind}, which cannot be computed here: "
                "only pooling and normalising can.",
                field=str(folder),
            )
    return Pooling(modes, normalize, include_prompt)


def _inside(folder: Path, module: Mapping[str, Any]) -> Path:
    """A module's folder. Raises CheckpointError for a path that leads out of the model's: the file is a stranger's."""
    place = folder / str(module.get("path") or "")
    if not place.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(
            f"modules.json of {folder.name} names the folder {module['path']}, outside of the model: correct it.",
            field=str(folder),
        )
    return place


def _modes(config: Mapping[str, Any]) -> tuple[str, ...]:
    stated = config.get("pooling_mode")
    if stated:
        chosen = (stated,) if isinstance(stated, str) else tuple(stated)
    else:
        chosen = tuple(mode for flag, mode in _FLAGS.items() if config.get(flag))
    unknown = [mode for mode in chosen if mode not in MODES]
    if unknown:
        raise CheckpointError(f"The pooling mode {unknown[0]} is not known: use {', '.join(MODES)}.")
    return chosen or ("mean",)


def _model_length(folder: Path) -> int | None:
    """Shorter of what the tokenizer and the position table allow, as sentence-transformers takes it."""
    lengths = [
        (_json(folder / "tokenizer_config.json") or {}).get("model_max_length"),
        (_json(folder / "config.json") or {}).get("max_position_embeddings"),
    ]
    known = [int(length) for length in lengths if isinstance(length, (int, float)) and 0 < length < 10**9]
    return min(known) if known else None


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _text(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
