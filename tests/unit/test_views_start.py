"""What Start and the recipe bar say, without a browser."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from components.recorded import Answer, Prompt, Recording
from components.session import Session
from components.settings import Settings
from components.views import recipe_bar, start
from llm_merge.demo import demo_path
from llm_merge.recipe import ModelEntry, Recipe

PRIVATE = Settings(home=Path("/nowhere"))
VERSE = Prompt(
    "verse",
    "Rewrite this verse: <b>Go.</b>",
    (
        Answer((("smollm2", 1.0),), "Go away."),
        Answer((("king-james", 1.0),), "Get thee hence."),
        Answer((("king-james", 0.5), ("dictionary", 0.5)), "Go thou hence."),
        Answer((("king-james", 0.1), ("dictionary", 0.9)), "Depart."),
    ),
)
RECORDING = Recording("2026-11-21", "hash", {}, (VERSE,))


def demo() -> Session:
    return Session(base=demo_path("smollm2"), fine_tunes=(demo_path("king-james"), demo_path("dictionary")))


def test_recorded_cards_are_base_specialist_and_merge_with_their_date() -> None:
    cards = start.recorded_cards(demo(), RECORDING, VERSE)
    assert [(card.title, card.text) for card in cards] == [
        ("Base", "Go away."),
        ("King James", "Get thee hence."),
        ("Merged", "Go thou hence."),
    ]
    assert all("recorded on 2026-11-21" in card.source for card in cards)
    assert "King James 0.50 / Dictionary 0.50" in cards[-1].source


def test_the_merged_card_follows_the_shares_to_the_nearest_recorded_mix() -> None:
    cards = start.recorded_cards(demo().with_hand_shares((0.2, 0.8)), RECORDING, VERSE)
    assert cards[-1].text == "Depart."
    assert "King James 0.10 / Dictionary 0.90" in cards[-1].source


def test_prompts_and_answers_are_escaped() -> None:
    shown = start.answers_html(demo(), RECORDING, 0, None)
    assert "<b>Go.</b>" not in shown
    assert "&lt;b&gt;Go.&lt;/b&gt;" in shown


def test_live_answers_replace_the_recorded_ones_and_grey_out_when_the_shares_move() -> None:
    session = demo()
    live = start.LiveAnswers(
        VERSE.text, ((session.base, "a"), (start.MERGED_NAME, "b")), session.recipe_key, "King James 0.50"
    )
    shown = start.answers_html(session, RECORDING, 0, live)
    assert "live at King James 0.50" in shown
    assert "recorded on" not in shown
    assert "stale" not in shown
    moved = start.answers_html(session.with_hand_shares((0.9, 0.1)), RECORDING, 0, live)
    assert "the shares have changed since" in moved


def test_own_models_have_no_demo_answers() -> None:
    assert start.answers_html(Session(base="mine", fine_tunes=("x",)), RECORDING, 0, None) == start.OWN_MODELS


@pytest.mark.parametrize("number", [-1, 7, 10**9])
def test_a_prompt_number_from_nowhere_gives_the_first_prompt(number: int) -> None:
    assert start.prompt_text(RECORDING, number) == VERSE.text


def test_the_next_step_is_the_first_thing_that_is_missing() -> None:
    session = Session()
    assert recipe_bar.next_step(session).tab == "models"
    session = session.with_models("decoder", "base", [])
    assert recipe_bar.next_step(session).label == "Add a fine-tune →"
    session = session.with_models("decoder", "base", ["a", "b"])
    assert recipe_bar.next_step(session).tab == "examples"
    session = session.with_rows([{"input": "q", "output": "a", "task": ""}], "mine", ())
    assert recipe_bar.next_step(session).tab == "weights"
    session = session.with_hand_shares((0.5, 0.5))
    assert recipe_bar.next_step(session).tab == "try"
    session = replace(session, tried=session.recipe_key)
    assert recipe_bar.next_step(session).tab == "save"
    session = replace(session, saved=(session.recipe_key, "/out"))
    assert recipe_bar.next_step(session).label == "Try another mix →"


def test_the_bar_names_shares_rows_and_whether_it_is_saved() -> None:
    session = Session().with_models("decoder", "base", ["org/one", "org/two<script>"])
    shown = recipe_bar.bar_html(session, PRIVATE)
    assert "one <b>50 %</b>" in shown
    assert "<script>" not in shown
    assert "no examples" in shown
    assert "not saved" in shown


# ---- a recipe made on Layers -----------------------------------------------------------------------------------------


def layered(session: Session) -> Session:
    weights = [0.6] * len(session.mixed)
    entries = tuple(ModelEntry(model, weight) for model, weight in zip(session.mixed, weights, strict=True))
    return session.with_layered(Recipe(entries, "breadcrumbs", session.base, normalize=False), "Hi-Merging <i>")


def test_what_is_recorded_belongs_to_shares_and_start_says_so_when_layers_decide() -> None:
    shown = start.answers_html(layered(demo()), RECORDING, 0, None)
    assert "a recipe made layer by layer (Hi-Merging &lt;i&gt;)" in shown
    assert "<i>" not in shown
    assert "recorded on" not in shown
    assert start.result_html({"anything": 1}, layered(demo())) == ""


def test_the_bar_shows_weights_of_task_vectors_not_shares_of_a_whole() -> None:
    session = layered(Session().with_models("decoder", "base", ["org/one", "org/two"]))
    shown = recipe_bar.bar_html(session, PRIVATE)
    assert "one <b>0.60</b>" in shown
    assert "two <b>0.60</b>" in shown  # 1.2 together: no percentages
    assert "Hi-Merging &lt;i&gt;, layer by layer" in shown
    assert "%" not in shown
    assert "<i>, layer" not in shown


def test_the_next_step_after_layers_is_to_try_not_to_measure() -> None:
    rows = [{"input": "a", "output": "b", "task": "t"}]
    session = Session().with_models("decoder", "base", ["a", "b"]).with_rows(rows, "mine", ())
    assert recipe_bar.next_step(session).label == "Measure →"
    session = layered(session)
    assert recipe_bar.next_step(session).label == "Try it →"
    tried = replace(session, tried=session.recipe_key)
    assert recipe_bar.next_step(tried).label == "Save it →"
    assert recipe_bar.next_step(tried.with_layered(None)).label == "Measure →"
