"""Whether a LoRA adapter was made for the base that it is put on, told from names alone. It reads no weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from llm_merge.errors import Problem
from llm_merge.hub import hub_name

if TYPE_CHECKING:
    from llm_merge.checkpoint import Checkpoint


def adapter_base_mismatch(checkpoint: Checkpoint) -> Problem | None:
    """Whether the adapter was made for another base than it is put on, though the shapes fit.

    A problem when both bases are known and differ; a warning when one of them cannot be named, or when only the
    organisation or a quantisation suffix differs (mirrors of one model do).
    """
    adapter = checkpoint.adapter
    if adapter is None:
        return None
    own, chosen = adapter.base_name.split("@")[0], checkpoint.base_identity
    if own and same_folder(own, checkpoint.folder):
        return None
    title = adapter.title
    fix = "Choose the adapter's own base, or make sure that they are the same model."
    if not own:
        return Problem("warning", checkpoint.reference,
                       f"The adapter “{title}” does not say which base it was made for.",
                       f"Make sure that it is “{chosen}”.")  # fmt: skip
    if own.lower() == chosen.lower():
        return None
    own_name, chosen_name = _plain_name(own), _plain_name(chosen)
    known = hub_name(own) == own and "/" in own and "/" in chosen
    if known and own_name != chosen_name:
        return Problem("problem", checkpoint.reference,
                       f"The adapter “{title}” was made for “{own}”, and the chosen base is “{chosen}”.",
                       f"Choose “{own}” as base, or another adapter.")  # fmt: skip
    if not known and own_name == chosen_name:
        return None
    verb = "may be another copy of it" if known else "may be another model"
    return Problem("warning", checkpoint.reference,
                   f"The adapter “{title}” was made for “{own}”; the chosen base “{chosen}” {verb}.", fix)  # fmt: skip


def same_folder(text: str, folder: Path) -> bool:
    """Whether a text is a path to this folder."""
    try:
        return Path(text).expanduser().resolve() == folder.resolve()
    except (OSError, ValueError, RuntimeError):
        return False


def _plain_name(name: str) -> str:
    """The last part of a path or hub id, without the suffix of a quantised copy (QLoRA adapters name those)."""
    last = re.split(r"[\\/]", name.rstrip("\\/"))[-1].lower()
    return re.sub(r"(-unsloth)?-bnb-4bit$|-(gptq|awq|int4|int8|4bit|8bit)$", "", last)
