"""Which entries of a model's change are kept: the largest, or the largest but for a few outliers.

Masks are exact and do not hang on threads or chunks: among entries of equal size the one of lowest index comes first
(mergekit keeps an arbitrary subset). Nothing is sorted but a sample. Knows nothing of models, weights or seeds.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import torch

    Floats: TypeAlias = np.ndarray[Any, np.dtype[np.floating[Any]]]

CHUNK = 1 << 16  # entries looked at together: they stay in the cache
SAMPLE = 1 << 14  # entries that the bracket around the k-th magnitude is guessed from
SMALL = 1 << 16  # up to this many entries, looking for a bracket costs more than it saves
MARGIN = 4.5  # standard deviations of the sample's rank; a miss falls back, so this decides speed only


def top_fraction_mask(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Bool mask of the int(density·n) entries of largest magnitude, at least one, in the shape of `delta`.

    delta       float32 or float64, any shape
    density     from 0 to 1; 1 and above keeps everything

    mergekit stops where int(density·n) is 0; a tensor that asks for a share of itself keeps one entry here.
    """
    return largest_mask(delta, kept_count(delta.numel(), density))


def outlier_free_mask(delta: torch.Tensor, density: float, gamma: float) -> torch.Tensor:
    """Bool mask without the int(gamma·n) entries of largest magnitude, of the int(density·n) that follow them.

    density     from 0 to 1; 1 and above keeps everything, outliers too, as in mergekit
    gamma       from 0 to 1; lowered where density + gamma is above 1, so that the density is reached

    gamma·n below 1 drops no outlier; mergekit drops every entry then, because its slice ends at -0.
    """
    count = delta.numel()
    kept = kept_count(count, density)
    outliers = min(int(gamma * count), count - kept)
    mask = largest_mask(delta, kept + outliers)
    # Both masks follow the same order, so the smaller one lies within the larger and exactly `kept` entries remain.
    return mask & ~largest_mask(delta, outliers) if outliers else mask


def kept_count(count: int, density: float) -> int:
    """int(density·count), but at least one of the entries that there are."""
    return min(count, max(1, int(density * count)))


def largest_mask(delta: torch.Tensor, keep: int) -> torch.Tensor:
    """Bool mask of the `keep` entries of largest magnitude, the lowest index first among equals; shape of `delta`."""
    import numpy as np
    import torch

    values = delta.detach().reshape(-1).cpu().numpy()
    if keep <= 0 or keep >= values.size:
        return torch.full_like(delta, keep > 0, dtype=torch.bool)
    threshold, above = kth_magnitude(values, keep)
    mask = np.empty(values.size, dtype=np.bool_)
    left = keep - above  # how many of the entries equal to the threshold are kept
    for start, magnitudes in _magnitudes(values):
        chunk = mask[start : start + CHUNK]
        np.greater_equal(magnitudes, threshold, out=chunk)
        equal = np.flatnonzero(magnitudes == threshold)
        chunk[equal[left:]] = False
        left = max(0, left - equal.size)
    return torch.from_numpy(mask).reshape(delta.shape).to(delta.device)


def kth_magnitude(values: Floats, k: int) -> tuple[float, int]:
    """The k-th largest magnitude, and how many entries are strictly larger.

    values      flat float32 or float64
    k           from 1 to the number of values

    A sample says between which two magnitudes the k-th one probably lies; one pass counts what is above and collects
    what is between, and the answer is looked for in there. If it turns out to lie elsewhere, all values are searched.
    """
    found = _in_bracket(values, k) if values.size > SMALL else None
    if found is None:
        import numpy as np

        found = _kth(np.abs(values), k)
    return found


def _in_bracket(values: Floats, k: int) -> tuple[float, int] | None:
    """The answer of `kth_magnitude`, or None if the k-th magnitude is not in the bracket."""
    import numpy as np

    # A seed of its own: the sample may decide how long this takes, never what comes out.
    places = np.random.default_rng(0).integers(values.size, size=SAMPLE)
    sample = np.sort(np.abs(values[places]))[::-1]
    share = k / values.size
    centre, margin = share * SAMPLE, MARGIN * math.sqrt(SAMPLE * share * (1 - share)) + MARGIN
    first, last = math.floor(centre - margin), math.ceil(centre + margin)
    high = float(sample[first]) if first >= 0 else math.inf
    low = float(sample[last]) if last < SAMPLE else -1.0

    # The ends are counted apart from what is between: a magnitude that many entries share makes one of them.
    not_below_high, between = 0, []
    for _, magnitudes in _magnitudes(values):
        not_below_high += int(np.count_nonzero(magnitudes >= high))
        between.append(magnitudes[np.flatnonzero((magnitudes > low) & (magnitudes < high))])
    inside = np.concatenate(between)
    above_low = not_below_high + inside.size
    if not_below_high < k <= above_low:
        threshold, above = _kth(inside, k - not_below_high)
        return threshold, not_below_high + above
    if k > above_low:
        at_low = sum(int(np.count_nonzero(magnitudes == low)) for _, magnitudes in _magnitudes(values))
        return (low, above_low) if k <= above_low + at_low else None
    above_high = sum(int(np.count_nonzero(magnitudes > high)) for _, magnitudes in _magnitudes(values))
    return (high, above_high) if k > above_high else None


def _kth(magnitudes: Floats, k: int) -> tuple[float, int]:
    """The k-th largest of some magnitudes, and how many are strictly larger."""
    import numpy as np

    threshold = np.partition(magnitudes, magnitudes.size - k)[magnitudes.size - k]
    return float(threshold), int(np.count_nonzero(magnitudes > threshold))


def _magnitudes(values: Floats) -> Iterator[tuple[int, Floats]]:
    """The magnitudes, a chunk at a time, each with the index where it starts."""
    import numpy as np

    for start in range(0, values.size, CHUNK):
        yield start, np.abs(values[start : start + CHUNK])
