"""Which models the page offers, and which a visitor may use: the demo's, the hub cache's, folders, or what they typed.

The one place that decides what a text in a model field means; in public mode that is a demo model or nothing. It looks
at names of files only and opens no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from components.naming import without_demo_paths
from components.settings import Settings
from llm_merge import hub, lora
from llm_merge.demo import DEMO_MODELS, demo_path
from llm_merge.errors import CheckpointError

MAX_CHARS = 1000  # of a typed reference: two long paths
MAX_LISTED = 500  # of the hub cache and of folders each; more is found by typing

PUBLIC_ONLY = (
    "On this public page only the demo models can be mixed: choose one from the list, or run LLM Merge on your own "
    "machine to mix any models."
)


@dataclass(frozen=True)
class Entry:
    """One model that can be chosen from the list. `model_type` is "" where only opening it would tell."""

    reference: str
    title: str
    source: str  # "demo" | "hub cache" | "folder"
    adapter: bool
    model_type: str = ""

    @property
    def label(self) -> str:
        return self.title if self.source == "demo" else f"{self.title} · {self.source}"


def entries(settings: Settings) -> list[Entry]:
    """Everything on offer, the demo's models first. A missing cache or folder offers nothing and is no error."""
    found = [
        Entry(demo_path(model.key), model.title, "demo", model.base is not None, model.model_type)
        for model in DEMO_MODELS
        if model.base is None or (Path(model.reference) / lora.CONFIG).is_file()
    ]
    if settings.public:
        return found
    return found + list(_cached()) + list(_folders(settings.models_dir))


def base_choices(settings: Settings) -> list[tuple[str, str]]:
    """(label, value) of what can be a base."""
    return [(entry.label, shown_choice(entry.reference, settings)) for entry in entries(settings) if not entry.adapter]


def fine_tune_choices(settings: Settings, model_type: str = "") -> list[tuple[str, str]]:
    """(label, value) of what can be a fine-tune; of the demo's, those of the type and its bases last."""
    offered = [e for e in entries(settings) if not (model_type and e.model_type) or e.model_type == model_type]
    offered.sort(key=lambda entry: entry.source == "demo" and not entry.adapter)
    return [(entry.label, shown_choice(entry.reference, settings)) for entry in offered]


def shown_choice(reference: str, settings: Settings) -> str:
    """A reference as a model field holds it: on a public page without the server's folders."""
    return without_demo_paths(reference) if settings.public else reference


def resolve_choice(text: str, settings: Settings) -> str:
    """What was chosen or typed → a reference for `open_checkpoint`; "" for an empty field.

    Knows demo models by title, key and reference. Raises CheckpointError in public mode for anything else.
    """
    text = text.strip().strip("\"'").strip() if isinstance(text, str) else ""
    if len(text) > MAX_CHARS:
        raise CheckpointError(f"A model's name or path has at most {MAX_CHARS} characters; this one has {len(text):,}.")
    if not text:
        return ""
    for model in DEMO_MODELS:
        if text in (demo_path(model.key), model.key) or text.lower() == model.title.lower():
            return demo_path(model.key)
    if settings.public:
        # As `shown_choice` writes it, a base by its hub id; what is not demo is refused, whatever it is.
        for model in DEMO_MODELS:
            if text == without_demo_paths(demo_path(model.key)):
                return demo_path(model.key)
        raise CheckpointError(PUBLIC_ONLY, field=text[:MAX_CHARS])
    return text


def is_demo(reference: str) -> bool:
    return any(reference == demo_path(model.key) for model in DEMO_MODELS)


def _cached() -> Iterator[Entry]:
    """Whole models in the hub cache: the snapshot that `main` points to, as opening the plain hub id would use."""
    from huggingface_hub import constants

    for repository in _subfolders(Path(constants.HF_HUB_CACHE), "models--*"):
        try:
            commit = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            continue
        folder = repository / "snapshots" / commit
        name = hub.cached_name(folder)
        if name and hub.is_complete(folder):
            yield Entry(name, name, "hub cache", lora.is_adapter(folder))


def _folders(models_dir: Path | None) -> Iterator[Entry]:
    """Models in the folder and one level below it, as `org/name` layouts have."""
    if models_dir is None:
        return
    for folder in _subfolders(models_dir):
        inner = [folder] if _is_model(folder) else [sub for sub in _subfolders(folder) if _is_model(sub)]
        for model in inner:
            title = model.relative_to(models_dir).as_posix()
            yield Entry(str(model.absolute()), title, "folder", lora.is_adapter(model))


def _is_model(folder: Path) -> bool:
    """Also a pickle or a damaged model: it is listed, and opening it says what is wrong with it."""
    if (folder / lora.CONFIG).is_file():
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool({"architectures", "model_type", "hidden_size"} & set(config))


def _subfolders(folder: Path, pattern: str = "*") -> list[Path]:
    try:
        found = [path for path in folder.glob(pattern) if path.is_dir() and not path.name.startswith(".")]
    except OSError:
        return []
    return sorted(found, key=lambda path: path.name.lower())[:MAX_LISTED]
