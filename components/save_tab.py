"""Save: where to, in which type, what it takes; then the merge itself, and the model card that was written.

Layout and wiring only. In public mode there is no folder to choose: the result is one bounded download.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from components import save_run
from components.feedback import error_html, note_html, progress_html, sentence
from components.naming import without_demo_paths
from components.page import Page
from components.session import Session
from components.settings import Settings
from components.views import save as view
from llm_merge.errors import MergeError, OutputError, Problem

KIND = "save"


@dataclass(frozen=True)
class SaveTab:
    """`suggested` holds the folder that the page proposed last: a name the visitor typed is never replaced."""

    place: gr.Tab
    folder: gr.Textbox
    folder_found: gr.HTML
    dtype: gr.Radio
    facts: gr.HTML
    problems: gr.HTML
    save: gr.Button
    stop: gr.Button
    progress: gr.HTML
    saved: gr.HTML
    download: gr.DownloadButton
    recipe: gr.Code
    card_box: gr.Accordion
    card: gr.Markdown
    suggested: gr.State
    rounding: gr.State  # (recipe, what rounding would erase of it), so that drawing again need not read weights
    kept: gr.State  # what was saved last, also when a later try was stopped


def build(settings: Settings) -> SaveTab:
    place = gr.context.Context.block
    assert isinstance(place, gr.Tab), "the Save tab is built inside its gr.Tab"
    with gr.Row(elem_id="save-row"):
        with gr.Column(scale=1, min_width=320):
            folder = gr.Textbox(
                label="Output folder",
                info="Made when it does not exist; otherwise it must be empty.",
                visible=not settings.public,
                max_lines=2,
                elem_id="save-folder",
            )
            folder_found = gr.HTML(elem_id="save-folder-found")
            dtype = gr.Radio(
                view.type_choices(view.Reading()), value="", label="Type of the weights", elem_id="save-type"
            )
            facts = gr.HTML(elem_id="save-facts")
            problems = gr.HTML(elem_id="save-problems")
            with gr.Row(elem_id="save-actions"):
                label = "Merge for download" if settings.public else "Save the merged model"
                save = gr.Button(label, variant="primary", elem_id="save-run", scale=0, min_width=220)
                stop = gr.Button("Stop", variant="stop", visible=False, elem_id="save-stop", scale=0, min_width=120)
            progress = gr.HTML(elem_id="save-progress")
            saved = gr.HTML(elem_id="save-saved")
            download = gr.DownloadButton("Download the model", visible=False, elem_id="save-download")
        with gr.Column(scale=1, min_width=320):
            recipe = gr.Code(
                label="Recipe: mergekit reads it too",
                language="yaml",
                interactive=False,
                show_line_numbers=False,
                wrap_lines=True,
                buttons=["copy"],
                elem_id="save-recipe",
            )
            with gr.Accordion("Model card, as written", open=True, visible=False, elem_id="save-card-box") as card_box:
                card = gr.Markdown(elem_id="save-card")
    return SaveTab(
        place, folder, folder_found, dtype, facts, problems, save, stop, progress, saved, download, recipe, card_box,
        card, gr.State(""), gr.State(("", None)), gr.State(None),
    )  # fmt: skip


def wire(tab: SaveTab, page: Page) -> None:
    settings = page.settings
    private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    drawn = [tab.folder, tab.suggested, tab.rounding, tab.dtype, tab.facts, tab.problems, tab.save, tab.recipe]
    result = [tab.saved, tab.download, tab.card_box]
    outcome = [tab.progress, tab.save, tab.stop, tab.folder_found]

    def redraw(
        session: Session,
        text: str | None,
        suggested: str,
        rounding: tuple[str, Problem | None],
        kept: view.Saved | None,
    ) -> tuple[Any, ...]:
        """session, folder, suggested folder, rounding, last saved → `drawn` and `result`."""
        reading, text = view.read_plan(session), text or ""
        erased = rounding[1] if rounding[0] == session.recipe_key else None
        # What the visitor typed is read, never written; and nothing is sent back unless it is new, since they may be
        # typing while this is on its way.
        before = text
        if settings.public:
            text = suggested = ""
        elif not text.strip() or text == suggested:
            text = suggested = session.saved_folder or view.suggested_folder(session)
        return (
            gr.skip() if settings.public or text == before else text,
            suggested,
            rounding,
            gr.Radio(view.type_choices(reading), value=session.dtype or ""),
            view.facts_html(reading, settings, text),
            view.problems_html(session, reading, settings, erased),
            gr.Button(interactive=view.can_save(session, reading, settings)),
            without_demo_paths(session.recipe_key) if settings.public else session.recipe_key,
            *draw_result(session, kept),
        )

    def draw_result(session: Session, saved: view.Saved | None) -> tuple[Any, ...]:
        """→ `result`; what belongs to an earlier recipe says so."""
        if saved is None:
            return "", gr.skip(), gr.skip()
        if view.is_gone(saved):
            return note_html(view.GONE), gr.DownloadButton(visible=False, value=None), gr.skip()
        earlier = "" if saved.recipe_key == session.recipe_key else ", of the earlier recipe"
        offer = gr.DownloadButton(
            f"Download the model{earlier}", value=saved.archive or None, visible=bool(saved.archive)
        )
        return view.saved_html(session, saved), offer, gr.Accordion(f"Model card, as written{earlier}", visible=True)

    def look_closely(
        session: Session,
        text: str | None,
        suggested: str,
        rounding: tuple[str, Problem | None],
        kept: view.Saved | None,
    ) -> tuple[Any, ...]:
        """The same, once a sample of the weights was read."""
        if rounding[0] != session.recipe_key:
            rounding = session.recipe_key, view.rounding_of(session)
        return redraw(session, text, suggested, rounding, kept)

    def choose_type(session: Session, dtype: str) -> Session:
        """session, type → session."""
        try:
            changed = replace(session, dtype=dtype or None)
            _ = changed.recipe  # the core says what is wrong with it
        except MergeError as error:
            raise gr.Error(error.message, print_exception=False) from error
        return changed

    def check_folder(session: Session, text: str | None) -> tuple[str, str]:
        """session, folder → what is wrong with it, facts."""
        if settings.public:
            return "", gr.skip()
        reading = view.read_plan(session)
        text = text or ""
        return error_html(view.folder_message(text, reading)), view.facts_html(reading, settings, text)

    def run(session: Session, visitor: str, text: str | None) -> Iterator[tuple[Any, ...]]:
        """session, visitor, folder → `outcome`."""
        text = text or ""
        wrong = "" if settings.public else view.folder_message(text, view.read_plan(session))
        if wrong:
            yield "", gr.skip(), gr.skip(), error_html(wrong)
            return
        try:
            job = page.jobs.start(visitor, KIND, "Saving", save_run.work(session, text, settings))
        except MergeError as error:
            yield error_html(sentence(error)), gr.skip(), gr.skip(), ""
            return
        yield from follow(visitor, job)

    def follow(visitor: str, job_id: str) -> Iterator[tuple[Any, ...]]:
        for job in page.jobs.follow(visitor, job_id):
            # A folder that filled up or was taken meanwhile belongs to its field, everything else to the progress.
            at_folder = isinstance(job.error, OutputError) and not settings.public
            message = error_html(sentence(job.error)) if job.error and at_folder else ""
            buttons = gr.Button(visible=not job.active), gr.Button(visible=job.active)
            yield ("" if at_folder else progress_html(job), *buttons, message)

    def finished(session: Session, visitor: str) -> tuple[Any, ...]:
        """session, visitor → session, last saved, card and `result`; nothing after a merge that was not finished."""
        job = page.jobs.latest(visitor, KIND) if visitor else None
        if job is None or not isinstance(job.result, view.Saved):
            return (gr.skip(),) * 6
        saved = job.result
        # On a reload the visitor's session may not have arrived yet: one that this merge is not of is left alone.
        own = saved.recipe_key == session.recipe_key
        marked = replace(session, saved=(saved.recipe_key, saved.folder or "a download")) if own else gr.skip()
        return marked, saved, view.card_body(saved.card), *draw_result(session, saved)

    def attach(visitor: str) -> Iterator[tuple[Any, ...]]:
        """visitor → `outcome`: find a merge again after a reload."""
        job = page.jobs.latest(visitor, KIND) if visitor else None
        if job is not None and job.active:
            yield from follow(visitor, job.id)
        else:
            yield gr.skip(), gr.skip(), gr.skip(), gr.skip()

    def stop(visitor: str) -> None:
        """visitor → nothing."""
        page.jobs.stop(visitor, KIND)

    state = [page.session, tab.folder, tab.suggested, tab.rounding, tab.kept]
    page.session.change(redraw, state, [*drawn, *result], **private)
    tab.place.select(look_closely, state, [*drawn, *result], **private)
    typed = tab.dtype.input(choose_type, [page.session, tab.dtype], page.session, **private)
    typed.then(look_closely, state, [*drawn, *result], **private)
    tab.folder.blur(check_folder, [page.session, tab.folder], [tab.folder_found, tab.facts], **private)
    ended = [page.session, tab.kept, tab.card, *result]
    ran = tab.save.click(run, [page.session, page.visitor, tab.folder], outcome, concurrency_limit=None, **private)
    ran.then(finished, [page.session, page.visitor], ended, **private)
    tab.stop.click(stop, page.visitor, None, queue=False, **private)
    found = page.arrived.then(attach, page.visitor, outcome, concurrency_limit=None, **private)
    found.then(finished, [page.session, page.visitor], ended, **private)
