"""Source tensors in memory: the same as from disk, each once, within the budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_merge.checkpoint import Checkpoint, open_checkpoint
from llm_merge.source_cache import SourceCache
from tests.tiny_models import TinyFamily, make_tiny_lora

NAME, OTHER = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(reference, tensor) of everything that is read from disk."""
    done: list[tuple[str, str]] = []
    own = Checkpoint.read

    def counted(self: Checkpoint, name: str) -> torch.Tensor:
        done.append((self.reference, name))
        return own(self, name)

    monkeypatch.setattr(Checkpoint, "read", counted)
    return done


def test_a_tensor_is_read_once_and_is_the_checkpoint_s(tiny_llama: TinyFamily, reads: list[tuple[str, str]]) -> None:
    cache, first = SourceCache(10**8), open_checkpoint(tiny_llama.references[0])
    second = open_checkpoint(tiny_llama.references[1])
    for _ in range(3):
        assert torch.equal(cache.read(first, NAME), Checkpoint.read(first, NAME))
        assert torch.equal(cache.read(second, NAME), Checkpoint.read(second, NAME))
    assert len(reads) == 2 + 6  # the six are the test's own
    assert cache.nbytes == 2 * cache.read(first, NAME).nbytes


def test_what_an_adapter_leaves_alone_is_the_base_s(
    tmp_path: Path, tiny_llama: TinyFamily, reads: list[tuple[str, str]]
) -> None:
    base = tiny_llama.references[0]
    adapters = [make_tiny_lora(tmp_path / str(n), n, tiny_llama.base, targets=("q_proj",)) for n in (1, 2)]
    models = [open_checkpoint(reference) for reference in (base, *(f"{base}+{adapter}" for adapter in adapters))]
    cache = SourceCache(10**8)
    shared = [cache.read(model, OTHER) for model in models]
    assert shared[0] is shared[1] is shared[2]
    own = [cache.read(model, NAME) for model in models]
    assert not torch.equal(own[1], own[2])
    assert all(torch.equal(tensor, Checkpoint.read(model, NAME)) for tensor, model in zip(own, models, strict=True))


@pytest.mark.parametrize("tensors", [0, 1, 2])
def test_no_more_is_kept_than_the_budget(tiny_llama: TinyFamily, tensors: int) -> None:
    model = open_checkpoint(tiny_llama.references[0])
    size = Checkpoint.read(model, OTHER).nbytes
    cache = SourceCache(tensors * size)
    names = [f"model.layers.{n}.mlp.{part}_proj.weight" for n in (0, 1) for part in ("up", "gate", "down")]
    for name in names * 2:
        assert torch.equal(cache.read(model, name), Checkpoint.read(model, name))
        assert cache.nbytes <= tensors * size


def test_what_was_not_used_for_longest_goes_first(tiny_llama: TinyFamily, reads: list[tuple[str, str]]) -> None:
    model = open_checkpoint(tiny_llama.references[0])
    a, b, c = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("up", "gate", "down"))
    cache = SourceCache(2 * model.tensors[a].nbytes)
    for name in (a, b, a, c, a, b):
        cache.read(model, name)
    assert [name for _, name in reads] == [a, b, c, b]
