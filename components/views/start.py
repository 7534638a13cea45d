"""The Start view's words: recorded or live answers side by side, and the one sentence with the result."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.feedback import note_html
from components.naming import middle_cut, short_name
from components.palette import BASE, MERGED
from components.recorded import Prompt, Recording
from components.session import Session
from components.views.recipe_bar import colors
from llm_merge.demo import DEMO_MODELS, demo_path
from llm_merge.scoreboard import recorded_sentence

FALLBACK_PROMPT = "Rewrite this verse in King James English: Jesus said to them, “Don’t be afraid. I am with you.”"
OWN_MODELS = (
    '<p class="headline">You are working with your own models. <b>Run it live</b> goes back to the demo; the button '
    "above leads on with your models.</p>"
)
LAYERED = (
    "The merge is now a recipe made layer by layer ({}): Try answers with it. What is recorded here belongs to shares; "
    "moving the temperature in Weights goes back to them."
)
NOTHING_RECORDED = '<p class="headline">Nothing is recorded for the demo yet: <b>Run it live</b> fills this place.</p>'
MERGED_NAME = "merged"


@dataclass(frozen=True)
class LiveAnswers:
    """Answers of a live run so far: (model's reference or "merged", text), the merge's recipe and how to say it."""

    prompt: str
    answers: tuple[tuple[str, str], ...]
    recipe_key: str
    mix: str


@dataclass(frozen=True)
class Card:
    """One answer: whose, how it came about, the text. `merged` comes first on a phone."""

    title: str
    source: str
    text: str
    color: str
    merged: bool = False
    stale: bool = False


def demo_keys() -> dict[str, str]:
    """Reference → key of every demo model."""
    return {demo_path(model.key): model.key for model in DEMO_MODELS}


def demo_mix(session: Session) -> dict[str, float] | None:
    """The session's mix by demo keys, or None when a model is not of the demo."""
    keys = demo_keys()
    if not session.mixed or any(model not in keys for model in session.models):
        return None
    return {keys[model]: share for model, share in zip(session.mixed, session.shares, strict=True)}


def recorded_cards(session: Session, recording: Recording, prompt: Prompt) -> list[Card]:
    """Base, the prompt's specialist and the merge, as recorded; the merge at the recorded mix nearest to the shares."""
    mix = demo_mix(session)
    if mix is None:
        return []
    keys = demo_keys()
    color = {keys[model]: value for model, value in colors(session).items()}
    base_key = keys.get(session.base, "")
    specialist = next(
        (model.key for model in DEMO_MODELS if model.task == prompt.task and model.key in mix and model.base), ""
    )
    when = f"recorded on {recording.recorded_on}"
    cards = []
    for key, tint in ((base_key, BASE), (specialist, color.get(specialist, BASE))):
        answer = prompt.exact({key: 1.0}) if key else None
        if answer is not None:
            title = "Base" if key == base_key else short_name(demo_path(key))
            cards.append(Card(title, when, answer.text, tint))
    merged = prompt.nearest(mix)
    if merged is not None:
        cards.append(Card("Merged", f"{when} at {mix_words(dict(merged.mix))}", merged.text, MERGED, merged=True))
    return cards


def specialist_for(session: Session, task: str) -> str:
    """The fine-tune of the mix that was made for the task, else the first one; "" when there is none."""
    made_for = {demo_path(model.key) for model in DEMO_MODELS if model.task == task and model.base}
    tunes = [model for model in session.models if model != session.base]
    return next((model for model in tunes if model in made_for), tunes[0] if tunes else "")


def mix_words(mix: Mapping[str, float]) -> str:
    """ "King James 0.50 / Dictionary 0.50"."""
    return " / ".join(f"{short_name(demo_path(key))} {share:.2f}" for key, share in mix.items())


def cards_html(prompt: str, cards: Sequence[Card]) -> str:
    """The prompt and the answers beside each other. All text is escaped: it is model output."""
    if not cards:
        return ""
    articles = "".join(
        f'<article class="{"merged" if c.merged else ""}{" stale" if c.stale else ""}" style="--c:{c.color}">'
        f"<h3>{html.escape(c.title)}</h3>"
        f'<p class="from">{html.escape(c.source)}</p><p class="text">{html.escape(c.text) or "…"}</p></article>'
        for c in cards
    )
    return f'<p class="asked">Asked: <q>{html.escape(prompt)}</q></p><div class="answers">{articles}</div>'


def prompt_choices(recording: Recording | None) -> list[tuple[str, int]]:
    """(label, number) of the recorded prompts."""
    if recording is None:
        return [("A verse", 0)]
    return [
        (middle_cut(prompt.text.partition(": ")[2] or prompt.text, 40), i) for i, prompt in enumerate(recording.prompts)
    ]


def prompt_text(recording: Recording | None, number: int) -> str:
    """What to ask the models in a live run; the number comes from a browser and may be anything."""
    if recording is None:
        return FALLBACK_PROMPT
    return recording.prompts[number if number in range(len(recording.prompts)) else 0].text


def prompt_task(recording: Recording | None, number: int) -> str:
    """The task that a recorded prompt belongs to."""
    if recording is None or number not in range(len(recording.prompts)):
        return "verse"
    return recording.prompts[number].task


def answers_html(session: Session, recording: Recording | None, number: int, live: LiveAnswers | None) -> str:
    """The live run's answers when there are some to this prompt, else the recorded ones, else what to do."""
    asked = prompt_text(recording, number)
    if session.layered is not None:
        return note_html(LAYERED.format(session.layered_from))
    if demo_mix(session) is None:
        return OWN_MODELS
    if live is not None and live.prompt == asked and live.answers:
        return cards_html(asked, live_cards(live, session))
    if recording is None:
        return NOTHING_RECORDED
    return cards_html(asked, recorded_cards(session, recording, recording.prompts[number]))


def live_cards(live: LiveAnswers, session: Session) -> list[Card]:
    """The answers of a live run; greyed once the shares are no longer those of its merge."""
    color = colors(session)
    cards = []
    for name, text in live.answers:
        merged = name == MERGED_NAME
        stale = merged and live.recipe_key != session.recipe_key
        title = "Merged" if merged else ("Base" if name == session.base else short_name(name))
        source = f"live at {live.mix}" + (" — the shares have changed since" if stale else "") if merged else "live"
        cards.append(Card(title, source, text, MERGED if merged else color.get(name, BASE), merged, stale))
    return cards


def result_html(scores: Mapping[str, Any] | None, session: Session) -> str:
    """One sentence from the recorded scoreboard for the mix nearest to the shares; empty when nothing fits."""
    mix = demo_mix(session) if session.layered is None else None
    if scores is None or mix is None:
        return ""
    return f'<p class="headline">{html.escape(recorded_sentence(scores, mix))}</p>'
