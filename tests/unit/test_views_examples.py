"""What the Examples tab says: readings of texts, the rows in use, and previews in which everything is escaped."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from components import start_tab
from components.exact_preview import ExactRow
from components.session import Session
from components.settings import Settings
from components.views import examples as view
from components.views.scoreboard_view import SEARCH_ROWS
from llm_merge.errors import ExampleError
from llm_merge.examples import Columns

SETTINGS = Settings()
PUBLIC = Settings.for_public(Path("home"))
CHAT = Session(model_type="decoder")
SEARCH = Session(model_type="encoder")


def plain(text: str) -> str:
    """HTML as it reads."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text)).strip()


def table_of(rows: int) -> str:
    return "input,output\n" + "".join(f"question {i},answer {i}\n" for i in range(rows))


# ---- demo sets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("session", "titles"), [
    (CHAT, ["Verse", "Dictionary", "Both"]),
    (SEARCH, ["Spanish verse", "Definition", "Both"]),
])  # fmt: skip
def test_each_demo_set_is_one_choice_away(session: Session, titles: list[str]) -> None:
    choices = view.demo_choices(session.model_type)
    assert [title for title, _ in choices] == titles
    for title, choice in choices:
        chosen = view.use_demo(session, choice)
        assert view.demo_choice(chosen) == choice
        assert len(chosen.rows) == (64 if choice == "both" else 32)
        named = " + ".join(titles[:2]) if choice == "both" else title
        assert chosen.rows_from == f"{named} (demo)"


def test_both_gives_the_rows_that_the_start_opens_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_tab.live_run, "recorded_table", lambda session, cache: None)
    start = start_tab.demo_session(None)  # type: ignore[arg-type]
    both = view.use_demo(CHAT, "both")
    assert (both.rows_hash, both.rows_from, both.demo_tasks) == (start.rows_hash, start.rows_from, start.demo_tasks)


def test_an_unknown_demo_set_is_refused() -> None:
    with pytest.raises(ExampleError, match="choose verse, dictionary, both"):
        view.use_demo(CHAT, "../secret")


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_a_readable_text_takes_over() -> None:
    reading = view.read(view.use_demo(CHAT, "both"), table_of(2), view.OWN_TEXT, SETTINGS)
    assert [row["output"] for row in reading.session.rows] == ["answer 0", "answer 1"]
    assert view.demo_choice(reading.session) is None
    assert reading.columns == Columns("input", "output")
    assert plain(view.reading_html(reading)) == "Your text: 2 rows read as CSV."


@pytest.mark.parametrize(("shape", "model_type"), [("answer", "decoder"), ("search", "encoder")])
def test_what_the_empty_box_shows_can_be_read(shape: str, model_type: str) -> None:
    reading = view.read(replace(Session(), model_type=model_type), view.PLACEHOLDERS[shape], view.OWN_TEXT, SETTINGS)
    assert reading.session.rows and not reading.problems


def test_problems_are_listed_with_their_lines_and_nothing_in_use_changes() -> None:
    before = view.use_demo(CHAT, "verse")
    reading = view.read(before, "input,output\na,\n<b>,c,d\n", view.OWN_TEXT, SETTINGS)
    assert reading.session == before
    assert reading.columns == Columns("input", "output")
    assert plain(view.reading_html(reading)) == (
        "Your text cannot be used yet. Line 2: the answer (column “output”) is empty. "
        "Line 3 has 3 cells, the header has 2 columns: put a text that contains a comma between quotation marks. "
        "Until then the rows read last stay in use: 32, Verse (demo)."
    )


def test_what_stays_in_use_is_said() -> None:
    assert view.rows_in_use(CHAT) == "No rows are in use so far."
    own = view.read(CHAT, table_of(1), view.OWN_TEXT, SETTINGS).session
    assert view.rows_in_use(own) == "Until then the rows read last stay in use: 1, your text as it was."
    file = view.read(CHAT, table_of(3).encode(), "mine.csv", SETTINGS).session
    assert view.rows_in_use(file) == "Until then the rows read last stay in use: 3, mine.csv."


def test_names_of_files_and_columns_are_escaped() -> None:
    reading = view.read(CHAT, "<i>a</i>,b\n1,2\n", "<b>.csv", SETTINGS)
    shown = view.reading_html(reading) + view.summary_html(reading.session, SETTINGS)
    assert "<i>" not in shown
    assert "<b>.csv" not in shown
    assert "“&lt;i&gt;a&lt;/i&gt;” is taken as the question" in shown


def test_columns_can_be_chosen_even_when_none_could_be_guessed() -> None:
    reading = view.read(CHAT, '[{"text": "a", "messages": "b"}]', view.OWN_TEXT, SETTINGS)
    assert reading.names == ("text", "messages")
    assert reading.problems
    chosen = view.read(CHAT, '[{"text": "a", "messages": "b"}]', view.OWN_TEXT, SETTINGS, Columns("text", "messages"))
    assert chosen.session.rows[0]["output"] == "b"


def test_a_choice_of_columns_is_kept_while_the_text_has_them() -> None:
    chosen = Columns("input", "better")
    kept = view.read(CHAT, "input,output,better\na,b,c\nd,e,f", view.OWN_TEXT, SETTINGS, chosen)
    assert [row["output"] for row in kept.session.rows] == ["c", "f"]
    dropped = view.read(CHAT, "input,output\na,b", view.OWN_TEXT, SETTINGS, chosen)
    assert dropped.columns == Columns("input", "output")


def test_a_column_that_becomes_the_question_is_nothing_else() -> None:
    guessed = Columns("instruction", "output", context="input", task="kind")
    assert view.with_choice(guessed, "input", "output") == Columns("input", "output", task="kind")
    assert view.with_choice(guessed, "instruction", "kind") == Columns("instruction", "kind", context="input")
    assert view.with_choice(None, "a", "b") == Columns("a", "b")
    reading = view.read(CHAT, '{"instruction": "a", "input": "b", "output": "c"}', view.OWN_TEXT, SETTINGS)
    assert "“input” follows “instruction” on a new line." in view.reading_html(reading)


def test_a_choice_of_columns_keeps_the_choices_of_a_question() -> None:
    guessed = Columns("question", "answer", choices="options")
    assert view.with_choice(guessed, "question", "answer") == guessed
    assert view.with_choice(guessed, "title", "answer") == Columns("title", "answer", choices="options")
    assert view.with_choice(guessed, "question", "options") == Columns("question", "options")


# ---- the task of what is pasted --------------------------------------------------------------------------------------


def test_rows_without_a_task_get_the_one_that_was_named_and_others_keep_theirs() -> None:
    text = '{"input": "a", "output": "b"}\n{"input": "c", "output": "d", "task": "poems"}'
    reading = view.read(CHAT, text, view.OWN_TEXT, SETTINGS, task="  law ")
    assert [row["task"] for row in reading.session.rows] == ["law", "poems"]
    assert reading.session.rows_from == view.OWN_TEXT


def test_a_named_task_is_added_to_the_visitors_other_tasks() -> None:
    law = view.read(CHAT, table_of(2), view.OWN_TEXT, SETTINGS, task="law").session
    both = view.read(law, table_of(3), view.OWN_TEXT, SETTINGS, task="poems")
    assert [row["task"] for row in both.session.rows] == ["law"] * 2 + ["poems"] * 3
    assert "2 rows of other tasks stay in use." in both.notes
    again = view.read(both.session, table_of(1), view.OWN_TEXT, SETTINGS, task="law")
    assert [row["task"] for row in again.session.rows] == ["poems"] * 3 + ["law"]  # read again, not added twice
    assert [row["task"] for row in view.read(both.session, table_of(1), view.OWN_TEXT, SETTINGS).session.rows] == [""]


def test_demo_rows_and_rows_without_a_task_do_not_stay_beside_a_named_task() -> None:
    for before in (view.use_demo(CHAT, "both"), view.read(CHAT, table_of(2), view.OWN_TEXT, SETTINGS).session):
        reading = view.read(before, table_of(3), view.OWN_TEXT, SETTINGS, task="law")
        assert [row["task"] for row in reading.session.rows] == ["law"] * 3
        assert reading.session.demo_tasks == ()


@pytest.mark.parametrize(("task", "words"), [("x" * 61, "61 characters"), ("Law", "have the same name")])
def test_a_name_that_cannot_be_changes_nothing(task: str, words: str) -> None:
    text = '{"input": "a", "output": "b"}\n{"input": "c", "output": "d", "task": "law"}'
    reading = view.read(CHAT, text, view.OWN_TEXT, SETTINGS, task=task)
    assert words in reading.problems[0]
    assert reading.session is CHAT


def test_a_name_that_another_task_in_use_bears_nearly_is_refused() -> None:
    law = view.read(CHAT, table_of(2), view.OWN_TEXT, SETTINGS, task="law").session
    reading = view.read(law, table_of(2), view.OWN_TEXT, SETTINGS, task="Law")
    assert "have the same name" in reading.problems[0]
    assert reading.session is law


def test_tasks_together_keep_the_page_s_limit() -> None:
    law = view.read(CHAT, table_of(40), view.OWN_TEXT, PUBLIC, task="law").session
    reading = view.read(law, table_of(40), view.OWN_TEXT, PUBLIC, task="poems")
    assert reading.problems == ("With the other tasks these are 80 rows; 64 are allowed.",)
    assert reading.session is law


def test_a_hostile_name_of_a_task_is_text() -> None:
    reading = view.read(CHAT, table_of(2), view.OWN_TEXT, SETTINGS, task="<img src=x onerror=1>")
    shown = view.reading_html(reading) + view.summary_html(reading.session, SETTINGS)
    shown += view.preview_html(reading.session, 0, None)
    assert "<img" not in shown


def test_a_conversation_offers_its_last_turn_as_the_answer() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    reading = view.read(CHAT, json.dumps([{"id": 1, "messages": turns}]), view.OWN_TEXT, SETTINGS)
    assert reading.columns == Columns("messages", "")
    assert view.answer_choices(reading) == [
        ("id", "id"), ("messages", "messages"), ("the last assistant turn", ""),
    ]  # fmt: skip


def test_a_public_page_reads_little() -> None:
    assert view.read(CHAT, table_of(65), view.OWN_TEXT, PUBLIC).problems == (
        "There are 65 rows; at most 64 are read here: leave some out.",)  # fmt: skip
    assert view.read(CHAT, table_of(65), view.OWN_TEXT, SETTINGS).problems == ()
    long = f"input,output\n{'a' * 8000},b\n"
    assert view.read(CHAT, long, view.OWN_TEXT, PUBLIC).problems == (
        "Line 2: this row has 8,001 characters; at most 8,000 are read: shorten it.",)  # fmt: skip


# ---- the rows in use -------------------------------------------------------------------------------------------------


def test_rows_held_out_are_counted_and_explained() -> None:
    own = view.read(CHAT, table_of(32), view.OWN_TEXT, SETTINGS).session
    assert plain(view.summary_html(own, SETTINGS)) == (
        "In use: Your text Task Rows To measure on Held out all 32 24 8 24 rows to measure on, 8 held out for the "
        "scoreboard: a merge is judged on rows that its weights were not computed from."
    )
    few = view.read(CHAT, table_of(5), view.OWN_TEXT, SETTINGS).session
    assert "(same rows: optimistic)" in view.summary_html(few, SETTINGS)
    demo = view.use_demo(CHAT, "both")
    assert plain(view.summary_html(demo, SETTINGS)) == (
        "In use: Verse + Dictionary (demo) Task Rows verse 32 dictionary 32 64 rows to measure on; 32 other rows of "
        "each task are held out for the scoreboard."
    )
    search = view.use_demo(replace(Session(), model_type="encoder"), "both")
    assert f"{SEARCH_ROWS} other rows of each task" in view.summary_html(search, SETTINGS)


def test_each_row_says_on_which_side_it_is() -> None:
    own = view.read(CHAT, table_of(32), view.OWN_TEXT, SETTINGS).session
    places = [view.place_html(own, i) for i in range(32)]
    assert places[0].startswith("Row 1 of 32 · ")
    assert sum(place.endswith("held out") for place in places) == 8
    assert sum(place.endswith("to measure on") for place in places) == 24
    assert view.place_html(view.use_demo(CHAT, "verse"), 2) == "Row 3 of 32 · verse"


@pytest.mark.parametrize(("index", "step", "expected"), [
    (0, 1, 1), (1, 1, 0), (0, -1, 1), (7, 0, 0), (-1, 0, 0), ("1", 0, 0), (None, 0, 0),
])  # fmt: skip
def test_row_numbers_from_a_browser_always_exist(index: object, step: int, expected: int) -> None:
    two = replace(CHAT, rows=({"input": "a", "output": "b", "task": ""},) * 2)
    assert view.row_index(two, index, step) == expected
    assert view.row_index(CHAT, index, step) == 0


# ---- previews --------------------------------------------------------------------------------------------------------

ROW = {"input": "<img src=x>", "output": "<script>", "task": ""}
PASSAGES = {"query": "<q>", "pos": ["first", "second"], "neg": ["<n>"], "task": ""}


def test_the_answer_is_marked_and_every_text_escaped() -> None:
    shown = view.preview_html(replace(CHAT, rows=(ROW,)), 0, None)
    assert '<mark class="scored">&lt;script&gt;</mark>' in shown
    assert "&lt;img src=x&gt;" in shown
    assert "<img" not in shown
    assert plain(shown).endswith("Underlined is the answer.")


def test_the_exact_text_is_shown_with_its_scored_tokens() -> None:
    exact = ExactRow((("<|user|>\n<q>\n", False), ("<answer><|end|>", True)), 12, 4, ("Chat format: <t>.",))
    shown = view.preview_html(replace(CHAT, rows=(ROW,)), 0, exact)
    assert '&lt;|user|&gt;\n&lt;q&gt;\n<mark class="scored">&lt;answer&gt;&lt;|end|&gt;</mark>' in shown
    assert plain(shown).endswith(
        "Underlined is scored: the loss is the mean over these 4 of 12 tokens. The rest is only read. "
        "Chat format: &lt;t&gt;."
    )


def test_earlier_turns_are_shown() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    shown = view.preview_html(replace(CHAT, rows=({**ROW, "messages": turns},)), 0, None)
    assert plain(shown).startswith("system Be brief. user Hi assistant &lt;script&gt;")


def test_a_query_is_shown_with_what_it_competes_with() -> None:
    session = replace(SEARCH, rows=(PASSAGES,))
    shown = plain(view.preview_html(session, 0, None))
    assert shown.startswith("query &lt;q&gt; to be found first also right second not to be found &lt;n&gt;")
    pieces = (("query: <q>\n", False), ("passage: first", True), ("\npassage: <n>", False))
    exact = ExactRow(pieces, 0, 0, ("Each query competes with 64 passages.",))
    shown = plain(view.preview_html(session, 0, exact))
    assert shown.startswith(
        "query query: &lt;q&gt; to be found passage: first also right second not to be found passage"
    )
    assert shown.endswith(
        "has to be nearer to the query than every other passage. Each query competes with 64 passages."
    )


def test_without_rows_there_is_a_hint_and_nothing_to_browse() -> None:
    assert "choose a demo set or paste your own" in view.summary_html(CHAT, SETTINGS)
    assert view.place_html(CHAT, 0) == view.preview_html(CHAT, 0, None) == ""
