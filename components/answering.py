"""The Try tab's work on models in memory: answers side by side, and passages ranked. Runs as jobs, yields Steps.

Borrows models from `live.py`, has each follow its column's recipe, and draws one token of each column in turn: on a
processor that is as fast as one after the other, and nothing competes for its cores.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from components.demo_setup import prepare_steps
from components.jobs import Step, Work
from components.live import LIVE, LiveModels
from components.session import Session
from components.settings import Settings
from components.views.try_view import Answer, Answers, Column, Found, base_of, mix_words
from llm_merge.recipe import Recipe

if TYPE_CHECKING:
    from llm_merge.generation import GenerationSettings
    from llm_merge.workbench import Workbench


def answer_work(
    session: Session,
    prompt: str,
    columns: tuple[Column, ...],
    generation: GenerationSettings,
    settings: Settings,
    pool: LiveModels = LIVE,
) -> Work:
    """The job that answers `prompt` in every column; its result is the `Answers`."""
    how = (
        "likeliest tokens only"
        if generation.greedy
        else f"randomness {generation.temperature:g}, seed {generation.seed}"
    ) + f", at most {generation.max_new_tokens} tokens, the same for all columns"
    first = Answers(
        prompt, session.recipe_key, mix_words(session), how, tuple(Answer(column.name) for column in columns)
    )

    def run(stop: threading.Event) -> Generator[Step, None, Answers]:
        from llm_merge.checkpoint import open_checkpoint
        from llm_merge.evaluation import resolve_format

        answers = first
        yield from prepare_steps(session.models, stop)
        yield Step("Getting the models ready", None, answers)
        fmt = resolve_format([open_checkpoint(model) for model in session.models])
        recipes = [column.recipe for column in columns]
        with pool.borrow(base_of(session), session.model_type, recipes, settings, stop) as benches:
            for begin in range(0, len(columns), len(benches)):
                numbers = range(begin, min(begin + len(benches), len(columns)))
                with _locked(benches):
                    for number in numbers:
                        answers = _with(answers, number, state="merging")
                        yield Step("Merging in memory", None, answers)
                        benches[number - begin].follow(columns[number].recipe, stop)
                    for number, answer in _in_turn(benches, numbers, prompt, generation, fmt, stop):
                        answers = _with(answers, number, **answer)
                        yield Step("Answering", None, answers)
        return answers

    return run


def search_work(
    session: Session, query: str, passages: tuple[str, ...], settings: Settings, pool: LiveModels = LIVE
) -> Work:
    """The job that ranks `passages` for `query` by the base and by the merge; its result is a `Found`."""
    merged = session.recipe
    assert merged is not None, "the caller has checked that there is something to try"
    recipes = [Recipe.single(base_of(session), dtype=session.dtype), merged]

    def run(stop: threading.Event) -> Generator[Step, None, Found]:
        import numpy as np

        from llm_merge.evaluation import embed, similarity

        yield from prepare_steps(session.models, stop)
        yield Step("Getting the models ready", None)
        results = []
        with pool.borrow(base_of(session), session.model_type, recipes, settings, stop) as benches:
            for number, recipe in enumerate(recipes):
                bench = benches[number % len(benches)]
                yield Step("Merging in memory" if number else "Loading the base", number / 2)
                with bench.lock:
                    bench.follow(recipe, stop)
                    texts = embed(bench, passages, "passage", stop)
                    asked = embed(bench, [query], "query", stop)
                everything = np.concatenate([asked, texts])
                pairs = similarity(everything, everything)
                scores = similarity(asked, texts)[0]
                results.append((tuple(scores.tolist()), tuple(tuple(row) for row in pairs.tolist())))
        (base, base_pairs), (mixed, merged_pairs) = results
        return Found(query, passages, session.recipe_key, mix_words(session), base, mixed, base_pairs, merged_pairs)

    return run


def _in_turn(
    benches: list[Workbench],
    numbers: range,
    prompt: str,
    generation: GenerationSettings,
    fmt: object,
    stop: threading.Event,
) -> Iterator[tuple[int, dict[str, object]]]:
    """(column, what changed): one token of each column after the other, until all have ended."""
    from llm_merge.generation import generate
    from llm_merge.prompts import ResolvedFormat

    assert isinstance(fmt, ResolvedFormat)
    running = {n: generate(benches[n - numbers.start], prompt, generation, fmt, stop) for n in numbers}
    spent = dict.fromkeys(numbers, 0.0)
    texts = dict.fromkeys(numbers, "")
    try:
        while running and not stop.is_set():
            for number in list(running):
                began = time.monotonic()
                text = next(running[number], None)
                spent[number] += time.monotonic() - began
                if text is not None:
                    texts[number] = text
                    yield number, {"text": text, "state": "writing"}
                    continue
                del running[number]
                count = len(benches[number - numbers.start].tokenizer(texts[number])["input_ids"])
                yield number, {"state": "done", "tokens": count, "seconds": spent[number]}
    finally:
        for answer in running.values():
            answer.close()  # type: ignore[attr-defined]


def _with(answers: Answers, number: int, **changes: object) -> Answers:
    columns = list(answers.columns)
    columns[number] = replace(columns[number], **changes)  # type: ignore[arg-type]
    return replace(answers, columns=tuple(columns))


@contextmanager
def _locked(benches: list[Workbench]) -> Iterator[None]:
    for bench in benches:
        bench.lock.acquire()
    try:
        yield
    finally:
        for bench in benches:
            bench.lock.release()
