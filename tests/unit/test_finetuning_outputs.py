"""What fine-tuning programs leave behind opens as it is: LLaMA-Factory's exports and adapters, TRL's folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llm_merge.checkpoint import open_checkpoint
from llm_merge.merge import MemorySink, run
from llm_merge.plan import make_plan
from llm_merge.recipe import ModelEntry, Recipe
from tests.tiny_models import TinyFamily, make_tiny_lora

# Beside the model, as their trainers write it; none of it is weights, and some of it is pickled.
LLAMA_FACTORY = ("README.md", "all_results.json", "train_results.json", "trainer_log.jsonl", "trainer_state.json",
                 "training_args.bin", "training_loss.png", "Modelfile")  # fmt: skip
TRL = ("README.md", "training_args.bin", "runs/events.out.tfevents.1", "completions/completions_00001.parquet")


def leave_behind(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\x80\x04not a tensor" if name.endswith(".bin") else b"{}")
    step = folder / "checkpoint-10"
    step.mkdir()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (step / name).write_bytes(b"\x80\x04")


@pytest.fixture
def adapter(tiny_llama: TinyFamily, tmp_path: Path) -> Path:
    return make_tiny_lora(tmp_path / "lora", 1, tiny_llama.base)


@pytest.mark.parametrize("beside", [LLAMA_FACTORY, TRL])
def test_an_adapter_folder_opens_with_all_that_lies_beside_it(
    tiny_llama: TinyFamily, adapter: Path, beside: tuple[str, ...]
) -> None:
    before = open_checkpoint(f"{tiny_llama.base}+{adapter}")
    changed = [name for name in before.tensors if before.changes(name)]
    plain = {name: before.read(name) for name in changed}
    leave_behind(adapter, beside)
    opened = open_checkpoint(f"{tiny_llama.base}+{adapter}")
    assert changed
    assert all(torch.equal(opened.read(name), value) for name, value in plain.items())


@pytest.mark.parametrize("beside", [LLAMA_FACTORY, TRL])
def test_an_exported_model_merges_with_its_base(
    tiny_llama: TinyFamily, beside: tuple[str, ...], tmp_path: Path
) -> None:
    import shutil

    export = tmp_path / "export"
    shutil.copytree(tiny_llama.fine_tunes[0], export)
    leave_behind(export, beside)
    recipe = Recipe(
        (ModelEntry(str(export), 1.0),), "task_arithmetic", base_model=str(tiny_llama.base), dtype="float32"
    )
    sink = MemorySink()
    for _ in run(make_plan(recipe), sink):
        pass
    tune = open_checkpoint(str(tiny_llama.fine_tunes[0]))
    for name, value in sink.tensors.items():
        assert torch.allclose(value, tune.read(name).float(), atol=1e-6), name


def test_an_adapter_that_names_its_base_opens_alone(tiny_llama: TinyFamily, adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tiny_llama.base)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    leave_behind(adapter, LLAMA_FACTORY)
    assert open_checkpoint(str(adapter)).adapter is not None
