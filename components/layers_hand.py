"""Layers by hand: set or multiply the weight, or set the density, of the layers that are selected in the map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from components.feedback import error_html, sentence
from components.layers_parts import private, shown_report
from components.page import Page
from components.session import Session
from components.settings import Settings
from components.views import layers as view
from llm_merge.errors import MergeError
from llm_merge.layer_edits import EDITS
from llm_merge.methods import METHODS


@dataclass(frozen=True)
class HandPart:
    model: gr.Dropdown
    what: gr.Radio
    value: gr.Number
    apply: gr.Button
    back: gr.Button
    problem: gr.HTML
    now: gr.HTML


def build(settings: Settings) -> HandPart:
    words = METHODS["breadcrumbs"].parameters
    with gr.Accordion("Edit the selected layers by hand", open=False, elem_id="layers-hand"):
        gr.HTML(f'<p class="about">Weight: {words["weight"].help} Density: {words["density"].help}</p>', padding=False)
        with gr.Row():
            model = gr.Dropdown([], label="Of", elem_id="hand-model", min_width=180, scale=2)
            what = gr.Radio([(edit.capitalize(), edit) for edit in EDITS], value=EDITS[0], label="Do",
                            elem_id="hand-what", min_width=260, scale=3)  # fmt: skip
            value = gr.Number(0.5, label="Value", elem_id="hand-value", minimum=-2, maximum=4, min_width=110)
        with gr.Row(elem_id="hand-actions"):
            apply = gr.Button("Apply to the selected layers", size="sm", elem_id="hand-apply", min_width=220, scale=0)
        problem = gr.HTML(elem_id="hand-problem", padding=False)
    with gr.Row(elem_id="layers-in-use"):
        now = gr.HTML(elem_id="layers-recipe", padding=False)
        back = gr.Button("Back to the shares", size="sm", visible=False, elem_id="hand-back", min_width=160, scale=0)
    return HandPart(model, what, value, apply, back, problem, now)


def wire(part: HandPart, page: Page, combine: gr.Dropdown, selection: gr.State) -> None:
    def redraw(session: Session, model: str | None) -> tuple[Any, ...]:
        """session, model → model, back, what the recipe says of layers."""
        offered = view.model_choices(session)
        kept = model if model in [value for _, value in offered] else ""
        return (
            gr.Dropdown(offered, value=kept),
            gr.Button(visible=session.layered is not None),
            view.recipe_html(session),
        )

    def apply(
        session: Session, visitor: str, combine: str, chosen: Any, model: str | None, what: str, value: float
    ) -> tuple[Any, ...]:
        """session, visitor, combine, selected layers, model, edit, value → session, problem."""
        report, _ = shown_report(page, visitor, session, combine)
        try:
            return view.edited(session, report, tuple(chosen or ()), model or "", what, value), ""
        except MergeError as error:
            return gr.skip(), error_html(sentence(error))

    page.session.change(redraw, [page.session, part.model], [part.model, part.back, part.now], **private)
    inputs = [page.session, page.visitor, combine, selection, part.model, part.what, part.value]
    part.apply.click(apply, inputs, [page.session, part.problem], **private)
    part.back.click(lambda session: session.with_layered(None), page.session, page.session, **private)
