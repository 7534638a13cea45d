"""One safetensors file: its header, checked before anything is believed, and single tensors read by position.

The format (huggingface.co/docs/safetensors): 8 bytes little-endian length N, N bytes of JSON (name → dtype, shape,
offsets from the end of the header), then the tensors without gaps. This module knows nothing of models or folders, and
imports torch only to make a tensor.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_merge.errors import CheckpointError

if TYPE_CHECKING:
    import torch

MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library too. A longer header is a broken or hostile file."""

DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""safetensors' name → torch's name and bytes per element."""


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about one tensor. `start` is its first byte in `file`, `dtype` torch's name ("bfloat16")."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_floating(self) -> bool:
        return "float" in self.dtype


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of the file, by name, in the order of its bytes.

    Raises CheckpointError for a file that is cut off, that is not safetensors, or whose header does not fit its size.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            # The length is checked before it is used: a wrong one must not make us reserve gigabytes.
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise _broken(path, "it is cut off, or is not a safetensors file")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{_where(path)} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise _broken(path, "its header is not readable") from error
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a table of tensors")
    header.pop("__metadata__", None)
    tensors = [_entry(path, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    position = 8 + length
    for tensor in tensors:  # no gap and no overlap: otherwise two names could read the same bytes
        if tensor.start != position:
            raise _broken(path, f"its header gives the tensor “{tensor.name}” a wrong place")
        position += tensor.nbytes
    if position > size:
        raise _broken(path, f"it is cut off: its header promises {position:,} bytes and it has {size:,}")
    if position < size:
        raise _broken(path, f"its header describes {position:,} bytes and it has {size:,}")
    return {tensor.name: tensor for tensor in tensors}


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """The tensor as it is stored, in memory of its own.

    Opens the file anew each time (some 20 µs): so any number of threads can read at once, on Windows too, where there
    is no `os.pread`. Raises CheckpointError when the file has changed or gone since its header was read.
    """
    import torch

    flat = torch.empty(info.nbytes, dtype=torch.uint8)
    buffer = memoryview(flat.numpy())  # type: ignore[arg-type]  # numpy arrays are buffers from 3.12 on
    try:
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.start)
            while len(buffer):  # one read returns at most 2 GB on Linux
                count = file.readinto(buffer)
                if not count:
                    raise _broken(info.file, "it became shorter after it was opened")
                buffer = buffer[count:]
    except OSError as error:
        raise CheckpointError(f"{_where(info.file)} cannot be read: {error.strerror or error}.") from error
    return flat.view(getattr(torch, info.dtype)).reshape(info.shape)


def _entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        kind, shape = entry["dtype"], entry["shape"]
        begin, end = entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as error:
        raise _broken(path, f"its header describes the tensor “{name}” wrongly") from error
    if not whole:
        raise _broken(path, f"its header describes the tensor “{name}” wrongly")
    if kind not in DTYPES:
        raise CheckpointError(f"{_where(path)} stores the tensor “{name}” as {kind}, a type that cannot be merged; "
                              "use the model in bfloat16, float16 or float32.")  # fmt: skip
    dtype, item = DTYPES[kind]
    if end - begin != math.prod(shape) * item:
        raise _broken(path, f"its header gives the tensor “{name}” {end - begin:,} bytes, and {kind} of shape "
                            f"{list(shape)} takes {math.prod(shape) * item:,}")  # fmt: skip
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, end - begin)


def _where(path: Path) -> str:
    return f"“{path.name}” in “{path.parent}”"


def _broken(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{_where(path)} is damaged: {what}. Download or copy it again.")
