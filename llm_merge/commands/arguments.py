"""The arguments that commands share, and how their words are read. Wrong ones end the program with 2 and a sentence."""

from __future__ import annotations

import argparse
import math
import re

from llm_merge.contributions import COMBINES
from llm_merge.metrics import LOSS, METRICS
from llm_merge.plan import MAX_SHARD_BYTES
from llm_merge.recipe import DTYPES

MODEL_TYPES = ("decoder", "encoder", "encoder-decoder")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def add_talking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="write the result as JSON to standard output, and nothing else there"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress and no notes on standard error")


def add_output_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=sorted(set(DTYPES.values())),
        help="type of the written weights; without it the recipe's, else the first model's",
    )
    parser.add_argument(
        "--out-shard-size",
        type=size,
        default=MAX_SHARD_BYTES,
        metavar="SIZE",
        help="largest weights file, such as 500M or 5G in powers of ten (default: 5G)",
    )


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Models, rows and how they are measured: the same for `analyze` and `hi-merge`, so that both share what was
    measured."""
    models = parser.add_argument_group("models and rows")
    models.add_argument("--base", required=True, metavar="MODEL", help="the model that all specialists were tuned from")
    models.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="[TASK=]MODEL",
        help="a specialist and its task; once for each. A model is a folder, a hub id, base+adapter, or a demo model's "
        "name, such as king-james",
    )
    models.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="[TASK=]FILE",
        help="example rows of a task (JSON, JSON Lines, CSV, TSV, or dataset_info.json:name); a task without a "
        "specialist is only reported",
    )
    models.add_argument(
        "--held-out-data",
        action="append",
        default=[],
        metavar="[TASK=]FILE",
        help="rows that are only reported; without it one row in four of --data is held out",
    )
    models.add_argument("--type", choices=MODEL_TYPES, default="decoder", help="kind of model (default: decoder)")
    models.add_argument("--rows", type=int, metavar="N", help="at most N analysis rows per task (default: all)")
    models.add_argument("--seed", type=int, default=0, help="how rows are divided and drawn (default: 0)")
    measuring = parser.add_argument_group("measuring")
    names = ", ".join(metric.name for metric in METRICS)
    measuring.add_argument(
        "--metric", default=LOSS, metavar="NAME", help=f"one for all tasks: {names} (default: {LOSS})"
    )
    measuring.add_argument(
        "--combine", choices=COMBINES, default="average", help="how the specialists are merged (default: average)"
    )
    measuring.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    measuring.add_argument(
        "--store",
        metavar="FOLDER",
        help="where evaluations are kept as they are measured; what is there is not measured again (default: the "
        "user's cache folder)",
    )


def size(text: str) -> int:
    """ "500M", "5G", "5GB": bytes in powers of ten."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    nbytes = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if nbytes < 1:
        raise argparse.ArgumentTypeError(f"“{text}” is not a size: write a number and K, M, G or T, such as 5G")
    return nbytes


def count(text: str) -> int:
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"“{text}” is not a number of rows: write 0 or more")
    return int(text)


def layers(text: str) -> int | tuple[str, ...]:
    """A number of layers, or their keys: "5"; "0,7,12", "7,", "embeddings"."""
    words = [word.strip() for word in text.split(",")]
    keys = [word for word in words if word]
    if len(words) == 1 and keys and keys[0].isdecimal():
        return int(keys[0])
    if not keys or keys[0].startswith("-") or len(set(keys)) < len(keys):
        raise argparse.ArgumentTypeError(
            f"“{text}” names no layers: write how many, such as 5, or which, such as 0,7,12 (one alone: “7,”)"
        )
    return tuple(keys)


def pruning(text: str) -> tuple[str, float, float]:
    """ "verse=0.4,0.9": a task, the share p of its delta that is kept, and its scale s."""
    task, sign, pair = text.rpartition("=")
    try:
        p, s = (float(word) for word in pair.split(","))
    except ValueError:
        p = s = math.nan
    if not sign or not task.strip() or not (math.isfinite(p) and math.isfinite(s)):
        raise argparse.ArgumentTypeError(f"“{text}” is not task=p,s: write it as verse=0.4,0.9")
    return task.strip(), p, s
