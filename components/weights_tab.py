"""Weights: measure the models on the examples, then move the temperature and see what becomes of the shares.

Layout and wiring only. What is said is decided in `views/weights.py`, what is measured in `measure_job.py`; shares are
computed in the browser and checked in the core.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from components import measure_job
from components.charts import loss_dots
from components.feedback import error_html, note_html, progress_html, sentence
from components.jobs import JobView
from components.page import Page
from components.session import Session
from components.settings import Settings
from components.views import weights as view
from components.views.choice import Choice
from components.views.shares import apply_choice, widget_of
from components.widgets.temperature import WeightTemperature
from llm_merge.errors import MergeError
from llm_merge.measurements import Estimate, LossTable, estimate

KIND = "measure"
TITLE = "Weights"  # the tab's, as shell.py has it


@dataclass(frozen=True)
class WeightsTab:
    missing: gr.HTML
    measure: gr.Button
    stop: gr.Button
    progress: gr.HTML
    source: gr.HTML
    table: gr.HTML
    drawn: gr.Accordion
    chart: gr.Plot
    shares: WeightTemperature
    drawn_for: gr.State  # what table and chart show now, so that moving the temperature does not send them again


def build(settings: Settings) -> WeightsTab:
    with gr.Row(elem_id="weights-row"):
        with gr.Column(scale=5, min_width=320):
            missing = gr.HTML(view.missing_html(Session()), elem_id="weights-missing")
            with gr.Row(elem_id="weights-actions"):
                measure = gr.Button("Measure", variant="primary", interactive=False, elem_id="measure", min_width=180)
                stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop-measure", min_width=90)
            progress = gr.HTML(elem_id="measure-progress")
            table = gr.HTML(elem_id="losses", apply_default_css=False)
            source = gr.HTML(elem_id="losses-source")
        with gr.Column(scale=6, min_width=320):
            shares = WeightTemperature(elem_id="weights-shares")
    with gr.Accordion("Every example's loss, drawn", open=False, visible=False, elem_id="losses-drawn") as drawn:
        chart = gr.Plot(show_label=False, elem_id="losses-chart")
    return WeightsTab(missing, measure, stop, progress, source, table, drawn, chart, shares, gr.State(""))


def wire(tab: WeightsTab, page: Page) -> None:
    settings, cache = page.settings, page.measurements
    private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    costs = _Costs(page)

    def redraw(session: Session, visitor: str, drawn_for: str) -> tuple[Any, ...]:
        """session, visitor, what is drawn → shares, what is drawn, missing, measure, source, table, drawn, chart."""
        key = view.drawing_key(session)
        if key == drawn_for:
            return (widget_of(session), key, *[gr.skip()] * 6)
        now = page.jobs.latest(visitor, KIND) if visitor else None
        table = table_of(session, now) if now is not None else view.table_html(session, None)
        return widget_of(session), key, view.missing_html(session), button(session, now), *drawing(session, table)

    def redraw_all(session: Session, visitor: str) -> tuple[Any, ...]:
        """session, visitor → as `redraw`."""
        return redraw(session, visitor, "")

    def button(session: Session, now: JobView | None, cost: Estimate | None = None) -> Any:
        shown = view.measure_button(session, cost or costs.known(session))
        return gr.Button(
            shown.label,
            interactive=shown.enabled,
            variant="primary" if shown.primary else "secondary",
            visible=not (now is not None and now.active),
        )

    def price(session: Session, visitor: str, opened: gr.SelectData) -> Any:
        """session, visitor, which tab was opened → measure, with an estimate on it. The first one takes seconds."""
        if opened.value != TITLE:
            return gr.skip()
        cost = costs.of(session)
        return button(session, page.jobs.latest(visitor, KIND) if visitor else None, cost)

    def price_again(session: Session, visitor: str) -> Any:
        """session, visitor → measure: once estimates are quick."""
        if not costs.are_quick() or costs.known(session) is not None:
            return gr.skip()
        cost = costs.of(session)
        return button(session, page.jobs.latest(visitor, KIND) if visitor else None, cost)

    def table_of(session: Session, now: JobView) -> str:
        so_far = now.step.data if isinstance(now.step.data, view.MeasuredSoFar) and now.status != "done" else None
        return view.table_html(session, so_far, active=now.active)

    def drawing(session: Session, table: str) -> tuple[Any, ...]:
        """→ source, table, drawn, chart."""
        losses, figure = view.measured(session), None
        if losses is not None:
            names, tints = view.chart_names(session, losses)
            figure = loss_dots(losses, names, tints, [view.example_text(row) for row in session.measured_rows])
        return view.source_html(session), table, gr.Accordion(visible=figure is not None), figure

    def choose(session: Session, choice: Choice) -> Session:
        """session, what was set in the widget → session."""
        try:
            return apply_choice(session, choice)
        except MergeError as error:
            raise gr.Error(error.message, print_exception=False) from error

    def follow(visitor: str, session: Session, job: str) -> Iterator[tuple[Any, ...]]:
        """→ progress, table, measure, stop."""
        for now in page.jobs.follow(visitor, job):
            buttons = gr.Button("Measure", visible=not now.active), gr.Button("Stop", visible=now.active)
            kept = note_html(view.STOPPED) if now.status == "stopped" else progress_html(now)
            yield (kept, table_of(session, now), *buttons)

    def measure(session: Session, visitor: str) -> Iterator[tuple[Any, ...]]:
        """session, visitor → progress, table, measure, stop."""
        try:
            work = measure_job.work(session, settings, cache, fresh=view.is_fresh(session))
            job = page.jobs.start(visitor, KIND, "Measuring", work)
        except MergeError as error:
            yield error_html(sentence(error)), gr.skip(), gr.skip(), gr.skip()
            return
        yield from follow(visitor, session, job)

    def attach(session: Session, visitor: str) -> Iterator[tuple[Any, ...]]:
        """session, visitor → progress, table, measure, stop: find a measurement again after a reload."""
        now = page.jobs.latest(visitor, KIND) if visitor else None
        if now is not None and now.active:
            yield from follow(visitor, session, now.id)
        else:  # a handler that yields nothing would empty its outputs
            yield gr.skip(), gr.skip(), gr.skip(), gr.skip()

    def finished(session: Session, visitor: str) -> Any:
        """session, visitor → session: with the losses, if they are still those of its rows.

        Otherwise it is left alone: on load, the visitor's own may be arriving just now.
        """
        costs.forget()
        now = page.jobs.latest(visitor, KIND) if visitor else None
        table = now.result if now is not None else None
        if not isinstance(table, LossTable) or table.rows_hash != session.measured_hash:
            return gr.skip()
        return session.with_losses(table) if set(session.models) <= set(table.models) else gr.skip()

    def stop(visitor: str) -> None:
        """visitor → nothing."""
        page.jobs.stop(visitor, KIND)

    inputs = [page.session, page.visitor]
    shown = [tab.shares, tab.drawn_for, tab.missing, tab.measure, tab.source, tab.table, tab.drawn, tab.chart]
    running = [tab.progress, tab.table, tab.measure, tab.stop]
    changed = page.session.change(redraw, [*inputs, tab.drawn_for], shown, **private)
    changed.then(price_again, inputs, tab.measure, **private)
    page.tabs.select(price, inputs, tab.measure, **private)
    tab.shares.release(choose, [page.session, tab.shares], page.session, **private)
    ran = tab.measure.click(measure, inputs, running, concurrency_limit=None, **private)
    ran.then(finished, inputs, page.session, **private).then(redraw_all, inputs, shown, **private)
    tab.stop.click(stop, page.visitor, None, queue=False, **private)
    found = page.arrived.then(attach, inputs, running, concurrency_limit=None, **private)
    found.then(finished, inputs, page.session, **private)


class _Costs:
    """What measuring would cost, asked once per models and rows: it reads every model's headers."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._known: dict[tuple[Any, ...], Estimate | None] = {}

    def are_quick(self) -> bool:
        """The first estimate loads transformers; nobody should wait for that before the Weights tab is opened."""
        return "transformers" in sys.modules

    def known(self, session: Session) -> Estimate | None:
        return self._known.get(self._key(session))

    def of(self, session: Session) -> Estimate | None:
        """The estimate; None for models and rows that cannot be measured, of which other places say why."""
        if len(session.models) < 2 or not session.measured_rows:
            return None
        key, settings = self._key(session), self._page.settings
        if key not in self._known:
            while len(self._known) > 200:
                self._known.pop(next(iter(self._known)))
            try:
                self._known[key] = estimate(
                    session.models,
                    session.model_type,
                    session.measured_rows,
                    self._page.measurements,
                    gpu=settings.device.startswith("cuda"),
                    fresh=view.is_fresh(session),
                )
            except (MergeError, OSError):
                self._known[key] = None
        return self._known[key]

    def forget(self) -> None:
        """After measuring, what is remembered and how fast it goes have changed."""
        self._known.clear()

    def _key(self, session: Session) -> tuple[Any, ...]:
        return (session.models, session.model_type, session.measured_hash, view.is_fresh(session))
