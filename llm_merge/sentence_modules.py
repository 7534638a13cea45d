"""Weights inside an embedding model's sentence-transformers modules (a Dense projection), merged like all others.

The modules' settings are copied with the other files of the base; which modules there are, and whether they fit
together, is `sentence_folders.py`'s business.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llm_merge.merge import combined
from llm_merge.plan import Plan, TensorPlan
from llm_merge.sentence_folders import WEIGHTS_FILE, module_folders

if TYPE_CHECKING:
    import torch


def write_weights(plan: Plan, folder: Path) -> None:
    """Merge the weights inside the base's modules into the same places in `folder`."""
    for module in module_folders(plan.base):
        if (plan.base.folder / module / WEIGHTS_FILE).is_file():
            (folder / module).mkdir(exist_ok=True)
            _merge_weights(plan, module, folder / module / WEIGHTS_FILE)


def _merge_weights(plan: Plan, module: str, target: Path) -> None:
    from safetensors.torch import load_file, save_file

    sources = [load_file(checkpoint.folder / module / WEIGHTS_FILE) for checkpoint in plan.checkpoints]
    base = load_file(plan.base.folder / module / WEIGHTS_FILE) if plan.is_task_arithmetic else {}
    merged: dict[str, torch.Tensor] = {}
    for name, first in sources[0].items():
        settings = plan.recipe.settings_for(f"{module}.{name}")
        weights = settings.pop("weight")
        if plan.is_task_arithmetic:
            weights = tuple(0.0 if c is plan.base else w for c, w in zip(plan.checkpoints, weights, strict=True))
        dtype = plan.recipe.dtype or str(first.dtype).removeprefix("torch.")
        tensor = TensorPlan(f"{module}.{name}", tuple(first.shape), dtype, "merge", (), plan.recipe.merge_method,
                            weights, "", 0, tuple(settings.items()))  # fmt: skip
        merged[name] = combined(plan, tensor, [source[name] for source in sources], base.get(name)).contiguous()
    save_file(merged, target, metadata={"format": "pt"})
