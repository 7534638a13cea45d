"""The Try tab's decisions: which columns answer, what was asked, which passage moved where, and what is out of date.

Pure: from a session and what was tried to text, tables and labels. A result names the recipe it was made with, and is
greyed when the session's is another one by now. Everything that a model wrote is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, replace

from components.naming import middle_cut, short_name, without_demo_paths
from components.palette import BASE, MERGED
from components.session import Session, row_shape
from components.settings import Settings
from components.views.recipe_bar import colors, weights_shown
from components.views.start import MERGED_NAME, Card, cards_html
from llm_merge.errors import MergeError
from llm_merge.recipe import Recipe

MAX_COLUMNS = 4
MAX_PASSAGES = 40
EXAMPLES = 4  # buttons

CHAT_EXAMPLES = (
    "Rewrite this verse in King James English: Jesus said to them, “Don’t be afraid. I am with you always.”",
    "Define the word: lighthouse",
    "What is the capital of France?",
    "Rewrite this verse in King James English: He told his servants to go into the city and bring food.",
)


@dataclass(frozen=True)
class SearchExample:
    """A query with passages to rank."""

    query: str
    passages: tuple[str, ...]


SEARCH_EXAMPLES = (
    SearchExample(
        "En el principio creó Dios los cielos y la tierra.",
        (
            "In the beginning God created the heavens and the earth.",
            "The earth belongs to Yahweh, with all that is in it.",
            "He made the stars also, and set them in the sky.",
            "The king built houses and planted gardens in the city.",
            "At the end of the day the workers went home.",
        ),
    ),
    SearchExample(
        "a tower with a strong light that guides ships at night",
        ("lighthouse", "candle", "harbour", "church", "torch", "sailor"),
    ),
    SearchExample(
        "How do I bake bread without yeast?",
        (
            "Soda bread rises with baking soda and buttermilk instead of yeast.",
            "Yeast needs warmth, water and sugar to grow.",
            "The bakery on the corner opens at seven.",
            "Money is sometimes called bread.",
        ),
    ),
)


@dataclass(frozen=True)
class Column:
    """One answer's place: a model's reference or "merged", and the recipe that makes it."""

    name: str
    recipe: Recipe


@dataclass(frozen=True)
class Answer:
    """What a column says so far. `state`: waiting | merging | writing | done | stopped."""

    name: str
    text: str = ""
    state: str = "waiting"
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Answers:
    """One prompt, answered side by side. `mix`: how to say the recipe; `how`: the settings in words."""

    prompt: str
    recipe_key: str
    mix: str
    how: str
    columns: tuple[Answer, ...]


@dataclass(frozen=True)
class Found:
    """One query, ranked by the base and by the merge: similarities from −1 to 1.

    base, merged            of each passage to the query
    base_pairs, …           of all texts to each other, the query first
    """

    query: str
    passages: tuple[str, ...]
    recipe_key: str
    mix: str
    base: tuple[float, ...]
    merged: tuple[float, ...]
    base_pairs: tuple[tuple[float, ...], ...]
    merged_pairs: tuple[tuple[float, ...], ...]


def what_to_try(session: Session) -> str:
    """ "chat", "search", or "" when there is nothing to try: no models, or a reranker."""
    if not session.mixed or session.model_type == "reranker":
        return ""
    return "chat" if row_shape(session.model_type) == "answer" else "search"


def nothing_to_try(session: Session) -> str:
    """What to do first; "" when something can be tried."""
    if not session.mixed:
        return "There is nothing to try yet: choose a base and a fine-tune in Models."
    if session.model_type == "reranker":
        return "Rerankers can be mixed and saved; trying them on this page comes later."
    return ""


def base_of(session: Session) -> str:
    """The model whose architecture, tokenizer and column is the base's: the first one when no base was chosen."""
    return session.base or session.models[0]


def column_choices(session: Session) -> list[tuple[str, str]]:
    """(label, value) of the models that can answer beside the merge; the values name no folder of a server."""
    return [(_title(session, model), without_demo_paths(model)) for model in session.models]


def default_columns(session: Session) -> list[str]:
    """The base and the first fine-tune, which is the one that the first example prompt is meant for."""
    return [without_demo_paths(model) for model in (session.base, *session.fine_tunes[:1]) if model]


def columns(session: Session, chosen: Sequence[str]) -> tuple[Column, ...]:
    """The base, the merge, then the fine-tunes. Raises MergeError for too many columns or unknown models."""
    known = {without_demo_paths(model): model for model in session.models}
    chosen = [known.get(value, value) for value in chosen]
    if any(model not in session.models for model in chosen):
        raise MergeError("The models have changed meanwhile: choose the columns again.", field="columns")
    if len(set(chosen)) + 1 > MAX_COLUMNS:
        raise MergeError(f"At most {MAX_COLUMNS} answers fit side by side: take one model away.", field="columns")
    recipe = session.recipe
    if recipe is None:
        raise MergeError(nothing_to_try(session), field="models")
    result = [Column(MERGED_NAME, recipe)]
    for model in session.models:
        if model in chosen:
            place = 0 if model == session.base else len(result)
            result.insert(place, Column(model, Recipe.single(model, dtype=session.dtype)))
    return tuple(result)


def mix_words(session: Session) -> str:
    """ "King James 0.50 / Dictionary 0.50", or what made the recipe layer by layer."""
    words = " / ".join(f"{short_name(model)} {share:.2f}" for model, share in weights_shown(session))
    return f"{session.layered_from}: {words}" if session.layered is not None else words


def check_prompt(prompt: str, settings: Settings) -> str:
    """The prompt, or MergeError when it is empty or too long."""
    if not prompt.strip():
        raise MergeError("The prompt is empty: write something or press an example.", field="prompt")
    if len(prompt) > settings.max_prompt_chars:
        limit = settings.max_prompt_chars
        raise MergeError(
            f"The prompt has {len(prompt):,} characters; at most {limit:,} fit: shorten it.", field="prompt"
        )
    return prompt


def read_passages(text: str, settings: Settings) -> tuple[str, ...]:
    """One passage a line, each once. Raises MergeError for fewer than two or too many."""
    passages = tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if len(passages) < 2:
        raise MergeError("Ranking takes at least two passages: write one on each line.", field="passages")
    if len(passages) > MAX_PASSAGES:
        raise MergeError(
            f"There are {len(passages)} passages; at most {MAX_PASSAGES} are ranked here.", field="passages"
        )
    if len(text) > settings.max_prompt_chars:
        limit = settings.max_prompt_chars
        raise MergeError(f"The passages have {len(text):,} characters; at most {limit:,} fit.", field="passages")
    return passages


def chat_examples(session: Session) -> tuple[str, ...]:
    """Prompts for the buttons: the demo's, or the first questions of the visitor's own rows."""
    if session.demo_tasks or not session.rows or row_shape(session.model_type) != "answer":
        return CHAT_EXAMPLES
    own = dict.fromkeys(str(row.get("input") or "").strip() for row in session.rows)
    return tuple(text for text in own if text)[:EXAMPLES] or CHAT_EXAMPLES


def search_examples(session: Session) -> tuple[SearchExample, ...]:
    """Queries for the buttons: the demo's, or ones from the visitor's own rows with the other rows' passages."""
    if session.demo_tasks or len(session.rows) < 2 or row_shape(session.model_type) != "search":
        return SEARCH_EXAMPLES
    passages = [_first(row.get("pos")) for row in session.rows]
    found = []
    for index, row in enumerate(session.rows[: EXAMPLES - 1]):
        near = [passages[(index + step) % len(passages)] for step in range(8)]
        found.append(SearchExample(str(row.get("query") or ""), tuple(dict.fromkeys(text for text in near if text))))
    return tuple(found)


def is_example(text: str, drawn: object) -> bool:
    """Whether a field holds an example, so that another may take its place. `drawn` None: nobody has touched it yet."""
    known = {*CHAT_EXAMPLES, *(example.query for example in SEARCH_EXAMPLES)}
    return drawn is None or not text.strip() or text in known


def ended(answers: Answers) -> Answers | None:
    """Answers whose job has ended: what is not done was stopped; None when nothing was said at all."""
    if not any(column.text for column in answers.columns):
        return None if any(column.state != "done" for column in answers.columns) else answers
    columns = tuple(c if c.state == "done" else replace(c, state="stopped") for c in answers.columns)
    return replace(answers, columns=columns)


def example_label(text: str) -> str:
    """A prompt as a button says it: what comes after the instruction, cut in the middle."""
    head, colon, rest = text.partition(": ")
    return middle_cut(rest if colon and len(head) > 30 and rest else text, 38)


def cards(answers: Answers, session: Session) -> list[Card]:
    """The answers as cards in their models' colours; all greyed when the recipe is another one by now."""
    color = colors(session)
    stale = is_stale(answers.recipe_key, session)
    made = []
    for answer in answers.columns:
        merged = answer.name == MERGED_NAME
        tint = MERGED if merged else color.get(answer.name, BASE)
        state = {"waiting": "waiting", "merging": "merging in memory", "writing": "writing", "stopped": "stopped"}.get(
            answer.state, ""
        )
        speed = f"{answer.tokens} tokens in {answer.seconds:.1f} s" if answer.state == "done" and answer.tokens else ""
        source = " · ".join(part for part in (answers.mix if merged else "", state, speed) if part)
        text = answer.text or ("(an empty answer)" if answer.state == "done" else "")
        made.append(Card("Merged" if merged else _title(session, answer.name), source, text, tint, merged, stale))
    return made


def answers_html(answers: Answers | None, session: Session) -> str:
    """The answers side by side under what was asked; a line about the recipe they were made with when it is old."""
    if answers is None:
        return ""
    old = stale_html(answers.mix) if is_stale(answers.recipe_key, session) else ""
    return old + cards_html(answers.prompt, cards(answers, session)) + f'<p class="how">{html.escape(answers.how)}</p>'


def is_stale(recipe_key: str, session: Session) -> bool:
    """Whether a result was made with another recipe than the session's."""
    return recipe_key != session.recipe_key


def stale_html(mix: str) -> str:
    """Says what an old result was made with."""
    return f'<div class="message note">Made with {html.escape(mix)}; the mix has changed since.</div>'


def button_label(verb: str, made_with: str | None, session: Session) -> str:
    """ "Answer" at first and while it is current, "Redo with the new mix" once it is not."""
    return "Redo with the new mix" if made_with is not None and is_stale(made_with, session) else verb


def ranks(scores: Sequence[float]) -> list[int]:
    """Place of each passage from 1 (most similar); equal scores share the better place."""
    return [1 + sum(other > score for other in scores) for score in scores]


def shift_words(before: int, after: int) -> str:
    """How a place changed: "▲ 2" moved up by two, "▼ 1" down, "=" stayed."""
    moved = before - after
    return f"▲ {moved}" if moved > 0 else f"▼ {-moved}" if moved < 0 else "="


def heatmap_order(found: Found) -> tuple[list[str], list[list[float]], list[list[float]]]:
    """Passages in the merge's order, and both matrices in it, the query first: the chart's numbers are the places."""
    order = _order(found)
    lines = [0, *(index + 1 for index in order)]
    base = [[found.base_pairs[i][j] for j in lines] for i in lines]
    merged = [[found.merged_pairs[i][j] for j in lines] for i in lines]
    return [found.passages[index] for index in order], base, merged


def _order(found: Found) -> list[int]:
    after = ranks(found.merged)
    return sorted(range(len(found.passages)), key=lambda index: after[index])


def found_html(found: Found | None, session: Session) -> str:
    """The passages in the merge's order, with both similarities, both places and the shift."""
    if found is None:
        return ""
    before, after = ranks(found.base), ranks(found.merged)
    rows = "".join(
        f"<tr><td>{after[i]}</td><td>{html.escape(found.passages[i])}</td><td>{found.merged[i]:.3f}</td>"
        f"<td>{found.base[i]:.3f}</td><td>{before[i]}</td>"
        f'<td class="{_direction(before[i], after[i])}">{shift_words(before[i], after[i])}</td></tr>'
        for i in _order(found)
    )
    stale = is_stale(found.recipe_key, session)
    old, grey = (stale_html(found.mix), " stale") if stale else ("", "")
    head = (
        '<tr><th scope="col">Place</th><th scope="col">Passage</th><th scope="col">Merged</th>'
        '<th scope="col">Base</th><th scope="col">Base’s place</th><th scope="col">Shift</th></tr>'
    )
    return (
        f'{old}<div class="ranking{grey}"><p class="asked">Query: <q>{html.escape(found.query)}</q>'
        f' · merged is {html.escape(found.mix)} · similarity is the cosine, at most 1</p><div class="scroll"><table>'
        f"<thead>{head}</thead><tbody>{rows}</tbody></table></div>"
        '<p class="how">Below: the similarity of every two texts; passages are numbered by their place.</p></div>'
    )


def _direction(before: int, after: int) -> str:
    return "up" if after < before else "down" if after > before else "same"


def _title(session: Session, model: str) -> str:
    return "Base" if model == session.base else short_name(model)


def _first(value: object) -> str:
    if isinstance(value, str):
        return value
    return str(value[0]) if isinstance(value, (list, tuple)) and value else ""
