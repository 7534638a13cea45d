"""Writing a merge as a job: prepare, merge to a folder with progress in tensors and bytes, and in public mode pack it.

The job leaves either everything or nothing, whenever it is stopped. It knows jobs and the core, and no Gradio.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
import zipfile
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from components.demo_setup import prepare_steps
from components.jobs import Step, Work
from components.naming import without_demo_paths
from components.session import Session
from components.settings import Settings
from components.views import save as view
from llm_merge.errors import OutputError, RecipeError
from llm_merge.merge import rounding_warning, run
from llm_merge.output import FolderSink
from llm_merge.plan import make_plan, size_text

DOWNLOADS = "llm-merge-download-"
KEPT_DOWNLOADS = 16  # over all visitors: what bounds the disk that downloads take
KEPT_SECONDS = 3600.0
PACK_BYTES = 16 * 1024**2  # packed between two signs of progress


def work(session: Session, folder: str, settings: Settings) -> Work:
    """The job for `JobRegistry.start`; its result is a `views.save.Saved`. `folder` is not used in public mode."""

    def job(stop: threading.Event) -> Generator[Step, None, view.Saved]:
        recipe = session.recipe
        if recipe is None or len(session.mixed) < 2:
            raise RecipeError(view.ONE_MODEL if session.mixed else view.NO_MODELS, field="models")
        for step in prepare_steps(session.mixed, stop):
            yield Step(step.message, step.fraction)
        started = time.monotonic()
        yield Step("Planning")
        plan = make_plan(recipe)
        if large := view.too_large(plan, settings):
            raise OutputError(large, field="output_path")
        origin = view.provenance(session)
        if rounding := rounding_warning(plan):
            origin = replace(origin, notes=(*origin.notes, str(rounding)))
        temporary = _new_download() if settings.public else None
        target = temporary / _name(session) if temporary else Path(folder)
        kept = False
        try:
            sink = FolderSink(target, model_type=session.model_type, provenance=origin)
            with closing(run(plan, sink)) as events:
                for event in events:
                    if event.phase == "done":
                        break  # no stop may come between a whole folder and its being reported
                    share = event.bytes_done / max(event.bytes_total, 1)
                    yield Step(view.progress_text(event), share * (0.8 if temporary else 1.0))
            archive = ""
            if temporary:
                for name in ("README.md", "mergekit_config.yml"):
                    _hide_folders(target / name)
                archive = str(target) + ".zip"
                for fraction, message in _pack(target, Path(archive)):
                    yield Step(message, 0.8 + 0.2 * fraction)
            card = (target / "README.md").read_text(encoding="utf-8")
            if temporary:
                shutil.rmtree(target, ignore_errors=True)
            kept = True
        finally:
            if temporary and not kept:
                shutil.rmtree(temporary, ignore_errors=True)
        seconds = time.monotonic() - started
        where = "" if temporary else str(sink.path)
        return view.Saved(session.recipe_key, where, card, len(plan.tensors), plan.output_bytes, seconds, archive)

    return job


def _pack(folder: Path, archive: Path) -> Iterator[tuple[float, str]]:
    """Put the folder into a zip file, uncompressed: weights hardly shrink. Yields (share done, sentence)."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    total, done = sum(path.stat().st_size for path in files), 0
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as packed:
        for path in files:
            name = f"{folder.name}/{path.relative_to(folder).as_posix()}"
            with path.open("rb") as source, packed.open(name, "w", force_zip64=True) as target:
                while block := source.read(PACK_BYTES):
                    target.write(block)
                    done += len(block)
                    yield done / max(total, 1), f"Packing: {size_text(done)} of {size_text(total)}"


def _hide_folders(path: Path) -> None:
    """What is given away does not tell where the server keeps the demo."""
    path.write_text(without_demo_paths(path.read_text(encoding="utf-8")), encoding="utf-8")


def _name(session: Session) -> str:
    return Path(view.suggested_folder(session, Path("/nowhere"))).name


def _new_download() -> Path:
    """A fresh folder that nobody can guess; old ones make room for it.

    Inside Gradio's own folder, from where a file is handed out as it is; of any other it would keep a second copy.
    """
    parent = Path(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio").resolve()
    parent.mkdir(parents=True, exist_ok=True)
    kept = sorted(parent.glob(f"{DOWNLOADS}*"), key=lambda path: path.stat().st_mtime)
    for index, path in enumerate(kept):
        if index <= len(kept) - KEPT_DOWNLOADS or time.time() - path.stat().st_mtime > KEPT_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=DOWNLOADS, dir=parent))
