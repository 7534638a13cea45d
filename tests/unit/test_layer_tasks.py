"""Which rows belong to which fine-tune on the Layers tab, what is missing, and that held-out rows never decide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components.session import Session
from components.settings import Settings
from components.views import examples
from components.views import layer_tasks as view
from llm_merge.demo import demo_examples, demo_path
from llm_merge.errors import ExampleError, MergeError
from llm_merge.tasks import Task

SETTINGS = Settings(home=Path("/nowhere"))
PUBLIC = Settings.for_public(Path("/nowhere"))
HOSTILE = "<img src=x onerror=1>"


def rows(task: str, count: int) -> list[dict[str, Any]]:
    return [{"input": f"{task} question {n}", "output": f"{task} answer {n}", "task": task} for n in range(count)]


def own(*given: dict[str, Any], tunes: tuple[str, ...] = ("/m/a", "/m/b")) -> Session:
    return Session().with_models("decoder", "/m/base", tunes).with_rows(given, "mine", ())


def demo() -> Session:
    session = Session(base=demo_path("smollm2"), fine_tunes=(demo_path("king-james"), demo_path("dictionary")))
    return examples.use_demo(session, "both")


def texts(found: tuple[Any, ...]) -> set[tuple[str, str]]:
    return {(row["input"], row["output"]) for row in found}


def by_name(session: Session, count: int = 8) -> dict[str, Task]:
    return {task.name: task for task in view.tasks_for(session, SETTINGS, count)}


# ---- which rows ------------------------------------------------------------------------------------------------------


def test_each_demo_specialist_is_analysed_on_its_own_task_and_general_rows_stand_beside() -> None:
    tasks = by_name(demo())
    assert list(tasks) == ["verse", "dictionary", "general"]
    assert [tasks[name].model for name in tasks] == [demo_path("king-james"), demo_path("dictionary"), ""]
    assert [len(tasks[name].analysis) for name in tasks] == [8, 8, 0]
    for name in ("verse", "dictionary"):
        reported = demo_examples("decoder", name, "heldout")
        assert texts(tasks[name].held_out) == texts(reported)  # those that the scoreboard reports
        assert not texts(tasks[name].analysis) & texts(reported)
        assert not tasks[name].same_rows
    assert len(tasks["general"].held_out) == len(demo_examples("decoder", "general", "heldout")) > 0
    assert {row["task"] for row in tasks["general"].held_out} == {"general"}


def test_more_rows_contain_the_fewer_ones() -> None:
    few, more = by_name(demo(), 8), by_name(demo(), 16)
    assert texts(few["verse"].analysis) < texts(more["verse"].analysis)
    assert few["verse"].held_out == more["verse"].held_out


@pytest.mark.parametrize("count", [24, 40])
def test_own_rows_that_are_held_out_are_never_analysed(count: int) -> None:
    session = own(*rows("law", count), *rows("poems", count))
    tasks = by_name(session, 1000)
    analysed = texts(tuple(row for task in tasks.values() for row in task.analysis))
    reported = texts(tuple(row for task in tasks.values() for row in task.held_out))
    assert not analysed & reported
    assert analysed == texts(session.measured_rows)
    assert analysed | reported == texts(session.rows)
    assert not any(task.same_rows for task in tasks.values())


def test_a_row_that_stands_there_twice_is_on_one_side_only() -> None:
    again = [*rows("law", 12), *rows("law", 12), *rows("poems", 12), *rows("poems", 12)]
    for task in by_name(own(*again), 1000).values():
        assert not texts(task.analysis) & texts(task.held_out)
        assert task.analysis


def test_thousands_of_rows_are_divided_by_their_place_not_by_comparing_each_with_all() -> None:
    """2,500 held-out rows among 10,000: comparing each with all others would take 20 million comparisons."""

    class Counted(dict[str, Any]):
        compared = 0

        def __eq__(self, other: object) -> bool:
            Counted.compared += 1
            return super().__eq__(other)

        __hash__ = None  # type: ignore[assignment]

    session = own(*map(Counted, [*rows("law", 5000), *rows("poems", 5000)]))
    Counted.compared = 0
    view.tasks_for(session, SETTINGS, 8)
    assert Counted.compared < 20_000


def test_few_own_rows_are_analysed_and_reported_alike_and_that_is_said() -> None:
    session = own(*rows("law", 3), *rows("poems", 3))
    tasks = by_name(session)
    assert all(task.same_rows and task.analysis for task in tasks.values())
    assert "look better than they are" in view.owners_html(session, SETTINGS, 8)


def test_tasks_are_given_to_fine_tunes_in_order_unless_they_bear_their_names() -> None:
    assert view.owners(own(*rows("law", 2), *rows("poems", 2))) == {"law": "/m/a", "poems": "/m/b"}
    named = own(*rows("law", 2), *rows("poems", 2), tunes=("/m/poems", "/m/law"))
    assert view.owners(named) == {"law": "/m/law", "poems": "/m/poems"}


def test_a_third_task_belongs_to_nobody_and_is_reported_beside() -> None:
    tasks = by_name(own(*rows("law", 10), *rows("poems", 10), *rows("cooking", 10)))
    assert tasks["cooking"].model == ""


# ---- what is missing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("session", "words"),
    [
        (Session(), "choose one in Models"),
        (Session(base="/m/base"), "Choose a fine-tune of the base"),
        (Session(base="/m/base", fine_tunes=("/m/a",), model_type="reranker"), "Rerankers cannot be measured yet"),
        (Session(base="/m/base", fine_tunes=("/m/a",)), "Add examples in Examples first"),
        (own({"input": "q", "output": "a", "task": ""}), "do not say which task they are of"),
        (own({"input": "q", "output": "a", "task": "  "}), "do not say which task they are of"),
        (own({"input": "q", "output": "a"}), "do not say which task they are of"),
        (own(*rows("law", 2), {"input": "q", "output": "a"}), "do not say which task they are of"),
        (own(*rows("law", 2)), "“b” has no task"),
        (own(*rows("general", 2), *rows("law", 2)), "“b” has no task"),
    ],
)
def test_the_first_thing_that_is_missing_is_said_in_one_sentence(session: Session, words: str) -> None:
    shown = view.missing_html(session, SETTINGS)
    assert words in shown
    assert shown.count("<p") <= 1
    assert view.owners_html(session, SETTINGS, 8) == ""
    with pytest.raises(MergeError, match=words.replace("(", r"\(")):
        view.tasks_for(session, SETTINGS, 8)


def test_nothing_is_said_when_nothing_is_missing() -> None:
    assert view.missing_html(demo(), SETTINGS) == ""
    assert view.missing_html(own(*rows("law", 2), *rows("poems", 2)), SETTINGS) == ""


def test_one_fine_tune_needs_one_task_only() -> None:
    session = own(*rows("law", 2), tunes=("/m/a",))
    assert [task.model for task in view.tasks_for(session, SETTINGS, 8)] == ["/m/a"]


# ---- what a visitor chooses ------------------------------------------------------------------------------------------


def test_a_visitor_says_whose_task_it_is_and_the_other_gets_what_is_left() -> None:
    session = view.with_owner(own(*rows("law", 2), *rows("poems", 2)), "/m/b", "law")
    assert view.owners(session) == {"law": "/m/b", "poems": "/m/a"}
    assert [task.model for task in view.tasks_for(session, SETTINGS, 8)] == ["/m/b", "/m/a"]
    back = view.with_owner(session, "/m/a", "law")
    assert view.owners(back) == {"law": "/m/a", "poems": "/m/b"}
    assert "<b>b</b> on 2 rows of law" in view.owners_html(session, SETTINGS, 8)


def test_a_choice_of_other_rows_or_models_is_forgotten() -> None:
    session = view.with_owner(own(*rows("law", 2), *rows("poems", 2)), "/m/b", "law")
    other = session.with_rows([*rows("x", 2), *rows("y", 2)], "mine", ())
    assert view.owners(other) == {"x": "/m/a", "y": "/m/b"}
    assert session.with_models("decoder", "/m/base", ("/m/a", "/m/c")).owners == ()
    with pytest.raises(ExampleError, match="not among the models any more"):
        view.with_owner(session, "/m/c", "law")


def test_results_name_what_they_belong_to() -> None:
    session = own(*rows("law", 2), *rows("poems", 2))
    key = view.layers_key(session)
    assert view.layers_key(own(*rows("law", 2), *rows("poems", 2))) == key
    assert view.layers_key(session.with_hand_shares((0.2, 0.8))) == key  # shares change no layer
    others = [
        view.with_owner(session, "/m/b", "law"),
        session.with_rows(rows("law", 2), "mine", ()),
        session.with_models("decoder", "/m/base", ("/m/b", "/m/a")),
        session.with_models("decoder", "/m/other", session.fine_tunes),
    ]
    assert len({key, *map(view.layers_key, others)}) == 5


def test_a_public_page_offers_the_fewest_rows() -> None:
    assert view.row_choices(SETTINGS) == (8, 16, 32)
    assert view.row_choices(PUBLIC) == (8,)


def test_names_from_outside_are_text() -> None:
    session = own(*rows(HOSTILE, 2), *rows("poems", 2), tunes=(f"/m/{HOSTILE}", "/m/b"))
    shown = view.owners_html(session, SETTINGS, 8) + view.missing_html(replace(session, rows=()), SETTINGS)
    shown += view.missing_html(own(*rows("poems", 2), tunes=(f"/m/{HOSTILE}", f"/n/{HOSTILE}")), SETTINGS)
    assert "&lt;img" in shown
    assert "<img" not in shown
