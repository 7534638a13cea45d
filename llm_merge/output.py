"""A merged model as a folder that transformers loads: written aside, and renamed when whole.

The plan knows every byte's place, so weights go straight from the merge into files of their final size, one tensor at a
time. What else a model folder needs is copied from the base. This module never merges and never looks at values.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from llm_merge import sentence_modules
from llm_merge.card import Provenance, model_card
from llm_merge.errors import OutputError
from llm_merge.families import get_family
from llm_merge.plan import Plan, TensorPlan, size_text

if TYPE_CHECKING:
    import torch

ROOM = 20_000_000  # bytes for the tokenizer, configs and the model card
INDEX_FILE = "model.safetensors.index.json"

_SAFETENSORS_TYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


class FolderSink:
    """Writes a model folder. Nothing appears at `path` before everything is there.

    model_type      "encoder" adds the sentence-transformers modules; None: what the first model looks like
    provenance      what the model card says about where the weights come from
    """

    def __init__(
        self, path: str | Path, *, model_type: str | None = None, provenance: Provenance | None = None
    ) -> None:
        self.path = Path(path).expanduser().absolute()
        self._model_type = model_type
        self._provenance = provenance or Provenance()
        self._plan: Plan | None = None
        self._aside: Path | None = None
        self._made_parents: list[Path] = []
        self._weights: _WeightsFile | None = None
        self._hashes: dict[str, str] = {}

    def open(self, plan: Plan) -> None:
        """Raises OutputError if the folder cannot be written."""
        check_output(self.path, plan)
        self._plan = plan
        self._made_parents = [parent for parent in self.path.parents if not parent.exists()]
        self._aside = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:8]}.partial")
        with _disk_errors(self.path):
            self._aside.mkdir(parents=True)

    def write(self, tensor_plan: TensorPlan, tensor: torch.Tensor) -> None:
        with _disk_errors(self.path):
            if self._weights is None or self._weights.file != tensor_plan.shard:
                self._close_weights()
                assert self._plan is not None
                assert self._aside is not None
                self._weights = _WeightsFile(self._aside, tensor_plan.shard, self._plan)
            self._weights.write(tensor)

    def finish(self) -> None:
        assert self._plan is not None
        assert self._aside is not None
        with _disk_errors(self.path):
            self._close_weights()
            if len(self._plan.shards) > 1:
                _write_json(self._aside / INDEX_FILE, _index(self._plan))
            _write_json(self._aside / "config.json", output_config(self._plan))
            family = get_family(self._model_type or self._plan.base.model_type_guess)
            _write_extra_files(family.extra_files(self._plan.base), self._aside)
            if family.name == "encoder":
                sentence_modules.write_weights(self._plan, self._aside)
            (self._aside / "mergekit_config.yml").write_text(self._plan.recipe.to_yaml(), encoding="utf-8")
            card = model_card(self._plan, family, self.path.name, self._provenance, self._hashes)
            (self._aside / "README.md").write_text(card, encoding="utf-8")
            if self.path.exists():
                self.path.rmdir()  # empty, `check_output` has seen to it; Windows cannot rename onto it
            self._aside.rename(self.path)

    def discard(self) -> None:
        """Remove everything written, and the parent folders made for it."""
        if self._weights is not None:
            self._weights.abandon()
            self._weights = None
        if self._aside is not None:
            shutil.rmtree(self._aside, ignore_errors=True)
        for parent in self._made_parents:
            try:
                parent.rmdir()
            except OSError:
                break

    def _close_weights(self) -> None:
        if self._weights is not None:
            self._hashes[self._weights.file] = self._weights.close()
            self._weights = None


def check_output(path: str | Path, plan: Plan) -> None:
    """Raise OutputError, saying what to do, unless the plan's result can be written to this folder."""
    existing, free = check_place(path)
    needed = plan.output_bytes + ROOM
    if free < needed:
        raise _refusal(
            f"The disk of {existing} has {size_text(free)} free and the merged model needs {size_text(needed)}: "
            "free some space or choose another disk."
        )


def check_place(path: str | Path) -> tuple[Path, int]:
    """The nearest folder that exists and its free bytes; raises OutputError unless a model can be written to `path`.

    Needs no plan: what is wrong with a folder is said before a model is opened.
    """
    if not str(path).strip():
        raise OutputError("No output folder is named: give the folder that the merged model is to be written to.",
                          field="output_path")  # fmt: skip
    if "\0" in str(path):
        raise _refusal("The name of the output folder contains a character that no name can have: write it again.")
    target = Path(path).expanduser().absolute()
    try:
        if target.is_dir():
            if any(target.iterdir()):
                raise _refusal(f"The output folder {target} exists and is not empty: choose another name, or empty it.")
        elif target.exists():
            raise _refusal(f"{target} is a file: give the name of a folder that does not exist yet.")
        existing = next(parent for parent in target.parents if parent.exists())
        if not existing.is_dir():
            raise _refusal(f"{existing} is a file, so there can be no folder {target}: choose another place.")
        free = shutil.disk_usage(existing).free
    except OSError as error:  # a name too long, a folder that may not be listed
        raise _refusal(f"“{str(path)[:200]}” cannot be used as an output folder: {_reason(error)}.") from error
    if not os.access(existing, os.W_OK | os.X_OK):
        raise _refusal(f"The folder {existing} cannot be written to: choose one in which you may write.")
    return existing, free


class _WeightsFile:
    """One safetensors file, made at its final size; tensors arrive in the order of its header."""

    def __init__(self, folder: Path, file: str, plan: Plan) -> None:
        self.file = file
        header = _header([tensor for tensor in plan.tensors if tensor.shard == file])
        size = len(header) + sum(shard.nbytes for shard in plan.shards if shard.file == file)
        self._handle: BinaryIO = (folder / file).open("wb")
        self._digest = hashlib.sha256()
        self._left = size
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._handle.fileno(), 0, size)  # a full disk is found now, not after an hour
        self._put(header)

    def write(self, tensor: torch.Tensor) -> None:
        import torch

        self._put(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> str:
        """SHA-256 of the file, in hex: the hash by which the hub names it too."""
        self._handle.close()
        if self._left:
            raise RuntimeError(f"{self.file} lacks {self._left} bytes of its plan")
        return self._digest.hexdigest()

    def abandon(self) -> None:
        self._handle.close()

    def _put(self, data: bytes | memoryview) -> None:
        self._handle.write(data)
        self._digest.update(data)
        self._left -= len(data)


class _disk_errors:
    """Turns the errors of a disk into one sentence."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise _refusal(
                f"Writing {self.path} failed: {_reason(error)}. Nothing was left behind; free some space or choose "
                "another folder."
            ) from error


def _header(tensors: list[TensorPlan]) -> bytes:
    """The safetensors header: 8 bytes of length, then JSON padded with spaces to a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for tensor in tensors:
        offsets = [tensor.start, tensor.start + tensor.nbytes]
        kind = _SAFETENSORS_TYPES.get(tensor.dtype, tensor.dtype.upper())
        entries[tensor.name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _index(plan: Plan) -> dict[str, Any]:
    weight_map = {tensor.name: tensor.shard for tensor in plan.tensors}
    return {"metadata": {"total_size": plan.output_bytes}, "weight_map": dict(sorted(weight_map.items()))}


def output_config(plan: Plan) -> dict[str, Any]:
    """The base's config with the type and head of the result; the card says whose it was, not `_name_or_path`."""
    config = {key: value for key, value in plan.base.config.items() if key != "_name_or_path"}
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]:
        config[key] = plan.dtype
    if plan.separate_head and plan.base.tied:
        config["tie_word_embeddings"] = False
    return config


def _write_extra_files(files: Mapping[str, Path | str], folder: Path) -> None:
    """Tokenizer, chat template, generation settings, modules: copied, or the text given."""
    for name, source in files.items():
        target = folder / name
        if ".." in target.parts or not target.is_relative_to(folder):
            continue  # a modules.json that points out of its model's folder
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, str):
            target.write_text(source, encoding="utf-8")
        elif source.is_dir():
            target.mkdir(exist_ok=True)
        else:
            shutil.copyfile(source, target)


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _refusal(message: str) -> OutputError:
    return OutputError(message, field="output_path")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
