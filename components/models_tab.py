"""Models: the type, a base and its fine-tunes, each with what was found and what is wrong below it.

Layout and wiring only. What a field's text means and what is said about it is decided in `views/models.py`; a field
keeps what was typed into it, whatever becomes of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from components.catalogue import base_choices, fine_tune_choices, resolve_choice, shown_choice
from components.demo_setup import prepare_steps, unprepared
from components.feedback import error_html, progress_html, sentence
from components.jobs import JobView, Step
from components.page import Page
from components.session import Session
from components.settings import Settings
from components.views import models as view
from llm_merge.demo import demo_path
from llm_merge.download import download, missing_parts
from llm_merge.errors import MergeError

AT_FIRST = 2  # fine-tune fields shown

# Tab out of a Gradio 6.31 dropdown moves into its list when that can scroll, and opens the list again behind one's
# back. Here Tab goes to the next control, and leaving the field closes its list, for every dropdown of the page.
LEAVE_LISTS = """
if (!window.leaveLists) {
  window.leaveLists = true;
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Tab" || event.target.getAttribute("role") !== "combobox") return;
    event.stopPropagation();
    const list = document.getElementById(event.target.getAttribute("aria-controls"));
    if (list) list.tabIndex = -1;
  }, true);
}
"""

CHAT_DEMO = ("decoder", "smollm2", ("king-james", "dictionary"))
SEARCH_DEMO = ("encoder", "minilm", ("spanish-search", "reverse-dictionary"))


@dataclass(frozen=True)
class FineTune:
    """One fine-tune's place: its field, what was found, and the button that takes it away."""

    group: gr.Column
    field: gr.Dropdown
    remove: gr.Button
    found: gr.HTML


@dataclass(frozen=True)
class ModelsTab:
    """`drawn` holds the models that the fields show, so that a field with a mistake in it is not drawn over."""

    chat_demo: gr.Button
    search_demo: gr.Button
    kind: gr.Radio
    kind_note: gr.HTML
    base: gr.Dropdown
    base_found: gr.HTML
    fine_tunes: tuple[FineTune, ...]
    add: gr.Button
    stop: gr.Button
    progress: gr.HTML
    summary: gr.HTML
    drawn: gr.State
    count: gr.State


def build(settings: Settings) -> ModelsTab:
    typed: dict[str, Any] = {"allow_custom_value": not settings.public, "filterable": True, "value": None}
    hint = "Choose from the list" + ("." if settings.public else ", or paste a folder or a hub id such as org/name.")
    with gr.Row(elem_id="models-demos"):
        gr.HTML(
            "<p>Start from a demo, or choose your own models below.</p>",
            elem_id="models-intro",
            js_on_load=LEAVE_LISTS,
            min_width=300,
        )
        chat_demo = gr.Button("Chat demo", size="sm", elem_id="chat-demo", min_width=120, scale=0)
        search_demo = gr.Button("Search demo", size="sm", elem_id="search-demo", min_width=120, scale=0)
    with gr.Row(elem_id="models-row"):
        with gr.Column(scale=1, min_width=320):
            base = gr.Dropdown(
                base_choices(settings),
                label="Base",
                info=f"The model that the fine-tunes were trained from. {hint}",
                elem_id="model-base",
                **typed,
            )
            base_found = gr.HTML(elem_id="model-base-found")
            kind = gr.Radio(
                [(title, name) for name, title in view.TYPES.items()],
                value="decoder",
                label="Type",
                elem_id="model-type",
            )
            kind_note = gr.HTML(elem_id="model-type-found")
        with gr.Column(scale=1, min_width=320):
            fine_tunes = []
            for place in range(1, settings.max_models + 1):
                with gr.Column(visible=place <= AT_FIRST, elem_classes="model-tune", min_width=300) as group:
                    with gr.Row(elem_classes="model-line"):
                        field = gr.Dropdown(
                            fine_tune_choices(settings, "decoder"),
                            label=f"Fine-tune {place}",
                            elem_id=f"model-tune-{place}",
                            scale=1,
                            min_width=200,
                            **typed,
                        )
                        remove = gr.Button(
                            f"Remove fine-tune {place}",
                            size="sm",
                            elem_id=f"remove-tune-{place}",
                            elem_classes="remove",
                            scale=0,
                            min_width=44,
                        )
                    found = gr.HTML(elem_id=f"model-tune-{place}-found", padding=True)
                fine_tunes.append(FineTune(group, field, remove, found))
            add = gr.Button("Add a fine-tune", size="sm", elem_id="add-tune")
    with gr.Row():
        progress = gr.HTML(elem_id="models-progress", scale=1)
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop-models", scale=0, min_width=100)
    summary = gr.HTML(elem_id="models-summary")
    return ModelsTab(
        chat_demo=chat_demo,
        search_demo=search_demo,
        kind=kind,
        kind_note=kind_note,
        base=base,
        base_found=base_found,
        fine_tunes=tuple(fine_tunes),
        add=add,
        stop=stop,
        progress=progress,
        summary=summary,
        drawn=gr.State(None),
        count=gr.State(AT_FIRST),
    )


def wire(tab: ModelsTab, page: Page) -> None:
    settings = page.settings
    private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    fields = [tab.base, *(tune.field for tune in tab.fine_tunes)]
    shown: list[Any] = [tab.kind, tab.kind_note, tab.base, tab.base_found]
    for tune in tab.fine_tunes:
        shown += [tune.group, tune.field, tune.found]
    shown += [tab.add, tab.summary, tab.count, tab.drawn]
    places = len(tab.fine_tunes)

    def draw(
        session: Session,
        models: view.Models,
        count: int,
        wanted: int,
        texts: Sequence[str] | None = None,
        relist: bool = True,
    ) -> list[Any]:
        """What `shown` becomes; the session is the one that the page will have.

        `count` fine-tunes are visible now, at least `wanted` will be. `texts` is what stands in the fields: what is
        right already is left alone, because drawing it anew would take the focus out of it. `relist`: the lists offer
        another type's models.
        """
        before, used = count, [place for place, tune in enumerate(models.fine_tunes, 1) if tune.text]
        count = min(max(AT_FIRST, wanted, *used), places)
        padded = [models.base, *models.fine_tunes, *[view.Field()] * places][: places + 1]
        lists = [base_choices(settings), *[fine_tune_choices(settings, session.model_type)] * places]

        def dropdown(place: int) -> Any:
            text = shown_choice(padded[place].text, settings)
            if texts is not None and text == texts[place] and not (relist and place):
                return gr.skip()
            return gr.Dropdown(choices=lists[place], value=text or None, allow_custom_value=not settings.public)

        updates: list[Any] = [session.model_type, view.type_html(session.model_type, models)]
        updates += [dropdown(0), view.field_html(models.base)]
        for place in range(1, places + 1):
            seen = gr.skip() if (place <= count) == (place <= before) else gr.Column(visible=place <= count)
            updates += [seen, dropdown(place), view.field_html(padded[place])]
        drawn = (session.model_type, session.base, session.fine_tunes)
        return [*updates, gr.Button(interactive=count < places), view.summary_html(models), count, drawn]

    def apply(
        session: Session,
        kind: str,
        count: int,
        held: Sequence[str],
        texts: Sequence[str] | None = None,
        *,
        own_kind: bool = False,
    ) -> list[Any]:
        """→ session and `shown`. `held` is what the fields hold now, `texts` what they shall hold if that differs."""
        wanted = count if texts is None else count - 1
        texts = held if texts is None else texts
        models = view.read_fields(texts[0], texts[1:], settings)
        known = kind if kind in view.TYPES else ""
        keep = own_kind or models.detected == "" or models.chosen[0] == session.base != ""
        session = view.next_session(session, models, known if keep else "")
        return [session, *draw(session, models, count, wanted, held, own_kind or session.model_type != kind)]

    def changed(session: Session, kind: str, count: int, *texts: Any) -> list[Any]:
        """session, type, count, fields → session, shown."""
        return apply(session, kind, count, _texts(texts))

    def kind_changed(session: Session, kind: str, count: int, *texts: Any) -> list[Any]:
        """session, type, count, fields → session, shown: the visitor's own type counts."""
        return apply(session, kind, count, _texts(texts), own_kind=True)

    def fetch(*texts: Any) -> Iterator[tuple[str, Any]]:
        """fields → progress, stop: downloads and converts what opening the fields needs, before they are opened."""
        start = time.monotonic()
        try:
            for step in _fetching(_texts(texts), settings):
                seconds = time.monotonic() - start
                running = JobView("", "models", "Getting models ready", "running", step, seconds)
                yield progress_html(running), gr.Button(visible=True)
        except MergeError as error:
            yield error_html(sentence(error)), gr.Button(visible=False)
            return
        yield "", gr.Button(visible=False)

    def redraw(session: Session, count: int, drawn: Any) -> Iterator[list[Any]]:
        """session, count, drawn → shown: only when the models were changed elsewhere."""
        if drawn == (session.model_type, session.base, session.fine_tunes):
            yield [gr.skip()] * len(shown)  # a generator that yields nothing would empty them
            return
        base, tunes = view.fields_of(session, places)
        yield draw(session, view.read_fields(base, tunes, settings), count, AT_FIRST)
        if unprepared(session.models):
            for _ in prepare_steps(session.models):
                pass
            yield draw(session, view.read_fields(base, tunes, settings), count, AT_FIRST)

    def add(count: int) -> list[Any]:
        """count → count, groups, add button."""
        count = min(count + 1, places)
        groups = [gr.Column(visible=place <= count) for place in range(1, places + 1)]
        return [count, *groups, gr.Button(interactive=count < places)]

    def without(place: int) -> Any:
        def removed(session: Session, kind: str, count: int, *texts: Any) -> list[Any]:
            """session, type, count, fields → session, shown: one fine-tune less, the later ones move up."""
            held = _texts(texts)
            kept = [text for number, text in enumerate(held) if number != place]
            return apply(session, kind, count, held, [*kept, ""])

        return removed

    def demo(kind: str, base: str, tunes: Sequence[str]) -> Any:
        def chosen(session: Session) -> Session:
            """session → session with the demo's models."""
            models = [demo_path(key) for key in tunes]
            return session.with_models(kind, demo_path(base), models).with_base_included(False)

        return chosen

    def stopped() -> tuple[str, Any]:
        """→ progress, stop."""
        return "", gr.Button(visible=False)

    inputs = [page.session, tab.kind, tab.count, *fields]
    everything = [page.session, *shown]
    fetches: list[Any] = []
    for field in fields:
        fetched = field.input(fetch, fields, [tab.progress, tab.stop], concurrency_limit=4, **private)
        fetched.then(changed, inputs, everything, **private)
        fetches.append(fetched)
    tab.stop.click(stopped, None, [tab.progress, tab.stop], cancels=fetches, queue=False, **private)
    tab.kind.input(kind_changed, inputs, everything, **private)
    for place, tune in enumerate(tab.fine_tunes, 1):
        tune.remove.click(without(place), inputs, everything, **private)
    groups = [tune.group for tune in tab.fine_tunes]
    tab.add.click(add, tab.count, [tab.count, *groups, tab.add], **private)
    tab.chat_demo.click(demo(*CHAT_DEMO), page.session, page.session, **private)
    tab.search_demo.click(demo(*SEARCH_DEMO), page.session, page.session, **private)
    page.session.change(redraw, [page.session, tab.count, tab.drawn], shown, concurrency_limit=None, **private)


def _fetching(texts: Sequence[str], settings: Settings) -> Iterator[Step]:
    """What has to be there before the fields can be opened. What is wrong with a text is said when it is opened."""
    references = []
    for text in texts:
        try:
            reference = resolve_choice(text, settings)
        except MergeError:
            continue
        references += [reference] if reference else []
    yield from prepare_steps(references)
    if settings.public:
        return
    for reference in references:
        for _ in range(3):  # an adapter names its base only once it is here
            parts = missing_parts(reference)
            if not parts:
                break
            yield from (Step(message, share) for message, share in download(parts[0]))


def _texts(values: Sequence[Any]) -> list[str]:
    """What the fields hold; every handler is public, so a value may be anything."""
    return [value if isinstance(value, str) else "" for value in values]
