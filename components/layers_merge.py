"""Layers, lower half: Hi-Merging with its switches, its steps as they come, and the recipe that it reaches.

Layout and wiring only. A stop keeps the recipe reached so far; "Use this recipe" puts it on the recipe bar, so that Try
and Save use it at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from components import layers_job
from components.feedback import error_html, note_html, progress_html, sentence
from components.hi_charts import pruning_grid, steps_curve
from components.jobs import JobView
from components.layers_parts import HI_MERGE, TITLE, Switchboard, private, store_of
from components.page import Page
from components.session import Session
from components.settings import Settings
from components.try_parts import result_of
from components.views import layer_tasks
from components.views import layers as view
from components.views.layer_report import unit_of
from llm_merge.errors import MergeError

NAME = "Hi-Merging"


@dataclass(frozen=True)
class MergePart:
    board: Switchboard
    combine: gr.Dropdown
    missing: gr.HTML
    run: gr.Button
    stop: gr.Button
    use: gr.Button
    progress: gr.HTML
    result: gr.HTML
    curve: gr.Plot
    steps: gr.HTML
    grid_box: gr.Accordion
    grid: gr.Plot


def build(settings: Settings) -> MergePart:
    gr.HTML(
        '<h2 class="section">Let Hi-Merging settle it</h2><p class="about">Every fine-tune is first pruned and scaled '
        "as suits its own task; then the layers are taken one by one, the worst conflict first: where both tasks are "
        "hurt, the layer that contributes more is kept; where one gains at the other’s cost, it is reduced. "
        "Only analysis rows decide.</p>",
        padding=False,
    )
    grids = view.GRIDS[1:] if settings.public else view.GRIDS
    with gr.Row(elem_id="himerge-main"):
        grid = gr.Dropdown(grids, value="coarse", label="Search for pruning and scale", elem_id="himerge-grid",
                           info="p, s of each fine-tune, on its own task", min_width=220)  # fmt: skip
        combine = gr.Dropdown(view.COMBINES, value="average", label="Combine as", elem_id="himerge-combine",
                              info="how the pruned changes are added to the base", min_width=220)  # fmt: skip
        noise = gr.Slider(0, 4, 0, step=0.5, label="Act only beyond noise", elem_id="himerge-noise", min_width=220,
                          info="standard errors; 0 acts on every sign, as published")  # fmt: skip
    with gr.Accordion("What the published description leaves open", open=False, elem_id="himerge-switches"), gr.Row():
        severe = gr.Dropdown(view.SEVERE_BY, value="before", label="Severe conflict: keep", min_width=220,
                             elem_id="himerge-severe", info="the layer that contributes most")  # fmt: skip
        partial = gr.Dropdown(view.TARGETS, value="enhanced", label="Partial conflict: reduce", min_width=220,
                              elem_id="himerge-partial", info="to half of its p and s")  # fmt: skip
        accept = gr.Dropdown(view.KEPT_EDITS, value="always", label="An edit that hurts", elem_id="himerge-accept",
                             info="the mean over the tasks falls", min_width=220)  # fmt: skip
        most = gr.Number(0, label="Edit at most so many layers", minimum=0, precision=0, elem_id="himerge-most",
                         info="0: as many as conflict", min_width=220)  # fmt: skip
        recompute = gr.Checkbox(False, label="Measure again after every edit", elem_id="himerge-recompute",
                                info="the merge’s side of the remaining layers: slow", min_width=220)  # fmt: skip
    missing = gr.HTML(elem_id="himerge-missing", padding=False)
    with gr.Row(elem_id="himerge-actions"):
        run = gr.Button("Run Hi-Merging", variant="primary", elem_id="himerge-run", min_width=220)
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id="himerge-stop", min_width=90)
        use = gr.Button("Use this recipe", visible=False, elem_id="himerge-use", min_width=180)
        progress = gr.HTML(elem_id="himerge-progress", padding=False)
    result = gr.HTML(elem_id="himerge-result", padding=False)
    curve = gr.Plot(show_label=False, visible=False, elem_id="himerge-curve")
    steps = gr.HTML(elem_id="himerge-steps", padding=False)
    with gr.Accordion("The search over p and s", open=False, visible=False, elem_id="himerge-grid-box") as grid_box:
        drawn = gr.Plot(show_label=False, elem_id="himerge-grid-chart")
    board = Switchboard(grid, partial, severe, recompute, most, accept, noise)
    return MergePart(board, combine, missing, run, stop, use, progress, result, curve, steps, grid_box, drawn)


def wire(part: MergePart, page: Page, rows: gr.Radio, metric: gr.Dropdown) -> None:
    settings, store, board = page.settings, store_of(page), part.board

    def merged_of(visitor: str, session: Session) -> tuple[JobView | None, layers_job.Merged | None]:
        job = page.jobs.latest(visitor, HI_MERGE) if visitor else None
        found = result_of(job, layers_job.Merged)
        return job, found if found is not None and found.key == layer_tasks.layers_key(session) else None

    def draw(found: layers_job.Merged | None, active: bool, session: Session) -> tuple[Any, ...]:
        """→ use, result, curve, steps, grid box, grid chart."""
        if found is None:
            known = "" if active else view.recorded_result(session)
            return gr.Button(visible=False), known, gr.Plot(visible=False), "", gr.Accordion(visible=False), gr.skip()
        event = found.event
        usable = event.recipe is not None and not active
        tasks = (
            event.report.setup.tasks if event.report is not None else tuple(dict.fromkeys(c.task for c in event.grid))
        )
        unit = unit_of(event.report) if event.report is not None else "nats"
        begun = len(event.points) > len(tasks) + 2
        curve = steps_curve(event.points, tasks, unit, same_rows=found.same_rows) if begun else None
        grid = pruning_grid(event.grid, tasks, unit) if event.grid else None
        return (
            gr.Button(visible=usable),
            view.result_html(event, same_rows=found.same_rows),
            gr.Plot(curve, visible=curve is not None),
            view.steps_html(event),
            gr.Accordion(visible=grid is not None),
            grid if grid is not None else gr.skip(),
        )

    def button(session: Session, count: int, grid: str, active: bool) -> Any:
        cost = view.cost_of(session, settings, count)
        label = view.merge_label(cost, grid)
        return gr.Button(label, interactive=not view.merge_missing(session, settings), visible=not active)

    def redraw(session: Session, visitor: str, count: int, grid: str) -> tuple[Any, ...]:
        """session, visitor, rows, grid → missing, run, use, result, curve, steps, grid box, grid chart."""
        job, found = merged_of(visitor, session)
        active = job is not None and job.active
        return (
            view.merge_missing(session, settings),
            button(session, count, grid, active),
            *draw(found, active, session),
        )

    def price(session: Session, visitor: str, count: int, grid: str) -> Any:
        """session, visitor, rows, grid → run."""
        job = page.jobs.latest(visitor, HI_MERGE) if visitor else None
        return button(session, count, grid, job is not None and job.active)

    def price_when_opened(session: Session, visitor: str, count: int, grid: str, opened: gr.SelectData) -> Any:
        """session, visitor, rows, grid, which tab was opened → run."""
        return price(session, visitor, count, grid) if opened.value == TITLE else gr.skip()

    def follow(visitor: str, session: Session, job_id: str) -> Iterator[tuple[Any, ...]]:
        """→ progress, run, stop, use, result, curve, steps, grid box, grid chart."""
        shown: tuple[int, int, int] | None = None
        for now in page.jobs.follow(visitor, job_id):
            _, found = merged_of(visitor, session)
            event = found.event if found is not None else None
            said = note_html(view.stopped_words(event)) if now.status == "stopped" else progress_html(now)
            size = (len(event.grid), len(event.trials), len(event.points)) if event is not None else None
            # Charts are drawn when there is something new in them, not with every cell that is measured.
            drawn = draw(found, now.active, session) if size != shown or not now.active else (gr.skip(),) * 6
            shown = size
            yield (said, gr.Button(visible=not now.active), gr.Button(visible=now.active), *drawn)

    def run(
        session: Session, visitor: str, count: int, metric: str, combine: str, *switches: Any
    ) -> Iterator[tuple[Any, ...]]:
        """session, visitor, rows, metric, combine, switches → as `follow`."""
        try:
            layers_job.check(session, settings, count)
            chosen = view.checked_switches(settings, *switches)
            how = layers_job.How(count, combine, metric or "-loss")
            work = layers_job.hi_merge_work(session, settings, store, how, chosen)
            job = page.jobs.start(visitor, HI_MERGE, NAME, work)
        except MergeError as error:
            yield (error_html(sentence(error)), *[gr.skip()] * 8)
            return
        yield from follow(visitor, session, job)

    def attach(session: Session, visitor: str) -> Iterator[tuple[Any, ...]]:
        """session, visitor → as `follow`: find a run again after a reload."""
        now = page.jobs.latest(visitor, HI_MERGE) if visitor else None
        if now is not None and now.active:
            yield from follow(visitor, session, now.id)
        else:
            yield (gr.skip(),) * 9

    def use(session: Session, visitor: str) -> Session:
        """session, visitor → session with the recipe reached."""
        _, found = merged_of(visitor, session)
        if found is None or found.event.recipe is None:
            raise gr.Error("There is no recipe of these models: run Hi-Merging first.", print_exception=False)
        return session.with_layered(found.event.recipe, NAME)

    state = [page.session, page.visitor]
    shown = [part.use, part.result, part.curve, part.steps, part.grid_box, part.grid]
    drawn = [part.missing, part.run, *shown]
    running = [part.progress, part.run, part.stop, *shown]
    drawing = [*state, rows, board.grid]
    page.session.change(redraw, drawing, drawn, **private)
    page.tabs.select(price_when_opened, drawing, part.run, **private)
    for field in (rows, board.grid):
        field.input(price, drawing, part.run, **private)
    ran = part.run.click(
        run, [*state, rows, metric, part.combine, *board.inputs], running, concurrency_limit=None, **private
    )
    ran.then(redraw, drawing, drawn, **private)
    part.stop.click(lambda visitor: page.jobs.stop(visitor, HI_MERGE), page.visitor, None, queue=False, **private)
    part.use.click(use, state, page.session, **private)
    attached = page.arrived.then(attach, state, running, concurrency_limit=None, **private)
    attached.then(redraw, drawing, drawn, **private)
