"""A model as it lies on disk: opened by its headers and configs, its tensors read one at a time when asked for.

A reference is a folder, a hub id `org/name[@revision]`, or `base+adapter`; a LoRA adapter is applied while its base is
read, in float32, and never written anywhere. This module refuses what cannot be merged (pickles, quantised weights)
and does not know what is done with the tensors; opening imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_merge import hashing, lora
from llm_merge.adapter_base import adapter_base_mismatch, same_folder
from llm_merge.errors import CheckpointError
from llm_merge.hub import cached_name, hub_name, resolve_folder, split_reference
from llm_merge.lora import Adapter
from llm_merge.model_folder import ModelType, find_tensors, guess_type, read_config
from llm_merge.tensor_file import TensorInfo, read_tensor

if TYPE_CHECKING:
    import torch

__all__ = [
    "Adapter",
    "Checkpoint",
    "ModelInfo",
    "ModelType",
    "TensorInfo",
    "adapter_base_mismatch",
    "describe",
    "open_checkpoint",
    "split_reference",
]

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
_NOT_IDENTITY = ("_name_or_path", "transformers_version")  # of config.json: they differ between equal models
_NOT_IDENTITY_ADAPTER = ("base_model_name_or_path", "peft_version", "revision", "inference_mode", "auto_mapping")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened model: headers and configs only.

    reference       as the user wrote it
    folder          where the base's files are
    config          the base's config.json
    tensors         name → what is stored; an adapter changes values, never names or shapes
    base_identity   which published model the base is, as far as one can tell: a hub id, else the folder's name
    adapter         the adapter of `base+adapter`, fitted on this base, or None
    base_reference  what opens the base alone
    """

    reference: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    base_identity: str
    adapter: Adapter | None = None
    base_reference: str = ""

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored; one that the adapter changes comes in float32, changed. Safe from any thread.

        Reads only this tensor's bytes. Raises KeyError for an unknown name, CheckpointError for a vanished file.
        """
        info = self.tensors[name]
        update = self.adapter.updates.get(name) if self.adapter else None
        return update.apply(lambda: read_tensor(info)) if update else read_tensor(info)

    def dtype_of(self, name: str) -> str:
        """The type in which the tensor is stored, also where an adapter changes it."""
        return self.tensors[name].dtype

    def changes(self, name: str) -> bool:
        """Whether the adapter changes this tensor."""
        return self.adapter is not None and name in self.adapter.updates

    @cached_property
    def main_dtype(self) -> str:
        """The floating type that most of the base's weights are stored in; float32 if there are none."""
        counts: Counter[str] = Counter()
        for info in self.tensors.values():
            if info.is_floating:
                counts[info.dtype] += info.numel
        return counts.most_common(1)[0][0] if counts else "float32"

    @property
    def model_config(self) -> Mapping[str, Any]:
        """The part of the config that describes the language model (some models nest it)."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @property
    def architecture(self) -> str:
        """transformers' class, as the config names it; the model type if it names none."""
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else str(self.config.get("model_type") or "unknown")

    @property
    def tied(self) -> bool:
        """Whether the output head is the input embeddings. False for models without such a head."""
        if not self.architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")):
            return False
        flag = self.config.get("tie_word_embeddings", self.model_config.get("tie_word_embeddings"))
        return flag if isinstance(flag, bool) else not any(name.endswith("lm_head.weight") for name in self.tensors)

    @property
    def is_sentence_transformer(self) -> bool:
        return (self.folder / "modules.json").is_file()

    @cached_property
    def model_type_guess(self) -> ModelType:
        return guess_type(self.architecture, self.config, self.is_sentence_transformer)

    def tokenizer_files(self) -> tuple[Path, ...]:
        return tuple(path for name in TOKENIZER_FILES if (path := self.folder / name).is_file())

    def tokenizer_hash(self) -> str:
        """SHA-256 hex over the tokenizer's files and their names. Equal hashes: the same tokens for the same text."""
        return hashing.combined_hash(part for p in self.tokenizer_files() for part in (p.name, hashing.file_hash(p)))

    def content_hash(self) -> str:
        """SHA-256 hex over weights and config, the adapter's too: what a measurement was made with.

        Where the files lie and which version wrote them makes no difference. Takes a second per gigabyte the first
        time; each file's hash is remembered in the app's folder.
        """
        return self._content_hash

    @cached_property
    def _content_hash(self) -> str:
        config = {key: value for key, value in self.config.items() if key not in _NOT_IDENTITY}
        files = sorted({info.file for info in self.tensors.values()})
        base = hashing.combined_hash([hashing.json_hash(config), *(hashing.file_hash(file) for file in files)])
        if self.adapter is None:
            return base
        config = {key: value for key, value in self.adapter.config.items() if key not in _NOT_IDENTITY_ADAPTER}
        return hashing.combined_hash([base, hashing.json_hash(config), hashing.file_hash(self.adapter.file)])

    def base_hash(self) -> str:
        """`content_hash` of the base alone."""
        return replace(self, adapter=None).content_hash()


@dataclass(frozen=True)
class ModelInfo:
    """What one wants to know of a model before using it. `bytes` are those of the weights, adapter included."""

    reference: str
    title: str
    architecture: str
    model_type: ModelType
    layers: int | None
    hidden: int | None
    parameters: int
    dtype: str
    bytes: int
    vocabulary: int | None
    tied: bool
    base: str
    adapter_of: str | None = None
    adapter_rank: int | None = None
    adapter_bytes: int = 0


def open_checkpoint(reference: str, *, base: str | None = None, local_only: bool | None = None) -> Checkpoint:
    """Opens a folder, a hub id, `base+adapter`, or an adapter alone (on `base`, else on the base its config names).

    local_only: never ask the hub; None leaves it to HF_HUB_OFFLINE. Demo bases that travel in packages are made ready
    when they are needed (some 15 seconds, once). Raises CheckpointError, in one sentence, `field` = reference.
    """
    try:
        return _open(reference, base, bool(local_only))
    except CheckpointError as error:
        error.field = error.field or reference
        raise


def describe(checkpoint: Checkpoint) -> ModelInfo:
    """Sizes and names from config and headers; None where the config does not say."""
    adapter = checkpoint.adapter
    adapter_bytes = sum(info.nbytes for info in adapter.tensors.values()) if adapter else 0
    return ModelInfo(
        reference=checkpoint.reference,
        title=_title(checkpoint),
        architecture=checkpoint.architecture,
        model_type=checkpoint.model_type_guess,
        layers=_number(checkpoint.model_config, "num_hidden_layers", "n_layer", "num_layers", "n_layers"),
        hidden=_number(checkpoint.model_config, "hidden_size", "n_embd", "d_model", "dim"),
        parameters=sum(info.numel for info in checkpoint.tensors.values() if info.is_floating),
        dtype=checkpoint.main_dtype,
        bytes=sum(info.nbytes for info in checkpoint.tensors.values()) + adapter_bytes,
        vocabulary=_number(checkpoint.model_config, "vocab_size"),
        tied=checkpoint.tied,
        base=checkpoint.base_identity,
        adapter_of=(adapter.base_name or checkpoint.base_identity) if adapter else None,
        adapter_rank=adapter.rank if adapter else None,
        adapter_bytes=adapter_bytes,
    )


def _open(reference: str, base: str | None, local_only: bool) -> Checkpoint:
    first, adapter_text = split_reference(reference)
    folder = _folder(first, local_only)
    if adapter_text is None and lora.is_adapter(folder):
        adapter = lora.open_adapter(folder, first)
        base_folder, base_text = _own_base(adapter, base, local_only)
        return _put_on(reference, base_folder, base_text, adapter)
    if adapter_text is None:
        return _open_model(reference, folder, first)
    if lora.is_adapter(folder):
        raise CheckpointError(f"“{first}” is an adapter, so it cannot be the base of “{adapter_text}”: write "
                              "base+adapter.")  # fmt: skip
    adapter_folder = _folder(adapter_text, local_only)
    if not lora.is_adapter(adapter_folder):
        raise CheckpointError(f"“{adapter_text}” is no adapter: it has no {lora.CONFIG}.")
    return _put_on(reference, folder, first, lora.open_adapter(adapter_folder, adapter_text))


def _put_on(reference: str, folder: Path, base_text: str, adapter: Adapter) -> Checkpoint:
    if lora.is_adapter(folder):
        raise CheckpointError(f"“{base_text}” is an adapter, so it cannot be the base of “{adapter.title}”.")
    alone = _open_model(base_text, folder, base_text)
    kind = str(alone.config.get("model_type") or "")
    fitted = lora.fit(adapter, alone.tensors, alone.base_identity, model_type=kind, tied=alone.tied)
    return replace(alone, reference=reference, adapter=fitted)


def _own_base(adapter: Adapter, base: str | None, local_only: bool) -> tuple[Path, str]:
    """The folder of the base to put an adapter on, and how to call it."""
    from llm_merge import demo

    if base:
        return _folder(base, local_only), base
    own = adapter.base_name
    if not own:
        raise CheckpointError(f"The adapter “{adapter.title}” does not say which base it was made for: choose one, or "
                              "write base+adapter.")  # fmt: skip
    for model in demo.DEMO_MODELS:
        if model.base is None and model.reference == own:
            own = demo.demo_path(model.key)
    beside = adapter.folder / own
    if not Path(own).is_absolute() and not Path(own).is_dir() and own.startswith(".") and beside.is_dir():
        return beside.resolve(), str(beside.resolve())
    try:
        return _folder(own, local_only), own
    except CheckpointError as error:
        raise CheckpointError(f"The adapter “{adapter.title}” needs its base “{own}”. {error.message}") from error


def _folder(text: str, local_only: bool) -> Path:
    """The folder of a reference; a demo base that is still inside its package is made ready first."""
    from llm_merge import demo

    for model in demo.DEMO_MODELS:
        if model.base is None and text == demo.demo_path(model.key) and not demo.is_prepared(model.key):
            for _ in demo.prepare(model.key):
                pass
    return resolve_folder(text, local_only=local_only)


def _open_model(reference: str, folder: Path, text: str) -> Checkpoint:
    config = read_config(folder, text)
    return Checkpoint(
        reference, folder, config, find_tensors(folder, text, config), _identity(text, folder, config), None, text
    )


def _identity(text: str, folder: Path, config: Mapping[str, Any]) -> str:
    """Where it came from if that was the hub, else what its config says it was, else its folder's name."""
    if name := cached_name(folder):
        return name
    stored = str(config.get("_name_or_path") or "")
    candidate = stored if _is_folder(text) else text
    name = hub_name(candidate)
    return name if name and "/" in name and not _is_folder(candidate) else folder.name


def _title(checkpoint: Checkpoint) -> str:
    """A demo model's title; else the last part of its name."""
    from llm_merge import demo

    own = checkpoint.adapter.folder if checkpoint.adapter else checkpoint.folder
    for model in demo.DEMO_MODELS:
        last = demo.demo_path(model.key).rpartition("+")[2]
        if same_folder(last, own):
            return model.title
    return checkpoint.adapter.title if checkpoint.adapter else checkpoint.base_identity.split("/")[-1]


def _is_folder(text: str) -> bool:
    return Path(text).expanduser().is_dir()


def _number(config: Mapping[str, Any], *keys: str) -> int | None:
    values = (config.get(key) for key in keys)
    return next((value for value in values if type(value) is int), None)
