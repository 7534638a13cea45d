"""The mix that the page opens on, merged and measured on the real models: it keeps what its specialists learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from components.recorded import MEASURED
from components.session import Session
from llm_merge.demo import demo_examples, demo_path, packaged_file, prepare
from llm_merge.measurements import MeasurementCache, measure_models, recorded_losses

ROWS = 12  # of each set: enough for gains of more than a nat, few enough for two cores

pytestmark = pytest.mark.skipif(
    packaged_file("smollm2") is None,
    reason="the package that carries the demo's base is not installed (requirements-demo.txt)",
)


def rows_of(model_type: str, task: str, split: str) -> list[dict[str, Any]]:
    return [{**row, "task": task} for row in demo_examples(model_type, task, split)]


def measured(models: list[Any], model_type: str, rows: list[dict[str, Any]], **options: Any) -> Any:
    measuring = measure_models(models, model_type, rows, device="cpu", **options)
    while True:
        try:
            next(measuring)
        except StopIteration as end:
            return end.value


@pytest.fixture(scope="module", autouse=True)
def _base_is_ready() -> None:
    for _ in prepare("smollm2"):
        pass


def opening_session(tmp_path: Path) -> Session:
    """The session that the page opens on."""
    rows = rows_of("decoder", "verse", "work") + rows_of("decoder", "dictionary", "work")
    session = Session().with_models("decoder", demo_path("smollm2"), [demo_path("king-james"), demo_path("dictionary")])
    session = session.with_rows(rows, "Verse + Dictionary (demo)", ("verse", "dictionary"))
    cache = MeasurementCache(tmp_path, recorded=MEASURED)
    table = recorded_losses(session.models, "decoder", session.rows, cache)
    assert table is not None, "nothing is recorded for the demo's own rows: run scripts/measure_demo.py"
    assert not table.other_base, "the recording was made with another base than this one"
    return session.with_losses(table)


def test_the_mix_that_the_page_opens_on_keeps_half_of_each_gain(tmp_path: Path) -> None:
    recipe = opening_session(tmp_path).recipe
    assert recipe is not None
    for task, specialist in (("verse", "king-james"), ("dictionary", "dictionary")):
        rows = rows_of("decoder", task, "heldout")[:ROWS]
        table = measured([demo_path("smollm2"), demo_path(specialist), recipe], "decoder", rows)
        base, own, mixed = (table.mean(model) for model in (demo_path("smollm2"), demo_path(specialist), recipe))
        assert own < base - 0.2, f"{specialist} gains nothing on {task}"
        assert (base - mixed) / (base - own) >= 0.5, f"the mix keeps too little of {specialist}"
