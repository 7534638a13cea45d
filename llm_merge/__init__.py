"""LLM Merge: mix fine-tuned models, see why, try before you save.

The functions and values that other programs use, loaded when they are first asked for: importing this package brings in
neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_merge.analysis import Analysis, analyze_contributions, iter_contributions, open_analysis
    from llm_merge.checkpoint import Checkpoint, describe, open_checkpoint
    from llm_merge.contribution_report import ContributionReport
    from llm_merge.delta_stats import DeltaStats, delta_statistics
    from llm_merge.errors import (
        CheckpointError,
        ExampleError,
        IncompatibleModels,
        MergeError,
        OutputError,
        Problem,
        RecipeError,
        Stopped,
    )
    from llm_merge.hi_merging import Switches, Trial
    from llm_merge.hierarchical import HiMergeResult, hi_merge, iter_hi_merge
    from llm_merge.main import mix_models, mix_models_by_layers, mix_models_with_data
    from llm_merge.merge import MemorySink, Progress, merged_tensors, rounding_loss, run
    from llm_merge.output import FolderSink, check_output
    from llm_merge.plan import Plan, check, make_plan
    from llm_merge.recipe import Recipe
    from llm_merge.tasks import Task, split_tasks
    from llm_merge.weights import softmax_weights, weights_from_losses
    from llm_merge.workbench import Workbench

__version__ = "0.1.0"

_HOMES = {
    "analysis": ("Analysis", "analyze_contributions", "iter_contributions", "open_analysis"),
    "checkpoint": ("Checkpoint", "describe", "open_checkpoint"),
    "contribution_report": ("ContributionReport",),
    "delta_stats": ("DeltaStats", "delta_statistics"),
    "errors": ("CheckpointError", "ExampleError", "IncompatibleModels", "MergeError", "OutputError", "Problem",
               "RecipeError", "Stopped"),
    "hierarchical": ("HiMergeResult", "hi_merge", "iter_hi_merge"),
    "hi_merging": ("Switches", "Trial"),
    "main": ("mix_models", "mix_models_by_layers", "mix_models_with_data"),
    "merge": ("MemorySink", "Progress", "merged_tensors", "rounding_loss", "run"),
    "output": ("FolderSink", "check_output"),
    "plan": ("Plan", "check", "make_plan"),
    "recipe": ("Recipe",),
    "tasks": ("Task", "split_tasks"),
    "weights": ("softmax_weights", "weights_from_losses"),
    "workbench": ("Workbench",),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Analysis",
    "Checkpoint",
    "CheckpointError",
    "ContributionReport",
    "DeltaStats",
    "ExampleError",
    "FolderSink",
    "HiMergeResult",
    "IncompatibleModels",
    "MemorySink",
    "MergeError",
    "OutputError",
    "Plan",
    "Problem",
    "Progress",
    "Recipe",
    "RecipeError",
    "Stopped",
    "Switches",
    "Task",
    "Trial",
    "Workbench",
    "analyze_contributions",
    "check",
    "check_output",
    "delta_statistics",
    "describe",
    "hi_merge",
    "iter_contributions",
    "iter_hi_merge",
    "make_plan",
    "merged_tensors",
    "mix_models",
    "mix_models_by_layers",
    "mix_models_with_data",
    "open_analysis",
    "open_checkpoint",
    "rounding_loss",
    "run",
    "softmax_weights",
    "split_tasks",
    "weights_from_losses",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
