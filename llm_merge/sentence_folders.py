"""Which folders of an embedding model hold weights of sentence-transformers modules, and whether two models' fit.

Told from `modules.json` and headers; no weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llm_merge.errors import Problem
from llm_merge.tensor_file import read_header

if TYPE_CHECKING:
    from llm_merge.checkpoint import Checkpoint

MODULES_FILE = "modules.json"
WEIGHTS_FILE = "model.safetensors"
PICKLE_FILE = "pytorch_model.bin"


def problems(base: Checkpoint, other: Checkpoint, name: str) -> Iterator[Problem]:
    """What keeps the weights inside the modules from being merged; `name` is how to call the other model."""
    for module in module_folders(base):
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


def module_folders(checkpoint: Checkpoint) -> list[str]:
    """Names of the folders that modules.json lists; one that leads out of the model's folder is left alone."""
    file = checkpoint.folder / MODULES_FILE
    if not file.is_file():
        return []
    listed = json.loads(file.read_text(encoding="utf-8"))
    paths = [str(module.get("path", "")) for module in listed]
    return [path for path in paths if path and Path(path).name == path and (checkpoint.folder / path).is_dir()]


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in read_header(file).items()}
