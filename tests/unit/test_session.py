"""The session: shares follow from what was chosen and measured, and nothing stale counts as current."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from components.session import Session
from llm_merge.errors import RecipeError
from llm_merge.recipe import ModelEntry, Recipe

ROWS = ({"input": "a", "output": "b", "task": "x"}, {"input": "c", "output": "d", "task": "y"})


@dataclass(frozen=True)
class Table:
    """Losses as the measurement gives them: just what a session asks of it."""

    models: tuple[str, ...]
    means: tuple[float, ...]
    rows_hash: str

    def mean(self, model: str) -> float:
        return self.means[self.models.index(model)]


def chosen() -> Session:
    return Session(base="base", fine_tunes=("a", "b")).with_rows(ROWS, "mine", ())


def measured(session: Session, **means: float) -> Session:
    return session.with_losses(Table(tuple(means), tuple(means.values()), session.rows_hash))  # type: ignore[arg-type]


def test_shares_are_equal_until_measured_then_follow_the_losses() -> None:
    session = chosen()
    assert (session.shares, session.origin) == ((0.5, 0.5), "equal")
    after = measured(session, base=3.0, a=1.0, b=2.0)
    assert after.origin == "losses"
    assert after.shares[0] > after.shares[1]


def test_the_base_takes_a_share_only_when_included() -> None:
    session = measured(chosen(), base=3.0, a=1.0, b=2.0)
    assert session.mixed == ("a", "b")
    assert session.with_base_included(True).mixed == ("base", "a", "b")
    assert sum(session.with_base_included(True).shares) == pytest.approx(1)


def test_losses_of_other_rows_or_of_too_few_models_do_not_count() -> None:
    session = measured(chosen(), a=1.0, b=2.0)
    assert session.table is not None
    assert session.with_rows(ROWS[:1], "fewer", ()).table is None
    assert session.with_models("decoder", "base", ("a", "c")).table is None


def test_hand_shares_hold_until_the_models_change_or_the_temperature_is_used() -> None:
    session = measured(chosen(), a=1.0, b=2.0).with_hand_shares((0.9, 0.1))
    assert (session.shares, session.origin) == ((0.9, 0.1), "hand")
    assert session.with_temperature(1.0).origin == "losses"
    assert session.with_models("decoder", "base", ("a",)).shares == (1.0,)


def test_wrong_shares_and_temperatures_are_refused_in_the_cores_words() -> None:
    with pytest.raises(RecipeError, match=r"sum to 0\.9"):
        chosen().with_hand_shares((0.5, 0.4))
    with pytest.raises(RecipeError, match="finite"):
        chosen().with_hand_shares((float("nan"), 1.0))
    with pytest.raises(RecipeError, match="temperature"):
        chosen().with_temperature(0)


def test_saved_belongs_to_the_recipe_it_was_written_with() -> None:
    session = chosen()
    saved = replace(session, saved=(session.recipe_key, "/out"))
    assert saved.saved_folder == "/out"
    assert saved.with_hand_shares((0.6, 0.4)).saved_folder == ""


def test_rows_of_another_shape_go_with_the_model_type() -> None:
    assert chosen().with_models("encoder", "e", ("f",)).rows == ()
    assert chosen().with_models("encoder-decoder", "e", ("f",)).rows == ROWS


def test_the_same_model_twice_counts_once() -> None:
    assert Session(base="base", fine_tunes=("a", "a", "", "base")).models == ("base", "a")


def test_held_out_rows_never_decide_the_shares() -> None:
    rows = [{"input": f"question {i}", "output": "answer", "task": "t"} for i in range(24)]
    session = Session(base="base", fine_tunes=("a", "b")).with_rows(rows, "mine", ())
    assert (len(session.measured_rows), len(session.rows)) == (18, 24)
    demo = session.with_rows(rows, "demo", ("t",))
    assert demo.measured_rows == demo.rows
    few = session.with_rows(rows[:5], "mine", ())
    assert few.measured_rows == few.rows


# ---- a recipe made on Layers -----------------------------------------------------------------------------------------


def layered() -> Session:
    recipe = Recipe((ModelEntry("a", 0.4), ModelEntry("b", 0.4)), "breadcrumbs", "base", None, normalize=False)
    return measured(chosen(), base=3.0, a=1.0, b=2.0).with_layered(recipe, "Hi-Merging")


def test_a_recipe_made_on_layers_takes_the_place_of_the_shares_and_gives_it_back() -> None:
    session = layered()
    assert (session.origin, session.shares_from, session.layered_from) == ("layers", "losses", "Hi-Merging")
    assert session.recipe == session.layered
    back = session.with_layered(None)
    assert (back.origin, back.layered_from) == ("losses", "")
    assert back.recipe == measured(chosen(), base=3.0, a=1.0, b=2.0).recipe


def test_it_is_written_in_the_type_that_was_chosen_and_its_results_belong_to_it() -> None:
    session = replace(layered(), dtype="float16")
    assert session.recipe is not None
    assert session.recipe.dtype == "float16"
    assert session.recipe_key == session.recipe.to_yaml() != session.with_layered(None).recipe_key
    saved = replace(session, saved=(session.recipe_key, "/out"))
    assert saved.saved_folder == "/out"
    assert saved.with_layered(None).saved_folder == ""


def test_whoever_moves_the_shares_gives_the_recipe_of_layers_up() -> None:
    given_up = (
        layered().with_temperature(1.0),
        layered().with_hand_shares((0.2, 0.8)),
        layered().with_base_included(True),
        layered().with_models("decoder", "base", ("a", "c")),
        layered().with_models("decoder", "other base", ("a", "b")),
        layered().with_models("decoder", "base", ("b", "a")),
    )
    assert [(session.layered, session.layered_from) for session in given_up] == [(None, "")] * 6
    assert [session.origin for session in given_up[:2]] == ["losses", "hand"]


def test_it_outlives_other_rows_losses_and_the_same_models_again() -> None:
    session = layered()
    for kept in (
        session.with_rows(ROWS[:1], "fewer", ()),
        session.with_losses(None),
        session.with_models("decoder", "base", ("a", "b")),
    ):
        assert kept.layered is not None
        assert kept.origin == "layers"
