"""Which entries are kept: against sorting everything, on values with and without equals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from llm_merge.methods import sparsify
from llm_merge.methods.sparsify import kept_count, kth_magnitude, largest_mask, outlier_free_mask, top_fraction_mask

LARGE = sparsify.SMALL + 12_345


def by_sorting(delta: torch.Tensor, keep: int) -> torch.Tensor:
    """The obvious slow way: a stable sort of the magnitudes, so the lowest index comes first among equals."""
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[delta.reshape(-1).abs().sort(descending=True, stable=True).indices[:keep]] = True
    return mask.reshape(delta.shape)


def normal(count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count))


VALUES: dict[str, Callable[[int], torch.Tensor]] = {
    "all different": normal,
    "few different": lambda count: (normal(count) * 2).round(),
    "mostly zero": lambda count: torch.where(normal(count + 1)[1:] > 1.5, normal(count), torch.zeros(count)),
    "all equal": lambda count: torch.full((count,), -0.5),
    "sorted": lambda count: torch.linspace(0, 1, count),
    "heavy tails": lambda count: normal(count) ** 9,
    "bfloat16": lambda count: normal(count).bfloat16().float(),
}


@pytest.mark.parametrize("count", [1, 2, 64, 1000, LARGE])
@pytest.mark.parametrize("values", VALUES)
def test_the_mask_is_that_of_a_stable_sort(values: str, count: int) -> None:
    delta = VALUES[values](count)
    for density in (0.0, 1e-4, 0.1, 0.5, 0.77, 0.999, 1.0):
        mask = top_fraction_mask(delta, density)
        assert int(mask.sum()) == kept_count(count, density)
        assert torch.equal(mask, by_sorting(delta, kept_count(count, density)))


@pytest.mark.parametrize("values", VALUES)
def test_the_kth_magnitude_comes_with_the_number_above_it(values: str) -> None:
    flat = VALUES[values](LARGE).numpy()
    ordered = np.sort(np.abs(flat))[::-1]
    for k in (1, 2, 100, LARGE // 3, LARGE // 2, LARGE - 1, LARGE):
        threshold, above = kth_magnitude(flat, k)
        assert threshold == ordered[k - 1]
        assert above == int((ordered > threshold).sum())


def test_a_sample_that_misleads_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bracket without width misses nearly always, on either side; the answer stays."""
    monkeypatch.setattr(sparsify, "MARGIN", 0.0)
    monkeypatch.setattr(sparsify, "SAMPLE", 16)
    delta = normal(LARGE)
    for keep in range(1, LARGE, LARGE // 9):
        assert torch.equal(largest_mask(delta, keep), by_sorting(delta, keep))


def test_at_least_one_entry_and_never_more_than_there_are() -> None:
    assert top_fraction_mask(torch.tensor([1.0, -3.0, 2.0]), 0.1).tolist() == [False, True, False]
    assert top_fraction_mask(torch.empty(0), 0.5).shape == (0,)
    assert top_fraction_mask(torch.tensor(2.0), 0.5).tolist() is True


def test_among_equals_the_lowest_index_is_kept() -> None:
    assert top_fraction_mask(torch.tensor([1.0, -2.0, 2.0, 2.0]), 0.5).tolist() == [False, True, True, False]


def test_shape_and_order_are_those_of_a_strided_tensor() -> None:
    delta = normal(600).reshape(20, 30).t()
    assert torch.equal(top_fraction_mask(delta, 0.3), by_sorting(delta.contiguous(), 180))


def test_outliers_are_dropped_before_the_largest_are_kept() -> None:
    delta = torch.tensor([8.0, -7, 6, 5, -4, 3, 2, 1])
    assert outlier_free_mask(delta, 0.5, 0.25).nonzero().flatten().tolist() == [2, 3, 4, 5]
    assert outlier_free_mask(delta, 0.5, 0.0).nonzero().flatten().tolist() == [0, 1, 2, 3]
    # 0.01 of eight entries is less than one; mergekit drops them all here.
    assert torch.equal(outlier_free_mask(delta, 0.5, 0.01), top_fraction_mask(delta, 0.5))


def test_a_density_that_leaves_no_room_for_outliers_is_reached_all_the_same() -> None:
    delta = torch.tensor([8.0, -7, 6, 5, -4, 3, 2, 1])
    assert outlier_free_mask(delta, 0.75, 0.5).nonzero().flatten().tolist() == [2, 3, 4, 5, 6, 7]
    assert outlier_free_mask(delta, 1.0, 0.5).all()


def test_the_band_has_its_size_among_equals_too() -> None:
    assert int(outlier_free_mask(torch.ones(1000), 0.3, 0.2).sum()) == 300
    assert outlier_free_mask(torch.empty(0), 0.3, 0.2).shape == (0,)
