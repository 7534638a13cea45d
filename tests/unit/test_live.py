"""The pool of resident models: bounded, one borrower at a time, and nobody's recipe in another's answer."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

import pytest

from components import live
from components.answering import answer_work, search_work
from components.jobs import Step
from components.live import LiveModels, memory_of, why_not
from components.session import Session
from components.settings import Settings
from components.views.try_view import MERGED_NAME, Answers, Found, columns
from llm_merge.checkpoint import open_checkpoint
from llm_merge.errors import MergeError, Stopped
from llm_merge.evaluation import resolve_format
from llm_merge.generation import GenerationSettings, generate
from llm_merge.recipe import Recipe
from llm_merge.workbench import bench_for
from tests.tiny_models import TinyFamily


@dataclass
class FakePlan:
    recipe: Recipe


class FakeBench:
    """Holds the last recipe that it followed."""

    def __init__(self, *_: Any) -> None:
        self.plan: FakePlan | None = None

    def follow(self, recipe: Recipe) -> None:
        self.plan = FakePlan(recipe)


@pytest.fixture
def settings() -> Settings:
    return Settings(device="cpu")


def size(family: TinyFamily, settings: Settings) -> int:
    return memory_of(open_checkpoint(str(family.base)), settings)


def test_one_model_a_recipe_while_the_budget_lasts(tiny_llama: TinyFamily, settings: Settings) -> None:
    recipes = [Recipe.single(model) for model in tiny_llama.references]
    base, one = tiny_llama.references[0], size(tiny_llama, settings)
    for budget, expected in ((3 * one, 3), (2 * one, 2), (one, 1)):
        pool = LiveModels(FakeBench)
        with pool.borrow(base, "decoder", recipes, replace(settings, live_memory=budget)) as benches:
            assert len(benches) == expected
            assert len(set(map(id, benches))) == expected
        assert pool.nbytes == expected * one <= budget


def test_a_model_that_is_lent_is_not_lent_again(tiny_llama: TinyFamily, settings: Settings) -> None:
    pool, recipes = LiveModels(FakeBench), [Recipe.single(tiny_llama.references[0])]
    with pool.borrow(recipes[0].references[0], "decoder", recipes, settings) as mine:
        with pool.borrow(recipes[0].references[0], "decoder", recipes, settings) as yours:
            assert mine[0] is not yours[0]
        with pool.borrow(recipes[0].references[0], "decoder", recipes, settings) as again:
            assert again[0] is yours[0]


def test_the_model_that_holds_the_recipe_is_preferred(tiny_llama: TinyFamily, settings: Settings) -> None:
    pool = LiveModels(FakeBench)
    recipes = [Recipe.single(model) for model in tiny_llama.references]
    with pool.borrow(tiny_llama.references[0], "decoder", recipes, settings) as benches:
        for bench, recipe in zip(benches, recipes, strict=True):
            bench.follow(recipe)
        holder = benches[2]
    with pool.borrow(tiny_llama.references[0], "decoder", [recipes[2]], settings) as found:
        assert found == [holder]


def test_memory_grows_with_the_columns_and_not_with_the_mixes(tiny_llama: TinyFamily, settings: Settings) -> None:
    pool, base = LiveModels(FakeBench), tiny_llama.references[0]
    for share in (0.1, 0.2, 0.3, 0.4):
        recipes = [Recipe.single(base), Recipe.linear(tiny_llama.references[1:], [share, 1 - share])]
        with pool.borrow(base, "decoder", recipes, settings) as benches:
            for bench, recipe in zip(benches, recipes, strict=True):
                bench.follow(recipe)
    assert pool.nbytes == 2 * size(tiny_llama, settings)


def test_idle_models_of_other_kinds_make_room(
    tiny_llama: TinyFamily, tiny_bert: TinyFamily, settings: Settings
) -> None:
    bert, llama = size(tiny_bert, settings), size(tiny_llama, settings)
    pool, tight = LiveModels(FakeBench), replace(settings, live_memory=max(bert, llama))
    for family, kind in ((tiny_llama, "decoder"), (tiny_bert, "encoder"), (tiny_llama, "decoder")):
        with pool.borrow(family.references[0], kind, [Recipe.single(family.references[0])], tight) as benches:
            assert len(benches) == 1
        assert pool.nbytes <= tight.live_memory


def test_who_finds_all_in_use_waits_and_can_stop_waiting(
    tiny_llama: TinyFamily, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, recipe = LiveModels(FakeBench), Recipe.single(tiny_llama.references[0])
    tight = replace(settings, live_memory=size(tiny_llama, settings))
    stop = threading.Event()
    stop.set()
    with pool.borrow(recipe.references[0], "decoder", [recipe], tight):
        with pytest.raises(Stopped), pool.borrow(recipe.references[0], "decoder", [recipe], tight, stop):
            pass
        monkeypatch.setattr(live, "WAIT", 0.0)
        with (
            pytest.raises(MergeError, match="All models that fit into memory are answering others"),
            pool.borrow(recipe.references[0], "decoder", [recipe], tight),
        ):
            pass


def test_a_model_that_could_not_be_built_leaves_no_trace(tiny_llama: TinyFamily, settings: Settings) -> None:
    def broken(*_: Any) -> Any:
        raise MergeError("no memory")

    pool, recipe = LiveModels(broken), Recipe.single(tiny_llama.references[0])
    with pytest.raises(MergeError, match="no memory"), pool.borrow(recipe.references[0], "decoder", [recipe], settings):
        pass
    assert pool.nbytes == 0


def test_a_model_that_is_too_large_says_so_with_both_sizes(tiny_llama: TinyFamily, settings: Settings) -> None:
    checkpoint = open_checkpoint(str(tiny_llama.base))
    assert why_not(checkpoint, settings) == ""
    small = replace(settings, live_memory=1000)
    assert why_not(checkpoint, small) == (
        f"This model needs {memory_of(checkpoint, small) / 1000:.3g} kB in memory and 1 kB are set aside for trying: "
        "merge it to a folder in Save, which holds one tensor at a time, and run it on a larger machine."
    )
    with (
        pytest.raises(MergeError, match="merge it to a folder in Save"),
        LiveModels(FakeBench).borrow(checkpoint.reference, "decoder", [Recipe.single(checkpoint.reference)], small),
    ):
        pass


def session_of(family: TinyFamily, kind: str) -> Session:
    base, *tunes = family.references
    return Session().with_models(kind, base, tunes).with_hand_shares([0.3, 0.7])


def finish(steps: Any) -> tuple[list[Step], Any]:
    seen = []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as end:
            return seen, end.value


@pytest.mark.parametrize("fitting", [1, 2, 3])
def test_each_column_is_its_own_recipe_s_answer(tiny_llama: TinyFamily, settings: Settings, fitting: int) -> None:
    """However many models fit at once, and whoever was answered before on the same models."""
    session = session_of(tiny_llama, "decoder")
    pool = LiveModels()
    tight = replace(settings, live_memory=fitting * size(tiny_llama, settings))
    drawn = GenerationSettings(temperature=1.5, max_new_tokens=6)
    other = replace(session, by_hand=(0.9, 0.1))
    for asked in (session, other, session):
        wanted = columns(asked, asked.models[:2])
        assert [column.name for column in wanted] == [session.base, MERGED_NAME, session.fine_tunes[0]]
        steps, answers = finish(answer_work(asked, "Hi", wanted, drawn, tight, pool)(threading.Event()))
        assert isinstance(answers, Answers)
        assert (answers.recipe_key, answers.prompt) == (asked.recipe_key, "Hi")
        fmt = resolve_format([open_checkpoint(model) for model in asked.models])
        for column, answer in zip(wanted, answers.columns, strict=True):
            alone = list(generate(bench_for(column.recipe, "decoder", "cpu", session.base), "Hi", drawn, fmt))
            assert answer.text == alone[-1]
            assert answer.state == "done"
        assert all(isinstance(step.data, Answers) for step in steps)


def test_closing_the_job_gives_the_models_back(tiny_llama: TinyFamily, settings: Settings) -> None:
    session, pool = session_of(tiny_llama, "decoder"), LiveModels()
    wanted = columns(session, session.models[:1])
    drawn = GenerationSettings(temperature=1.5, max_new_tokens=50)
    tight = replace(settings, live_memory=2 * size(tiny_llama, settings))
    steps = answer_work(session, "Hi", wanted, drawn, tight, pool)(threading.Event())
    while next(steps).message != "Answering":
        pass
    steps.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "generate"]
    with pool.borrow(session.base, "decoder", [wanted[0].recipe] * 2, tight) as benches:
        assert len(benches) == 2
        assert all(bench.lock.acquire(blocking=False) for bench in benches)


def test_a_search_ranks_by_base_and_merge(tiny_bert: TinyFamily, settings: Settings) -> None:
    from llm_merge.evaluation import embed, similarity

    session = session_of(tiny_bert, "encoder")
    passages = ("a place where ships are sheltered", "Paris", "the gospel")
    _, found = finish(search_work(session, "harbour", passages, settings, LiveModels())(threading.Event()))
    assert isinstance(found, Found)
    assert session.recipe is not None
    for scores, recipe in ((found.base, Recipe.single(session.base)), (found.merged, session.recipe)):
        bench = bench_for(recipe, "encoder", "cpu", session.base)
        expected = similarity(embed(bench, ["harbour"], "query"), embed(bench, passages))[0]
        assert scores == pytest.approx(expected.tolist(), abs=1e-6)
    assert found.base != found.merged
    assert [row[i] for i, row in enumerate(found.merged_pairs)] == pytest.approx([1, 1, 1, 1], abs=1e-5)
