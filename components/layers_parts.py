"""What the parts of the Layers tab share: the kinds of their jobs, the switches of the method, the report in force."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from components import layers_job
from components.page import Page
from components.session import Session
from components.try_parts import result_of
from components.views import layer_tasks
from components.views import layers as view
from llm_merge.cell_store import CellStore
from llm_merge.contribution_report import ContributionReport
from llm_merge.errors import MergeError
from llm_merge.hi_merging import Switches

TITLE = "Layers"  # the tab's, as shell.py has it
ANALYSE, HI_MERGE, DELTAS, SCORE = "analyse", "hi-merge", "deltas", "score-recipe"
private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

_stores: dict[str, CellStore] = {}


@dataclass(frozen=True)
class Switchboard:
    """The controls of Hi-Merging's switches, in the order of `views.layers.switches_of`."""

    grid: gr.Dropdown
    partial: gr.Dropdown
    severe: gr.Dropdown
    recompute: gr.Checkbox
    most: gr.Number
    accept: gr.Dropdown
    noise: gr.Slider

    @property
    def inputs(self) -> list[Any]:
        return [self.grid, self.partial, self.severe, self.recompute, self.most, self.accept, self.noise]

    def read(self, *values: Any) -> Switches:
        """The switches as they are set; the method's own while one of them cannot be used."""
        try:
            return view.switches_of(*values)
        except (MergeError, TypeError, ValueError):
            return Switches()


def store_of(page: Page) -> CellStore:
    """One store of measured cells for the whole page."""
    folder = str(page.settings.home)
    if folder not in _stores:
        _stores[folder] = layers_job.cell_store(page.settings)
    return _stores[folder]


def shown_report(page: Page, visitor: str, session: Session, combine: str) -> tuple[ContributionReport | None, str]:
    """The report that the map shows, and words for where it comes from.

    The visitor's newest analysis of these models and tasks, else what was recorded of them; where there are both, the
    one of the merge that `combine` names.
    """
    job = page.jobs.latest(visitor, ANALYSE) if visitor else None
    found, own = result_of(job, layers_job.Analysed), None
    if found is not None and found.key == layer_tasks.layers_key(session):
        own = found.report
        if own.setup.combine == combine or (job is not None and job.active):
            return own, ""
    recorded = view.recorded_report(session, combine)
    return recorded if recorded[0] is not None or own is None else (own, "")
