"""Random masks: the share they keep, and what they depend on."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from llm_merge.methods.random_masks import BLOCK, random_mask


def mask(count: int, density: float = 0.5, *, seed: int = 0, tensor: str = "t", model: str = "m#0") -> torch.Tensor:
    return random_mask(torch.empty(count), density, seed=seed, tensor=tensor, model=model)


def agreement(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left == right).float().mean())


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.9])
def test_the_share_kept_is_the_density(density: float) -> None:
    count = 4 * BLOCK
    error = math.sqrt(density * (1 - density) / count)
    assert abs(float(mask(count, density).float().mean()) - density) < 5 * error


def test_nothing_and_everything() -> None:
    assert not mask(1000, 0.0).any()
    assert mask(1000, 1.0).all()


@pytest.mark.parametrize("shape", [(0,), (1,), (), (3, 5), (2, BLOCK)])
def test_the_shape_is_the_tensors(shape: tuple[int, ...]) -> None:
    assert random_mask(torch.empty(shape), 0.5, seed=0, tensor="t", model="m#0").shape == shape


def test_a_shorter_tensor_gets_the_beginning_of_a_longer_ones_mask() -> None:
    """So an entry's bit depends on its place alone, not on how many entries follow."""
    long = mask(3 * BLOCK)
    for count in (1, 5, BLOCK - 1, BLOCK, BLOCK + 3):
        assert torch.equal(mask(count), long[:count])


def test_blocks_models_tensors_and_seeds_are_independent() -> None:
    first = mask(4 * BLOCK)
    others = [mask(4 * BLOCK, model="m#1"), mask(4 * BLOCK, tensor="u"), mask(4 * BLOCK, seed=1), first.roll(BLOCK)]
    assert all(abs(agreement(first, other) - 0.5) < 5 * 0.5 / math.sqrt(4 * BLOCK) for other in others)


def test_a_lower_density_keeps_a_part_of_what_a_higher_one_keeps() -> None:
    assert not (mask(BLOCK, 0.2) & ~mask(BLOCK, 0.4)).any()


def test_the_bits_are_the_same_on_every_machine() -> None:
    bits = mask(2 * BLOCK + 7, 0.3, seed=42, tensor="model.layers.0.mlp.up_proj.weight", model="org/a#0")
    assert hashlib.sha256(bytes(bits.tolist())).hexdigest()[:16] == "7ce7ffb1f16af006"
