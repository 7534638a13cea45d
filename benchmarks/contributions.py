"""Contribution analysis of a 110 M Llama (18 layers) and two fine-tunes, 8 rows of 64 to 128 tokens per task.

Four ways to the same numbers, with the same number of threads: layers swapped in memory with full passes, swapped with
hidden states kept (what `analyze` does), estimated by backward passes, all three taking turns; and the published way,
which has mergekit write every merge to disk and evaluates each in a fresh process, measured on 2 layers and scaled.
Then how well the estimate ranks the demo's layers, and the memory that it takes, extended to 7B models.

    python benchmarks/contributions.py [--threads 1] [--mergekit-env FOLDER] [--skip-published]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

if TYPE_CHECKING:
    from llm_merge.analysis import Analysis

SIZES = {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 18, "num_attention_heads": 10,
         "num_key_value_heads": 5}  # fmt: skip
ROWS, FEW, SHORTEST, LONGEST = 8, 2, 64, 128
VOCABULARY = 49152
PUBLISHED_LAYERS = ("5", "12")
MB, GB = 1e6, 1e9
SMALL_CACHE = 64_000_000  # of source tensors and of deltas in the memory run, so that both are streamed there too
# What analysis and estimate may keep beside the weights: the source tensors, and half for activations, half for deltas.
SOURCES, BUDGET = 3 * 1024**3, 2 * 1024**3
# Parameters, those of the largest tensor that the fine-tunes change, and words.
BIG = {
    "Llama-2-7B, full fine-tunes": (6.738e9, 32000 * 4096, 32000),
    "Mistral-7B, full fine-tunes": (7.242e9, 32000 * 4096, 32000),
    "Qwen2-7B, LoRA on all projections": (7.616e9, 18944 * 3584, 152064),
    "Qwen2-7B, full fine-tunes": (7.616e9, 152064 * 3584, 152064),
}
SIGNS = {"alpha": "α", "beta": "β", "contribution": "c"}


@dataclass(frozen=True)
class Spent:
    """Seconds on the clock, and of processors."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.wall + other.wall, self.cpu + other.cpu)

    def times(self, factor: float) -> Spent:
        return Spent(self.wall * factor, self.cpu * factor)


def make_models(folder: Path, tunes: int = 2) -> list[str]:
    from check_mergekit import make_llama

    base = make_llama(folder / "base", SIZES, dtype="bfloat16", seed=0)
    made = [make_llama(folder / f"tune-{n}", SIZES, dtype="bfloat16", seed=n, base=base) for n in range(1, tunes + 1)]
    return [str(base), *map(str, made)]


def make_rows(base: str, tasks: int = 2, count: int = ROWS) -> dict[str, list[dict[str, Any]]]:
    """For each task other rows of the demo that have 64 to 128 tokens in the model's chat format."""
    from llm_merge.checkpoint import open_checkpoint
    from llm_merge.demo import demo_examples
    from llm_merge.evaluation import prepare, resolve_format
    from llm_merge.families import get_family
    from llm_merge.measurement_keys import default_settings

    checkpoint = open_checkpoint(base)
    tokenizer = get_family("decoder").load_tokenizer(checkpoint)
    rows = demo_examples("decoder", "verse", "heldout")
    ready = prepare(rows, "decoder", tokenizer, default_settings("decoder"), resolve_format([checkpoint], "auto"))
    fit = [row for row, done in zip(rows, ready.rows, strict=True) if SHORTEST <= len(done.ids) <= LONGEST]
    return {f"task {n + 1}": fit[n * count : (n + 1) * count] for n in range(tasks)}


def opened(models: Sequence[str], rows: Mapping[str, Sequence[Any]], kept: bool) -> Analysis:
    """An analysis that remembers nothing from before. kept: whether it keeps hidden states."""
    from llm_merge.analysis import open_analysis
    from llm_merge.layer_scorer import LayerScorer
    from llm_merge.tasks import Task

    class Naive(LayerScorer):
        def _can_start(self, number: int) -> bool:
            return False

    tasks = [Task(name, model, tuple(rows[name]), ()) for name, model in zip(rows, models[1:], strict=True)]
    analysis = open_analysis(models[0], tasks, device="cpu")
    if not kept:
        naive = Naive(analysis.scorer.benches, analysis.scorer.tasks)
        naive.plan(analysis.setup.merged())
        analysis.scorer = naive
    return analysis


def side_by_side(models: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> tuple[dict[str, Spent], dict[str, Any]]:
    """Three analyses, models already in memory, that take turns evaluation by evaluation, so that whatever else the
    machine does slows all of them; what each has spent, and its report."""
    from llm_merge.analysis import iter_contributions

    running: dict[str, Any] = {}
    for way in ("estimate", "exact", "naive"):
        analysis = opened(models, rows, kept=way != "naive")
        running[way] = iter_contributions(analysis, estimate=way == "estimate", layers=0 if way == "estimate" else None)
    spent, reports = {way: Spent() for way in running}, {}
    while running:
        for way in list(running):
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                next(running[way])
            except StopIteration as end:
                reports[way] = end.value
                del running[way]
            spent[way] += Spent(time.perf_counter() - wall, time.process_time() - cpu)
    return spent, reports


def published(models: Sequence[str], rows: Mapping[str, Sequence[Any]], program: Path, folder: Path) -> Spent:
    """A layer's seconds of the published way: each of a layer's 6 merges is written to disk by mergekit and
    evaluated by a process of its own on the tasks that need it, 8 evaluations in all."""
    from check_mergekit import mergekit_merge

    from llm_merge.contributions import cells_of

    setup = opened(models, rows, kept=True).setup
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    wall, cpu = time.perf_counter(), of_children()
    for layer in PUBLISHED_LAYERS:
        merges: dict[str, tuple[dict[str, Any], list[str]]] = {}
        for cell in cells_of(setup, [layer]):
            written = {**setup.variant(cell).to_dict(), "dtype": "bfloat16"}
            merges.setdefault(json.dumps(written), (written, []))[1].append(cell.task)
        assert len(merges) == 3 * len(rows)
        for number, (written, tasks) in enumerate(merges.values()):
            out = folder / f"merge-{layer}-{number}"
            mergekit_merge(program, written, out)
            command = [sys.executable, __file__, "--evaluate", str(out), str(folder / "rows.json"), *tasks]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    count = len(PUBLISHED_LAYERS)
    return Spent((time.perf_counter() - wall) / count, (of_children() - cpu) / count)


def of_children() -> float:
    """CPU seconds of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def evaluate(folder: str, rows_file: str, *tasks: str) -> None:
    """What a fresh process does with one merge: load it, and measure it on the tasks' rows."""
    from llm_merge.checkpoint import open_checkpoint
    from llm_merge.metrics import row_values
    from llm_merge.recipe import Recipe
    from llm_merge.workbench import Workbench

    rows = json.loads(Path(rows_file).read_text(encoding="utf-8"))
    bench = Workbench(open_checkpoint(folder), "decoder", "cpu")
    bench.follow(Recipe.single(folder))
    for task in tasks:
        print(task, row_values(bench, rows[task], "-loss"))


def memory(folder: str, count: str, rows_each: str) -> None:
    """In a process of its own: the peak of an estimate of `count` fine-tunes, model in bfloat16, as JSON."""
    from functools import partial

    import torch

    from llm_merge import analysis, gradients, layer_estimates, layer_scorer
    from llm_merge.checkpoint import open_checkpoint
    from llm_merge.tasks import Task
    from llm_merge.workbench import Workbench

    models = [str(Path(folder) / "base"), *(str(Path(folder) / f"tune-{n + 1}") for n in range(int(count)))]
    rows = make_rows(models[0], int(count), int(rows_each))
    started = peak()
    bench = Workbench(open_checkpoint(models[0]), "decoder", "cpu", dtype=torch.bfloat16)
    layer_estimates.layer_products = partial(gradients.layer_products, budget_bytes=2 * SMALL_CACHE)
    done = analysis.open_analysis(
        models[0],
        [Task(name, model, tuple(rows[name]), ()) for name, model in zip(rows, models[1:], strict=True)],
        benches=[bench],
    )
    done.scorer = layer_scorer.LayerScorer([bench], done.scorer.tasks, source_bytes=SMALL_CACHE)
    done.scorer.plan(done.setup.merged())
    for _ in done.estimate(done.report()):
        pass
    largest = max(parameter.numel() for parameter in bench.model.parameters())
    print(json.dumps({"before": started, "peak": peak(), "weights": bench.nbytes, "largest": largest}))


def peak() -> float:
    """Bytes of resident memory at most so far. Where there is a /proc, of this program alone: `ru_maxrss` of a process
    begins with what its parent held."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024.0 * int(status.partition("VmHWM:")[2].split()[0])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024.0 if sys.platform != "darwin" else 1.0)


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Rank correlation; equal values get ranks in their order."""
    import numpy as np

    ranks = [np.argsort(np.argsort(np.asarray(side))) for side in (left, right)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def rankings(report: Any) -> list[tuple[str, float]]:
    """How the estimates of α, β, c, γ and Γ rank the blocks, against what was measured."""
    from dataclasses import replace

    guessed = replace(report, cells={})
    keys = [layer.key for layer in report.setup.layers if layer.block]
    found = []
    for task in report.setup.tasks:
        for side in ("before", "after"):
            for name in SIGNS:
                sides = [[getattr(r, name)(task, side, key).value for key in keys] for r in (guessed, report)]
                found.append((f"{SIGNS[name]}, {task}, {side} merging", spearman(*sides)))
        found.append((f"γ, {task}", spearman(*([r.gamma(task, k).value for k in keys] for r in (guessed, report)))))
    found.append(("Γ", spearman(*([r.total(k).value for k in keys] for r in (guessed, report)))))
    return found


def show_rankings() -> None:
    from llm_merge.contribution_report import ContributionReport
    from llm_merge.demo import ASSETS

    path = ASSETS / "measured" / "contributions-decoder.json"
    if not path.is_file():
        print("\nThe demo's specialists are not measured yet: run scripts/measure_hi_merging.py --report-only.")
        return
    report = ContributionReport.from_dict(json.loads(path.read_text(encoding="utf-8"))["report"])
    print(f"\nEstimate against exact on the demo's specialists (recorded {report.measured_on}), 30 blocks:\n")
    print("| | Spearman |\n| --- | ---: |")
    for name, value in rankings(report):
        print(f"| {name} | {value:.2f} |")


def show_memory(folder: Path, threads: int) -> None:
    def run(rows: int) -> dict[str, float]:
        command = [sys.executable, __file__, "--threads", str(threads), "--memory", str(folder), "3", str(rows)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return dict(json.loads(done.stdout.splitlines()[-1]))

    many, few = run(ROWS), run(FEW)
    # Rows cost their logits; the rest is what the largest tensor takes while it is merged in float32, subtracted from
    # the base and multiplied with its gradient, beside the weights and the two bounded stores of sources and deltas.
    a_row = max(0.0, (many["peak"] - few["peak"]) / (ROWS - FEW))
    rest = many["peak"] - many["before"] - many["weights"] - 2 * SMALL_CACHE - ROWS * a_row
    an_entry = rest / many["largest"]
    print(
        f"\nMemory of the estimate, base and three fine-tunes: peak {many['peak'] / MB:.0f} MB = programs "
        f"{many['before'] / MB:.0f} + weights in bfloat16 {many['weights'] / MB:.0f} + source tensors kept "
        f"{SMALL_CACHE / MB:.0f} + deltas kept {SMALL_CACHE / MB:.0f} + {ROWS} rows' logits {ROWS * a_row / MB:.0f} + "
        f"{rest / MB:.0f} for the largest tensor ({many['largest'] / 1e6:.1f} M entries: {an_entry:.1f} bytes each)."
        f"\n\nExtended, in GB:\n"
    )
    print("| models | programs | weights | activations and deltas | logits | largest tensor | sum | with sources |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, (parameters, largest, words) in BIG.items():
        logits = ROWS * a_row * words / VOCABULARY
        parts = [many["before"], 2 * parameters, BUDGET, logits, an_entry * largest]
        cells = " | ".join(f"{part / GB:.1f}" for part in (*parts, sum(parts), sum(parts) + SOURCES))
        print(f"| {name} | {cells} |", flush=True)


def show_times(models: Sequence[str], folder: Path, options: argparse.Namespace) -> None:
    from check_mergekit import mergekit_program

    rows = make_rows(models[0])
    table, reports = side_by_side(models, rows)
    for way, spent in table.items():
        print(f"{way}: {spent.wall:.1f} s, CPU {spent.cpu:.1f} s", file=sys.stderr, flush=True)
    layers = len(reports["exact"].setup.layers)
    apart = max(
        abs(one - two)
        for cell, values in reports["exact"].cells.items()
        for one, two in zip(values, reports["naive"].cells[cell], strict=True)
    )
    if not options.skip_published:
        program = mergekit_program(options.mergekit_env)
        table["published"] = published(models, rows, program, folder).times(layers)
    names = {
        "naive": "a layer swapped in memory, full pass",
        "exact": "swapped, hidden states kept (exact)",
        "estimate": "estimate, backward passes",
        "published": f"merges on disk (mergekit), fresh processes ({len(PUBLISHED_LAYERS)} of {layers} layers, scaled)",
    }
    print(f"\n{options.threads} thread(s); exact differs from naive by at most {apart:.1e}.\n")
    print("| way | wall s | CPU s | naive / it, CPU | published / it, CPU | published / it, wall |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, spent in table.items():
        ratios = [table["naive"].cpu / spent.cpu]
        if "published" in table:
            ratios += [table["published"].cpu / spent.cpu, table["published"].wall / spent.wall]
        cells = " | ".join(f"{ratio:.2f}×" for ratio in ratios)
        print(f"| {names[name]} | {spent.wall:.1f} | {spent.cpu:.1f} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of every process (default: 1)")
    parser.add_argument("--mergekit-env", type=Path, default=None, help="mergekit's own environment")
    parser.add_argument("--skip-published", action="store_true", help="without mergekit")
    parser.add_argument("--evaluate", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE"}  # children's, too
    import torch

    torch.set_num_threads(options.threads)
    if options.evaluate:
        evaluate(*options.evaluate)
        return
    if options.memory:
        memory(*options.memory)
        return
    from check_mergekit import ENVIRONMENT

    from llm_merge.demo import prepare

    options.mergekit_env = options.mergekit_env or ENVIRONMENT
    for _ in prepare("smollm2"):
        pass
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder), 3)  # the third fine-tune is for the memory alone
        show_memory(Path(folder), options.threads)
        show_times(models[:3], Path(folder), options)
    show_rankings()


if __name__ == "__main__":
    main()
