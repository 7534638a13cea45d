"""From an error to what a person reads: our own errors as they are, anything else as a short message and a log."""

from __future__ import annotations

import html
import logging

from components.jobs import JobView
from llm_merge.errors import MergeError

log = logging.getLogger(__name__)

UNEXPECTED = (
    "Something went wrong here that is not your fault; the details are in the app's log. Nothing you typed is lost."
)


def sentence(error: Exception) -> str:
    """What to tell the visitor about an error. Logs what is not ours."""
    if isinstance(error, MergeError):
        return error.message
    if isinstance(error, MemoryError):
        return "There is not enough memory for this: close other models or choose a smaller one."
    log.error("unexpected error", exc_info=error)
    return UNEXPECTED


def error_html(message: str) -> str:
    """A message block for one field; empty text gives nothing. Escapes its text, keeps its lines."""
    if not message:
        return ""
    return f'<div class="message problem" role="alert">{html.escape(message).replace(chr(10), "<br>")}</div>'


def note_html(message: str, kind: str = "note") -> str:
    """A quiet block: kind note | warning | good."""
    if not message:
        return ""
    return f'<div class="message {kind}">{html.escape(message).replace(chr(10), "<br>")}</div>'


def progress_html(view: JobView | None) -> str:
    """A job's progress as an accessible bar and one line; what became of it once it ended."""
    if view is None:
        return ""
    if view.status == "failed" and view.error is not None:
        return error_html(sentence(view.error))
    if view.status == "stopped":
        return note_html(f"Stopped after {seconds(view.seconds)}. {view.title}: nothing half-done was left behind.")
    if view.status == "done":
        return ""
    fraction = view.step.fraction
    text = view.step.message if view.status == "running" else f"Waiting: {view.place} in line before it starts"
    value = "" if fraction is None else f' aria-valuenow="{round(100 * fraction)}"'
    width = 100 if fraction is None else max(1, round(100 * min(fraction, 1)))
    moving = " unknown" if fraction is None else ""
    return (
        f'<div class="job"><div class="bar{moving}" role="progressbar" aria-label="{html.escape(view.title)}" '
        f'aria-valuemin="0" aria-valuemax="100"{value}><span style="width:{width}%"></span></div>'
        f'<div class="job-text"><span>{html.escape(text)}</span><span>{seconds(view.seconds)}</span></div></div>'
    )


def seconds(value: float) -> str:
    """A duration as people say it."""
    return f"{value:.0f} s" if value < 90 else f"{value / 60:.0f} min"
