"""An analysis in two processes: the report of one, and nothing measured twice after a death."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_merge.contribution_report import ContributionReport
from llm_merge.contributions import Cell
from tests.tiny_models import TinyFamily

REPOSITORY = Path(__file__).resolve().parents[2]
ALONE = [sys.executable, "-m", "llm_merge"]
TOGETHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llm_merge"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    for task, words in {"verse": ("gospel", "corn", "gladness"), "prose": ("harbour", "Paris", "ships")}.items():
        rows = [{"input": f"Define the word: {word}.", "output": f"A {word} of {task}."} for word in words]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def analyze(
    launcher: list[str], family: TinyFamily, place: Path, store: str, *more: str
) -> subprocess.CompletedProcess[str]:
    base, first, second = family.references
    models = ["--base", base, "--model", f"verse={first}", "--model", f"prose={second}"]
    rows = ["--data", "verse.jsonl", "--data", "prose.jsonl"]
    command = [*launcher, "analyze", *models, *rows, "--store", store, "--device", "cpu", "--json", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False, timeout=240)


def found(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert run.returncode == 0, run.stderr
    return {name: value for name, value in json.loads(run.stdout).items() if name not in ("seconds", "measured_on")}


def keys(place: Path, store: str) -> dict[str, list[str]]:
    """File of the store → keys of what was measured into it."""
    return {path.name: [json.loads(line)["key"] for line in path.read_text().splitlines()]
            for path in (place / store).glob("*.jsonl")}  # fmt: skip


def test_two_processes_report_what_one_does(place: Path, tiny_llama: TinyFamily) -> None:
    alone = found(analyze(ALONE, tiny_llama, place, "alone", "--out", "alone.json"))
    together = found(analyze(TOGETHER, tiny_llama, place, "together", "--out", "together.json"))
    assert together == alone
    reports = [json.loads((place / f"{name}.json").read_text()) for name in ("alone", "together")]
    first, second = ({**report, "seconds": 0, "measured_on": ""} for report in reports)
    assert first == second
    assert len(keys(place, "alone")) == 1
    files = [set(own) for own in keys(place, "together").values()]
    assert len(files) == 2
    assert len(files[0] & files[1]) <= 6  # the whole models, which both stand on; no cell was measured twice
    assert files[0] | files[1] == set(next(iter(keys(place, "alone").values())))


def test_all_agree_on_the_estimates_and_on_the_layers_that_they_rank_highest(
    place: Path, tiny_llama: TinyFamily
) -> None:
    alone = found(analyze(ALONE, tiny_llama, place, "a", "--layers", "2"))
    together = found(analyze(TOGETHER, tiny_llama, place, "b", "--layers", "2"))
    assert together == alone
    assert len(alone["cells"]) == 16


def test_after_a_death_only_the_rest_is_measured(place: Path, tiny_llama: TinyFamily) -> None:
    # What a death leaves behind: some layers' cells in a store, no report.
    found(analyze(TOGETHER, tiny_llama, place, "healed", "--layers", "0,1"))
    before = keys(place, "healed")
    done = set().union(*before.values())
    assert len(done) == 6 + 16
    report = ContributionReport.from_dict(found_with_date(analyze(TOGETHER, tiny_llama, place, "healed")))
    fresh = [key for name, own in keys(place, "healed").items() if name not in before for key in own]
    assert len(set(fresh) & done) <= 6  # whole models run again as the ground for new cells
    assert len(set(fresh) - done) == len(report.cells) - 16
    whole = {Cell(task, side, kind, layer.key) for task in report.setup.tasks for layer in report.setup.layers
             for side in ("before", "after") for kind in ("delete", "add")}  # type: ignore[arg-type]  # fmt: skip
    assert set(report.cells) == whole


def found_with_date(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert run.returncode == 0, run.stderr
    data: dict[str, Any] = json.loads(run.stdout)
    return data


def test_what_is_wrong_is_said_once(place: Path, tiny_llama: TinyFamily) -> None:
    run = analyze(TOGETHER, tiny_llama, place, "wrong", "--metric", "rogue")
    assert run.returncode != 0
    assert run.stdout == ""
    assert run.stderr.count("The metric “rogue” is not known") == 1
    assert not (place / "wrong").exists()
