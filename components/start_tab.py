"""Start: what one sees first. The demo's shares and temperature, finished answers side by side, and two ways on.

Opens on what was recorded; "Run it live" does the whole run before the visitor's eyes and shows its own answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from components import live_run
from components.feedback import error_html, progress_html, sentence
from components.jobs import JobView
from components.page import Page
from components.recorded import recorded_answers, recorded_scores
from components.session import Session
from components.settings import Settings
from components.views import start as view
from components.views.choice import Choice
from components.views.shares import apply_choice, widget_of
from components.widgets.temperature import WeightTemperature
from llm_merge.demo import demo_examples, demo_path
from llm_merge.errors import MergeError
from llm_merge.measurements import MeasurementCache

TITLE = "Mix fine-tuned models. See why. Try before you save."
KIND = "live demo"


@dataclass(frozen=True)
class StartTab:
    shares: WeightTemperature
    prompt: gr.Radio
    answers: gr.HTML
    result: gr.HTML
    run: gr.Button
    stop: gr.Button
    own: gr.Button
    progress: gr.HTML


def build(settings: Settings) -> StartTab:
    gr.HTML(f"<h1>{TITLE}</h1>", elem_id="start-title", padding=False)
    with gr.Row(elem_id="start-row"):
        with gr.Column(scale=5, min_width=320):
            shares = WeightTemperature(compact=True, elem_id="start-shares")
        with gr.Column(scale=8, min_width=320):
            prompt = gr.Radio(
                view.prompt_choices(recorded_answers()), value=0, label="Ask", elem_id="start-prompt", container=False
            )
            answers = gr.HTML(elem_id="start-answers", padding=False)
            result = gr.HTML(elem_id="start-result", padding=False)
    with gr.Row(elem_id="start-actions"):
        run = gr.Button("Run it live", variant="primary", elem_id="run-live", scale=0, min_width=180)
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop-live", scale=0, min_width=180)
        own = gr.Button("Use my own models", elem_id="own-models", scale=0, min_width=210)
    progress = gr.HTML(elem_id="start-progress", padding=False)
    return StartTab(shares, prompt, answers, result, run, stop, own, progress)


def demo_session(cache: MeasurementCache) -> Session:
    """What a new visitor finds: the chat demo, both tasks, and the losses recorded for them."""
    rows = [{**row, "task": task} for task in ("verse", "dictionary") for row in demo_examples("decoder", task, "work")]
    session = Session().with_models("decoder", demo_path("smollm2"), [demo_path("king-james"), demo_path("dictionary")])
    session = session.with_rows(rows, "Verse + Dictionary (demo)", ("verse", "dictionary"))
    return session.with_losses(live_run.recorded_table(session, cache))


def wire(tab: StartTab, page: Page) -> None:
    private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    progress_outputs = [tab.progress, tab.answers, tab.run, tab.stop]

    def draw(session: Session, prompt: int, live: JobView | None) -> str:
        return view.answers_html(session, recorded_answers(), prompt, live_run.answers_of(live))

    def redraw(session: Session, visitor: str, prompt: int) -> tuple[Any, str, str]:
        """session, visitor, prompt → shares, answers, result."""
        scores = recorded_scores(session.model_type)
        live = page.jobs.latest(visitor, KIND) if visitor else None
        return widget_of(session), draw(session, prompt, live), view.result_html(scores, session)

    def choose(session: Session, choice: Choice) -> Session:
        """session, what was set in the widget → session."""
        try:
            return apply_choice(session, choice)
        except MergeError as error:
            raise gr.Error(error.message, print_exception=False) from error

    def follow(visitor: str, session: Session, prompt: int, job: str) -> Iterator[tuple[Any, ...]]:
        for live in page.jobs.follow(visitor, job):
            running = gr.Button(visible=not live.active), gr.Button(visible=live.active)
            yield (progress_html(live), draw(session, prompt, live), *running)

    def run(session: Session, visitor: str, prompt: int) -> Iterator[tuple[Any, ...]]:
        """session, visitor, prompt → progress, answers, run, stop."""
        if view.demo_mix(session) is None:
            session = demo_session(page.measurements)
        asked = view.prompt_text(recorded_answers(), prompt)
        specialist = view.specialist_for(session, view.prompt_task(recorded_answers(), prompt))
        try:
            work = live_run.work(session, asked, specialist, page.settings, page.measurements)
            job = page.jobs.start(visitor, KIND, "The live run", work)
        except MergeError as error:
            yield error_html(sentence(error)), gr.skip(), gr.skip(), gr.skip()
            return
        yield from follow(visitor, session, prompt, job)

    def finished(session: Session, visitor: str) -> Any:
        """session, visitor → session: the losses just measured take the recorded ones' place.

        With nothing to add it leaves the session alone: on load, the visitor's own may be arriving just now.
        """
        live = page.jobs.latest(visitor, KIND) if visitor else None
        if live is None or live.result is None:
            return gr.skip()
        kept = session if view.demo_mix(session) is not None else demo_session(page.measurements)
        return replace(kept.with_losses(live.result.table), tried=live.result.recipe_key)

    def attach(session: Session, visitor: str, prompt: int) -> Iterator[tuple[Any, ...]]:
        """session, visitor, prompt → progress, answers, run, stop: find a run again after a reload."""
        live = page.jobs.latest(visitor, KIND) if visitor else None
        if live is not None and live.active:
            yield from follow(visitor, session, prompt, live.id)
        else:
            yield gr.skip(), gr.skip(), gr.skip(), gr.skip()

    def stop(visitor: str) -> None:
        """visitor → nothing."""
        page.jobs.stop(visitor, KIND)

    def own() -> tuple[Session, Any]:
        """→ session, tabs."""
        return Session(), page.goto("models")

    inputs = [page.session, page.visitor, tab.prompt]
    shown = [tab.shares, tab.answers, tab.result]
    page.session.change(redraw, inputs, shown, **private)
    tab.prompt.input(redraw, inputs, shown, **private)
    tab.shares.release(choose, [page.session, tab.shares], page.session, **private)
    ran = tab.run.click(run, inputs, progress_outputs, concurrency_limit=None, **private)
    ran.then(finished, inputs[:2], page.session, **private)
    tab.stop.click(stop, page.visitor, None, queue=False, **private)
    tab.own.click(own, None, [page.session, page.tabs], **private)
    found = page.arrived.then(attach, inputs, progress_outputs, concurrency_limit=None, **private)
    found.then(finished, inputs[:2], page.session, **private)
