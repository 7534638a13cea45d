"""What a model is called on the page: a demo model's title, else the last part of its reference."""

from __future__ import annotations

from functools import lru_cache
from pathlib import PurePath

from llm_merge.demo import ADAPTERS, DEMO_MODELS, demo_path


@lru_cache(maxsize=256)
def short_name(reference: str) -> str:
    """A short human name: "King James" for the demo's adapter, "llama3-ag-news" for "org/llama3-ag-news"."""
    for model in DEMO_MODELS:
        if reference == demo_path(model.key):
            return model.title
    last = reference.rsplit("+", 1)[-1].rstrip("/\\")
    return PurePath(last.replace("\\", "/")).name.split("@")[0] or reference


def without_demo_paths(text: str) -> str:
    """A reference, recipe or card with the demo's folders on this machine named as everybody knows them.

    "HuggingFaceTB/SmolLM2-135M-Instruct+assets/demo/adapters/king-james" for the demo's King James.
    """
    for model in DEMO_MODELS:
        if model.base is None:
            text = text.replace(demo_path(model.key), model.reference)
    return text.replace(str(ADAPTERS), "assets/demo/adapters")


def middle_cut(text: str, length: int = 32) -> str:
    """A long name cut in the middle, where it says least; the full one belongs in a title."""
    if len(text) <= length:
        return text
    head = (length - 1) * 2 // 3
    return f"{text[:head]}…{text[-(length - 1 - head) :]}"
