"""Try, for models of text: one prompt, answered side by side by the merge and the models beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from components.answering import answer_work
from components.feedback import error_html, progress_html, sentence
from components.page import Page
from components.session import Session
from components.settings import Settings
from components.try_parts import KIND, example_buttons, private, result_of, stopper, tried
from components.views import try_view as view
from llm_merge.errors import MergeError

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


def build(settings: Settings, group: gr.Column) -> ChatPart:
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
        examples = example_buttons("try-example", [view.example_label(text) for text in view.CHAT_EXAMPLES])
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


def wire(chat: ChatPart, page: Page) -> None:
    outputs = [chat.progress, chat.answers, chat.answer, chat.stop]
    inputs = [
        page.session, page.visitor, chat.prompt, chat.columns, chat.temperature, chat.length, chat.greedy, chat.top_p,
        chat.penalty, chat.seed,
    ]  # fmt: skip

    def follow(visitor: str, session: Session, job: str) -> Iterator[tuple[Any, ...]]:
        for now in page.jobs.follow(visitor, job):
            answers = result_of(now, view.Answers)
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

    answered = chat.answer.click(answer, inputs, outputs, concurrency_limit=None, **private())
    answered.then(tried(page, view.Answers), [page.session, page.visitor], page.session, **private())
    chat.stop.click(stopper(page), page.visitor, None, queue=False, **private())
    found = page.arrived.then(attach, [page.session, page.visitor], outputs, concurrency_limit=None, **private())
    found.then(tried(page, view.Answers), [page.session, page.visitor], page.session, **private())
    for place, button in enumerate(chat.examples):

        def use(session: Session, place: int = place) -> str:
            """session → prompt."""
            examples = view.chat_examples(session)
            return examples[min(place, len(examples) - 1)]

        button.click(use, page.session, chat.prompt, **private())
