"""Try, for embedding models: a query and passages, ranked by the base and by the merge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from components.answering import search_work
from components.charts import similarity_heatmaps
from components.feedback import error_html, progress_html, sentence
from components.page import Page
from components.session import Session
from components.try_parts import KIND, example_buttons, private, result_of, stopper, tried
from components.views import try_view as view
from llm_merge.errors import MergeError


@dataclass(frozen=True)
class SearchPart:
    group: gr.Column
    query: gr.Textbox
    passages: gr.Textbox
    examples: tuple[gr.Button, ...]
    rank: gr.Button
    stop: gr.Button
    progress: gr.HTML
    found: gr.HTML
    heatmaps: gr.Plot


def build(group: gr.Column) -> SearchPart:
    first = view.SEARCH_EXAMPLES[0]
    with gr.Row(elem_classes="ask"):
        query = gr.Textbox(first.query, label="Query", lines=3, elem_id="try-query", scale=1, min_width=240)
        passages = gr.Textbox(
            "\n".join(first.passages),
            label="Passages, one on each line",
            lines=5,
            max_lines=12,
            elem_id="try-passages",
            scale=2,
            min_width=280,
        )
        with gr.Column(scale=0, min_width=150):
            rank = gr.Button("Rank", variant="primary", elem_id="try-rank")
            stop = gr.Button("Stop", variant="stop", visible=False, elem_id="try-search-stop")
    with gr.Row(elem_classes="examples-row"):
        labels = [view.example_label(example.query) for example in view.SEARCH_EXAMPLES]
        examples = example_buttons("try-search-example", labels)
    progress = gr.HTML(elem_id="try-search-progress", padding=False)
    found = gr.HTML(elem_id="try-found", padding=False)
    heatmaps = gr.Plot(show_label=False, visible=False, elem_id="try-heatmaps")
    return SearchPart(group, query, passages, examples, rank, stop, progress, found, heatmaps)


def wire(search: SearchPart, page: Page) -> None:
    outputs = [search.progress, search.found, search.heatmaps, search.rank, search.stop]

    def draw(found: view.Found | None, session: Session) -> tuple[Any, Any]:
        if found is None:
            return gr.skip(), gr.skip()
        figure = similarity_heatmaps(*view.heatmap_order(found))
        return view.found_html(found, session), gr.Plot(figure, visible=True)

    def follow(visitor: str, session: Session, job: str) -> Iterator[tuple[Any, ...]]:
        for now in page.jobs.follow(visitor, job):
            shown = draw(result_of(now, view.Found), session)
            yield progress_html(now), *shown, gr.Button("Rank", visible=not now.active), gr.Button(visible=now.active)

    def rank(session: Session, visitor: str, query: str, passages: str) -> Iterator[tuple[Any, ...]]:
        """session, visitor, query, passages → progress, found, heatmaps, rank, stop."""
        try:
            if view.what_to_try(session) != "search":
                raise MergeError(view.nothing_to_try(session) or "These models do not embed texts.", field="models")
            query = view.check_prompt(query or "", page.settings)
            work = search_work(session, query, view.read_passages(passages or "", page.settings), page.settings)
            job = page.jobs.start(visitor, KIND, "The ranking", work)
        except MergeError as error:
            yield error_html(sentence(error)), gr.skip(), gr.skip(), gr.skip(), gr.skip()
            return
        yield from follow(visitor, session, job)

    def attach(session: Session, visitor: str) -> Iterator[tuple[Any, ...]]:
        """session, visitor → outputs: find a ranking again after a reload."""
        job = page.jobs.latest(visitor, KIND) if visitor else None
        if job is not None and view.what_to_try(session) == "search":
            yield from follow(visitor, session, job.id)
        else:
            yield gr.skip(), gr.skip(), gr.skip(), gr.skip(), gr.skip()

    ranked = search.rank.click(
        rank, [page.session, page.visitor, search.query, search.passages], outputs, concurrency_limit=None, **private()
    )
    ranked.then(tried(page, view.Found), [page.session, page.visitor], page.session, **private())
    search.stop.click(stopper(page), page.visitor, None, queue=False, **private())
    page.arrived.then(attach, [page.session, page.visitor], outputs, concurrency_limit=None, **private())
    for place, button in enumerate(search.examples):

        def use(session: Session, place: int = place) -> tuple[str, str]:
            """session → query, passages."""
            examples = view.search_examples(session)
            example = examples[min(place, len(examples) - 1)]
            return example.query, "\n".join(example.passages)

        button.click(use, page.session, [search.query, search.passages], **private())
