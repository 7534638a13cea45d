"""Weights inside an embedding model's sentence-transformers modules (a Dense projection), merged like all others.

The modules' settings are copied with the other files of the base; this module knows only which folders `modules.json`
lists, whether their weights fit together, and how to merge them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llm_merge.errors import Problem
from llm_merge.methods import get_method
from llm_merge.tensor_file import read_header

if TYPE_CHECKING:
    import torch

    from llm_merge.checkpoint import Checkpoint
    from llm_merge.plan import Plan

MODULES_FILE = "modules.json"
WEIGHTS_FILE = "model.safetensors"
PICKLE_FILE = "pytorch_model.bin"


def write_weights(plan: Plan, folder: Path) -> None:
    """Merge the weights inside the base's modules into the same places in `folder`."""
    for module in _module_folders(plan.base):
        if (plan.base.folder / module / WEIGHTS_FILE).is_file():
            (folder / module).mkdir(exist_ok=True)
            _merge_weights(plan, module, folder / module / WEIGHTS_FILE)


def problems(base: Checkpoint, other: Checkpoint, name: str) -> Iterator[Problem]:
    """What keeps the weights inside the modules from being merged; `name` is how to call the other model."""
    for module in _module_folders(base):
        mine, theirs = (checkpoint.folder / module / WEIGHTS_FILE for checkpoint in (base, other))
        if (mine.parent / PICKLE_FILE).is_file() and not mine.is_file():
            yield Problem("problem", base.reference, f"The module {module} is a pickle file ({PICKLE_FILE}).",
                          "Load and save the model with sentence-transformers: that writes safetensors.")  # fmt: skip
        elif mine.is_file() and not theirs.is_file():
            yield Problem("problem", other.reference, f"“{name}” lacks the weights of the module {module}.",
                          "Choose an embedding model with the same modules.")  # fmt: skip
        elif mine.is_file() and _shapes(mine) != _shapes(theirs):
            yield Problem("problem", other.reference, f"“{name}” has other shapes in its module {module}.",
                          "Choose an embedding model with the same modules.")  # fmt: skip


def _module_folders(checkpoint: Checkpoint) -> list[str]:
    """Names of the folders that modules.json lists; one that leads out of the model's folder is left alone."""
    file = checkpoint.folder / MODULES_FILE
    if not file.is_file():
        return []
    listed = json.loads(file.read_text(encoding="utf-8"))
    paths = [str(module.get("path", "")) for module in listed]
    return [path for path in paths if path and Path(path).name == path and (checkpoint.folder / path).is_dir()]


def _merge_weights(plan: Plan, module: str, target: Path) -> None:
    from safetensors.torch import load_file, save_file

    method = get_method(plan.recipe.merge_method)
    sources = [load_file(checkpoint.folder / module / WEIGHTS_FILE) for checkpoint in plan.checkpoints]
    merged: dict[str, torch.Tensor] = {}
    for name, first in sources[0].items():
        dtype, precision = _types(plan, first, method.precision)
        read = [source[name].to(precision) for source, weight in zip(sources, plan.weights, strict=True) if weight]
        result = method.function(read, weights=[weight for weight in plan.weights if weight])
        merged[name] = result.to(dtype).contiguous()
    save_file(merged, target, metadata={"format": "pt"})


def _types(plan: Plan, tensor: torch.Tensor, precision: str) -> tuple[torch.dtype, torch.dtype]:
    import torch

    return getattr(torch, plan.recipe.dtype) if plan.recipe.dtype else tensor.dtype, getattr(torch, precision)


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in read_header(file).items()}
