"""`llm-merge analyze`: where layers help and where they fight, as a table and a report. Also in several processes."""

from __future__ import annotations

import argparse
import threading
from typing import Any

from llm_merge.analysis import Analysis, open_analysis
from llm_merge.commands.arguments import add_inputs, add_talking
from llm_merge.commands.arguments import layers as layers_type
from llm_merge.commands.arguments import pruning as pruning_type
from llm_merge.commands.console import Console, stat_dict, stat_text, stopping, table, time_text
from llm_merge.commands.files import check_file, write_file
from llm_merge.commands.inputs import Inputs, check_layers, cost_of, open_store, read_inputs
from llm_merge.contribution_report import ContributionReport
from llm_merge.contributions import cells_of
from llm_merge.distributed import Share, agree, iter_shared, join, leave
from llm_merge.errors import Stopped

EXAMPLE = """examples:
  llm-merge analyze --base smollm2 --model verse=king-james --model dictionary=dictionary \\
      --data verse=verse.jsonl --data dictionary=dictionary.jsonl --layers 5 --out report.json
  torchrun --nproc-per-node 2 -m llm_merge analyze …
  accelerate launch --multi_gpu --num_processes 4 -m llm_merge analyze …

γ is what a layer contributes before merging less what it contributes after: above 0 the merge made it serve the task
worse. Γ is the sum over the tasks. Each evaluation is kept as it is measured: after Ctrl-C or a crash the same command
goes on where it was.
Exit codes: 0 done, 1 an error that is said in a sentence, 2 wrong arguments, 130 stopped."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "analyze",
        help="see which layers help their task and which fight after merging",
        description="Contribution analysis of Hi-Merging: for every layer and task what merging does to it.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_inputs(parser)
    parser.add_argument(
        "--layers",
        type=layers_type,
        metavar="N|KEYS",
        help="measure the N layers that an estimate ranks highest, or these: 0,7,12 (one alone: “7,”; default: all)",
    )
    parser.add_argument(
        "--estimate-only", action="store_true", help="only the first-order estimate of every layer, which is quick"
    )
    parser.add_argument(
        "--pruning",
        action="append",
        default=[],
        type=pruning_type,
        metavar="TASK=P,S",
        help="keep the share P of a specialist's delta, scaled by S (default: 1,1)",
    )
    parser.add_argument("--out", metavar="report.json", help="file to write the report to")
    add_talking(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, console: Console) -> int:
    share = join(args.device)
    try:
        return _run(args, console, share)
    finally:
        leave(share)


def _run(args: argparse.Namespace, console: Console, share: Share) -> int:
    stop = threading.Event()
    layers = 0 if args.estimate_only else args.layers
    estimate = isinstance(layers, int)
    analysis, cost = agree(share, lambda: _open(args, console, share, layers, stop))
    console.note(cost)
    for note in analysis.notes:
        console.note(note)
    report, stopped = analysis.report(), False
    events = iter_shared(analysis, share, estimate=estimate, layers=layers)
    with stopping(stop):
        try:
            while True:
                event = next(events)
                report = event.report
                if event.phase != "done":
                    told = f"{event.message} ({event.done} of {event.total})"
                    console.progress(event.phase, told, event.done, event.total)
        except StopIteration as end:
            report = end.value
        except Stopped:
            if share.world > 1:
                raise
            stopped = True
    if share.rank == 0:
        write_file(args.out, report.to_json() + "\n", "--out")
        _show(report, console)
    if stopped:
        console.error("Stopped. What is measured is kept: the same command goes on from here.")
    return 130 if stopped else 0


def _open(
    args: argparse.Namespace,
    console: Console,
    share: Share,
    layers: int | tuple[str, ...] | None,
    stop: threading.Event,
) -> tuple[Analysis, str]:
    """The analysis, and a sentence on its cost."""
    check_file(args.out, "--out")
    inputs = read_inputs(args, console, args.pruning)
    check_layers(layers, inputs)
    analysis = open_analysis(
        inputs.base,
        inputs.tasks,
        model_type=args.type,
        metric=args.metric,
        pruning=inputs.pruning,
        combine=args.combine,
        device=share.device,
        store=open_store(args.store),
        stop=stop,
    )
    return analysis, _cost(analysis, inputs, share, layers)


def _cost(analysis: Analysis, inputs: Inputs, share: Share, layers: int | tuple[str, ...] | None) -> str:
    """One sentence: what has to be done, how much of it is known already, and how long the rest may take."""
    setup, scorer, tasks = analysis.setup, analysis.scorer, len(analysis.setup.tasks)
    estimate = isinstance(layers, int)
    parts = [f"an estimate of {len(setup.layers)} layers by {3 * tasks} backward passes"] if estimate else []
    if isinstance(layers, int):
        keys, count = [], layers  # which ones, the estimate will say
    else:
        keys = [setup.layer(key).key for key in layers or [layer.key for layer in setup.layers]]
        count = len(keys)
    kept = sum(scorer.store.get(scorer.key(setup.variant(c), c.task)) is not None for c in cells_of(setup, keys))
    if count:
        words = f"{4 * tasks * count} evaluations of {count} layers and {3 * tasks} of whole models"
        parts.append(f"{words}, {kept} of them measured before" if kept else words)
    left = count - kept / (4 * tasks)
    cost = cost_of(inputs, analysis.metric, share.device, layers=left)
    shared = f" in {share.world} processes" if share.world > 1 else ""
    seconds = 0.0 if cost is None else cost.estimate * estimate + cost.exact * (left > 0)
    time = "" if cost is None else f" Roughly {time_text(seconds / share.world)}."
    return f"To do: {'; '.join(parts)}{shared}.{time}"


def _show(report: ContributionReport, console: Console) -> None:
    setup = report.setup
    head = ["layer", *(f"γ {task}" for task in setup.tasks), "Γ", "type"]
    lines, derived = [], []
    for layer in setup.layers:
        gammas = {task: report.gamma(task, layer.key) for task in setup.tasks}
        total, conflict = report.total(layer.key), report.conflict(layer.key)
        if total is not None:
            kind = f"{conflict.kind} (uncertain)" if conflict.uncertain else conflict.kind
            lines.append([layer.title, *(stat_text(gamma) for gamma in gammas.values()), stat_text(total), kind])
        derived.append(
            {
                "layer": layer.key,
                "title": layer.title,
                "gamma": {task: stat_dict(gamma) for task, gamma in gammas.items()},
                "Gamma": stat_dict(total),
                "type": conflict.kind,
                "uncertain": conflict.uncertain,
            }
        )
    if lines:
        console.say(table(head, lines))
        errors = "± one standard error; ≈ is a first-order estimate of −loss"
        console.say(f"γ and Γ in {report.unit}, metric {report.metric}; {errors}." if report.unit else
                    f"γ and Γ of {report.metric}; {errors}.")  # fmt: skip
    console.say(report.headline())
    console.result({**report.to_dict(), "headline": report.headline(), "layers": derived})
