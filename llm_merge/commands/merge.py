"""`llm-merge merge recipe.yml out/`: mergekit's YAML becomes a model folder."""

from __future__ import annotations

import argparse
import threading
from contextlib import closing
from typing import Any

from llm_merge.card import Provenance
from llm_merge.commands.arguments import add_output_settings, add_talking
from llm_merge.commands.console import Console, stopping
from llm_merge.commands.files import read_recipe, with_demo_models
from llm_merge.distributed import only_one_process
from llm_merge.errors import Stopped
from llm_merge.merge import rounding_warning
from llm_merge.merge import run as run_plan
from llm_merge.output import FolderSink, check_output, check_place
from llm_merge.plan import Plan, make_plan, size_text

EXAMPLE = """example:
  llm-merge merge recipe.yml merged --dtype bfloat16 --out-shard-size 2G

The folder appears when it is whole: Ctrl-C and errors leave nothing behind.
Exit codes: 0 done, 1 an error that is said in a sentence, 2 wrong arguments, 130 stopped."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "merge",
        help="run a recipe: mergekit's YAML becomes a model folder",
        description="Run a recipe tensor by tensor, for models of any size, and write a folder that transformers "
        "loads.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="recipe.yml", help="a recipe in mergekit's YAML")
    parser.add_argument("out", metavar="FOLDER", help="folder to write; it must not exist or be empty")
    add_output_settings(parser)
    add_talking(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, console: Console) -> int:
    only_one_process("merge")
    check_place(args.out)
    recipe = with_demo_models(read_recipe(args.recipe), console)
    if args.dtype:
        recipe = recipe.with_dtype(args.dtype)
    plan = make_plan(recipe, max_shard_bytes=args.out_shard_size)
    check_output(args.out, plan)
    console.result(write_model(plan, args.out, console))
    return 0


def write_model(
    plan: Plan, folder: str, console: Console, *, model_type: str | None = None, notes: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Run the plan into the folder, and say what was written, also as the result for programs.

    notes   for the model card; the plan's warnings are there anyway

    Raises OutputError, and Stopped after Ctrl-C; then nothing is left behind.
    """
    stop = threading.Event()
    with stopping(stop):
        rounding = rounding_warning(plan)
        warnings = [str(warning) for warning in (*plan.warnings, *([rounding] if rounding else []))]
        for warning in warnings:
            console.note(f"Note: {warning}")
        sink = FolderSink(folder, model_type=model_type,
                          provenance=Provenance(notes=(*notes, *([str(rounding)] if rounding else []))))  # fmt: skip
        with closing(run_plan(plan, sink)) as events:
            for event in events:
                if stop.is_set() and event.phase != "done":
                    raise Stopped
                size = f"{size_text(event.bytes_done)} of {size_text(event.bytes_total)}"
                console.progress("merge", f"Merging: {event.done} of {event.total} tensors, {size}",
                                 event.done, event.total)  # fmt: skip
    console.say(f"{sink.path}: {len(plan.tensors)} tensors, {size_text(plan.output_bytes)}, {plan.dtype}")
    return {
        "output": str(sink.path),
        "files": [shard.file for shard in plan.shards],
        "tensors": len(plan.tensors),
        "bytes": plan.output_bytes,
        "dtype": plan.dtype,
        "warnings": warnings,
    }
