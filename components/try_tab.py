"""Try: the merge speaks before anything is saved. Answers side by side, passages ranked, and the scoreboard below.

Layout and wiring only. The work runs as jobs (`answering.py`), so a reload finds an answer again and Stop ends it
before its next token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from components import scoreboard_panel, try_chat, try_search
from components.feedback import note_html
from components.page import Page
from components.session import Session
from components.settings import Settings
from components.try_parts import KIND, private, result_of
from components.views import try_view as view


@dataclass(frozen=True)
class TryTab:
    """`drawn`: which models and rows the fields were last filled for, so that a mere change of shares leaves them."""

    nothing: gr.HTML
    chat: try_chat.ChatPart
    search: try_search.SearchPart
    scores: scoreboard_panel.ScoreboardPanel
    drawn: gr.State


def build(settings: Settings) -> TryTab:
    nothing = gr.HTML(visible=False, elem_id="try-nothing", padding=False)
    with gr.Column(visible=True, elem_id="try-chat") as chat_group:
        chat = try_chat.build(settings, chat_group)
    with gr.Column(visible=False, elem_id="try-search") as search_group:
        search = try_search.build(search_group)
    scores = scoreboard_panel.build(settings)
    return TryTab(nothing, chat, search, scores, gr.State(None))


def wire(tab: TryTab, page: Page) -> None:
    _wire_drawing(tab, page)
    try_chat.wire(tab.chat, page)
    try_search.wire(tab.search, page)
    scoreboard_panel.wire(tab.scores, page)


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
        offered = view.column_choices(session)
        kept = [value for value in chosen or [] if value in dict(offered).values()] or view.default_columns(session)
        columns = gr.CheckboxGroup(choices=offered, value=kept)
        # Sent back only when it is new: the visitor may be typing while this is on its way.
        asked = prompts[0] if view.is_example(prompt, drawn) and prompt != prompts[0] else gr.skip()
        first = searches[0]
        new = view.is_example(query, drawn) and query != first.query
        search_text = (first.query, "\n".join(first.passages)) if new else [gr.skip()] * 2
        own = _own_settings(session) if drawn is None or drawn[1] != session.models else None
        drawing = [own.temperature, own.top_p, own.repetition_penalty, own.greedy] if own else [gr.skip()] * 4
        chat_buttons = _labels(prompts, len(chat.examples))
        search_buttons = _labels([example.query for example in searches], len(search.examples))
        return [key, columns, asked, *chat_buttons, *drawing, *search_text, *search_buttons]

    def redraw(session: Session, visitor: str) -> list[Any]:
        """session, visitor → what is shown: results keep their recipe's name and are greyed when it is an old one."""
        job = page.jobs.latest(visitor, KIND) if visitor else None
        kind = view.what_to_try(session)
        answers, found = result_of(job, view.Answers), result_of(job, view.Found)
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
    page.session.change(fill, [page.session, tab.drawn, *typed], [tab.drawn, *fields], **private())
    page.session.change(redraw, [page.session, page.visitor], shown, **private())


def _labels(texts: Any, places: int) -> list[Any]:
    shown = [gr.Button(view.example_label(text), visible=True) for text in list(texts)[:places]]
    return shown + [gr.Button(visible=False)] * (places - len(shown))


def _own_settings(session: Session) -> Any:
    """What the base recommends for drawing answers; None for a model that is not on this disk yet."""
    from pathlib import Path

    from llm_merge.generation import GenerationSettings

    folder = Path(view.base_of(session).partition("+")[0])
    return GenerationSettings.of_model(folder) if folder.is_dir() else None
