"""Wall time and memory of each step of the demo's live run here: convert, measure, merge in memory, answer, save.

    python benchmarks/live_run.py

Memory is the process's resident peak so far, so a step that needs less than those before it shows no rise.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_merge.demo import demo_examples, demo_path, prepare
from llm_merge.recipe import Recipe


@contextmanager
def step(name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
    print(f"| {name} | {time.perf_counter() - began:.1f} | {peak:.0f} |", flush=True)


def main() -> None:
    print("| step | wall s | peak MiB |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder, step("convert the base into an empty cache"):
        for _ in prepare("smollm2", Path(folder)):
            pass
    for _ in prepare("smollm2"):
        pass
    with step("import torch and transformers' model classes"):
        import torch
        from transformers import LlamaForCausalLM

        assert torch.get_num_threads() and LlamaForCausalLM
    from llm_merge.checkpoint import open_checkpoint
    from llm_merge.evaluation import resolve_format
    from llm_merge.generation import GenerationSettings, generate
    from llm_merge.measurements import measure_models
    from llm_merge.merge import run
    from llm_merge.output import FolderSink
    from llm_merge.plan import make_plan
    from llm_merge.workbench import Workbench

    models = [demo_path(key) for key in ("smollm2", "king-james", "dictionary")]
    rows = [row for task in ("verse", "dictionary") for row in demo_examples("decoder", task, "work")]
    recipe = Recipe.linear(models[1:], [0.5, 0.5])
    with step("load the base"):
        bench = Workbench(open_checkpoint(models[0]), "decoder")
        bench.follow(Recipe.single(models[0]))
    with step(f"measure 3 models on {len(rows)} rows"):
        for _ in measure_models(models, "decoder", rows, bench=bench):
            pass
    with step("merge in memory"):
        bench.follow(recipe)
    fmt = resolve_format([open_checkpoint(model) for model in models])
    prompt = demo_examples("decoder", "verse", "heldout")[5]["input"]
    tokens = 0
    with step("answer one verse with 3 models, at most 48 tokens each"):
        for what in (Recipe.single(models[0]), Recipe.single(models[1]), recipe):
            bench.follow(what)
            text = list(generate(bench, prompt, GenerationSettings(max_new_tokens=48), fmt))[-1]
            tokens += len(bench.tokenizer(text)["input_ids"])
    with tempfile.TemporaryDirectory() as folder, step("save the merge, 269 MB with its SHA-256"):
        for _ in run(make_plan(recipe), FolderSink(Path(folder) / "merged")):
            pass
    print(f"\n{tokens} tokens answered; torch used {torch.get_num_threads()} threads on {bench.device}.")


if __name__ == "__main__":
    main()
