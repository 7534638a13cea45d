"""The page's table of contents. Two phases: build all tabs, then wire all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import Dependency

from components import examples_tab, layers_tab, models_tab, recipe_bar, save_tab, start_tab, try_tab, weights_tab
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
    "layers": ("Layers", layers_tab),
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
        arrived = _arrive(blocks, session, visitor, sessions, measurements)
        page = Page(blocks, settings, jobs, sessions, measurements, session, visitor, tabs, arrived)
        recipe_bar.wire(bar, page)
        for name, (_, tab) in TABS.items():
            tab.wire(built[name], page)
    blocks.queue(default_concurrency_limit=8, max_size=64, api_open=False)
    return blocks


def _arrive(
    blocks: gr.Blocks, session: gr.State, visitor: gr.BrowserState, sessions: SessionStore, cache: MeasurementCache
) -> Dependency:
    """What happens when the page opens; a session is kept from then on, each time it changes."""
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

    def arrive(known: str) -> tuple[str, Session]:
        """visitor → visitor, session: a new visitor opens on the demo, one who reloads finds their work."""
        before = sessions.get(known) if known else None
        return known or new_visitor(), before or start_tab.demo_session(cache)

    session.change(sessions.put, [visitor, session], None, **quiet)
    return blocks.load(arrive, visitor, [visitor, session], **quiet)
