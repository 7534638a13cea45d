"""What every tab is given when it is wired: the session, the visitor, the jobs, and the way to other tabs."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.events import Dependency

from components.jobs import JobRegistry
from components.session import Session
from components.settings import Settings

if TYPE_CHECKING:
    from llm_merge.measurements import MeasurementCache

VISITORS = 200  # sessions kept for visitors who reload


class SessionStore:
    """The last session of each visitor, so that a reload loses nothing. Bounded; the oldest goes first."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, visitor: str, session: Session) -> None:
        if not visitor:
            return
        with self._lock:
            self._sessions[visitor] = session
            self._sessions.move_to_end(visitor)
            while len(self._sessions) > VISITORS:
                self._sessions.popitem(last=False)

    def get(self, visitor: str) -> Session | None:
        with self._lock:
            return self._sessions.get(visitor)


@dataclass(frozen=True)
class Page:
    """Shared by all tabs.

    session     gr.State of a `Session`; handlers return the next one, tabs redraw on its `.change`
    visitor     gr.BrowserState holding a random id that only this browser knows
    tabs        the gr.Tabs; `goto("weights")` is the update that opens a tab
    arrived     the event after which visitor and session are known; what looks for a running job comes `.then`
    """

    blocks: gr.Blocks
    settings: Settings
    jobs: JobRegistry
    sessions: SessionStore
    measurements: MeasurementCache
    session: gr.State
    visitor: gr.BrowserState
    tabs: gr.Tabs
    arrived: Dependency

    def goto(self, name: str) -> Any:
        """The update for `page.tabs` that opens the tab called `name` (start, models, examples, weights,
        layers, try, save)."""
        return gr.Tabs(selected=name)


def new_visitor() -> str:
    """An id that cannot be guessed: it is the only thing that leads to a visitor's jobs and session."""
    return secrets.token_urlsafe(24)
