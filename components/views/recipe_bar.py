"""The recipe bar's words: the mix in one line, and which step comes next."""

from __future__ import annotations

import html
from dataclasses import dataclass

from components.naming import short_name
from components.palette import model_colors
from components.session import Session
from components.settings import Settings


@dataclass(frozen=True)
class NextStep:
    """The label of the bar's button and the tab that it opens."""

    label: str
    tab: str


def next_step(session: Session) -> NextStep:
    """The first thing that is missing, in the order of the work."""
    if not session.base and not session.fine_tunes:
        return NextStep("Choose models →", "models")
    if len(session.models) < 2:
        return NextStep("Add a fine-tune →", "models")
    if not session.rows:
        return NextStep("Add examples →", "examples")
    if session.shares_from == "equal" and session.layered is None:
        return NextStep("Measure →", "weights")
    if session.tried != session.recipe_key:
        return NextStep("Try it →", "try")
    if not session.saved_folder:
        return NextStep("Save it →", "save")
    return NextStep("Try another mix →", "weights")


def bar_html(session: Session, settings: Settings) -> str:
    """One line: a strip of shares with names, then the facts around it."""
    if not session.mixed:
        return '<div class="recipe"><p class="facts">No models chosen yet.</p></div>'
    parts = weights_shown(session)
    color = colors(session)
    strip = "".join(
        f'<span style="flex-grow:{max(share, 0):.4f};background:{color[model]}"></span>' for model, share in parts
    )
    number = "{:.2f}" if session.layered is not None else "{:.0%}"  # weights of task vectors need not sum to 1
    names = "".join(
        f'<li><i style="background:{color[model]}"></i>{html.escape(short_name(model))} '
        f"<b>{number.format(share).replace('%', ' %')}</b></li>"
        for model, share in parts
    )
    facts = " · ".join(_facts(session, settings))
    return (
        f'<div class="recipe"><div class="strip" aria-hidden="true">{strip}</div>'
        f'<ul class="shares" aria-label="Shares of the mix">{names}</ul><p class="facts">{html.escape(facts)}</p></div>'
    )


def weights_shown(session: Session) -> list[tuple[str, float]]:
    """Each model of the merge with its share; of a recipe made on Layers, with its weight where no layer is special."""
    if session.layered is None:
        return list(zip(session.mixed, session.shares, strict=True))
    weights = zip(session.layered.references, session.layered.weights, strict=True)
    return [(model, weight) for model, weight in weights if model in session.models]


def _facts(session: Session, settings: Settings) -> list[str]:
    origin = {
        "hand": "shares by hand",
        "equal": "equal shares, nothing measured",
        "losses": f"T = {session.temperature:g}",
        "layers": f"{session.layered_from}, layer by layer",
    }
    facts = [origin[session.origin]]
    if session.rows:
        measured = "measured" if session.table is not None else "not measured yet"
        facts.append(f"{len(session.measured_rows)} rows {measured}")
    else:
        facts.append("no examples")
    facts.append(device_name(settings.device))
    facts.append("saved" if session.saved_folder else "not saved")
    return facts


def device_name(device: str) -> str:
    """The device in words. `auto` is resolved only when torch is loaded already: the bar must not wait for it."""
    import sys

    if device == "auto" and "torch" in sys.modules:
        from llm_merge.workbench import choose_device

        device = choose_device()
    return {"auto": "GPU if there is one", "cpu": "CPU", "mps": "Apple GPU"}.get(device, device.upper())


def colors(session: Session) -> dict[str, str]:
    """Each of the session's models with its colour, the same everywhere on the page."""
    return dict(zip(session.models, model_colors([model == session.base for model in session.models]), strict=True))
