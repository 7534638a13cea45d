"""Lets mergekit 0.1.5 make what Hi-Merging found, from the recipe as YAML, and compares the weights with ours.

On a small Llama with two full fine-tunes, in float32 and bfloat16; with `--demo` also on the demo's decoders, whose
adapters are first merged into folders of their own. mergekit lives in an environment of its own, made once in
`--mergekit-env`. Ends with 1 unless every weight is the same to 1 ulp of bfloat16.

    python scripts/check_mergekit.py [--demo] [--mergekit-env FOLDER]

Equal magnitudes at the edge of what is kept are the one allowed difference: mergekit keeps any of them, we keep the
lowest indices. They are common where models are bfloat16, since differences of such numbers are few different values.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llm_merge.demo import cache_folder, demo_examples, demo_path, prepare
from llm_merge.hi_merging import Switches
from llm_merge.hierarchical import hi_merge, summary
from llm_merge.merge import run
from llm_merge.output import FolderSink
from llm_merge.plan import Plan, make_plan
from llm_merge.recipe import Recipe

if TYPE_CHECKING:
    import torch

MERGEKIT, TORCH = "0.1.5", "2.13.0"
ENVIRONMENT = cache_folder() / f"mergekit-{MERGEKIT}"
TASKS = ("verse", "dictionary")
SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4}
ROWS = 6


@dataclass(frozen=True)
class Difference:
    """Two folders of weights compared as bfloat16. ulps, largest: of all entries that are not at a tie."""

    entries: int
    other: int
    at_ties: int
    ulps: int
    largest: float


def mergekit_program(folder: Path = ENVIRONMENT) -> Path:
    """`mergekit-yaml` of an environment of its own, which is made when it is not there."""
    programs = folder / ("Scripts" if sys.platform == "win32" else "bin")
    program = programs / ("mergekit-yaml.exe" if sys.platform == "win32" else "mergekit-yaml")
    if not program.is_file():
        print(f"Installing mergekit {MERGEKIT} into {folder}: some minutes, once.", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True)
        constraints = folder / "constraints.txt"
        constraints.write_text(f"torch=={TORCH}\n", encoding="utf-8")
        python = programs / ("python.exe" if sys.platform == "win32" else "python")
        pip = [str(python), "-m", "pip", "install", "--quiet", "-c", str(constraints), f"mergekit=={MERGEKIT}"]
        subprocess.run(pip, check=True)
    return program


def mergekit_merge(program: Path, recipe: Mapping[str, Any], out: Path) -> None:
    """Let mergekit run a recipe, given as in its YAML."""
    config = out.with_suffix(".yml")
    config.write_text(yaml.safe_dump(dict(recipe), sort_keys=False), encoding="utf-8")
    command = [str(program), str(config), str(out), "--no-write-model-card", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"mergekit failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def make_llama(folder: Path, sizes: Mapping[str, int], *, dtype: str, seed: int, base: Path | None = None) -> Path:
    """A Llama with random weights and the demo's tokenizer; with `base`, its weights plus a dense random change.

    The change is a few per cent of each tensor, as fine-tuning leaves it, and a tenth of that in half of the entries.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(demo_path("smollm2"))
    torch.manual_seed(seed)
    if base is None:
        config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, max_position_embeddings=2048, **sizes)
        model = LlamaForCausalLM(config)
    else:
        model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                size = 0.03 * (parameter.std() if parameter.dim() > 1 else 0.1)
                parts = torch.rand_like(parameter) < 0.5
                parameter += torch.randn_like(parameter) * size * (0.1 + 0.9 * parts)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_models(folder: Path, dtype: str) -> list[str]:
    base = make_llama(folder / "base", SMALL, dtype=dtype, seed=0)
    return [
        str(base),
        *(str(make_llama(folder / t, SMALL, dtype=dtype, seed=n, base=base)) for n, t in enumerate(TASKS, 1)),
    ]


def demo_models(folder: Path) -> list[str]:
    """The demo's base, and its adapters merged into folders."""
    for key in ("king-james", "dictionary"):
        save(make_plan(Recipe.single(demo_path(key))), folder / key)
    return [demo_path("smollm2"), str(folder / "king-james"), str(folder / "dictionary")]


def found_recipe(models: list[str], combine: str, *, grid: str = "coarse") -> Recipe:
    """What Hi-Merging makes of the models with a few of the demo's rows."""
    rows = {task: demo_examples("decoder", task, "work")[:ROWS] for task in TASKS}
    own = dict(zip(TASKS, models[1:], strict=True))
    result = hi_merge(models[0], own, rows, switches=Switches(grid=grid), combine=combine)
    print(f"  Hi-Merging, {combine}: {summary(result)}", flush=True)
    return result.recipe


def save(plan: Plan, folder: Path) -> Path:
    for _ in run(plan, FolderSink(folder)):
        pass
    return folder


def compared(plan: Plan, ours: Path, theirs: Path) -> Difference:
    """Every tensor of the result, entry by entry."""
    import torch

    left, right = weights_of(ours), weights_of(theirs)
    missing = set(left) ^ set(right)
    if missing:
        sys.exit(f"Only one of the two results has {', '.join(sorted(missing)[:5])}.")
    entries = other = at_ties = ulps = 0
    largest = 0.0
    for tensor in plan.tensors:
        one, two = (side[tensor.name].to(torch.bfloat16).reshape(-1) for side in (left, right))
        far, apart = distances(one, two), (one.float() - two.float()).abs()
        entries += far.numel()
        other += int((far > 0).sum())
        if int(far.max()) > 1:
            tied = edge_of_what_is_kept(plan, tensor)
            at_ties += int((tied & (far > 0)).sum())
            far, apart = far.masked_fill(tied, 0), apart.masked_fill(tied, 0)
        ulps, largest = max(ulps, int(far.max())), max(largest, float(apart.max()))
    return Difference(entries, other, at_ties, ulps, largest)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def distances(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """How many bfloat16 numbers lie between the entries, plus one; 0 for equal ones."""
    import torch

    def place(values: torch.Tensor) -> torch.Tensor:
        bits = values.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (place(one) - place(two)).abs()


def edge_of_what_is_kept(plan: Plan, tensor: Any) -> torch.Tensor:
    """The entries whose change, in some model, is as large as the smallest one that is kept of it."""
    import torch

    base = plan.base.read(tensor.name).float().reshape(-1)
    tied = torch.zeros(base.numel(), dtype=torch.bool)
    densities = dict(tensor.settings)["density"]
    for checkpoint, source, density, weight in zip(
        plan.checkpoints, tensor.sources, densities, tensor.weights, strict=True
    ):
        if density < 1 and weight:
            sizes = (checkpoint.read(source).float().reshape(-1) - base).abs()
            tied |= sizes == sizes.topk(max(1, int(density * sizes.numel()))).values[-1]
    return tied


def check(name: str, models: list[str], dtype: str, program: Path, folder: Path) -> bool:
    """Both ways of combining, on one trio of models; prints a line for each comparison."""
    good = True
    for combine in ("average", "ties_sum"):
        recipe = found_recipe(models, combine).with_dtype(dtype)
        plan = make_plan(recipe)
        ours = save(plan, folder / f"ours-{combine}")
        # mergekit computes in `dtype`; for the sums in float32 that we make, it is told so and rounds at the end.
        exact = {**recipe.to_dict(), "dtype": "float32", "out_dtype": dtype}
        asked = {"in float32": exact} if dtype == "float32" else {"in float32": exact, "as written": recipe.to_dict()}
        for how, config in asked.items():
            theirs = folder / f"theirs-{combine}-{len(how)}"
            mergekit_merge(program, config, theirs)
            found = compared(plan, ours, theirs)
            print(
                f"| {name} | {recipe.merge_method} ({combine}) | {how} | {found.entries} | {found.other} | "
                f"{found.at_ties} | {found.ulps} | {found.largest:.2g} |",
                flush=True,
            )
            good &= how != "in float32" or found.ulps <= 1
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit-env", type=Path, default=ENVIRONMENT, help="mergekit's own environment")
    parser.add_argument("--demo", action="store_true", help="the demo's decoders too (about 10 minutes)")
    options = parser.parse_args()
    program = mergekit_program(options.mergekit_env)
    for _ in prepare("smollm2"):
        pass
    print("| models | method | mergekit computes | entries | different | at ties | ulps of the rest | their largest |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    good = True
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder:
            models = small_models(Path(folder), dtype)
            good &= check(f"small Llama, {dtype}", models, dtype, program, Path(folder))
    if options.demo:
        with tempfile.TemporaryDirectory() as folder:
            good &= check("demo, bfloat16", demo_models(Path(folder)), "bfloat16", program, Path(folder))
    print("\nThe same to 1 ulp of bfloat16." if good else "\nNOT the same to 1 ulp of bfloat16.")
    sys.exit(not good)


if __name__ == "__main__":
    main()
