"""The old name: `from LLM_Merge.main import mix_models` and `from LLM_Merge import …` give what `llm_merge` has."""

import sys
from typing import Any

import llm_merge
from llm_merge import main

sys.modules[f"{__name__}.main"] = main
__all__ = ["main", *llm_merge.__all__]


def __getattr__(name: str) -> Any:
    return getattr(llm_merge, name)
