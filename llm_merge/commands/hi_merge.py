"""`llm-merge hi-merge`: Hi-Merging from two or more specialists to a recipe or a model folder, step by step."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Sequence
from typing import Any

from llm_merge.analysis import open_analysis
from llm_merge.commands.arguments import add_inputs, add_output_settings, add_talking, count
from llm_merge.commands.console import Console, number_text, plain, stat_dict, stat_text, stopping, table, time_text
from llm_merge.commands.files import check_file, write_file
from llm_merge.commands.inputs import Inputs, cost_of, open_store, read_inputs
from llm_merge.commands.merge import write_model
from llm_merge.distributed import only_one_process
from llm_merge.errors import Stopped
from llm_merge.hi_merging import CHOICES, COARSE, STEPS, Switches, Trial
from llm_merge.hierarchical import HiMergeEvent, HiMergeResult, Point, iter_hi_merge, summary
from llm_merge.output import check_output, check_place
from llm_merge.plan import make_plan

EXAMPLE = """example:
  llm-merge hi-merge --base smollm2 --model verse=king-james --model dictionary=dictionary \\
      --data verse=verse.jsonl --data dictionary=dictionary.jsonl --grid coarse --recipe hi.yml --out merged

Decisions are made on analysis rows; held-out rows are measured beside and never decide. Ctrl-C keeps the recipe
reached so far; evaluations are kept as they are measured, and the same command goes on where it was.
Exit codes: 0 done, 1 an error that is said in a sentence, 2 wrong arguments, 130 stopped."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "hi-merge",
        help="merge by Hi-Merging: prune, scale, and settle the layers that fight",
        description="Hi-Merging (Fu et al., ACL 2025): prune and scale each specialist, then settle layer conflicts "
        "one by one.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_inputs(parser)
    switches, usual = parser.add_argument_group("the method (the defaults are our reading of the paper)"), Switches()
    switches.add_argument(
        "--grid",
        choices=CHOICES["grid"],
        default=usual.grid,
        help="search for the share kept p and the scale s: full 10 × 10, coarse 4 × 4 and around the best, or none "
        "(default: full)",
    )
    switches.add_argument(
        "--partial-target",
        choices=CHOICES["partial_target"],
        default=usual.partial_target,
        help="whose layer is reduced in a partial conflict (default: enhanced, which gains at the other's cost)",
    )
    switches.add_argument(
        "--severe-by",
        choices=CHOICES["severe_by"],
        default=usual.severe_by,
        help="the contribution, before or after merging, that decides who keeps a layer (default: before)",
    )
    switches.add_argument(
        "--recompute", action="store_true", help="measure the remaining layers again after every change"
    )
    switches.add_argument("--max-layers", type=int, metavar="N", help="change at most N layers (default: all)")
    switches.add_argument(
        "--accept",
        choices=CHOICES["accept"],
        default=usual.accept,
        help="keep every change, or only those after which the mean over the tasks is not lower (default: always)",
    )
    switches.add_argument(
        "--min-gamma-se",
        type=float,
        default=usual.min_gamma_se,
        metavar="N",
        help="act only where γ is more than N standard errors from 0 (default: 0)",
    )
    output = parser.add_argument_group("results")
    output.add_argument(
        "--held-out", type=count, default=200, metavar="N", help="held-out rows per task to report (default: 200)"
    )
    output.add_argument("--recipe", metavar="out.yml", help="file to write the recipe to, as mergekit's YAML")
    output.add_argument("--out", metavar="FOLDER", help="folder to write the merged model to, at once")
    output.add_argument("--report", metavar="report.json", help="file to write the deciding contributions to")
    output.add_argument("--trials", metavar="trials.json", help="file to write the grid, every step and scores to")
    add_output_settings(parser)
    add_talking(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, console: Console) -> int:
    only_one_process("hi-merge")
    switches = Switches(
        partial_target=args.partial_target,
        severe_by=args.severe_by,
        recompute=args.recompute,
        max_layers=args.max_layers,
        accept=args.accept,
        min_gamma_se=args.min_gamma_se,
        grid=args.grid,
    )
    for option in ("recipe", "report", "trials"):
        check_file(getattr(args, option), f"--{option}")
    if args.out is not None:
        check_place(args.out)
    inputs = read_inputs(args, console)
    if args.out is not None:
        check_output(args.out, make_plan(inputs.plan.recipe.with_dtype(args.dtype)))
    stop = threading.Event()
    analysis = open_analysis(
        inputs.base,
        inputs.tasks,
        model_type=args.type,
        metric=args.metric,
        combine=args.combine,
        device=args.device,
        store=open_store(args.store),
        held_out=args.held_out,
        stop=stop,
    )
    console.note(_cost(inputs, args, switches, len(analysis.setup.layers)))
    for note in analysis.notes:
        console.note(note)
    tasks, reached, result = analysis.setup.tasks, HiMergeEvent("models", "", 0, 1), None
    events = iter_hi_merge(analysis, switches, dtype=args.dtype)
    with stopping(stop):
        try:
            while True:
                reached = _further(reached, event := next(events))
                if event.phase == "layers" and event.done > 0:
                    console.say(step_text(event.trials[-1], tasks))
                elif event.phase != "done":
                    told = f"{event.message} ({event.done} of {event.total})"
                    console.progress(event.phase, told, event.done, event.total)
        except StopIteration as end:
            result = end.value
        except Stopped:
            pass
    _write(args, reached)
    if reached.points:
        console.say(points_table(reached.points, [*tasks, *(name for name in analysis.held_out if name not in tasks)]))
        unit = f" in {analysis.unit}" if analysis.unit else ""
        console.say(f"{analysis.metric}{unit}, higher is better; ± one standard error.")
    if result is not None:
        console.say(f"{summary(result)}.")
    written = None
    if result is not None and args.out is not None:
        plan = make_plan(result.recipe, max_shard_bytes=args.out_shard_size)
        written = write_model(plan, args.out, console, model_type=args.type,
                              notes=(f"Merged by Hi-Merging: {summary(result)}.",))  # fmt: skip
    elif args.recipe is None and reached.recipe is not None:
        console.say(reached.recipe.to_yaml())
    console.result(_as_json(reached, tasks, result, written))
    if result is None:
        kept = "the recipe reached so far is kept" if reached.recipe else "no recipe was reached yet"
        console.error(f"Stopped: {kept}. What is measured is kept, too: the same command goes on from here.")
    return 130 if result is None else 0


def _further(reached: HiMergeEvent, event: HiMergeEvent) -> HiMergeEvent:
    """The event with what earlier ones had found and it does not repeat."""
    return HiMergeEvent(
        event.phase,
        event.message,
        event.done,
        event.total,
        event.grid or reached.grid,
        event.report or reached.report,
        event.trials or reached.trials,
        event.points or reached.points,
        event.recipe or reached.recipe,
    )


def _cost(inputs: Inputs, args: argparse.Namespace, switches: Switches, layers: int) -> str:
    tasks = len(inputs.own)
    grid = {"full": len(STEPS) ** 2, "coarse": len(COARSE) ** 2 + 9, "none": 0}[switches.grid]
    cost = cost_of(inputs, args.metric, args.device, held_out=args.held_out)
    cells = f"a grid of {'about ' if switches.grid == 'coarse' else ''}{grid * tasks} evaluations; " if grid else ""
    more = ", and the remaining ones again after every change" if switches.recompute else ""
    words = f"To do: {cells}{4 * tasks * layers} evaluations of {layers} layers{more}."
    if cost is None:
        return words
    return f"{words} Roughly {time_text(cost.hi_merge(switches.grid))}, less what was measured before."


def _write(args: argparse.Namespace, reached: HiMergeEvent) -> None:
    if reached.recipe is not None:
        write_file(args.recipe, reached.recipe.to_yaml(), "--recipe")
    if reached.report is not None:
        write_file(args.report, reached.report.to_json() + "\n", "--report")
        found = _steps(reached, reached.report.setup.tasks)
        write_file(args.trials, json.dumps(plain(found), ensure_ascii=False, indent=1) + "\n", "--trials")


# ── in words and numbers ────────────────────────────────────────────────────────────────────────────────────────────


def step_text(trial: Trial, tasks: Sequence[str]) -> str:
    """One line: the layer, why, what was done, and what it did to each task's mean."""
    kind = f"{trial.kind} (uncertain)" if trial.uncertain else trial.kind
    words = f"{trial.step:>3}  {trial.title}: Γ {stat_text(trial.total)}, {kind}: {trial.action}"
    if not trial.edits:
        return words
    pairs = zip(tasks, trial.before, trial.after, strict=True)
    return f"{words}; " + ", ".join(f"{task} {number_text(b)} → {number_text(a)}" for task, b, a in pairs)


def points_table(points: Sequence[Point], tasks: Sequence[str]) -> str:
    """The base, each specialist, the average and the merge reached: the mean per task, analysis and held-out rows."""
    shown = [(point.name, point) for point in points if not point.name.startswith("step ")]
    shown += [("Hi-Merging", points[-1])] if points[-1].name.startswith("step ") else []
    columns = [(task, side) for task in tasks for side in ("analysis", "held_out")
               if any(task in getattr(point, side) for _, point in shown)]  # fmt: skip
    head = ["model", *(f"{task}, {'held out' if side == 'held_out' else side}" for task, side in columns), ""]
    lines = [
        [name, *(stat_text(getattr(point, side).get(task), signed=False) for task, side in columns), ""]
        for name, point in shown
    ]
    return table(head, lines)


def _as_json(
    reached: HiMergeEvent, tasks: Sequence[str], result: HiMergeResult | None, written: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "stopped": result is None,
        "summary": summary(result) if result is not None else "",
        "recipe": reached.recipe.to_dict() if reached.recipe is not None else None,
        **_steps(reached, tasks),
        "report": reached.report.to_dict() if reached.report is not None else None,
        "written": written,
    }


def _steps(reached: HiMergeEvent, tasks: Sequence[str]) -> dict[str, Any]:
    pairs = reached.report.setup.pruning if reached.report is not None else ()
    return {
        "pruning": dict(zip(tasks, pairs, strict=False)),
        "grid": [{"task": c.task, "p": c.p, "s": c.s, "score": stat_dict(c.score)} for c in reached.grid],
        "trials": [_trial_dict(trial, tasks) for trial in reached.trials],
        "points": [
            {
                "name": point.name,
                "analysis": {task: stat_dict(stat) for task, stat in point.analysis.items()},
                "held_out": {task: stat_dict(stat) for task, stat in point.held_out.items()},
            }
            for point in reached.points
        ],
    }


def _trial_dict(trial: Trial, tasks: Sequence[str]) -> dict[str, Any]:
    return {
        "step": trial.step,
        "layer": trial.layer,
        "title": trial.title,
        "Gamma": stat_dict(trial.total),
        "gamma": dict(zip(tasks, map(stat_dict, trial.gammas), strict=True)),
        "type": trial.kind,
        "uncertain": trial.uncertain,
        "action": trial.action,
        "edits": [{"task": tasks[edit.model], "weight": edit.weight, "density": edit.density} for edit in trial.edits],
        "before": dict(zip(tasks, trial.before, strict=True)),
        "after": dict(zip(tasks, trial.after, strict=True)),
        "accepted": trial.accepted,
    }
