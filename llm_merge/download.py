"""What opening a reference would have to download, and downloading it file by file with progress.

Only for callers that want to show progress: `open_checkpoint` fetches what it needs by itself. Downloads the same files
into the same cache as `hub.py`, and opens no model.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

from llm_merge import hub, lora
from llm_merge.errors import CheckpointError, Stopped


def missing_parts(reference: str) -> tuple[str, ...]:
    """The hub ids that opening would download, as far as one can tell now: an adapter that is not here yet names its
    base only once it is. Empty for folders, for what the cache holds, and when HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return ()
    first, second = hub.split_reference(reference)
    parts = [first] if second is None else [first, second]
    if second is None and (own := _base_of_adapter(first)):
        parts.append(own)
    return tuple(part for part in parts if not _is_here(part))


def download(part: str, stop: threading.Event | None = None) -> Iterator[tuple[str, float]]:
    """Downloads one hub id (`org/name[@revision]`): yields a sentence and the share of bytes done, before each file.

    Raises CheckpointError when the hub cannot give it, Stopped between two files; what is whole stays in the cache.
    """
    from huggingface_hub import HfApi, hf_hub_download

    name = hub.hub_name(part) or part
    revision = part.partition("@")[2] or None
    try:
        listed: Any = HfApi().model_info(name, revision=revision, files_metadata=True).siblings or []
        sizes = {file.rfilename: file.size or 0 for file in listed}
        wanted = [file for file in sizes if hub.is_downloaded(file)]
        total = sum(sizes[file] for file in wanted) or 1
        done = 0
        for file in sorted(wanted, key=lambda file: sizes[file]):  # configs first: a wrong model shows at once
            if stop is not None and stop.is_set():
                raise Stopped
            yield f"Downloading {name}: {file} ({done / 1e6:,.0f} of {total / 1e6:,.0f} MB)", done / total
            hf_hub_download(name, file, revision=revision)
            done += sizes[file]
    except (Stopped, GeneratorExit):
        raise
    except Exception as error:
        raise CheckpointError(hub.hub_sentence(part, name, error, None), field=part) from error
    yield f"{name} is here", 1.0


def _is_here(part: str) -> bool:
    if hub.hub_name(part) is None:
        return True  # a path: opening says whether it exists
    try:
        return hub.is_complete(hub.resolve_folder(part, local_only=True))
    except CheckpointError:
        return False


def _base_of_adapter(reference: str) -> str | None:
    """The hub id that an adapter on this machine names as its base, unless a package carries it."""
    from llm_merge.demo import DEMO_MODELS, packaged_file

    try:
        folder = hub.resolve_folder(reference, local_only=True)
        if not lora.is_adapter(folder):
            return None
        own = str(json.loads((folder / lora.CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (CheckpointError, OSError, ValueError, KeyError, TypeError):
        return None
    packaged = any(model.reference == own and model.base is None and packaged_file(model.key) for model in DEMO_MODELS)
    return None if packaged else own
