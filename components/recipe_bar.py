"""The recipe, always in sight: shares, temperature, rows, device, saved or not, and the next step as its button."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from components.page import Page
from components.session import Session
from components.views import recipe_bar as view


@dataclass(frozen=True)
class RecipeBar:
    shown: gr.HTML
    next_step: gr.Button


def build() -> RecipeBar:
    with gr.Row(elem_id="recipe-bar", equal_height=True):
        shown = gr.HTML(elem_id="recipe-shown", padding=False)
        next_step = gr.Button("Next", variant="primary", size="sm", elem_id="next-step", scale=0)
    return RecipeBar(shown, next_step)


def wire(bar: RecipeBar, page: Page) -> None:
    def show(session: Session) -> tuple[str, Any]:
        """session → bar, button."""
        return view.bar_html(session, page.settings), gr.Button(view.next_step(session).label)

    def go(session: Session) -> Any:
        """session → tabs."""
        return page.goto(view.next_step(session).tab)

    page.session.change(
        show, page.session, [bar.shown, bar.next_step], show_progress="hidden", api_visibility="private"
    )
    bar.next_step.click(go, page.session, page.tabs, show_progress="hidden", api_visibility="private")
