"""Layers: the recipe in use beside base, fine-tunes and plain average on held-out rows, by any metric. A job."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from components import layers_job
from components.feedback import error_html, progress_html, sentence
from components.jobs import JobView
from components.layers_parts import SCORE, private, store_of
from components.page import Page
from components.session import Session
from components.settings import Settings
from components.try_parts import result_of
from components.views import layer_scores as view
from components.views.weights import duration
from llm_merge.errors import MergeError


@dataclass(frozen=True)
class ScorePart:
    metric: gr.Dropdown
    run: gr.Button
    stop: gr.Button
    progress: gr.HTML
    table: gr.HTML


def build(settings: Settings) -> ScorePart:
    with gr.Accordion("Score the recipe in use on held-out rows", open=False, elem_id="layers-score"):
        with gr.Row(elem_id="layers-score-row"):
            metric = gr.Dropdown([("−loss", "-loss")], value="-loss", label="Metric", elem_id="score-metric",
                                 info="generated answers take minutes", min_width=200)  # fmt: skip
            run = gr.Button("Score", elem_id="layers-score-run", min_width=160, scale=0)
            stop = gr.Button("Stop", variant="stop", visible=False, elem_id="layers-score-stop", min_width=90, scale=0)
        progress = gr.HTML(elem_id="layers-score-progress", padding=False)
        table = gr.HTML(elem_id="layers-score-table", padding=False)
    return ScorePart(metric, run, stop, progress, table)


def wire(part: ScorePart, page: Page) -> None:
    settings, store = page.settings, store_of(page)

    def table_of(job: JobView | None, session: Session) -> str:
        found = result_of(job, layers_job.Scored)
        if found is None or found.key != layers_job.score_key(session):
            return ""
        return view.table_html(found.table, same_rows=found.same_rows)

    def label(session: Session, metric: str) -> str:
        cost = view.seconds(session, settings, metric, settings.demo_rows)
        return "Score" if cost is None else f"Score (≈ {duration(cost)})"

    def redraw(session: Session, visitor: str, metric: str) -> tuple[Any, ...]:
        """session, visitor, metric → metric, run, table."""
        offered = view.metric_choices(session)
        kept = metric if metric in [name for _, name in offered] else "-loss"
        job = page.jobs.latest(visitor, SCORE) if visitor else None
        table = table_of(job, session)
        return gr.Dropdown(offered or [("−loss", "-loss")], value=kept), gr.Button(label(session, kept)), table

    def follow(visitor: str, session: Session, job_id: str) -> Iterator[tuple[Any, ...]]:
        """→ progress, table, run, stop."""
        for now in page.jobs.follow(visitor, job_id):
            table = table_of(now, session)
            yield progress_html(now), table, gr.Button(visible=not now.active), gr.Button(visible=now.active)

    def run(session: Session, visitor: str, metric: str) -> Iterator[tuple[Any, ...]]:
        """session, visitor, metric → progress, table, run, stop."""
        try:
            work = layers_job.score_work(session, settings, store, metric or "-loss")
            job = page.jobs.start(visitor, SCORE, "The scores", work)
        except MergeError as error:
            yield error_html(sentence(error)), gr.skip(), gr.skip(), gr.skip()
            return
        yield from follow(visitor, session, job)

    def attach(session: Session, visitor: str) -> Iterator[tuple[Any, ...]]:
        """session, visitor → progress, table, run, stop: find a run again after a reload."""
        now = page.jobs.latest(visitor, SCORE) if visitor else None
        if now is not None and now.active:
            yield from follow(visitor, session, now.id)
        else:
            yield (gr.skip(),) * 4

    state, running = [page.session, page.visitor], [part.progress, part.table, part.run, part.stop]
    page.session.change(redraw, [*state, part.metric], [part.metric, part.run, part.table], **private)
    part.metric.input(lambda session, metric: gr.Button(label(session, metric)), [page.session, part.metric], part.run,
                      **private)  # fmt: skip
    part.run.click(run, [*state, part.metric], running, concurrency_limit=None, **private)
    part.stop.click(lambda visitor: page.jobs.stop(visitor, SCORE), page.visitor, None, queue=False, **private)
    page.arrived.then(attach, state, running, concurrency_limit=None, **private)
