"""The scoreboard's rows and words: held out or marked optimistic, errors beside every difference, red when worse."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components.live import LiveModels
from components.scoreboard_panel import score_work
from components.session import Session
from components.settings import Settings
from components.views import scoreboard_view as view
from components.views.scoreboard_view import RowSet, Scored
from llm_merge.demo import demo_path
from llm_merge.errors import MergeError
from llm_merge.measurements import MeasurementCache
from llm_merge.recipe import Recipe
from llm_merge.scoreboard import ScoredModel, score
from llm_merge.workbench import bench_for
from tests.tiny_models import TinyFamily

ROWS = tuple({"task": "", "input": f"question {i}", "output": f"answer {i}"} for i in range(40))


@pytest.fixture
def session() -> Session:
    chosen = Session().with_models("decoder", "/m/base", ["/m/king", "/m/words"])
    return chosen.with_hand_shares([0.25, 0.75])


def board(merged: float, *, n: int = 30) -> Any:
    """A board where the base loses 3 nats, king 2, words 2.5, and the merge what is asked."""

    def values(mean: float) -> tuple[tuple[float, ...], ...]:
        return (tuple(mean + 0.01 * (i % 2) for i in range(n)),)

    models = [
        ScoredModel("Base", "base", values(3.0)),
        ScoredModel("king", "specialist", values(2.0)),
        ScoredModel("words", "specialist", values(2.5)),
        ScoredModel(
            "Merged", "merged", tuple(tuple(v + 0.001 * i for i, v in enumerate(row)) for row in values(merged))
        ),
    ]
    return score(models, ["verse"])


def test_the_demo_is_scored_on_its_held_out_rows_and_on_general_ones(session: Session) -> None:
    sets = view.row_sets(replace(session, demo_tasks=("verse", "dictionary")), Settings())
    assert [(found.name, len(found.rows), found.same_rows) for found in sets] == [
        ("verse", 32, False), ("dictionary", 32, False), ("general", 32, False),
    ]  # fmt: skip
    public = view.row_sets(
        replace(session, demo_tasks=("verse",), model_type="encoder"), Settings.for_public(Path("x"))
    )
    assert [len(found.rows) for found in public] == [64, 64]


def test_demo_specialists_without_rows_are_scored_on_what_they_were_made_for(session: Session) -> None:
    bare = session.with_models("decoder", demo_path("smollm2"), [demo_path("dictionary"), demo_path("king-james")])
    assert [found.name for found in view.row_sets(bare, Settings())] == ["dictionary", "verse", "general"]
    assert [found.name for found in view.row_sets(session, Settings())] == ["general"]


def test_twenty_own_rows_and_more_are_held_out_in_part(session: Session) -> None:
    own = session.with_rows(ROWS, "mine", ())
    first, general, examples = view.row_sets(own, Settings())
    assert (first.name, len(first.rows), first.same_rows, general.name) == ("held-out rows", 10, False, "general")
    assert (examples.rows, examples.seen) == (own.measured_rows, True)
    assert "held out" in first.note
    assert not set(map(str, first.rows)) & set(map(str, own.measured_rows))


def test_few_own_rows_are_scored_again_and_called_optimistic(session: Session) -> None:
    own = session.with_rows(ROWS[:6], "mine", ())
    first = view.row_sets(own, Settings())[0]
    assert (first.name, len(first.rows), first.same_rows) == ("your rows", 6, True)
    assert first.note == "Your rows are the ones that the shares were computed from: optimistic."
    assert "optimistic" in view.about_html(own, Settings())


def test_nothing_to_score_says_what_to_do() -> None:
    with pytest.raises(MergeError, match="There is nothing to try yet: choose a base and a fine-tune in Models"):
        view.row_sets(Session(), Settings())
    assert "choose a base" in view.about_html(Session(), Settings())


def scored(found: Any, session: Session, *notes: str) -> Scored:
    return Scored(session.recipe_key, "king 0.25 / words 0.75", {"loss": found}, notes)


def test_every_difference_has_its_error_and_a_loss_that_falls_a_minus(session: Session) -> None:
    text = view.scored_html(scored(board(2.2), session), "loss", session)
    assert '<td class="up">2.005 <small>−1.00 ± 0.00</small></td>' in text
    assert "loss in nats, lower is better" in text
    assert "n = 30" in text
    assert "Merged is king 0.25 / words 0.75." in text
    assert "The merge keeps" in text
    assert "problem" not in text


def test_worse_than_every_parent_is_said_in_red(session: Session) -> None:
    text = view.scored_html(scored(board(2.9), session), "loss", session)
    assert 'class="message problem" role="alert">On verse the merge is worse than each of its parents' in text
    assert '<td class="worst">' in text


def test_the_same_rows_are_called_optimistic_and_an_old_mix_grey(session: Session) -> None:
    found = replace(board(2.2), same_rows=True)
    assert "The shares were computed from these rows: optimistic." in view.scored_html(
        scored(found, session), "loss", session
    )
    changed = session.with_hand_shares([0.5, 0.5])
    old = view.scored_html(scored(found, session), "loss", changed)
    assert 'class="scoreboard stale"' in old
    assert "Made with king 0.25 / words 0.75; the mix has changed since." in old


def test_names_from_outside_are_escaped(session: Session) -> None:
    evil = "<img src=x>"
    found = board(2.2)
    lines = tuple(replace(line, name=evil) for line in found.lines)
    text = view.scored_html(scored(replace(found, lines=lines, sets=(evil,)), session, evil), "loss", session)
    assert "<img" not in text


def finish(steps: Any) -> Any:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def test_the_job_scores_the_merge_that_the_session_describes(tiny_llama: TinyFamily, tmp_path: Path) -> None:
    from llm_merge.evaluation import losses, prepare, resolve_format

    base, *tunes = tiny_llama.references
    session = Session().with_models("decoder", base, tunes).with_hand_shares([0.3, 0.7])
    cache, rows = MeasurementCache(tmp_path), RowSet("verse", ROWS[:3])
    result = finish(score_work(session, [rows], Settings(device="cpu"), cache, LiveModels())(threading.Event()))
    assert isinstance(result, Scored)
    assert result.recipe_key == session.recipe_key
    found = result.boards["loss"]
    assert [(line.name, line.role) for line in found.lines] == [
        ("Base", "base"), ("tune-1", "specialist"), ("tune-2", "specialist"), ("Merged", "merged"),
    ]  # fmt: skip
    assert session.recipe is not None
    for line, recipe in ((found.lines[0], Recipe.single(base)), (found.lines[3], session.recipe)):
        bench = bench_for(recipe, "decoder", "cpu", base)
        prepared = prepare(rows.rows, "decoder", bench.tokenizer, None, resolve_format([bench.checkpoint]))
        expected = [loss for _, loss in losses(bench, prepared)]
        assert line.cells[0].mean == pytest.approx(sum(expected) / 3, abs=1e-5)


def test_an_embedding_model_is_scored_by_ranks_too(tiny_bert: TinyFamily, tmp_path: Path) -> None:
    from llm_merge.retrieval import retrieval

    base, *tunes = tiny_bert.references
    session = Session().with_models("encoder", base, tunes).with_hand_shares([0.3, 0.7])
    rows = RowSet(
        "verse", tuple({"query": f"{q} world", "pos": [f"{q} is said"]} for q in ("he", "ship", "Paris", "corn"))
    )
    cache = MeasurementCache(tmp_path)
    result = finish(score_work(session, [rows], Settings(device="cpu"), cache, LiveModels())(threading.Event()))
    assert list(result.boards) == ["loss", "R@1", "MRR", "nDCG@10"]
    assert session.recipe is not None
    found = retrieval(bench_for(session.recipe, "encoder", "cpu", base), rows.rows)
    assert result.boards["MRR"].lines[3].cells[0].mean == pytest.approx(found.mrr.mean)
    assert result.board("no such measure") is result.boards["loss"]
