"""The Save tab's decisions: what the merge will be and need, what stands in its way, and what was written.

Opens headers through the core and asks the disk how much is free; decides nothing about layout and knows no Gradio. All
text from outside is escaped here.
"""

from __future__ import annotations

import html
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from components.demo_setup import unprepared
from components.feedback import error_html, note_html, seconds
from components.naming import short_name
from components.session import Session
from components.settings import Settings
from llm_merge.card import Provenance
from llm_merge.checkpoint import open_checkpoint
from llm_merge.download import missing_parts
from llm_merge.errors import MergeError, Problem
from llm_merge.merge import Progress, rounding_warning
from llm_merge.output import check_output
from llm_merge.plan import Plan, check, size_text

TYPES = ("float32", "bfloat16", "float16")
FOLDER = Path("merged")  # beside where the app was started; new merges are suggested in it
MAX_NAME = 60  # characters of a suggested folder's name
ONE_MODEL = "A merge takes at least two models: add another one in Models."
GONE = "The merged model made room for newer ones on this public page: merge it again to download it."
NO_MODELS = "No models are chosen yet: choose a base and a fine-tune in Models."


@dataclass(frozen=True)
class Reading:
    """What headers tell of the merge as it stands.

    plan        None when there is none
    problems    and warnings, each of the model that causes it
    waiting     why nothing can be said yet, "" if it can
    """

    plan: Plan | None = None
    problems: tuple[Problem, ...] = ()
    waiting: str = ""


@dataclass(frozen=True)
class Saved:
    """What a save job leaves. `archive` is the download of public mode, "" for a folder of the visitor's."""

    recipe_key: str
    folder: str
    card: str
    tensors: int
    nbytes: int
    seconds: float
    archive: str = ""


def read_plan(session: Session) -> Reading:
    """Opens the models' headers. Downloads nothing and prepares nothing; says so instead."""
    recipe = session.recipe
    if recipe is None:
        return Reading(waiting=NO_MODELS)
    if len(session.mixed) < 2:
        return Reading(waiting=ONE_MODEL)
    if unprepared(session.mixed):
        return Reading(waiting="The demo models are being made ready, once; saving does the rest of it first.")
    missing = [part for model in session.mixed for part in missing_parts(model)]
    if missing:
        return Reading(waiting=f"{missing[0]} is not on this machine yet: download it in Models.")
    try:
        plan, problems = check(recipe)
    except MergeError as error:
        return Reading(problems=(Problem("problem", "", error.message),))
    return Reading(plan, problems)


def rounding_of(session: Session) -> Problem | None:
    """What rounding to the result's type would erase, from a sample of the weights; None if that is little."""
    plan = read_plan(session).plan
    if plan is None:
        return None
    try:
        return rounding_warning(plan, base=open_checkpoint(session.base) if session.base else None)
    except MergeError as error:
        return Problem("warning", "", error.message)


def can_save(session: Session, reading: Reading, settings: Settings) -> bool:
    """Whether the button may be pressed; a demo base that is not ready yet is made ready by the job."""
    if reading.plan is not None:
        return not too_large(reading.plan, settings)
    return len(session.mixed) > 1 and bool(unprepared(session.mixed))


def too_large(plan: Plan, settings: Settings) -> str:
    """In public mode, why the result is not given away; else ""."""
    if not settings.public or plan.output_bytes <= settings.max_download:
        return ""
    return (
        f"The merged model takes {size_text(plan.output_bytes)} in {plan.dtype} and this public page gives at most "
        f"{size_text(settings.max_download)}: choose a 16-bit type, or run LLM Merge on your own machine."
    )


def suggested_folder(session: Session, start: Path | None = None) -> str:
    """A folder that does not exist yet, named after the models: "…/merged/king-james-dictionary"."""
    if not session.mixed:
        return ""
    names = "-".join(short_name(model) for model in session.mixed)
    slug = re.sub(r"[^a-z0-9]+", "-", names.lower()).strip("-")[:MAX_NAME].strip("-") or "merge"
    parent = (start or Path.cwd()) / FOLDER
    number, path = 1, parent / slug
    while path.exists():
        number += 1
        path = parent / f"{slug}-{number}"
    return str(path)


def folder_message(text: str, reading: Reading) -> str:
    """What is wrong with the folder, "" if nothing is, or nothing can be said without a plan."""
    if reading.plan is None:
        return ""
    try:
        check_output(text, reading.plan)
    except MergeError as error:
        return error.message
    return ""


def type_choices(reading: Reading) -> list[tuple[str, str]]:
    """(label, value) of the types; "" is that of the first model."""
    first = reading.plan.checkpoints[0].main_dtype if reading.plan else ""
    return [(f"As the first model ({first})" if first else "As the first model", ""), *((name, name) for name in TYPES)]


def facts_html(reading: Reading, settings: Settings, folder: str) -> str:
    """What the plan says, as a table: what is written, what it takes of memory and disk."""
    plan = reading.plan
    if plan is None:
        return ""
    files = "1 file" if len(plan.shards) == 1 else f"{len(plan.shards)} files"
    rows = [
        ("Weights", f"{len(plan.tensors)} tensors in {files}, {size_text(plan.output_bytes)}"),
        ("Type", plan.dtype),
        ("Memory", f"about {size_text(plan.peak_memory_bytes)} more while merging"),
        ("Disk", _disk(plan, settings, folder)),
        ("Config and tokenizer", f"those of {short_name(plan.base.reference)}"),
    ]
    body = "".join(f"<tr><th scope='row'>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in rows)
    return f'<table class="plan-facts"><tbody>{body}</tbody></table>'


def problems_html(session: Session, reading: Reading, settings: Settings, rounding: Problem | None = None) -> str:
    """Why the merge cannot be saved, and what is worth knowing before it is, each with what to do."""
    if reading.waiting:
        return note_html(reading.waiting, "note")
    parts = []
    for problem in (*reading.problems, *([rounding] if rounding else [])):
        parts.append(error_html(str(problem)) if problem.severity == "problem" else note_html(str(problem), "warning"))
    if reading.plan and (large := too_large(reading.plan, settings)):
        parts.append(error_html(large))
    if session.origin == "equal" and reading.plan:
        parts.append(note_html("Nothing is measured: the models share equally. Weights can change that."))
    return "".join(parts)


def progress_text(event: Progress) -> str:
    """A merge's progress in tensors and bytes."""
    if event.phase == "merging":
        done, total = size_text(event.bytes_done), size_text(event.bytes_total)
        return f"Merging: {event.done} of {event.total} tensors, {done} of {total}"
    return "Writing config, tokenizer and model card"


def saved_html(session: Session, saved: Saved | None) -> str:
    """What was written, where, and how long it took; greyed once the recipe is another one."""
    if saved is None:
        return ""
    took = seconds(saved.seconds) if saved.seconds >= 1 else "less than a second"
    what = f"{saved.tensors} tensors, {size_text(saved.nbytes)}, in {took}"
    where = "Ready to download" if saved.archive else f"Saved to {saved.folder}"
    if saved.recipe_key == session.recipe_key:
        return note_html(f"{where}: {what}.", "good")
    stale = note_html(f"{where}: {what}. The recipe has changed since: save again for the new one.")
    return f'<div class="stale">{stale}</div>'


def is_gone(saved: Saved) -> bool:
    """Whether a download has made room for others since."""
    return bool(saved.archive) and not Path(saved.archive).is_file()


def card_body(card: str) -> str:
    """The model card without its front matter, for reading."""
    return re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL).strip()


def provenance(session: Session) -> Provenance:
    """Where the weights come from, for the model card."""
    losses = session.mean_losses
    if session.origin != "losses" or losses is None:
        notes = {
            "hand": "The weights were set by hand.",
            "layers": f"Made layer by layer: {session.layered_from}.",
        }
        return Provenance(notes=(notes.get(session.origin, "All models share equally."),))
    return Provenance(
        losses=losses, temperature=session.temperature, rows=len(session.measured_rows), rows_hash=session.measured_hash
    )


def _disk(plan: Plan, settings: Settings, folder: str) -> str:
    needed = size_text(plan.output_bytes)
    if settings.public:
        return f"{needed}, as one download"
    free = _free(folder)
    return f"{needed}, and {size_text(free)} are free there" if free is not None else needed


def _free(folder: str) -> int | None:
    """Free bytes where the folder is or would be; None for a name that no disk could have."""
    try:
        target = Path(folder).expanduser().absolute()
        existing = next(path for path in (target, *target.parents) if path.is_dir())
        return shutil.disk_usage(existing).free
    except (OSError, ValueError, RuntimeError, StopIteration):
        return None
