"""What the Try tab's two halves share: one kind of job, its result, its Stop, and the example buttons."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gradio as gr

from components.jobs import JobView
from components.page import Page
from components.session import Session
from components.views import try_view as view

KIND = "try"  # chat and search are never tried at once: one job


def example_buttons(name: str, labels: list[str]) -> tuple[gr.Button, ...]:
    return tuple(
        gr.Button(label, size="sm", elem_id=f"{name}-{place}", scale=0, min_width=80)
        for place, label in enumerate(labels, 1)
    )


def private() -> dict[str, Any]:
    return {"show_progress": "hidden", "api_visibility": "private"}


def result_of(job: JobView | None, kind: type[Any]) -> Any:
    """What a job has found so far, if it is of this kind."""
    if job is None:
        return None
    found = job.result if job.result is not None else job.step.data
    if isinstance(found, view.Answers) and not job.active:
        found = view.ended(found)
    return found if isinstance(found, kind) else None


def tried(page: Page, kind: type[Any]) -> Any:
    def note(session: Session, visitor: str) -> Any:
        """session, visitor → session: the recipe that the finished result was made with has been tried."""
        job = page.jobs.latest(visitor, KIND) if visitor else None
        made = result_of(job, kind) if job is not None and job.status == "done" else None
        return gr.skip() if made is None else replace(session, tried=made.recipe_key)

    return note


def stopper(page: Page) -> Any:
    def stop(visitor: str) -> None:
        """visitor → nothing."""
        page.jobs.stop(visitor, KIND)

    return stop
