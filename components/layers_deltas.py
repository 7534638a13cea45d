"""Layers: what the fine-tunes changed, read from the weights alone, by layer and module; one matrix close up.

Layout and wiring only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from components import layers_job
from components.feedback import error_html, note_html, progress_html, sentence
from components.layers_parts import DELTAS, private
from components.page import Page
from components.session import Session
from components.settings import Settings
from components.try_parts import result_of
from components.views import layer_deltas as view
from components.views import layer_report
from llm_merge.errors import MergeError


@dataclass(frozen=True)
class DeltaPart:
    box: gr.Column
    measure: gr.Dropdown
    pair: gr.Dropdown
    tensor: gr.Dropdown
    read: gr.Button
    progress: gr.HTML
    chart: gr.Plot


def build(settings: Settings) -> DeltaPart:
    with gr.Column(visible=False, elem_id="deltas-box") as box:
        with gr.Row():
            measure = gr.Dropdown(view.DELTA_MEASURES, value="relative_norm", label="Measure", elem_id="deltas-measure",
                                  visible=False, min_width=260)  # fmt: skip
            pair = gr.Dropdown([], label="Which two", elem_id="deltas-pair", visible=False, min_width=220)
            tensor = gr.Dropdown([], label="Weight matrix", elem_id="deltas-tensor", visible=False, min_width=320)
        read = gr.Button("Read the weights", variant="primary", elem_id="deltas-read", visible=False)
        progress = gr.HTML(elem_id="deltas-progress", padding=False)
        chart = gr.Plot(show_label=False, elem_id="deltas-chart")
    return DeltaPart(box, measure, pair, tensor, read, progress, chart)


def wire(part: DeltaPart, page: Page, show: gr.Dropdown, map_box: gr.Column) -> None:
    def stats_of(visitor: str, session: Session) -> Any:
        found = result_of(page.jobs.latest(visitor, DELTAS) if visitor else None, layers_job.Deltas)
        return found.stats if found is not None and found.key == layers_job.delta_key(session) else None

    def redraw(
        session: Session, visitor: str, shown: str, measure: str, pair: str | None, tensor: str | None
    ) -> tuple[Any, ...]:
        """session, visitor, show, measure, pair, tensor → what `drawn` lists."""
        if shown in layer_report.CONTRIBUTIONS:
            return (gr.Column(visible=True), gr.Column(visible=False), *[gr.skip()] * 6)
        stats = stats_of(visitor, session)
        pairs, close_up = view.pairs(session), shown == layer_report.TENSOR
        pair = pair if pair in [value for _, value in pairs] else (pairs[0][1] if pairs else None)
        say, figure, offered, wrong = "", None, [], False
        try:
            view.check_deltas(session, shown)
            if close_up:
                offered = view.tensor_choices(session)
                tensor = tensor if tensor in offered else view.first_tensor(offered)
                figure = view.close_up(session, tensor)
            elif stats is not None:
                figure = view.chart(stats, session, shown, measure, pair)
            else:
                say = note_html(view.READ_FIRST)
        except MergeError as error:
            say, wrong = error_html(sentence(error)), True
        needs = not close_up and stats is None and not wrong
        return (
            gr.Column(visible=False),
            gr.Column(visible=True),
            gr.Dropdown(visible=shown == layer_report.DELTAS and stats is not None),
            gr.Dropdown(
                pairs, value=pair, visible=shown in (layer_report.SIGNS, layer_report.COSINE) and len(pairs) > 1
            ),
            gr.Dropdown(offered, value=tensor if close_up else None, visible=close_up and bool(offered)),
            gr.Button(visible=needs),
            say,
            gr.Plot(figure, visible=figure is not None),
        )

    def read(session: Session, visitor: str) -> Iterator[str]:
        """session, visitor → progress."""
        try:
            view.check_deltas(session, layer_report.DELTAS)
            job = page.jobs.start(visitor, DELTAS, "Reading the weights", layers_job.delta_work(session))
        except MergeError as error:
            yield error_html(sentence(error))
            return
        for now in page.jobs.follow(visitor, job):
            yield progress_html(now)

    state = [page.session, page.visitor, show, part.measure, part.pair, part.tensor]
    drawn = [map_box, part.box, part.measure, part.pair, part.tensor, part.read, part.progress, part.chart]
    page.session.change(redraw, state, drawn, **private)
    for field in (show, part.measure, part.pair, part.tensor):
        field.input(redraw, state, drawn, **private)
    ran = part.read.click(read, [page.session, page.visitor], part.progress, concurrency_limit=None, **private)
    ran.success(redraw, state, drawn, **private)
