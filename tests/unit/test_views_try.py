"""What the Try tab shows: columns, words, places and shifts, what is out of date, and nothing unescaped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from components.session import Session
from components.settings import Settings
from components.views import try_view as view
from components.views.try_view import Answer, Answers, Found
from llm_merge.errors import MergeError
from llm_merge.recipe import ModelEntry, Recipe


@pytest.fixture
def session() -> Session:
    chosen = Session().with_models("decoder", "/m/base", ["/m/king", "/m/words"])
    return chosen.with_hand_shares([0.25, 0.75])


def answers(session: Session, text: str = "And he said") -> Answers:
    done = Answer("/m/base", text, "done", 4, 1.25), Answer(view.MERGED_NAME, text, "writing"), Answer("/m/king")
    return Answers("Say it", session.recipe_key, view.mix_words(session), "likeliest tokens only", done)


def found(session: Session) -> Found:
    pairs = ((1.0, 0.9, 0.5, 0.1), (0.9, 1.0, 0.2, 0.3), (0.5, 0.2, 1.0, 0.4), (0.1, 0.3, 0.4, 1.0))
    return Found(
        "q", ("first", "second", "third"), session.recipe_key, view.mix_words(session),
        (0.9, 0.5, 0.1), (0.2, 0.8, 0.1), pairs, pairs,
    )  # fmt: skip


def test_columns_are_base_merged_and_parents_in_that_order(session: Session) -> None:
    made = view.columns(session, ["/m/words", "/m/base"])
    assert [column.name for column in made] == ["/m/base", "merged", "/m/words"]
    assert made[0].recipe.references == ("/m/base",)
    assert made[1].recipe == session.recipe
    assert [column.name for column in view.columns(session, [])] == ["merged"]


def test_parents_are_rounded_as_the_merge_is(session: Session) -> None:
    made = view.columns(replace(session, dtype="float16"), ["/m/base"])
    assert [column.recipe.dtype for column in made] == ["float16", "float16"]


def test_the_base_and_the_first_fine_tune_are_beside_the_merge_at_first(session: Session) -> None:
    assert view.default_columns(session) == ["/m/base", "/m/king"]
    assert view.column_choices(session) == [("Base", "/m/base"), ("king", "/m/king"), ("words", "/m/words")]


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (["/etc/passwd"], "The models have changed meanwhile: choose the columns again."),
        (["/m/base", "/m/king", "/m/words", "/m/more"], "At most 4 answers fit side by side: take one model away."),
    ],
)
def test_columns_that_cannot_be_are_told(session: Session, chosen: list[str], words: str) -> None:
    more = replace(session, fine_tunes=(*session.fine_tunes, "/m/more"), by_hand=())
    with pytest.raises(MergeError) as caught:
        view.columns(more, chosen)
    assert caught.value.message == words


def test_what_there_is_to_try(session: Session) -> None:
    assert view.what_to_try(session) == "chat"
    assert view.what_to_try(replace(session, model_type="encoder")) == "search"
    assert view.what_to_try(Session()) == ""
    assert view.nothing_to_try(Session()) == "There is nothing to try yet: choose a base and a fine-tune in Models."
    assert "Rerankers can be mixed and saved" in view.nothing_to_try(replace(session, model_type="reranker"))


def test_answers_name_their_recipe_and_their_speed(session: Session) -> None:
    base, merged, king = view.cards(answers(session), session)
    assert (base.title, base.source) == ("Base", "4 tokens in 1.2 s")
    assert (merged.title, merged.source, merged.merged) == ("Merged", "king 0.25 / words 0.75 · writing", True)
    assert (king.title, king.source, king.text) == ("king", "waiting", "")
    assert not (base.stale or merged.stale)
    assert "Made with" not in view.answers_html(answers(session), session)


def test_answers_of_another_mix_are_greyed_and_can_be_redone(session: Session) -> None:
    changed = session.with_hand_shares([0.5, 0.5])
    old = answers(session)
    text = view.answers_html(old, changed)
    assert "Made with king 0.25 / words 0.75; the mix has changed since." in text
    assert text.count("stale") == 3
    assert view.button_label("Answer", old.recipe_key, changed) == "Redo with the new mix"
    assert view.button_label("Answer", old.recipe_key, session) == "Answer"
    assert view.button_label("Answer", None, session) == "Answer"


def test_what_a_model_wrote_is_escaped(session: Session) -> None:
    evil = "<img src=https://example.org/x.png> ![a](https://example.org/y.png) <script>alert(1)</script>"
    text = view.answers_html(answers(session, evil), session)
    assert "<img" not in text
    assert "<script" not in text
    passages = replace(found(session), passages=(evil, "b", "c"), query=evil)
    assert "<img" not in view.found_html(passages, session)


def test_an_empty_answer_says_that_it_is_one(session: Session) -> None:
    empty = Answers("Say it", session.recipe_key, "", "", (Answer("/m/base", "", "done"),))
    assert view.cards(empty, session)[0].text == "(an empty answer)"


def test_places_and_shifts(session: Session) -> None:
    assert view.ranks((0.9, 0.5, 0.5, 0.1)) == [1, 2, 2, 4]
    assert [view.shift_words(3, 1), view.shift_words(1, 2), view.shift_words(2, 2)] == ["▲ 2", "▼ 1", "="]
    text = view.found_html(found(session), session)
    places = [text.index(f"<td>{name}</td>") for name in ("second", "first", "third")]
    assert places == sorted(places), "the merge's order"
    assert text.index("second") < text.index("▲ 1") < text.index("first") < text.index("▼ 1") < text.index("third")
    assert "king 0.25 / words 0.75" in text


def test_the_heatmaps_numbers_are_the_places(session: Session) -> None:
    texts, base, merged = view.heatmap_order(found(session))
    assert texts == ["second", "first", "third"]
    assert base == merged
    assert base[0] == [1.0, 0.5, 0.9, 0.1], "the query stays first"
    assert base[1] == [0.5, 1.0, 0.2, 0.4]


def test_a_ranking_of_another_mix_is_greyed(session: Session) -> None:
    changed = session.with_hand_shares([0.5, 0.5])
    assert 'class="ranking stale"' in view.found_html(found(session), changed)
    assert "stale" not in view.found_html(found(session), session)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("only one\n\n", "Ranking takes at least two passages: write one on each line."),
        ("same\nsame", "Ranking takes at least two passages: write one on each line."),
        ("\n".join(map(str, range(41))), "There are 41 passages; at most 40 are ranked here."),
        ("a\n" + "b" * 30_000, "The passages have 30,002 characters; at most 20,000 fit."),
    ],
)
def test_passages_that_cannot_be_ranked(text: str, words: str) -> None:
    with pytest.raises(MergeError) as caught:
        view.read_passages(text, Settings())
    assert caught.value.message == words


def test_passages_are_one_a_line_and_each_once() -> None:
    assert view.read_passages(" a \n\nb\na\n", Settings()) == ("a", "b")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (" \n", "The prompt is empty: write something or press an example."),
        ("x" * 2001, "The prompt has 2,001 characters; at most 2,000 fit: shorten it."),
    ],
)
def test_prompts_that_cannot_be_asked(prompt: str, words: str) -> None:
    with pytest.raises(MergeError) as caught:
        view.check_prompt(prompt, Settings.for_public(Settings().home))
    assert caught.value.message == words


def test_examples_come_from_the_visitor_s_own_rows(session: Session) -> None:
    rows: list[dict[str, Any]] = [{"task": "t", "input": f"question {i}", "output": "a"} for i in range(9)]
    assert view.chat_examples(session) == view.CHAT_EXAMPLES
    assert view.chat_examples(replace(session, rows=tuple(rows))) == tuple(f"question {i}" for i in range(4))
    assert view.chat_examples(replace(session, rows=tuple(rows), demo_tasks=("verse",))) == view.CHAT_EXAMPLES
    search = replace(session, model_type="encoder", rows=({"query": "q1", "pos": ["p1"]}, {"query": "q2", "pos": "p2"}))
    first, second = view.search_examples(search)
    assert (first.query, first.passages, second.passages) == ("q1", ("p1", "p2"), ("p2", "p1"))


def test_a_button_says_what_is_asked_and_not_the_instruction() -> None:
    assert view.example_label(view.CHAT_EXAMPLES[0]).startswith("Jesus said to them")
    assert view.example_label("Define the word: lighthouse") == "Define the word: lighthouse"


def test_a_recipe_made_on_layers_answers_under_its_own_name(session: Session) -> None:
    recipe = Recipe(
        (ModelEntry("/m/king", 0.4), ModelEntry("/m/words", 0.4)), "breadcrumbs", "/m/base", normalize=False
    )
    layered = session.with_layered(recipe, "Hi-Merging")
    assert view.mix_words(layered) == "Hi-Merging: king 0.40 / words 0.40"
    merged = next(column for column in view.columns(layered, []) if column.name == view.MERGED_NAME)
    assert merged.recipe == layered.recipe
    before = answers(session)
    assert before.recipe_key != layered.recipe_key  # answers of the shares are old
