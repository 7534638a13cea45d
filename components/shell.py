"""The page's table of contents. Two phases: build all tabs, then wire all."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from components import examples_tab, models_tab, recipe_bar, save_tab, start_tab, try_tab, weights_tab
from components.jobs import JobRegistry
from components.page import Page, SessionStore, new_visitor
from components.session import Session
from components.settings import Settings
from llm_merge.measurements import MeasurementCache

ASSETS = Path(__file__).resolve().parent.parent / "assets"
TABS = {
    "start": ("Start", start_tab),
    "models": ("Models", models_tab),
    "examples": ("Examples", examples_tab),
    "weights": ("Weights", weights_tab),
    "try": ("Try", try_tab),
    "save": ("Save", save_tab),
}


def build_app(settings: Settings) -> gr.Blocks:
    """The whole page. Builds no model and reads no weight."""
    measurements = MeasurementCache(settings.home / "measured", recorded=ASSETS / "demo" / "measured")
    jobs, sessions = JobRegistry(), SessionStore()
    with gr.Blocks(title="LLM Merge", analytics_enabled=False, delete_cache=(3600, 6 * 3600)) as blocks:
        session = gr.State(Session(), time_to_live=6 * 3600)
        visitor = gr.BrowserState("", storage_key="llm-merge-visitor", secret="llm-merge")
        bar = recipe_bar.build()
        with gr.Tabs(selected="start", overflow_behavior="wrap", elem_id="tabs") as tabs:
            built = {}
            for name, (title, tab) in TABS.items():
                with gr.Tab(title, id=name, elem_id=f"tab-{name}"):
                    built[name] = tab.build(settings)
        page = Page(blocks, settings, jobs, sessions, measurements, session, visitor, tabs)
        recipe_bar.wire(bar, page)
        for name, (_, tab) in TABS.items():
            tab.wire(built[name], page)
        _remember(page)
    blocks.queue(default_concurrency_limit=8, max_size=64, api_open=False)
    return blocks


def _remember(page: Page) -> None:
    def arrive(visitor: str) -> tuple[str, Session]:
        """visitor → visitor, session: a new visitor opens on the demo, one who reloads finds their work."""
        known = page.sessions.get(visitor) if visitor else None
        return visitor or new_visitor(), known or start_tab.demo_session(page)

    def keep(visitor: str, session: Session) -> None:
        """visitor, session → nothing shown."""
        page.sessions.put(visitor, session)

    page.blocks.load(
        arrive, page.visitor, [page.visitor, page.session], show_progress="hidden", api_visibility="private"
    )
    page.session.change(keep, [page.visitor, page.session], None, show_progress="hidden", api_visibility="private")
