"""Measures Hi-Merging and the usual merges on the demo's decoders with the library itself, and records the outcome.

What is written to `assets/demo/measured`: `contributions-decoder.json`, the first analysis (task vectors as they are,
every layer measured, estimates beside) that the page opens on; and `hi-merging-decoder.json`, every merge on the
held-out rows, with its recipe. Everything is chosen on the 32 analysis rows of a task; the 200 held-out rows are only
reported. Every evaluation is kept by content in `--store`: it can be killed at any time and goes on where it was.

    python scripts/measure_hi_merging.py --report-only        the first analysis (about 20 minutes on one core)
    python scripts/measure_hi_merging.py                      everything (about 4 hours on one core)
    python scripts/measure_hi_merging.py --only average ties  some of the merges
    python scripts/measure_hi_merging.py --write-docs         the recorded table into docs/hi-merging.md
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from measure_demo import hash_of

from llm_merge.analysis import Analysis, iter_contributions, open_analysis
from llm_merge.cell_store import CellStore
from llm_merge.checkpoint import open_checkpoint
from llm_merge.demo import ASSETS, cache_folder, demo_examples, demo_model, demo_path, prepare
from llm_merge.hashing import file_hash
from llm_merge.hi_merging import Switches
from llm_merge.hierarchical import HiMergeResult, iter_hi_merge, summary
from llm_merge.measurement_keys import default_settings
from llm_merge.metrics import figure_of, measure, paired_difference
from llm_merge.recipe import ModelEntry, Recipe
from llm_merge.tasks import Task

BASE = "smollm2"
SPECIALISTS = {"verse": "king-james", "dictionary": "dictionary"}
SETS = (*SPECIALISTS, "general")
KEYS = (BASE, *SPECIALISTS.values())
DOCS = ASSETS.parent.parent / "docs" / "hi-merging.md"
BEGIN, END = "<!-- table -->\n", "<!-- /table -->"
SECONDS_BETWEEN_LINES = 15.0

Scores = Mapping[str, tuple[float, ...]]
"""Set → −loss of each held-out row."""


GRID = "coarse"  # the full grid takes an hour of one core for 32 rows of each task; `Switches` has it as its default


@dataclass(frozen=True)
class Run:
    """One line of the table: a recipe that is known, or Hi-Merging with some switches."""

    title: str
    recipe: Callable[[], Recipe] | None = None
    switches: Switches = field(default_factory=lambda: Switches(grid=GRID))
    combine: str = "average"


def task_vectors(method: str, weight: float, density: float | None = None, **more: float) -> Callable[[], Recipe]:
    """A recipe over both specialists with the same weight, and mergekit's defaults for all that is not said."""
    own = () if density is None else (("density", density),)
    entries = tuple(ModelEntry(demo_path(key), weight, own) for key in SPECIALISTS.values())
    return lambda: Recipe(entries, method, demo_path(BASE), parameters=tuple(more.items()))


# Task arithmetic: the plain sum, and λ = 0.4, which TIES' authors use where nothing is tuned (Yadav et al. 2023, §5).
# TIES: density 0.2 and λ = 1 are its paper's; DARE and its vote with density and weights of mergekit's examples, 0.5.
RUNS: dict[str, Run] = {
    "base": Run("SmolLM2 135M Instruct (the base)", lambda: Recipe.single(demo_path(BASE))),
    "verse": Run("King James (verse)", lambda: Recipe.single(demo_path(SPECIALISTS["verse"]))),
    "dictionary": Run("Dictionary (dictionary)", lambda: Recipe.single(demo_path(SPECIALISTS["dictionary"]))),
    "average": Run("plain average", lambda: Recipe.linear([demo_path(k) for k in SPECIALISTS.values()], [0.5, 0.5])),
    "task-arithmetic": Run("task arithmetic, weight 1 each", task_vectors("task_arithmetic", 1.0)),
    "ties": Run("TIES, density 0.2, weight 1 each", task_vectors("ties", 1.0, 0.2)),
    "dare-linear": Run("DARE, density 0.5, weight 0.5 each, seed 0", task_vectors("dare_linear", 0.5, 0.5)),
    "dare-ties": Run("DARE with TIES' vote, density 0.5, weight 0.5 each, seed 0", task_vectors("dare_ties", 0.5, 0.5)),
    "hi-merging": Run("**Hi-Merging**, as read from the paper (coarse grid)"),
    "grid-none": Run("Hi-Merging, grid none (p = s = 1)", switches=Switches(grid="none")),
    "combine-sum": Run("Hi-Merging, combine sum", combine="sum"),
    "combine-ties-sum": Run("Hi-Merging, combine ties_sum", combine="ties_sum"),
    "partial-weakened": Run("Hi-Merging, partial_target weakened", switches=Switches("weakened", grid=GRID)),
    "severe-after": Run("Hi-Merging, severe_by after", switches=Switches(grid=GRID, severe_by="after")),
    "if-better": Run("Hi-Merging, accept if_better", switches=Switches(grid=GRID, accept="if_better")),
    "beyond-noise": Run("Hi-Merging, min_gamma_se 2", switches=Switches(grid=GRID, min_gamma_se=2.0)),
    "recompute": Run("Hi-Merging, recompute, max_layers 2", switches=Switches(recompute=True, max_layers=2, grid=GRID)),
    "task-arithmetic-0.4": Run("task arithmetic, weight 0.4 each", task_vectors("task_arithmetic", 0.4)),
    "ties-0.5": Run("TIES, density 0.5, weight 1 each", task_vectors("ties", 1.0, 0.5)),
}


class Lab:
    """The demo's models in memory, the rows, and all that was measured before."""

    def __init__(self, store: Path, rows: int, held_out: int) -> None:
        for _ in prepare(BASE):
            pass
        self.folder = store
        self.analysis_rows = {task: tuple(demo_examples("decoder", task, "work")[:rows]) for task in SPECIALISTS}
        self.held_out_rows = {name: tuple(demo_examples("decoder", name, "heldout")[:held_out]) for name in SETS}
        tasks = [
            Task(t, demo_path(key), self.analysis_rows[t], self.held_out_rows[t]) for t, key in SPECIALISTS.items()
        ]
        tasks.append(Task("general", "", (), self.held_out_rows["general"]))
        self.analysis = open_analysis(demo_path(BASE), tasks, store=CellStore(store), held_out=held_out)
        self.held_out = self.analysis.held_out
        self.analysis.held_out = {}  # a run's steps are scored on analysis rows alone; its end on held-out rows, here
        self.start = self.analysis.setup

    def fresh(self, combine: str = "average") -> Analysis:
        """The analysis with nothing pruned; what was measured stays known."""
        self.analysis.setup = replace(self.start, combine=combine)
        return self.analysis

    def scores(self, recipe: Recipe) -> Scores:
        """The merge as it would be saved, in 16 bits like its models, on every held-out row."""
        scorer, found = self.analysis.scorer, {}
        for name, rows in self.held_out.items():
            key = scorer.key(recipe, rows)
            values = scorer.store.get(key)
            if values is None:
                with scorer.holding(recipe) as bench:
                    values = measure(bench, scorer.tasks[rows])
                scorer.store.put(key, values)
            found[name] = values
        return found

    def stamp(self) -> dict[str, Any]:
        opened = {key: open_checkpoint(demo_path(key)) for key in KEYS}
        return {
            "recorded_on": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "base": BASE,
            "base_hash": opened[BASE].content_hash(),
            "models": {key: opened[key].content_hash() for key in SPECIALISTS.values()},
            "adapter_hashes": {
                key: file_hash(Path(demo_model(key).reference) / "adapter_model.safetensors")
                for key in SPECIALISTS.values()
            },
            "settings": default_settings("decoder").key("decoder"),
            "analysis_rows": {task: len(rows) for task, rows in self.analysis_rows.items()},
            "analysis_rows_sha256": {task: hash_of(rows) for task, rows in self.analysis_rows.items()},
        }


def contributions(lab: Lab) -> dict[str, Any]:
    """The first analysis: task vectors as they are, every layer measured, estimates beside."""
    clock = lab.folder / "seconds.txt"  # what earlier, killed runs have spent on it
    spent = float(clock.read_text()) if clock.is_file() else 0.0
    began = time.monotonic()

    def tick(event: Any) -> None:
        clock.write_text(str(spent + time.monotonic() - began))

    report = told("contributions", iter_contributions(lab.fresh(), estimate=True), tick)
    report = replace(report, seconds=spent + time.monotonic() - began)
    clock.unlink(missing_ok=True)
    print(report.headline(), file=sys.stderr, flush=True)
    named = replace(report, setup=replace(report.setup, base=BASE, models=tuple(SPECIALISTS.values())))
    return {**lab.stamp(), "report": named.to_dict()}


def measure_run(lab: Lab, name: str) -> tuple[dict[str, Any], Scores]:
    run = RUNS[name]
    entry: dict[str, Any] = {"name": name, "title": run.title.replace("**", "")}
    if run.recipe is not None:
        recipe = run.recipe()
    else:
        result: HiMergeResult = told(name, iter_hi_merge(lab.fresh(run.combine), run.switches), None)
        recipe = result.recipe
        entry |= {
            "switches": {"combine": run.combine, **vars(run.switches)},
            "pruning": dict(zip(SPECIALISTS, result.pruning, strict=True)),
            "summary": summary(result),
            "kinds": counted([trial.kind for trial in result.trials]),
            "edited_layers": [trial.layer for trial in result.trials if trial.changed],
        }
        if name == "hi-merging":
            grid = [[c.task, c.p, c.s, round(c.score.value, 5), round(c.score.error, 5)] for c in result.grid]
            entry |= {"trials": short_trials(result), "grid": grid}
    entry["recipe"] = with_keys(recipe).to_yaml()
    return entry, lab.scores(recipe)


def told(name: str, events: Generator[Any, None, Any], tick: Callable[[Any], None] | None) -> Any:
    """The generator's result; now and then a line about how far it is."""
    said = 0.0
    while True:
        try:
            event = next(events)
        except StopIteration as end:
            return end.value
        if tick:
            tick(event)
        if time.monotonic() - said > SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            line = f"{name}: {event.phase} {event.done}/{event.total} {event.message}"
            print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def scored(values: Scores, base: Scores | None, average: Scores | None) -> dict[str, Any]:
    """Losses, lower is better, and their paired differences; "tasks" is the mean over the specialists' tasks."""
    found: dict[str, Any] = {}
    for name in SETS:
        figure = figure_of([-value for value in values[name]])
        found[name] = {"n": figure.n, "loss": round(figure.mean, 4), "se": round(figure.error, 4)}
    for title, other in (("to_base", base), ("to_average", average)):
        if other is None:
            continue
        differences = {name: paired_difference(other[name], values[name]) for name in SETS}  # of −loss: turned round
        for name, figure in differences.items():
            found[name] |= {title: round(figure.mean, 4), f"{title}_se": round(figure.error, 4)}
        own = [differences[task] for task in SPECIALISTS]
        mean, error = math.fsum(f.mean for f in own) / len(own), math.hypot(*(f.error for f in own)) / len(own)
        found.setdefault("tasks", {})
        found["tasks"] |= {title: round(mean, 4), f"{title}_se": round(error, 4)}
    return found


def with_keys(recipe: Recipe) -> Recipe:
    """The recipe with the demo's names, which `llm-merge merge` knows, in the place of this machine's paths."""
    names = {demo_path(key): key for key in KEYS}
    entries = tuple(replace(entry, model=names[entry.model]) for entry in recipe.models)
    return replace(recipe, models=entries, base_model=names[recipe.base_model] if recipe.base_model else None)


def short_trials(result: HiMergeResult) -> list[dict[str, Any]]:
    return [
        {
            "step": trial.step,
            "layer": trial.layer,
            "Gamma": [round(trial.total.value, 5), round(trial.total.error, 5)],
            "gamma": [[round(gamma.value, 5), round(gamma.error, 5)] for gamma in trial.gammas],
            "kind": trial.kind,
            "uncertain": trial.uncertain,
            "action": trial.action,
            "before": [round(value, 5) for value in trial.before],
            "after": [round(value, 5) for value in trial.after],
            "accepted": trial.accepted,
        }
        for trial in result.trials
    ]


def counted(kinds: Sequence[str]) -> dict[str, int]:
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def table(board: Mapping[str, Any]) -> str:
    """The recorded runs as Markdown."""
    counts = ", ".join(f"{name} {count}" for name, count in board["held_out_rows"].items())
    work = ", ".join(f"{name} {count}" for name, count in board["analysis_rows"].items())
    lines = [
        f"Nats per answer token, lower is better, ± one standard error; held-out rows: {counts}; chosen on analysis "
        f"rows: {work}; recorded on {board['recorded_on']}, base `{board['base_hash'][:12]}`. The last column is the "
        "mean over verse and dictionary less that of the plain average, row by row: below 0 is better.",
        "",
        "| merge | " + " | ".join(SETS) + " | both tasks, to the average |",
        "| --- |" + " ---: |" * (len(SETS) + 1),
    ]
    found = {entry["name"]: entry for entry in board["runs"]}
    for name, run in RUNS.items():
        if name not in found:
            continue
        scores = found[name]["scores"]
        cells = [f"{scores[s]['loss']:.3f} ± {scores[s]['se']:.3f}" for s in SETS]
        own = scores.get("tasks", {})
        compared = name != "average" and "to_average" in own
        cells.append(f"{own['to_average']:+.3f} ± {own['to_average_se']:.3f}" if compared else "")
        lines.append(f"| {run.title} | " + " | ".join(cells) + " |")
    missing = [run.title.replace("**", "") for name, run in RUNS.items() if name not in found]
    if missing:
        lines += ["", f"Not measured yet: {'; '.join(missing)}."]
    return "\n".join(lines) + "\n"


def write_docs(board: Mapping[str, Any]) -> None:
    before, mark, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        sys.exit(f"{DOCS} has no {BEGIN.strip()} and {END}.")
    DOCS.write_bytes(f"{before}{BEGIN}{table(board)}{END}{after}".encode())


def fits(path: Path, stamp: Mapping[str, Any]) -> bool:
    """Whether what is recorded there was measured with these models, rows and settings."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return all(known.get(key) == value for key, value in stamp.items() if key != "recorded_on")


def record(path: Path, found: dict[str, Any]) -> None:
    """Writes it, unless what is there says the same: then that one's date and seconds are the true ones."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def timeless(data: Mapping[str, Any]) -> dict[str, Any]:
        report = {**data.get("report", {}), "seconds": 0, "measured_on": ""}
        return {**data, "recorded_on": "", "report": report}

    if timeless(known) != timeless(found):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".part")
        aside.write_bytes(json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        aside.replace(path)
        print(f"wrote {path.name}", file=sys.stderr, flush=True)


def measure_runs(lab: Lab, names: Sequence[str], path: Path) -> dict[str, Any]:
    """Measures and records one run after the other; those recorded before with the same models and rows stay."""
    stamp = lab.stamp()
    stamp |= {
        "held_out_rows": {name: len(rows) for name, rows in lab.held_out_rows.items()},
        "held_out_rows_sha256": {name: hash_of(rows) for name, rows in lab.held_out_rows.items()},
    }
    base, average = (lab.scores(RUNS[name].recipe()) for name in ("base", "average"))  # type: ignore[misc]
    board: dict[str, Any] = {**stamp, "runs": []}
    for name in names:
        entry, values = measure_run(lab, name)
        # Read again each time: another process may be measuring other runs.
        known = json.loads(path.read_text(encoding="utf-8"))["runs"] if fits(path, stamp) else []
        runs = {run["name"]: run for run in known} | {name: {**entry, "scores": scored(values, base, average)}}
        board = {**stamp, "runs": [runs[n] for n in RUNS if n in runs]}
        record(path, board)
        line = ", ".join(f"{s} {runs[name]['scores'][s]['loss']:.3f}" for s in SETS)
        print(f"{time.strftime('%H:%M:%S')} {name}: {line}", file=sys.stderr, flush=True)
    return board


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=cache_folder() / "cells", help="where evaluations are kept")
    parser.add_argument("--out", type=Path, default=ASSETS / "measured", help="where the recordings are written")
    parser.add_argument("--rows", type=int, default=32, help="analysis rows per task")
    parser.add_argument("--held-out", type=int, default=200, help="held-out rows per set")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--report-only", action="store_true", help="only the first contribution analysis")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), metavar="NAME", help=f"of {', '.join(RUNS)}")
    parser.add_argument("--write-docs", action="store_true", help=f"put the recorded table into {DOCS.name}")
    options = parser.parse_args()
    path = options.out / "hi-merging-decoder.json"
    if options.write_docs:
        write_docs(json.loads(path.read_text(encoding="utf-8")))
        return
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    lab = Lab(options.store, options.rows, options.held_out)
    report = options.out / "contributions-decoder.json"
    if options.report_only or (not options.only and not fits(report, lab.stamp())):
        record(report, contributions(lab))
    if not options.report_only:
        print(table(measure_runs(lab, options.only or list(RUNS), path)))


if __name__ == "__main__":
    main()
