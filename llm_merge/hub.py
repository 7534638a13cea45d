"""From what a person writes to a folder on this machine: a path, or `org/name[@revision]` through the hub cache.

Only weights in safetensors, JSON and tokenizer files are ever downloaded: no pickle, no code. What is in the cache is
used without asking the network; name a revision to have exactly that one. This module looks into no file.
"""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from llm_merge.errors import CheckpointError

DOWNLOADED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
NOT_DOWNLOADED = ("original/*", "onnx/*", "openvino/*", "checkpoint-*/*", "consolidated*", "*.fp16.*", "*.non_ema.*")
"""Second copies of the same weights that some repositories hold beside the one that transformers loads."""

_HUB_ID = re.compile(r"(?P<name>(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_CACHED = re.compile(r"models--(?P<name>[\w.-]+)$")


def is_downloaded(file: str) -> bool:
    """Whether opening a hub model downloads this file of its repository."""
    wanted, unwanted = (
        any(fnmatch(file, pattern) for pattern in patterns) for patterns in (DOWNLOADED, NOT_DOWNLOADED)
    )
    return wanted and not unwanted


def split_reference(reference: str) -> tuple[str, str | None]:
    """`base+adapter` → (base, adapter); a plain reference → (reference, None).

    A folder whose own name contains a plus sign is recognised where it exists.
    """
    text = reference.strip()
    places = [place for place, letter in enumerate(text) if letter == "+"]
    if not places or _is_folder(text):
        return text, None
    halves = [(text[:place].strip(), text[place + 1 :].strip()) for place in places]
    halves = [(base, adapter) for base, adapter in halves if base and adapter] or halves[:1]
    best = max(halves, key=lambda half: _is_folder(half[0]) + _is_folder(half[1]))  # the first of equals
    return best


def hub_name(reference: str) -> str | None:
    """`org/name` of something that reads like a hub id, with or without @revision; None for anything else."""
    match = _HUB_ID.fullmatch(reference.strip())
    return match["name"] if match and ".." not in reference and "--" not in match["name"] else None


def cached_name(folder: Path) -> str | None:
    """`org/name` when the folder is a snapshot in a hub cache (…/models--org--name/snapshots/…)."""
    if folder.parent.name != "snapshots":
        return None
    match = _CACHED.match(folder.parent.parent.name)
    return match["name"].replace("--", "/", 1) if match else None


def resolve_folder(reference: str, *, local_only: bool = False) -> Path:
    """The folder that holds the model or adapter. A folder that exists wins over a hub id of the same name.

    Raises CheckpointError when there is no such folder and the hub cannot give it.
    """
    text = reference.strip()
    if not text:
        raise CheckpointError("No model is named: give a folder or a hub id such as “org/name”.")
    try:
        path = Path(text).expanduser()
        if path.is_dir():
            return path.absolute()
        if path.is_file():
            raise CheckpointError(_single_file(path))
    except (OSError, ValueError, RuntimeError) as error:  # a NUL byte, a name too long, an unknown ~user
        raise CheckpointError(f"“{_short(text)}” is not a folder's name or a hub id.") from error
    match = _HUB_ID.fullmatch(text)
    if not match or hub_name(text) is None:
        raise CheckpointError(f"There is no folder “{_short(text)}”.")
    return _from_hub(text, match["name"], match["revision"], local_only)


def is_complete(folder: Path) -> bool:
    """Whether everything that opening needs is there; a download that was stopped leaves a folder without it."""
    import json

    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return (folder / "adapter_model.safetensors").is_file()
    if not (folder / "config.json").is_file():
        return False
    if (folder / "model.safetensors").is_file():
        return True
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return all((folder / shard).is_file() for shard in set(index["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def hub_sentence(text: str, name: str, error: Exception, found: Path | None) -> str:
    """Why the hub could not give `text`, and what to do; `found` is the part of it that the cache holds."""
    from huggingface_hub import errors

    start = f"There is no folder “{text}”, and"
    if isinstance(error, errors.GatedRepoError):
        return (f"“{name}” asks you to accept its conditions first: do so on huggingface.co/{name}, then log in here "
                "with `hf auth login`.")  # fmt: skip
    if isinstance(error, errors.RevisionNotFoundError):
        return f"“{name}” has no revision “{text.partition('@')[2]}” on the Hugging Face hub."
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return (f"{start} the Hugging Face hub has no public model of that name; if it is private, log in with "
                "`hf auth login`.")  # fmt: skip
    if isinstance(error, OSError) and error.errno == 28:  # ENOSPC
        return f"“{name}” could not be downloaded: the disk is full. Free some space and try again."
    cached = "holds only part of it" if found else "does not hold a model of that name"
    return (f"{start} the Hugging Face hub could not be reached (the hub cache {cached}). "
            "Check the name, or the connection.")  # fmt: skip


def _from_hub(text: str, name: str, revision: str | None, local_only: bool) -> Path:
    from huggingface_hub import constants, snapshot_download

    # The same arguments for both calls, so that both mean the same snapshot.
    wanted: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": list(DOWNLOADED),
        "ignore_patterns": list(NOT_DOWNLOADED),
    }
    found: Path | None = None
    try:
        found = Path(snapshot_download(name, local_files_only=True, **wanted))
    except Exception:  # whatever it is, asking the hub below says it better
        found = None
    if found is not None and is_complete(found):
        return found
    if local_only:
        raise CheckpointError(f"There is no folder “{text}”, and the hub cache holds no complete model of that name.")
    try:
        if constants.HF_HUB_OFFLINE and found is not None:  # the hub's library would hand out the part again
            raise ConnectionError("offline")
        return Path(snapshot_download(name, **wanted))
    except Exception as error:
        raise CheckpointError(hub_sentence(text, name, error, found)) from error


def _single_file(path: Path) -> str:
    if path.suffix == ".gguf":
        return f"“{path.name}” is a GGUF file, whose weights are quantised; use the original model in safetensors."
    if path.suffix == ".safetensors":
        return f"“{path.name}” is a single file: give the folder it lies in, with its config.json."
    return f"“{path}” is a file: give the folder of a model, with its config.json and model.safetensors."


def _is_folder(text: str) -> bool:
    try:
        return bool(text) and Path(text).expanduser().is_dir()
    except (OSError, ValueError, RuntimeError):
        return False


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"
