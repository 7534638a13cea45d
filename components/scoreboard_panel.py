"""The scoreboard: every model and the merge on held-out rows and on general ones, as a job with progress and Stop.

Layout, the job and its wiring; what a difference is worth is `llm_merge.scoreboard`'s business, words and tables are
`views/scoreboard_view.py`'s.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from components.charts import scoreboard_bars
from components.demo_setup import prepare_steps
from components.feedback import error_html, progress_html, sentence
from components.jobs import Step, Work
from components.live import LIVE, LiveModels
from components.page import Page
from components.session import Session, row_shape
from components.settings import Settings
from components.views import scoreboard_view as view
from components.views.try_view import base_of, button_label, mix_words, what_to_try
from llm_merge.errors import MergeError
from llm_merge.recipe import Recipe
from llm_merge.scoreboard import Scoreboard, ScoredModel, score

if TYPE_CHECKING:
    from llm_merge.measurements import MeasurementCache
    from llm_merge.workbench import Workbench

KIND = "scoreboard"


@dataclass(frozen=True)
class ScoreboardPanel:
    run: gr.Button
    stop: gr.Button
    about: gr.HTML
    progress: gr.HTML
    metric: gr.Radio
    result: gr.HTML
    chart: gr.Plot


def build(settings: Settings) -> ScoreboardPanel:
    gr.HTML('<h2 class="section">Scoreboard</h2>', padding=False, elem_id="scoreboard-title")
    about = gr.HTML(elem_id="scoreboard-about", padding=False)
    with gr.Row(elem_classes="actions"):
        run = gr.Button("Score all models", elem_id="score", scale=0, min_width=160)
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id="score-stop", scale=0, min_width=120)
    progress = gr.HTML(elem_id="score-progress", padding=False)
    metric = gr.Radio(view.METRICS, value=view.METRICS[0][1], label="Measure", visible=False, elem_id="score-metric")
    result = gr.HTML(elem_id="score-result", padding=False)
    chart = gr.Plot(show_label=False, visible=False, elem_id="score-chart")
    return ScoreboardPanel(run, stop, about, progress, metric, result, chart)


def score_work(
    session: Session, sets: Sequence[view.RowSet], settings: Settings, cache: MeasurementCache, pool: LiveModels = LIVE
) -> Work:
    """The job: losses of every model and the merge on each set (parents' are remembered), and ranks where they embed.

    Its result is a `Scored`.
    """
    recipe = session.recipe
    assert recipe is not None, "the caller has checked that there is something to score"
    models: list[str | Recipe] = [*session.models, recipe]
    searching = row_shape(session.model_type) == "search"

    def run(stop: threading.Event) -> Generator[Step, None, view.Scored]:
        from llm_merge.measurements import measure_models

        yield from prepare_steps(session.models, stop)
        yield Step("Getting the models ready", None)
        values: dict[str, list[list[tuple[float, ...]]]] = {name: [[] for _ in models] for _, name in view.METRICS}
        parts = len(sets) * (2 if searching else 1)
        with pool.borrow(base_of(session), session.model_type, [recipe], settings, stop) as (bench,):
            for place, rows in enumerate(sets):
                begin = place * (2 if searching else 1)
                measuring = measure_models(
                    models, session.model_type, rows.rows, cache=cache, device=settings.device, stop=stop, bench=bench
                )
                while True:
                    try:
                        event = next(measuring)
                    except StopIteration as end:
                        table = end.value
                        break
                    if not event.from_cache:
                        done = event.done / max(event.total, 1)
                        who = view.title(session, event.model)
                        message = f"{rows.name}: {who}, {event.done} of {event.total} rows"
                        yield Step(message, (begin + done) / parts)
                for number in range(len(models)):
                    values["loss"][number].append(table.losses[number])
                if searching:
                    yield from _ranks(session, models, rows, bench, values, begin + 1, parts, stop)
        metrics = [name for _, name in view.METRICS if searching or name == "loss"]
        boards = {name: _board(session, sets, values[name], name) for name in metrics}
        return view.Scored(
            session.recipe_key, mix_words(session), boards, tuple(rows.note for rows in sets if rows.note)
        )

    return run


def _ranks(
    session: Session,
    models: Sequence[str | Recipe],
    rows: view.RowSet,
    bench: Workbench,
    values: dict[str, list[list[tuple[float, ...]]]],
    begin: int,
    parts: int,
    stop: threading.Event,
) -> Iterator[Step]:
    from llm_merge.retrieval import retrieval

    for number, model in enumerate(models):
        who = view.title(session, model if isinstance(model, str) else "")
        yield Step(f"{rows.name}: {who} ranks {len(rows.rows)} passages", (begin + number / len(models)) / parts)
        with bench.lock:
            bench.follow(model if isinstance(model, Recipe) else Recipe.single(model), stop)
            found = retrieval(bench, rows.rows, stop=stop)
        for name, column in (("R@1", found.recall_at_1), ("MRR", found.mrr), ("nDCG@10", found.ndcg_at_10)):
            values[name][number].append(column.values)


def _board(
    session: Session, sets: Sequence[view.RowSet], values: Sequence[Sequence[tuple[float, ...]]], metric: str
) -> Scoreboard:
    scored = [
        ScoredModel(
            view.title(session, model),
            "base" if model == session.base else "specialist" if model else "merged",
            tuple(values[number]),
            view.task_of(model),
        )
        for number, model in enumerate([*session.models, ""])
    ]
    same = any(rows.same_rows for rows in sets)
    seen = [rows.name for rows in sets if rows.seen]
    return score(scored, [rows.name for rows in sets], metric=metric, same_rows=same, seen=seen)


def wire(panel: ScoreboardPanel, page: Page) -> None:
    private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    buttons = [panel.progress, panel.run, panel.stop]
    shown = [panel.metric, panel.result, panel.chart]

    def scored_of(visitor: str) -> view.Scored | None:
        job = page.jobs.latest(visitor, KIND) if visitor else None
        return job.result if job is not None and isinstance(job.result, view.Scored) else None

    def result(session: Session, scored: view.Scored | None, metric: str) -> tuple[Any, ...]:
        """→ metric, result, chart."""
        if scored is None or what_to_try(session) == "":
            return gr.Radio(visible=False), "", gr.Plot(visible=False)
        board = scored.board(metric)
        figure = scoreboard_bars(board, view.line_colors(session, board))
        several = gr.Radio(visible=len(scored.boards) > 1)
        return several, view.scored_html(scored, metric, session), gr.Plot(figure, visible=True)

    def redraw(session: Session, visitor: str, metric: str) -> tuple[Any, ...]:
        """session, visitor, metric → about, run, metric, result, chart."""
        scored = scored_of(visitor)
        label = button_label("Score all models", scored.recipe_key if scored else None, session)
        about = view.about_html(session, page.settings)
        able = what_to_try(session) != ""
        return about, gr.Button(label, interactive=able), *result(session, scored, metric)

    def follow(visitor: str, job: str) -> Iterator[tuple[Any, ...]]:
        for now in page.jobs.follow(visitor, job):
            yield progress_html(now), gr.Button(visible=not now.active), gr.Button(visible=now.active)

    def run(session: Session, visitor: str) -> Iterator[tuple[Any, ...]]:
        """session, visitor → progress, run, stop."""
        try:
            sets = view.row_sets(session, page.settings)
            work = score_work(session, sets, page.settings, page.measurements)
            job = page.jobs.start(visitor, KIND, "The scoreboard", work)
        except MergeError as error:
            yield error_html(sentence(error)), gr.skip(), gr.skip()
            return
        yield from follow(visitor, job)

    def attach(visitor: str) -> Iterator[tuple[Any, ...]]:
        """visitor → progress, run, stop: find a run again after a reload."""
        job = page.jobs.latest(visitor, KIND) if visitor else None
        if job is not None and job.active:
            yield from follow(visitor, job.id)
        else:
            yield gr.skip(), gr.skip(), gr.skip()

    def stop(visitor: str) -> None:
        """visitor → nothing."""
        page.jobs.stop(visitor, KIND)

    everything = [page.session, page.visitor, panel.metric]
    drawing = [panel.about, panel.run, *shown]
    page.session.change(redraw, everything, drawing, **private)
    panel.metric.input(redraw, everything, drawing, **private)
    ran = panel.run.click(run, [page.session, page.visitor], buttons, concurrency_limit=None, **private)
    ran.then(redraw, everything, drawing, **private)
    panel.stop.click(stop, page.visitor, None, queue=False, **private)
    found = page.arrived.then(attach, page.visitor, buttons, concurrency_limit=None, **private)
    found.then(redraw, everything, drawing, **private)
