"""Try: the merge speaks before anything is saved. Answers side by side, passages ranked, and the scoreboard below.

Layout and wiring only. The work runs as jobs (`answering.py`), so a reload finds an answer again and Stop ends it
before its next token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from components import scoreboard_panel
from components.answering import answer_work, search_work
from components.charts import similarity_heatmaps
from components.feedback import error_html, note_html, progress_html, sentence
from components.jobs import JobView
from components.page import Page
from components.session import Session
from components.settings import Settings
from components.views import try_view as view
from llm_merge.errors import MergeError

KIND = "try"  # chat and search are never tried at once: one job
DEFAULT_LENGTH = 96


@dataclass(frozen=True)
class ChatPart:
    group: gr.Column
    prompt: gr.Textbox
    examples: tuple[gr.Button, ...]
    columns: gr.CheckboxGroup
    temperature: gr.Slider
    length: gr.Slider
    greedy: gr.Checkbox
    top_p: gr.Slider
    penalty: gr.Slider
    seed: gr.Number
    answer: gr.Button
    stop: gr.Button
    progress: gr.HTML
    answers: gr.HTML


@dataclass(frozen=True)
class SearchPart:
    group: gr.Column
    query: gr.Textbox
    passages: gr.Textbox
    examples: tuple[gr.Button, ...]
    rank: gr.Button
    stop: gr.Button
    progress: gr.HTML
    found: gr.HTML
    heatmaps: gr.Plot


@dataclass(frozen=True)
class TryTab:
    """`drawn`: which models and rows the fields were last filled for, so that a mere change of shares leaves them."""

    nothing: gr.HTML
    chat: ChatPart
    search: SearchPart
    scores: scoreboard_panel.ScoreboardPanel
    drawn: gr.State


def build(settings: Settings) -> TryTab:
    nothing = gr.HTML(visible=False, elem_id="try-nothing", padding=False)
    with gr.Column(visible=True, elem_id="try-chat") as chat_group:
        chat = _build_chat(settings, chat_group)
    with gr.Column(visible=False, elem_id="try-search") as search_group:
        search = _build_search(search_group)
    scores = scoreboard_panel.build(settings)
    return TryTab(nothing, chat, search, scores, gr.State(None))


def _build_chat(settings: Settings, group: gr.Column) -> ChatPart:
    with gr.Row(elem_classes="ask"):
        prompt = gr.Textbox(
            view.CHAT_EXAMPLES[0],
            label="Prompt",
            lines=2,
            max_lines=8,
            max_length=settings.max_prompt_chars,
            elem_id="try-prompt",
            scale=1,
            min_width=240,
        )
        with gr.Column(scale=0, min_width=150):
            answer = gr.Button("Answer", variant="primary", elem_id="try-answer")
            stop = gr.Button("Stop", variant="stop", visible=False, elem_id="try-stop")
    with gr.Row(elem_id="try-examples", elem_classes="examples-row"):
        examples = _example_buttons("try-example", [view.example_label(text) for text in view.CHAT_EXAMPLES])
    longest = min(settings.max_new_tokens, 512)
    with gr.Row(elem_id="try-settings"):
        columns = gr.CheckboxGroup(label="Beside the merge", elem_id="try-columns", scale=2, min_width=300)
        temperature = gr.Slider(0.05, 1.5, 0.2, step=0.05, label="Randomness", elem_id="try-temperature", min_width=180)
        length = gr.Slider(
            8,
            longest,
            min(DEFAULT_LENGTH, longest),
            step=8,
            label="Length in tokens",
            elem_id="try-length",
            min_width=180,
        )
    with gr.Accordion("More settings", open=False, elem_id="try-more"), gr.Row():
        greedy = gr.Checkbox(
            False, label="Always the likeliest", info="no randomness at all", elem_id="try-greedy", min_width=160
        )
        top_p = gr.Slider(
            0.1, 1.0, 0.9, step=0.05, label="Top-p", info="the likeliest tokens only", elem_id="try-top-p"
        )
        penalty = gr.Slider(1.0, 2.0, 1.1, step=0.05, label="Repetition penalty", info="1: none", elem_id="try-penalty")
        seed = gr.Number(0, precision=0, minimum=0, label="Seed", info="the same for all columns", elem_id="try-seed")
    progress = gr.HTML(elem_id="try-progress", padding=False)
    answers = gr.HTML(elem_id="try-answers", padding=False)
    return ChatPart(
        group, prompt, examples, columns, temperature, length, greedy, top_p, penalty, seed,
        answer, stop, progress, answers,
    )  # fmt: skip


def _build_search(group: gr.Column) -> SearchPart:
    first = view.SEARCH_EXAMPLES[0]
    with gr.Row(elem_classes="ask"):
        query = gr.Textbox(first.query, label="Query", lines=3, elem_id="try-query", scale=1, min_width=240)
        passages = gr.Textbox(
            "\n".join(first.passages),
            label="Passages, one on each line",
            lines=5,
            max_lines=12,
            elem_id="try-passages",
            scale=2,
            min_width=280,
        )
        with gr.Column(scale=0, min_width=150):
            rank = gr.Button("Rank", variant="primary", elem_id="try-rank")
            stop = gr.Button("Stop", variant="stop", visible=False, elem_id="try-search-stop")
    with gr.Row(elem_classes="examples-row"):
        labels = [view.example_label(example.query) for example in view.SEARCH_EXAMPLES]
        examples = _example_buttons("try-search-example", labels)
    progress = gr.HTML(elem_id="try-search-progress", padding=False)
    found = gr.HTML(elem_id="try-found", padding=False)
    heatmaps = gr.Plot(show_label=False, visible=False, elem_id="try-heatmaps")
    return SearchPart(group, query, passages, examples, rank, stop, progress, found, heatmaps)


def _example_buttons(name: str, labels: list[str]) -> tuple[gr.Button, ...]:
    return tuple(
        gr.Button(label, size="sm", elem_id=f"{name}-{place}", scale=0, min_width=80)
        for place, label in enumerate(labels, 1)
    )


def wire(tab: TryTab, page: Page) -> None:
    _wire_drawing(tab, page)
    _wire_chat(tab.chat, page)
    _wire_search(tab.search, page)
    scoreboard_panel.wire(tab.scores, page)


def _private() -> dict[str, Any]:
    return {"show_progress": "hidden", "api_visibility": "private"}


def _result(job: JobView | None, kind: type[Any]) -> Any:
    """What a job has found so far, if it is of this kind."""
    if job is None:
        return None
    found = job.result if job.result is not None else job.step.data
    if isinstance(found, view.Answers) and not job.active:
        found = view.ended(found)
    return found if isinstance(found, kind) else None


def _wire_drawing(tab: TryTab, page: Page) -> None:
    chat, search = tab.chat, tab.search
    fields = [
        chat.columns, chat.prompt, *chat.examples, chat.temperature, chat.top_p, chat.penalty, chat.greedy,
        search.query, search.passages, *search.examples,
    ]  # fmt: skip

    def fill(session: Session, drawn: Any, prompt: str, chosen: list[str], query: str, passages: str) -> list[Any]:
        """session, drawn, prompt, columns, query, passages → drawn, fields.

        Filled anew when the models or the rows are others; what the visitor wrote or chose is left alone.
        """
        key = (session.model_type, session.models, session.rows_hash)
        if drawn == key or not view.what_to_try(session):
            return [drawn, *[gr.skip()] * len(fields)]
        prompts, searches = view.chat_examples(session), view.search_examples(session)
        kept = [model for model in chosen or [] if model in session.models] or view.default_columns(session)
        columns = gr.CheckboxGroup(choices=view.column_choices(session), value=kept)
        asked = prompts[0] if view.is_example(prompt, drawn) else gr.skip()
        first = searches[0]
        search_text = (first.query, "\n".join(first.passages)) if view.is_example(query, drawn) else [gr.skip()] * 2
        own = _own_settings(session) if drawn is None or drawn[1] != session.models else None
        drawing = [own.temperature, own.top_p, own.repetition_penalty, own.greedy] if own else [gr.skip()] * 4
        chat_buttons = _labels(prompts, len(chat.examples))
        search_buttons = _labels([example.query for example in searches], len(search.examples))
        return [key, columns, asked, *chat_buttons, *drawing, *search_text, *search_buttons]

    def redraw(session: Session, visitor: str) -> list[Any]:
        """session, visitor → what is shown: results keep their recipe's name and are greyed when it is an old one."""
        job = page.jobs.latest(visitor, KIND) if visitor else None
        kind = view.what_to_try(session)
        answers, found = _result(job, view.Answers), _result(job, view.Found)
        return [
            gr.HTML(note_html(view.nothing_to_try(session)), visible=not kind),
            gr.Column(visible=kind == "chat"),
            gr.Column(visible=kind == "search"),
            view.answers_html(answers, session),
            gr.Button(view.button_label("Answer", answers.recipe_key if answers else None, session)),
            view.found_html(found, session),
            gr.Button(view.button_label("Rank", found.recipe_key if found else None, session)),
        ]

    shown = [tab.nothing, chat.group, search.group, chat.answers, chat.answer, search.found, search.rank]
    typed = [chat.prompt, chat.columns, search.query, search.passages]
    page.session.change(fill, [page.session, tab.drawn, *typed], [tab.drawn, *fields], **_private())
    page.session.change(redraw, [page.session, page.visitor], shown, **_private())


def _wire_chat(chat: ChatPart, page: Page) -> None:
    outputs = [chat.progress, chat.answers, chat.answer, chat.stop]
    inputs = [
        page.session, page.visitor, chat.prompt, chat.columns, chat.temperature, chat.length, chat.greedy, chat.top_p,
        chat.penalty, chat.seed,
    ]  # fmt: skip

    def follow(visitor: str, session: Session, job: str) -> Iterator[tuple[Any, ...]]:
        for now in page.jobs.follow(visitor, job):
            answers = _result(now, view.Answers)
            shown = view.answers_html(answers, session) if answers or not now.active else gr.skip()
            yield progress_html(now), shown, gr.Button("Answer", visible=not now.active), gr.Button(visible=now.active)

    def answer(
        session: Session, visitor: str, prompt: str, chosen: list[str], temperature: float, length: float,
        greedy: bool, top_p: float, penalty: float, seed: float,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """session, visitor, prompt, columns, settings → progress, answers, answer, stop."""
        from llm_merge.generation import GenerationSettings

        try:
            generation = GenerationSettings(
                temperature,
                top_p,
                penalty,
                min(int(length or 0), page.settings.max_new_tokens),
                bool(greedy),
                int(seed or 0),
            )
            columns = view.columns(session, chosen or [])
            prompt = view.check_prompt(prompt or "", page.settings)
            work = answer_work(session, prompt, columns, generation, page.settings)
            job = page.jobs.start(visitor, KIND, "The answers", work)
        except MergeError as error:
            yield error_html(sentence(error)), gr.skip(), gr.skip(), gr.skip()
            return
        yield from follow(visitor, session, job)

    def attach(session: Session, visitor: str) -> Iterator[tuple[Any, ...]]:
        """session, visitor → outputs: find an answer that is being written again after a reload."""
        job = page.jobs.latest(visitor, KIND) if visitor else None
        if job is not None and job.active and view.what_to_try(session) == "chat":
            yield from follow(visitor, session, job.id)
        else:
            yield gr.skip(), gr.skip(), gr.skip(), gr.skip()

    answered = chat.answer.click(answer, inputs, outputs, concurrency_limit=None, **_private())
    answered.then(_tried(page, view.Answers), [page.session, page.visitor], page.session, **_private())
    chat.stop.click(_stop(page), page.visitor, None, queue=False, **_private())
    found = page.blocks.load(attach, [page.session, page.visitor], outputs, concurrency_limit=None, **_private())
    found.then(_tried(page, view.Answers), [page.session, page.visitor], page.session, **_private())
    for place, button in enumerate(chat.examples):

        def use(session: Session, place: int = place) -> str:
            """session → prompt."""
            examples = view.chat_examples(session)
            return examples[min(place, len(examples) - 1)]

        button.click(use, page.session, chat.prompt, **_private())


def _wire_search(search: SearchPart, page: Page) -> None:
    outputs = [search.progress, search.found, search.heatmaps, search.rank, search.stop]

    def draw(found: view.Found | None, session: Session) -> tuple[Any, Any]:
        if found is None:
            return gr.skip(), gr.skip()
        figure = similarity_heatmaps(*view.heatmap_order(found))
        return view.found_html(found, session), gr.Plot(figure, visible=True)

    def follow(visitor: str, session: Session, job: str) -> Iterator[tuple[Any, ...]]:
        for now in page.jobs.follow(visitor, job):
            shown = draw(_result(now, view.Found), session)
            yield progress_html(now), *shown, gr.Button("Rank", visible=not now.active), gr.Button(visible=now.active)

    def rank(session: Session, visitor: str, query: str, passages: str) -> Iterator[tuple[Any, ...]]:
        """session, visitor, query, passages → progress, found, heatmaps, rank, stop."""
        try:
            if view.what_to_try(session) != "search":
                raise MergeError(view.nothing_to_try(session) or "These models do not embed texts.", field="models")
            query = view.check_prompt(query or "", page.settings)
            work = search_work(session, query, view.read_passages(passages or "", page.settings), page.settings)
            job = page.jobs.start(visitor, KIND, "The ranking", work)
        except MergeError as error:
            yield error_html(sentence(error)), gr.skip(), gr.skip(), gr.skip(), gr.skip()
            return
        yield from follow(visitor, session, job)

    def attach(session: Session, visitor: str) -> Iterator[tuple[Any, ...]]:
        """session, visitor → outputs: find a ranking again after a reload."""
        job = page.jobs.latest(visitor, KIND) if visitor else None
        if job is not None and view.what_to_try(session) == "search":
            yield from follow(visitor, session, job.id)
        else:
            yield gr.skip(), gr.skip(), gr.skip(), gr.skip(), gr.skip()

    ranked = search.rank.click(
        rank, [page.session, page.visitor, search.query, search.passages], outputs, concurrency_limit=None, **_private()
    )
    ranked.then(_tried(page, view.Found), [page.session, page.visitor], page.session, **_private())
    search.stop.click(_stop(page), page.visitor, None, queue=False, **_private())
    page.blocks.load(attach, [page.session, page.visitor], outputs, concurrency_limit=None, **_private())
    for place, button in enumerate(search.examples):

        def use(session: Session, place: int = place) -> tuple[str, str]:
            """session → query, passages."""
            examples = view.search_examples(session)
            example = examples[min(place, len(examples) - 1)]
            return example.query, "\n".join(example.passages)

        button.click(use, page.session, [search.query, search.passages], **_private())


def _tried(page: Page, kind: type[Any]) -> Any:
    def tried(session: Session, visitor: str) -> Session:
        """session, visitor → session: the recipe that the finished result was made with has been tried."""
        job = page.jobs.latest(visitor, KIND) if visitor else None
        made = _result(job, kind) if job is not None and job.status == "done" else None
        return session if made is None else replace(session, tried=made.recipe_key)

    return tried


def _stop(page: Page) -> Any:
    def stop(visitor: str) -> None:
        """visitor → nothing."""
        page.jobs.stop(visitor, KIND)

    return stop


def _labels(texts: Any, places: int) -> list[Any]:
    shown = [gr.Button(view.example_label(text), visible=True) for text in list(texts)[:places]]
    return shown + [gr.Button(visible=False)] * (places - len(shown))


def _own_settings(session: Session) -> Any:
    """What the base recommends for drawing answers; None for a model that is not on this disk yet."""
    from pathlib import Path

    from llm_merge.generation import GenerationSettings

    folder = Path(view.base_of(session).partition("+")[0])
    return GenerationSettings.of_model(folder) if folder.is_dir() else None
