"""Models and rows as the command line names them, checked before a weight is read: everything wrong is said at once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_merge import demo
from llm_merge.analysis_cost import AnalysisCost, analysis_cost
from llm_merge.cell_store import CellStore
from llm_merge.commands.console import Console
from llm_merge.commands.files import resolve_model
from llm_merge.contributions import Setup
from llm_merge.errors import ExampleError, MergeError
from llm_merge.layer_map import layer_map
from llm_merge.metrics import METRICS, get_metric
from llm_merge.plan import Plan, make_plan
from llm_merge.tasks import Task, assign_owners, split_tasks, tasks_from_files


@dataclass(frozen=True)
class Inputs:
    """What an analysis starts from.

    tasks       in order of their rows; those without a model are only reported
    pruning     (p, s) per specialist, in the order of their tasks
    plan        the merge of all specialists, from headers alone
    """

    base: str
    tasks: tuple[Task, ...]
    pruning: tuple[tuple[float, float], ...]
    plan: Plan

    @property
    def own(self) -> tuple[Task, ...]:
        """The specialists' tasks."""
        return tuple(task for task in self.tasks if task.model)


def read_inputs(args: argparse.Namespace, console: Console, pruning: Sequence[tuple[str, float, float]] = ()) -> Inputs:
    """Raises MergeError, as everything that it asks does. Opens headers and configs, no weights."""
    get_metric(args.metric, args.type)
    check_store(args.store)
    rows, notes = tasks_from_files(args.data, model_type=args.type)
    held_out: tuple[object, ...] = ()
    if args.held_out_data:
        held_out, more = tasks_from_files(args.held_out_data, model_type=args.type)
        notes = (*notes, *more)
    names = list(dict.fromkeys(row["task"] for row in rows))
    unknown = [row["task"] for row in held_out if row["task"] not in names]  # type: ignore[index]
    if unknown:
        raise ExampleError([f"--held-out-data has rows of “{unknown[0]}”; --data has {', '.join(names)}."])
    base = resolve_model(args.base, console)
    models, given = [], dict[str, str]()
    for text in args.model:
        task, name = task_and_model(text)
        models.append(resolve_model(name, console))
        if task in given:
            raise ExampleError([f"The task “{task}” has two models: name one --model {task}=…"], field="tasks")
        if task:
            given[task] = models[-1]
    if len(set(models)) < len(models):
        raise ExampleError(["One model is named twice: give each specialist one task."], field="tasks")
    owners = assign_owners(names, models, given)
    tasks = split_tasks(rows, owners, seed=args.seed, analysis=args.rows, held_out=held_out)  # type: ignore[arg-type]
    own = [task for task in tasks if task.model]
    pairs = _pairs(pruning, [task.name for task in own])
    setup = Setup(base, tuple(task.model for task in own), tuple(task.name for task in own), (), pairs, args.combine)
    plan = make_plan(setup.merged())
    for note in (*notes, *(task.note for task in tasks), *map(str, plan.warnings)):
        console.note(note)
    return Inputs(base, tasks, setup.pruning, plan)


def task_and_model(text: str) -> tuple[str, str]:
    """ "verse=king-james" → ("verse", "king-james"); a model alone, or a folder with such a name, has no task here."""
    if text.strip() and ("=" not in text or Path(text).exists()):
        return "", text
    task, _, name = text.partition("=")
    if not (task.strip() and name.strip()):
        message = f"“{text}” does not say which model: write task=model, such as verse=king-james."
        raise MergeError(message, field="model")
    return task.strip(), name.strip()


def check_layers(layers: int | Sequence[str] | None, inputs: Inputs) -> None:
    """Raises MergeError for layers that the models do not have."""
    known = [group.key for group in layer_map(tensor.name for tensor in inputs.plan.tensors).groups]
    if isinstance(layers, int):
        if layers > len(known):
            raise MergeError(
                f"--layers {layers} asks for more than the {len(known)} layers of these models: give a smaller number, "
                "or leave it out for all.",
                field="layers",
            )
        return
    for key in layers or ():
        if key not in known:
            message = f"There is no layer “{key}” in these models: there are {', '.join(known)}."
            raise MergeError(message, field="layers")


def check_store(folder: str | None) -> None:
    if folder is not None and (not folder.strip() or (Path(folder).exists() and not Path(folder).is_dir())):
        raise MergeError(f"--store “{folder}” is not a folder: give the name of one.", field="store")


def open_store(folder: str | None) -> CellStore:
    """The evaluations kept so far; without a folder named those in the user's cache folder."""
    return CellStore(Path(folder).expanduser() if folder else demo.cache_folder() / "cells")


def cost_of(
    inputs: Inputs, metric: str, device: str, *, layers: float | None = None, held_out: int = 0
) -> AnalysisCost | None:
    """Roughly what an analysis costs; None where answers are generated: who knows how long they are.

    layers      measured exactly; None: all
    """
    from llm_merge.workbench import choose_device

    if any(known.name == metric and known.kind == "generated" for known in METRICS):
        return None
    gpu = choose_device(device) != "cpu"
    return analysis_cost(inputs.plan.base, inputs.tasks, held_out=held_out, layers=layers, gpu=gpu)


def _pairs(pruning: Sequence[tuple[str, float, float]], tasks: Sequence[str]) -> tuple[tuple[float, float], ...]:
    found: dict[str, tuple[float, float]] = {}
    for task, p, s in pruning:
        if task not in tasks or task in found:
            twice = "is given twice" if task in found else "belongs to no specialist"
            raise MergeError(f"--pruning {task}={p:g},{s:g}: “{task}” {twice}; the tasks are {', '.join(tasks)}.",
                             field="pruning")  # fmt: skip
        found[task] = (p, s)
    return tuple(found.get(task, (1.0, 1.0)) for task in tasks)
