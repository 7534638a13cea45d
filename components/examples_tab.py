"""Examples: a demo set in one click, or the visitor's own rows pasted or uploaded, and how the models read them.

Layout and wiring only. What is typed stays in its box whatever is clicked, and survives a reload in the browser.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from components import exact_preview
from components.demo_setup import prepare_steps
from components.feedback import error_html, note_html, sentence
from components.page import Page
from components.session import Session, row_shape
from components.settings import Settings
from components.views import example_files
from components.views import examples as view
from llm_merge.errors import MergeError
from llm_merge.examples import Columns

# Kept for this browser tab only: nothing typed is lost on a reload, and nothing is left behind for the next person.
REMEMBER = (
    "(text) => { try { sessionStorage.setItem('llm-merge-examples', text) } catch { /* too long, or private */ } }"
)
RECALL = "() => { try { return [sessionStorage.getItem('llm-merge-examples') || ''] } catch { return [''] } }"


@dataclass(frozen=True)
class ExamplesTab:
    demo: gr.Radio
    expected: gr.HTML
    text: gr.Textbox
    task: gr.Textbox
    file: gr.File
    use_text: gr.Button
    reading: gr.HTML
    columns: gr.Row
    question: gr.Dropdown
    answer: gr.Dropdown
    summary: gr.HTML
    previous: gr.Button
    place: gr.HTML
    following: gr.Button
    preview: gr.HTML
    exact: gr.Button
    index: gr.State
    chosen: gr.State  # columns that the visitor chose, None while they are guessed
    source: gr.State  # "text" | "file": what the column fields belong to
    recalled: gr.State  # what was in the box before a reload: shown again, not read again


def build(settings: Settings) -> ExamplesTab:
    most = view.limits(settings)
    with gr.Row(elem_id="examples-row"):
        with gr.Column(scale=1, min_width=320):
            demo = gr.Radio(view.demo_choices("decoder"), label="Demo rows, in one click", elem_id="examples-demo")
            text = gr.Textbox(
                label="Or paste your own: JSON, JSON Lines, CSV or TSV",
                lines=9,
                max_lines=18,
                placeholder=view.PLACEHOLDERS["answer"],
                elem_id="examples-text",
            )
            expected = gr.HTML(elem_id="examples-expected")
            task = gr.Textbox(
                label="Task of these rows (optional)",
                info="Name it, and rows of other tasks stay in use: Layers needs rows of each fine-tune’s own task.",
                max_lines=1,
                elem_id="examples-task",
            )
            reading = gr.HTML(elem_id="examples-reading")
            with gr.Row(visible=False, elem_id="examples-columns") as columns:
                question = gr.Dropdown([], label="Question column", elem_id="examples-question", min_width=140)
                answer = gr.Dropdown([], label="Answer column", elem_id="examples-answer", min_width=140)
            use_text = gr.Button("Use the text above", size="sm", visible=False, elem_id="examples-use")
            file = gr.File(
                label=f"Or upload files: up to {most.rows:,} rows; of several, each is a task called after it",
                file_count="multiple",
                file_types=[".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt"],
                height=130,
                elem_id="examples-file",
            )
        with gr.Column(scale=1, min_width=320):
            summary = gr.HTML(elem_id="examples-summary")
            with gr.Row(elem_id="examples-browse"):
                previous = gr.Button("‹ Previous", size="sm", min_width=90, elem_id="examples-previous")
                place = gr.HTML(elem_id="examples-place", min_width=150)
                following = gr.Button("Next ›", size="sm", min_width=90, elem_id="examples-next")
            preview = gr.HTML(elem_id="examples-preview")
            exact = gr.Button("Show exactly what the models read", size="sm", visible=False, elem_id="examples-exact")
    index, chosen, source, recalled = gr.State(0), gr.State(None), gr.State("text"), gr.State("")
    return ExamplesTab(
        demo, expected, text, task, file, use_text, reading, columns, question, answer, summary, previous, place,
        following, preview, exact, index, chosen, source, recalled,
    )  # fmt: skip


def wire(tab: ExamplesTab, page: Page) -> None:
    settings = page.settings
    private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

    def draw_row(session: Session, index: int) -> tuple[Any, ...]:
        """→ index, place, preview, exact button."""
        try:
            exact = (
                exact_preview.exact_row(session, index) if session.rows and exact_preview.is_quick(session) else None
            )
        except Exception as error:
            shown = error_html(sentence(error)) + view.preview_html(session, index, None)
            return index, view.place_html(session, index), shown, gr.Button(visible=False)
        ask = exact is None and bool(session.rows) and bool(session.models)
        shown = view.preview_html(session, index, exact)
        return index, view.place_html(session, index), shown, gr.Button(visible=ask)

    def redraw(session: Session, index: int) -> tuple[Any, ...]:
        """session, row number → demo, text box, what is expected, use-text, summary, previous, next, and the row."""
        index = view.row_index(session, index)
        many = gr.Button(interactive=len(session.rows) > 1)
        choices, shape = view.demo_choices(session.model_type), row_shape(session.model_type)
        return (
            gr.Radio(choices, value=view.demo_choice(session)),
            gr.Textbox(placeholder=view.PLACEHOLDERS[shape]),
            f'<p class="facts">{view.EXPECTED[shape]}</p>',
            gr.Button(visible=session.rows_from != view.OWN_TEXT),
            view.summary_html(session, settings),
            many,
            many,
            *draw_row(session, index),
        )

    def shown(before: Session, reading: view.Reading, source: str) -> tuple[Any, ...]:
        """→ session, reading, columns row, question, answer, source.

        A session that reading did not change is not sent back: another one may have arrived meanwhile.
        """
        session = gr.skip() if reading.session is before else reading.session
        titles = view.column_titles(reading.session.model_type)
        columns = reading.columns or Columns("")
        question = gr.Dropdown(list(reading.names), value=columns.question or None, label=titles[0])
        answer = gr.Dropdown(view.answer_choices(reading), value=columns.answer, label=titles[1])
        if reading.columns is None:
            answer = gr.Dropdown(view.answer_choices(reading), value=None, label=titles[1])
        row = gr.Row(visible=len(reading.names) > 1)
        return session, view.reading_html(reading), row, question, answer, source

    def nothing() -> tuple[Any, ...]:
        """An empty box is no mistake: nothing is said, and the rows in use stay."""
        return gr.skip(), "", gr.Row(visible=False), gr.skip(), gr.skip(), "text"

    def read_text(session: Session, text: str, chosen: Columns | None, task: str) -> tuple[Any, ...]:
        """session, text, chosen columns, task → what `shown` says."""
        if not text.strip():
            return nothing()
        return shown(session, view.read(session, text, view.OWN_TEXT, settings, chosen, task or ""), "text")

    def typed(session: Session, text: str, chosen: Columns | None, task: str, recalled: str) -> tuple[Any, ...]:
        """session, text, chosen columns, task, text before a reload → what `shown` says."""
        return (gr.skip(),) * len(said) if text and text == recalled else read_text(session, text, chosen, task)

    def use_text(session: Session, text: str, chosen: Columns | None, task: str) -> tuple[Any, ...]:
        """session, text, chosen columns, task → what `shown` says."""
        if text.strip():
            return read_text(session, text, chosen, task)
        return gr.skip(), note_html("The box is empty: paste your rows into it."), *nothing()[2:]

    def use_text_again(session: Session, text: str, chosen: Columns | None, task: str) -> tuple[Any, ...]:
        """session, text, chosen columns, task → what `shown` says: the box's rows under their new task."""
        if not task.strip() or session.rows_from != view.OWN_TEXT:
            return (gr.skip(),) * len(said)
        unnamed = replace(session, rows=tuple(row for row in session.rows if row.get("task")))
        return read_text(unnamed, text, chosen, task)

    def read_file(session: Session, paths: list[str] | None, chosen: Columns | None, task: str) -> tuple[Any, ...]:
        """session, uploaded files, chosen columns, task → what `shown` says."""
        if not paths:
            return nothing()
        files = [Path(path) for path in paths]
        large = [file for file in files if file.stat().st_size > settings.max_upload_bytes]
        if large:
            size = f"{settings.max_upload_bytes // 1024**2} MB"
            too_long = view.Reading(session, problems=(f"The file is larger than {size}.",), source=large[0].name)
            return shown(session, too_long, "file")
        if len(files) > 1 or files[0].name == example_files.DATASET_INFO:
            return shown(session, example_files.read_several(session, files, settings), "file")
        data = files[0].read_bytes()
        return shown(session, view.read(session, data, files[0].name, settings, chosen, task or ""), "file")

    def change_columns(
        session: Session,
        text: str,
        paths: list[str] | None,
        source: str,
        chosen: Columns | None,
        task: str,
        question: Any,
        answer: Any,
    ) -> tuple[Any, ...]:
        """session, text, file, source, chosen columns, task, question, answer → chosen columns, what `shown` says."""
        file = Path(paths[0]) if source == "file" and paths else None
        data: str | bytes = file.read_bytes() if file is not None else text
        name = file.name if file is not None else view.OWN_TEXT
        before = chosen or view.read(session, data, name, settings).columns
        columns = view.with_choice(before, str(question or ""), str(answer or ""))
        return columns, *shown(session, view.read(session, data, name, settings, columns, task or ""), source)

    def use_demo(session: Session, choice: str) -> tuple[Any, ...]:
        """session, choice → session, reading, columns row."""
        try:
            return view.use_demo(session, choice), "", gr.Row(visible=False)
        except MergeError as error:
            return gr.skip(), error_html(sentence(error)), gr.skip()

    def turn(session: Session, index: int, step: int) -> tuple[Any, ...]:
        """session, row number → row number, place, preview, exact button."""
        return draw_row(session, view.row_index(session, index, step))

    def load(session: Session, index: int) -> Iterator[tuple[Any, ...]]:
        """session, row number → preview, exact button; the tokenizer may take seconds to load."""
        index = view.row_index(session, index)
        plain, busy = view.preview_html(session, index, None), gr.Button(interactive=False)
        try:
            for step in prepare_steps(session.models):
                yield note_html(f"{step.message} …") + plain, busy
            yield note_html("Loading the tokenizer …") + plain, busy
            exact = exact_preview.exact_row(session, index)
        except Exception as error:
            yield error_html(sentence(error)) + plain, gr.Button(interactive=True)
            return
        yield view.preview_html(session, index, exact), gr.Button(visible=False, interactive=True)

    row = [tab.index, tab.place, tab.preview, tab.exact]
    drawn = [tab.demo, tab.text, tab.expected, tab.use_text, tab.summary, tab.previous, tab.following, *row]
    said = [page.session, tab.reading, tab.columns, tab.question, tab.answer, tab.source]
    text_in = [page.session, tab.text, tab.chosen, tab.task]
    file_in = [page.session, tab.file, tab.chosen, tab.task]

    page.session.change(redraw, [page.session, tab.index], drawn, **private)
    # Gradio's `.input` hears keys that write a character and nothing else: no pasting, no Backspace. No handler writes
    # into the box, so `.change` cannot go round in circles.
    tab.text.change(None, tab.text, None, js=REMEMBER, **private)
    tab.text.change(typed, [*text_in, tab.recalled], said, trigger_mode="always_last", **private)
    tab.use_text.click(use_text, text_in, said, **private)
    tab.file.upload(read_file, file_in, said, **private)
    tab.task.blur(use_text_again, [page.session, tab.text, tab.chosen, tab.task], said, **private)
    tab.file.clear(read_text, text_in, said, **private)
    chosen_in = [page.session, tab.text, tab.file, tab.source, tab.chosen, tab.task, tab.question, tab.answer]
    for field in (tab.question, tab.answer):
        field.input(change_columns, chosen_in, [tab.chosen, *said], **private)
    tab.demo.input(use_demo, [page.session, tab.demo], [page.session, tab.reading, tab.columns], **private)
    tab.previous.click(lambda s, i: turn(s, i, -1), [page.session, tab.index], row, **private)
    tab.following.click(lambda s, i: turn(s, i, 1), [page.session, tab.index], row, **private)
    tab.exact.click(load, [page.session, tab.index], [tab.preview, tab.exact], concurrency_limit=4, **private)
    page.blocks.load(lambda text: (text, text), tab.text, [tab.text, tab.recalled], js=RECALL, **private)
