"""Layers, upper half: the analysis as a map of layers, and the numbers of the layer that somebody selected.

Layout and wiring only: what is said is decided in `views/layer_report.py` and `views/layers.py`, the work runs as a job
(`layers_job.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from components import layers_job
from components.feedback import error_html, note_html, progress_html, sentence
from components.layers_parts import ANALYSE, TITLE, Switchboard, private, shown_report, store_of
from components.page import Page
from components.session import Session
from components.settings import Settings
from components.views import layer_report, layer_tasks
from components.views import layers as view
from components.views.layer_choice import read_selection
from components.views.recipe_bar import device_name
from components.widgets.layer_map import LayerMap
from llm_merge.errors import MergeError


@dataclass(frozen=True)
class MapPart:
    missing: gr.HTML
    rows: gr.Radio
    combine: gr.Dropdown
    metric: gr.Dropdown
    analyse: gr.Button
    estimate: gr.Button
    stop: gr.Button
    progress: gr.HTML
    headline: gr.HTML
    show: gr.Dropdown
    map_box: gr.Column
    map: LayerMap
    measure: gr.Button
    detail: gr.HTML
    owners: gr.HTML
    task_box: gr.Row
    task_of: gr.Dropdown
    task: gr.Dropdown
    selection: gr.State  # keys of the selected layers


def build(settings: Settings) -> MapPart:
    choices = layer_tasks.row_choices(settings)
    gr.HTML(f'<p class="about">{layer_report.ABOUT}</p>', padding=False)
    missing = gr.HTML(elem_id="layers-missing", padding=False)
    headline = gr.HTML(elem_id="layers-headline", padding=False)
    with gr.Row(elem_id="layers-show-row", equal_height=True):
        show = gr.Dropdown(layer_report.SHOWS, value=layer_report.GAMMA, label="Show", elem_id="layers-show",
                           info="what the map is about", min_width=240, scale=3)  # fmt: skip
        combine = gr.Dropdown(view.COMBINES, value="average", label="Merged as", elem_id="layers-combine",
                              info="the merge that is analysed", min_width=180, scale=2)  # fmt: skip
        metric = gr.Dropdown([("−loss", "-loss")], value="-loss", label="Measured by", elem_id="layers-metric",
                             info="higher is better", min_width=150, scale=1)  # fmt: skip
        rows = gr.Radio(choices, value=choices[0], label="Rows per task", elem_id="layers-rows", min_width=200, scale=2,
                        info="more rows: less noise, more time")  # fmt: skip
    with gr.Row(elem_id="layers-actions"):
        analyse = gr.Button("Analyse the layers", variant="primary", elem_id="layers-analyse", min_width=260)
        estimate = gr.Button("Estimate only", elem_id="layers-estimate", min_width=150)
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id="layers-stop", min_width=90)
        progress = gr.HTML(elem_id="layers-progress", padding=False)
    with gr.Column(elem_id="layers-map-box") as map_box:
        layer_map = LayerMap(name="What each layer does to each task", elem_id="layers-map")
        detail = gr.HTML(elem_id="layers-detail", padding=False)
        measure = gr.Button("Measure the selected layer", size="sm", visible=False, elem_id="layers-measure",
                            min_width=220)  # fmt: skip
    with gr.Accordion("Which rows belong to which fine-tune", open=False, elem_id="layers-tasks-box"):
        owners = gr.HTML(elem_id="layers-owners", padding=False)
        with gr.Row(visible=False, elem_id="layers-tasks") as task_box:
            task_of = gr.Dropdown([], label="Fine-tune", elem_id="layers-task-of", min_width=180)
            task = gr.Dropdown([], label="is analysed on the rows of", elem_id="layers-task", min_width=180)
    return MapPart(
        missing, rows, combine, metric, analyse, estimate, stop, progress, headline, show, map_box, layer_map, measure,
        detail, owners, task_box, task_of, task, gr.State(()),
    )  # fmt: skip


def wire(part: MapPart, page: Page, board: Switchboard) -> None:
    settings, store = page.settings, store_of(page)

    def labels(session: Session, rows: int, active: bool) -> tuple[Any, Any]:
        """→ analyse, estimate."""
        cost, can = view.cost_of(session, settings, rows or layer_tasks.ROWS[0]), view.can_analyse(session, settings)
        label = view.analyse_label(cost, device_name(settings.device))
        return (
            gr.Button(label, interactive=can, visible=not active),
            gr.Button(view.estimate_label(cost), interactive=can, visible=not active),
        )

    def redraw(
        session: Session, visitor: str, rows: int, combine: str, metric: str, show: str, selection: Any, *switches: Any
    ) -> list[Any]:
        """session, visitor, rows, combine, metric, show, selected layers, switches → what `drawn` lists."""
        job = page.jobs.latest(visitor, ANALYSE) if visitor else None
        report, source = shown_report(page, visitor, session, combine)
        active = job is not None and job.active
        tasks, offered = view.task_choices(session), view.model_choices(session)[1:]
        several = len(tasks) > 1 and bool(offered)
        return [
            layer_tasks.missing_html(session, settings),
            *labels(session, rows, active),
            layer_report.headline_html(report, source),
            layer_report.map_value(report, shown_of(show)),
            layer_report.detail_html(report, selection, board.read(*switches)),
            layer_tasks.owners_html(session, settings, rows),
            gr.Row(visible=several),
            gr.Dropdown(offered, value=None),
            gr.Dropdown(tasks, value=None),
            gr.Dropdown(view.metric_choices(session), value=view.metric_kept(session, metric)),
        ]

    def shown_of(show: str) -> str:
        return show if show in layer_report.CONTRIBUTIONS else layer_report.GAMMA

    def follow(visitor: str, session: Session, show: str, job_id: str) -> Iterator[tuple[Any, ...]]:
        """→ progress, headline, map, analyse, estimate, stop."""
        for now in page.jobs.follow(visitor, job_id):
            found = now.result if now.status == "done" else now.step.data
            drawn: tuple[Any, ...] = (gr.skip(), gr.skip())
            if isinstance(found, layers_job.Analysed) and found.key == layer_tasks.layers_key(session):
                value = layer_report.map_value(found.report, shown_of(show), busy=now.active)
                drawn = (layer_report.headline_html(found.report), value)
            said = note_html(view.STOPPED) if now.status == "stopped" else progress_html(now)
            idle = gr.Button(visible=not now.active)
            yield (said, *drawn, idle, idle, gr.Button(visible=now.active))

    def start(
        session: Session,
        visitor: str,
        rows: int,
        combine: str,
        metric: str,
        show: str,
        layers: tuple[str, ...] | None,
        estimate: bool = False,
    ) -> Iterator[tuple[Any, ...]]:
        try:
            layers_job.check(session, settings, rows)
            report = shown_report(page, visitor, session, combine)[0] if layers is not None else None
            if rows not in layer_tasks.row_choices(settings):
                raise MergeError("Choose how many rows per task to analyse with.", field="rows")
            how = layers_job.How(rows, combine, metric or "-loss")
            work = layers_job.analyse_work(session, settings, store, how, layers, report, estimate_only=estimate)
            job = page.jobs.start(visitor, ANALYSE, "The analysis", work)
        except MergeError as error:
            yield (error_html(sentence(error)), *[gr.skip()] * 5)
            return
        yield from follow(visitor, session, show, job)

    def analyse(
        session: Session, visitor: str, rows: int, combine: str, metric: str, show: str
    ) -> Iterator[tuple[Any, ...]]:
        """session, visitor, rows, combine, metric, show → what `running` lists."""
        yield from start(session, visitor, rows, combine, metric, show, None)

    def estimate(
        session: Session, visitor: str, rows: int, combine: str, metric: str, show: str
    ) -> Iterator[tuple[Any, ...]]:
        """session, visitor, rows, combine, metric, show → what `running` lists."""
        yield from start(session, visitor, rows, combine, metric, show, None, estimate=True)

    def measure(
        session: Session, visitor: str, rows: int, combine: str, metric: str, show: str, selection: Any
    ) -> Iterator[tuple[Any, ...]]:
        """session, visitor, rows, combine, metric, show, selected layers → what `running` lists."""
        yield from start(session, visitor, rows, combine, metric, show, tuple(selection))

    def attach(session: Session, visitor: str, show: str) -> Iterator[tuple[Any, ...]]:
        """session, visitor, show → what `running` lists: find an analysis again after a reload."""
        now = page.jobs.latest(visitor, ANALYSE) if visitor else None
        if now is not None and now.active:
            yield from follow(visitor, session, show, now.id)
        else:
            yield (gr.skip(),) * 6

    def select(session: Session, visitor: str, combine: str, payload: Any, *switches: Any) -> tuple[Any, ...]:
        """session, visitor, combine, what the map sent, switches → selected layers, measure, detail."""
        report, _ = shown_report(page, visitor, session, combine)
        keys = [layer.key for layer in report.setup.layers] if report is not None else []
        try:
            chosen = read_selection(payload, keys).selected
        except MergeError as error:
            raise gr.Error(error.message, print_exception=False) from error
        button = gr.Button(view.selected_label(len(chosen)), visible=bool(chosen))
        return chosen, button, layer_report.detail_html(report, chosen, board.read(*switches))

    def explain(session: Session, visitor: str, combine: str, selection: Any, *switches: Any) -> str:
        """session, visitor, combine, selected layers, switches → detail."""
        report, _ = shown_report(page, visitor, session, combine)
        return layer_report.detail_html(report, selection, board.read(*switches))

    def price(session: Session, visitor: str, rows: int) -> tuple[Any, Any]:
        """session, visitor, rows → analyse, estimate."""
        job = page.jobs.latest(visitor, ANALYSE) if visitor else None
        return labels(session, rows, job is not None and job.active)

    def price_when_opened(session: Session, visitor: str, rows: int, opened: gr.SelectData) -> Any:
        """session, visitor, rows, which tab was opened → analyse, estimate: the base may be ready by now."""
        return price(session, visitor, rows) if opened.value == TITLE else (gr.skip(), gr.skip())

    def give_task(session: Session, model: str | None, task: str | None) -> Any:
        """session, fine-tune, task → session."""
        if not model or not task:
            return gr.skip()
        try:
            return layer_tasks.with_owner(session, model, task)
        except MergeError as error:
            raise gr.Error(error.message, print_exception=False) from error

    state = [page.session, page.visitor]
    buttons = [part.analyse, part.estimate]
    drawn = [part.missing, *buttons, part.headline, part.map, part.detail, part.owners, part.task_box, part.task_of,
             part.task, part.metric]  # fmt: skip
    settings_in = [*state, part.rows, part.combine, part.metric, part.show]
    drawing = [*settings_in, part.selection, *board.inputs]
    running = [part.progress, part.headline, part.map, *buttons, part.stop]
    page.session.change(redraw, drawing, drawn, **private)
    for field in (part.show, part.combine):
        field.input(redraw, drawing, drawn, **private)
    page.tabs.select(price_when_opened, [*state, part.rows], buttons, **private)
    part.rows.input(price, [*state, part.rows], buttons, **private)
    chosen = [part.selection, part.measure, part.detail]
    part.map.select(
        select, [*state, part.combine, part.map, *board.inputs], chosen, trigger_mode="always_last", **private
    )
    for switch in board.inputs:
        switch.change(explain, [*state, part.combine, part.selection, *board.inputs], part.detail, **private)
    for click, handler, inputs in (
        (part.analyse.click, analyse, settings_in),
        (part.estimate.click, estimate, settings_in),
        (part.measure.click, measure, [*settings_in, part.selection]),
    ):
        ran = click(handler, inputs, running, concurrency_limit=None, **private)
        ran.then(redraw, drawing, drawn, **private)
    part.stop.click(lambda visitor: page.jobs.stop(visitor, ANALYSE), page.visitor, None, queue=False, **private)
    for field in (part.task_of, part.task):
        field.input(give_task, [page.session, part.task_of, part.task], page.session, **private)
    found = page.arrived.then(attach, [*state, part.show], running, concurrency_limit=None, **private)
    found.then(redraw, drawing, drawn, **private)
