"""Measuring many models: what is remembered, what is measured again, and that a stop loses nothing."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from llm_merge import demo
from llm_merge.checkpoint import open_checkpoint
from llm_merge.errors import ExampleError, IncompatibleModels, Stopped
from llm_merge.evaluation import EvaluationSettings
from llm_merge.examples import rows_hash
from llm_merge.measurement_cache import Key, Measurement, MeasurementCache, parse
from llm_merge.measurements import LossTable, MeasureEvent, estimate, measure_models, recorded_losses
from llm_merge.recipe import Recipe
from tests.tiny_models import TinyFamily, make_tiny_llama, make_tiny_lora

ROWS = [
    {"input": "Define the word: harbour.", "output": "A place where ships are sheltered.", "task": "dictionary"},
    {"input": "Define the word: gospel.", "output": "Good news.", "task": "dictionary"},
    {"input": "Rewrite this verse: He told them to go.", "output": "And he said unto them, Go ye.", "task": "verse"},
]
SEARCH = [
    {"query": "ships", "pos": "A place where ships are sheltered.", "neg": ["Good news."], "task": ""},
    {"query": "gospel", "pos": "Preach the gospel to every creature.", "neg": [], "task": ""},
]


def measure(
    models: Sequence[str | Recipe],
    cache: MeasurementCache | None = None,
    rows: Sequence[dict[str, object]] = ROWS,
    model_type: str = "decoder",
    **options: object,
) -> tuple[list[MeasureEvent], LossTable]:
    """All events, and the table at the end."""
    events: list[MeasureEvent] = []
    options = {"today": "2026-11-21", "device": "cpu"} | options
    run = measure_models(models, model_type, rows, cache=cache, **options)
    while True:
        try:
            events.append(next(run))
        except StopIteration as end:
            return events, end.value


def computed(events: Sequence[MeasureEvent]) -> list[tuple[str, int]]:
    return [(event.model, event.row) for event in events if not event.from_cache and event.row >= 0]


@pytest.fixture
def cache(tmp_path: Path) -> MeasurementCache:
    return MeasurementCache(tmp_path / "measured")


def test_every_row_of_every_model_is_measured_once(tiny_llama: TinyFamily) -> None:
    events, table = measure(tiny_llama.references)
    assert sorted(computed(events)) == sorted((m, row) for m in tiny_llama.references for row in range(3))
    assert [event.done for event in events if event.row >= 0] == list(range(1, 10))
    assert {event.total for event in events} == {9}
    assert table.models == tuple(tiny_llama.references)
    assert table.rows_hash == rows_hash(ROWS)
    assert table.mean(tiny_llama.references[1]) == pytest.approx(math.fsum(table.losses[1]) / 3)
    assert "chat template" in table.format
    assert table.dates == ("", "", "")
    with pytest.raises(KeyError):
        table.of("another model")


def test_what_was_measured_is_not_measured_again(tiny_llama: TinyFamily, cache: MeasurementCache) -> None:
    _, first = measure(tiny_llama.references, cache)
    events, again = measure(tiny_llama.references, cache, today="2026-12-24")
    assert computed(events) == []
    assert again.losses == first.losses
    assert again.dates == ("2026-11-21",) * 3
    assert again.recorded == (False,) * 3  # remembered, not shipped


def test_another_model_measures_only_that_model(tiny_llama: TinyFamily, cache: MeasurementCache) -> None:
    base, one, two = tiny_llama.references
    measure([base, one], cache)
    events, _ = measure([base, one, two], cache)
    assert {model for model, _ in computed(events)} == {two}


def test_another_row_measures_only_that_row(tiny_llama: TinyFamily, cache: MeasurementCache) -> None:
    _, whole = measure(tiny_llama.references[:1], rows=ROWS)
    measure(tiny_llama.references[:1], cache, rows=ROWS[:2])
    relabelled = [{**row, "task": "mine"} for row in ROWS]  # a task is a label: it changes no loss
    events, table = measure(tiny_llama.references[:1], cache, rows=relabelled)
    assert computed(events) == [(tiny_llama.references[0], 2)]
    assert table.losses[0] == pytest.approx(whole.losses[0], abs=1e-5)


def test_an_embedding_models_row_depends_on_the_others(tiny_bert: TinyFamily, cache: MeasurementCache) -> None:
    _, pair = measure(tiny_bert.references, cache, SEARCH, "encoder")
    events, _ = measure(tiny_bert.references, cache, SEARCH, "encoder")
    assert computed(events) == []
    assert "Each query competes with 3 passages." in pair.notes
    third = {"query": "word", "pos": "Define the word.", "neg": [], "task": ""}
    events, triple = measure(tiny_bert.references, cache, [*SEARCH, third], "encoder")
    assert len(computed(events)) == 9
    assert triple.losses[0][:2] != pair.losses[0]


def test_a_copy_elsewhere_is_the_same_model_and_a_change_is_not(
    tiny_llama: TinyFamily, cache: MeasurementCache, tmp_path: Path
) -> None:
    measure([str(tiny_llama.base)], cache)
    copy = shutil.copytree(tiny_llama.base, tmp_path / "copy")
    assert computed(measure([str(copy)], cache)[0]) == []
    changed = make_tiny_llama(tmp_path / "changed", seed=5)
    assert len(computed(measure([str(changed)], cache)[0])) == 3


def test_settings_that_change_a_loss_measure_again_and_others_do_not(
    tiny_llama: TinyFamily, cache: MeasurementCache
) -> None:
    model = [str(tiny_llama.base)]
    measure(model, cache, settings=EvaluationSettings(batch_size=1))
    assert computed(measure(model, cache, settings=EvaluationSettings(batch_size=3))[0]) == []
    assert len(computed(measure(model, cache, settings=EvaluationSettings(format="plain"))[0])) == 3
    assert len(computed(measure(model, cache, fresh=True)[0])) == 3


def test_a_merge_is_measured_without_being_written(tiny_llama: TinyFamily, cache: MeasurementCache) -> None:
    _, one, two = tiny_llama.references
    alone = Recipe.linear([one, two], [1.0, 0.0])
    half = Recipe.linear([one, two], [0.5, 0.5])
    _, table = measure([one, alone, half], cache)
    assert table.of(alone) == pytest.approx(table.of(one), abs=1e-6)
    assert table.of(half) != pytest.approx(table.of(one), abs=1e-6)
    assert computed(measure([half], cache)[0]) == []
    assert len(computed(measure([Recipe.linear([one, two], [0.6, 0.4])], cache)[0])) == 3


def test_a_stop_keeps_what_was_measured(tiny_llama: TinyFamily, cache: MeasurementCache) -> None:
    stop = threading.Event()
    run = measure_models(
        tiny_llama.references, "decoder", ROWS, cache=cache, stop=stop, device="cpu",
        settings=EvaluationSettings(batch_size=1),
    )  # fmt: skip
    for _ in range(1 + 3 + 1 + 1):  # the first model's beginning and rows, the second's beginning and first row
        last = next(run)
    assert last.done == 4
    stop.set()
    with pytest.raises(Stopped):
        next(run)
    events, _ = measure(tiny_llama.references, cache)
    assert len(computed(events)) == 9 - 4


def test_closing_keeps_what_was_measured(tiny_llama: TinyFamily, cache: MeasurementCache) -> None:
    run = measure_models([str(tiny_llama.base)], "decoder", ROWS, cache=cache, device="cpu")
    first = [next(run), next(run)]
    run.close()
    assert first[1].row >= 0
    assert len(computed(measure([str(tiny_llama.base)], cache)[0])) == 2


def test_models_that_cannot_be_mixed_are_said_before_measuring(tiny_llama: TinyFamily, tmp_path: Path) -> None:
    wider = make_tiny_llama(tmp_path / "wider", seed=1, hidden=64)
    with pytest.raises(IncompatibleModels):
        next(measure_models([str(tiny_llama.base), str(wider)], "decoder", ROWS))
    with pytest.raises(ExampleError, match="empty answer"):
        next(measure_models([str(tiny_llama.base)], "decoder", [{"input": "a", "output": " "}]))


# ── the files ───────────────────────────────────────────────────────────────────────────────────────────────────────


MEASURED = Measurement(Key("m" * 64, "s" * 64, "float32"), ("r1", "r2"), (1.5, 2.5), "king-james", "b" * 64)


def test_a_measurement_survives_the_disk(cache: MeasurementCache) -> None:
    path = cache.put(MEASURED)
    assert path is not None
    assert parse(json.loads(path.read_text())) == MEASURED
    assert [found.loss for found in cache.get(MEASURED.key, ["r2", "r1"]) or ()] == [2.5, 1.5]
    assert cache.get(MEASURED.key, ["r1", "r3"]) is None
    assert cache.get(replace(MEASURED.key, dtype="bfloat16"), ["r1"]) is None
    assert cache.get(replace(MEASURED.key, dtype=""), ["r1"]) is not None
    assert [path.name for path in cache.folder.iterdir()] == [path.name]  # nothing half-written lies beside it


def damage_nothing_parses(text: str) -> str:
    return text[: len(text) // 2]


def damage_nan(text: str) -> str:
    return text.replace("1.5", "NaN")


def damage_count(text: str) -> str:
    return text.replace("[1.5,2.5]", "[1.5]")


def damage_version(text: str) -> str:
    return text.replace('"version":1', '"version":2')


def damage_all(text: str) -> str:
    return "[]"


@pytest.mark.parametrize("damage", [damage_nothing_parses, damage_nan, damage_count, damage_version, damage_all])
def test_a_damaged_file_counts_as_not_measured(cache: MeasurementCache, damage: Callable[[str], str]) -> None:
    path = cache.put(MEASURED)
    assert path is not None
    path.write_text(damage(path.read_text()))
    assert MeasurementCache(cache.folder).get(MEASURED.key, ["r1"]) is None
    cache.put(MEASURED)
    assert cache.get(MEASURED.key, ["r1"]) is not None


def test_the_users_own_measurement_comes_before_the_shipped_one(tmp_path: Path) -> None:
    cache = MeasurementCache(tmp_path / "own", recorded=tmp_path / "shipped")
    cache.put(MEASURED, tmp_path / "shipped")
    (found,) = cache.get(MEASURED.key, ["r1"]) or ()
    assert (found.loss, found.recorded) == (1.5, True)
    cache.put(replace(MEASURED, losses=(3.5, 4.5)))
    (found,) = cache.get(MEASURED.key, ["r1"]) or ()
    assert (found.loss, found.recorded) == (3.5, False)


def test_a_folder_that_cannot_be_written_only_costs_the_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert MeasurementCache(tmp_path / "file" / "measured").put(MEASURED) is None


# ── recorded for the demo ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def demo_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A demo of one tiny base and one tiny adapter, in the places where the real one looks for its own."""
    base = make_tiny_llama(tmp_path / "models" / "tiny-base", seed=0)
    adapter = make_tiny_lora(tmp_path / "adapters" / "verse", seed=1, base=base)
    models = (
        demo.DemoModel("base", "Base", "decoder", "someone/tiny-base", None, "general", ""),
        demo.DemoModel("verse", "Verse", "decoder", str(adapter), "base", "verse", ""),
    )
    monkeypatch.setattr(demo, "DEMO_MODELS", models)
    monkeypatch.setattr(demo, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(demo, "packaged_file", lambda key: base / "model.safetensors")
    return demo.demo_path("base"), demo.demo_path("verse")


def record(models: Sequence[str], tmp_path: Path) -> MeasurementCache:
    measure(models, MeasurementCache(tmp_path / "shipped"), today="2026-10-01")
    return MeasurementCache(tmp_path / "own", recorded=tmp_path / "shipped")


def test_recorded_losses_need_no_model(demo_pair: tuple[str, str], tmp_path: Path) -> None:
    cache = record(demo_pair, tmp_path)
    _, measured = measure(demo_pair)
    shutil.rmtree(tmp_path / "models")  # before the base is ready
    table = recorded_losses(demo_pair, "decoder", ROWS[1:], cache)
    assert table is not None
    assert table.dates == ("2026-10-01",) * 2
    assert table.recorded == (True, True)
    assert not table.other_base
    assert list(table.losses) == [pytest.approx(losses[1:], abs=1e-5) for losses in measured.losses]
    assert recorded_losses(demo_pair, "decoder", [*ROWS, {"input": "a", "output": "b"}], cache) is None
    assert recorded_losses(["somebody/else"], "decoder", ROWS, cache) is None


def test_recorded_on_another_base_is_said(demo_pair: tuple[str, str], tmp_path: Path) -> None:
    cache = record(demo_pair, tmp_path)
    make_tiny_llama(tmp_path / "models" / "tiny-base", seed=7)
    table = recorded_losses(demo_pair, "decoder", ROWS, cache)
    assert table is not None
    assert table.other_base
    events, _ = measure(demo_pair, cache)
    assert len(computed(events)) == 6  # another base is another model: nothing remembered is taken for it


def test_recorded_losses_of_another_adapter_are_not_shown(demo_pair: tuple[str, str], tmp_path: Path) -> None:
    cache = record(demo_pair, tmp_path)
    make_tiny_lora(tmp_path / "adapters" / "verse", seed=2, base=tmp_path / "models" / "tiny-base")
    assert recorded_losses(demo_pair, "decoder", ROWS, cache) is None
    assert recorded_losses(demo_pair[:1], "decoder", ROWS, cache) is not None


def test_the_demos_identity_is_its_content(demo_pair: tuple[str, str], tmp_path: Path) -> None:
    cache = record(demo_pair, tmp_path)
    names = {m.name: m for m in cache.recordings()}
    assert set(names) == {"base", "verse"}
    assert names["verse"].base_hash == names["base"].key.model == open_checkpoint(demo_pair[0]).content_hash()


# ── how long it will take ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_estimate_counts_what_is_missing(tiny_llama: TinyFamily, cache: MeasurementCache) -> None:
    models = tiny_llama.references
    before = estimate(models, "decoder", ROWS, cache)
    assert (before.missing, before.total) == (9, 9)
    assert before.seconds > 0
    measure(models[:2], cache, rows=ROWS[:2])
    assert estimate(models, "decoder", ROWS, cache).missing == 9 - 4
    measure(models, cache)
    after = estimate(models, "decoder", ROWS, cache)
    assert (after.missing, after.seconds) == (0, 0.0)


def test_the_estimate_learns_from_what_was_measured(tiny_llama: TinyFamily, cache: MeasurementCache) -> None:
    measure(tiny_llama.references[:1], cache)
    (own,) = cache.own()
    assert own.seconds > 0
    cache.put(replace(own, seconds=300.0))  # as if this machine were very slow
    assert estimate(tiny_llama.references, "decoder", ROWS, cache).seconds == pytest.approx(600, rel=0.01)
