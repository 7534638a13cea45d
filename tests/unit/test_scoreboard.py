"""What is claimed about a merge, and what is not."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_merge.scoreboard import (
    Scoreboard,
    ScoredModel,
    from_recorded,
    mean_and_error,
    recorded_sentence,
    score,
    summary,
    worse_than_parents,
)

# Rows of very different difficulty, on which every model moves alike: only paired differences see that.
HARD = (0.0, 3.0, 1.0, 5.0, 0.5, 2.0, 4.0, 1.5)


def shifted(by: float, wobble: float = 0.01) -> tuple[float, ...]:
    return tuple(value + by + (wobble if i % 2 else -wobble) for i, value in enumerate(HARD))


def board(merged: tuple[float, float, float], **options: bool) -> Scoreboard:
    """Base 0; King James gains 1.0 on verse, Dictionary 2.0 on dictionary; the merge's gains are given."""
    models = [
        ScoredModel("Base", "base", (HARD, HARD, HARD)),
        ScoredModel("King James", "specialist", (shifted(-1.0), shifted(0.1), shifted(0.2)), "verse"),
        ScoredModel("Dictionary", "specialist", (shifted(0.1), shifted(-2.0), shifted(0.1)), "dictionary"),
        ScoredModel("Merged", "merged", tuple(shifted(-gain) for gain in merged)),
    ]
    return score(models, ["verse", "dictionary", "general"], **options)


def test_differences_are_paired() -> None:
    cell = board((0.5, 1.0, 0.0)).lines[1].cells[0]
    assert cell.n == 8
    assert cell.gain == pytest.approx(1.0)
    assert cell.gain_error == pytest.approx(0.01 * math.sqrt(8 / 7) / math.sqrt(8))
    assert cell.error > 50 * cell.gain_error  # the rows differ far more than the models
    assert cell.mean == pytest.approx(sum(HARD) / 8 - 1)


def test_the_sentence_says_what_is_kept_and_what_it_costs() -> None:
    assert summary(board((0.84, 1.92, -0.03))) == (
        "The merge keeps 84 % of King James's gain, 96 % of Dictionary's; general 0.03 ± 0.00 nats worse."
    )


def test_no_percentage_of_a_gain_within_noise() -> None:
    noisy = tuple(value + (0.5 if i % 2 else -0.6) for i, value in enumerate(HARD))
    models = [
        ScoredModel("Base", "base", (HARD, HARD)),
        ScoredModel("King James", "specialist", (noisy, HARD), "verse"),
        ScoredModel("Merged", "merged", (shifted(-0.9), shifted(-0.004, 0.2))),
    ]
    words = summary(score(models, ["verse", "general"]))
    assert (
        words
        == "King James itself is within noise of the base on verse; general 0.00 ± 0.08 nats better (within noise)."
    )
    assert "%" not in words


def test_a_lost_gain_is_said_without_a_percentage() -> None:
    assert summary(board((-0.5, 1.0, 0.1))) == (
        "The merge keeps nothing of King James's gain, 50 % of Dictionary's; general 0.10 ± 0.00 nats better."
    )


def test_one_row_proves_nothing() -> None:
    models = [
        ScoredModel("Base", "base", ((2.0,),)),
        ScoredModel("A", "specialist", ((1.0,),)),
        ScoredModel("Merged", "merged", ((1.2,),)),
    ]
    assert summary(score(models, ["mine"])) == "A itself is within noise of the base on mine."


def test_a_specialist_without_a_task_is_judged_where_it_gains_most() -> None:
    models = [
        ScoredModel("Base", "base", (HARD, HARD)),
        ScoredModel("A", "specialist", (shifted(-0.1), shifted(-1.0))),
        ScoredModel("Merged", "merged", (shifted(-0.1), shifted(-0.5))),
    ]
    assert summary(score(models, ["one", "two"])) == "The merge keeps 50 % of A's gain; one 0.10 ± 0.00 nats better."


def test_retrieval_is_better_when_higher() -> None:
    models = [
        ScoredModel("Base", "base", ((0.1, 0.2, 0.1, 0.2),)),
        ScoredModel("A", "specialist", ((0.5, 0.6, 0.5, 0.6),)),
        ScoredModel("Merged", "merged", ((0.3, 0.4, 0.31, 0.4),)),
    ]
    found = score(models, ["mine"], metric="MRR")
    assert found.lines[1].cells[0].gain == pytest.approx(0.4)
    assert summary(found) == "The merge keeps 51 % of A's gain."


def test_worse_than_every_parent_is_said() -> None:
    assert worse_than_parents(board((0.5, 1.0, 0.0))) == ""
    assert worse_than_parents(board((-0.3, 1.0, -0.4))) == (
        "On verse and general the merge is worse than each of its parents: leave a model out, or give the base a share."
    )


def test_worse_within_noise_is_not_called_worse() -> None:
    noisy = tuple(value + (1.5 if i % 2 else -1.2) for i, value in enumerate(HARD))
    models = [ScoredModel("A", "specialist", (HARD,)), ScoredModel("Merged", "merged", (noisy,))]
    found = score(models, ["mine"])
    assert found.lines[1].cells[0].mean > found.lines[0].cells[0].mean
    assert worse_than_parents(found) == ""
    assert summary(found) == ""  # without a base there is no gain to keep


@given(st.lists(st.floats(min_value=-50, max_value=50), min_size=2, max_size=30), st.floats(min_value=-5, max_value=5))
def test_a_shift_moves_the_mean_and_not_the_error(values: list[float], shift: float) -> None:
    mean, error = mean_and_error(values)
    moved_mean, moved_error = mean_and_error([value + shift for value in values])
    assert moved_mean == pytest.approx(mean + shift, abs=1e-9)
    assert moved_error == pytest.approx(error, abs=1e-9)


# ── recorded ────────────────────────────────────────────────────────────────────────────────────────────────────────


def recorded(general: float = 0.03) -> dict[str, object]:
    """A file as scripts/measure_demo.py writes it."""

    def entry(weights: dict[str, float], task: str, difference: float) -> dict[str, object]:
        return {
            "weights": weights, "task": task, "metric": "loss", "n": 200, "mean": 2 + difference, "se": 0.1,
            "difference": difference, "difference_se": 0.0 if weights == {"smollm2": 1} else 0.02,
        }  # fmt: skip

    scores = []
    for task, king_james, dictionary, half in (
        ("verse", -0.8, 0.1, -0.7),
        ("dictionary", 0.0, -1.5, -1.2),
        ("general", 0.1, 0.1, general),
    ):
        scores += [
            entry({"smollm2": 1}, task, 0.0),
            entry({"king-james": 1}, task, king_james),
            entry({"dictionary": 1}, task, dictionary),
            entry({"king-james": 0.5, "dictionary": 0.5}, task, half),
            entry({"king-james": 0.9, "dictionary": 0.1}, task, king_james),
        ]
    return {"recorded_on": "2026-11-21", "scores": scores}


def test_the_recorded_sentence_is_that_of_the_nearest_mix() -> None:
    words = "keeps 88 % of King James's gain, 80 % of Dictionary's; general 0.03 ± 0.02 nats worse (within noise)."
    assert recorded_sentence(recorded(), {"king-james": 0.5, "dictionary": 0.5}) == f"The merge {words}"
    assert recorded_sentence(recorded(), {"king-james": 0.6, "dictionary": 0.4}) == f"At 0.50 / 0.50 the merge {words}"
    assert recorded_sentence(recorded(), {"king-james": 0.8, "dictionary": 0.2}).startswith("At 0.90 / 0.10 the merge")


def test_nothing_is_said_of_a_mix_that_was_not_recorded() -> None:
    assert recorded_sentence(recorded(), {"smollm2": 0.4, "king-james": 0.3, "dictionary": 0.3}) == ""
    assert recorded_sentence(recorded(), {"king-james": 1.0}) == ""
    assert from_recorded({"scores": [{"metric": "loss"}]}, {"king-james": 0.5, "dictionary": 0.5}) is None
    assert recorded_sentence({}, {"king-james": 0.5, "dictionary": 0.5}) == ""


def test_a_recorded_board_has_base_parents_and_merge() -> None:
    found = from_recorded(recorded(), {"king-james": 0.5, "dictionary": 0.5})
    assert found is not None
    roles = [("SmolLM2 135M Instruct", "base"), ("King James", "specialist"), ("Dictionary", "specialist")]
    assert [(line.name, line.role) for line in found.lines] == [*roles, ("Merged", "merged")]
    assert found.lines[1].cells[0].gain == 0.8


def test_rows_that_the_shares_come_from_are_shown_and_claimed_nothing_of() -> None:
    rows = ((2.0, 2.1, 2.2), (3.0, 3.1, 3.2))
    models = [
        ScoredModel("Base", "base", rows),
        ScoredModel("A", "specialist", ((1.0, 1.2, 1.1), (2.9, 3.0, 3.3)), task="verse"),
        ScoredModel("Merged", "merged", ((1.2, 1.3, 1.4), (9.0, 9.1, 9.2))),
    ]
    board = score(models, ["verse", "example rows"], seen=["example rows"])
    assert board.lines[2].cells[1].mean == pytest.approx(9.1)
    assert "example rows" not in summary(board)
    assert (
        worse_than_parents(board)
        == "On verse the merge is worse than each of its parents: leave a model out, or give the base a share."
    )
