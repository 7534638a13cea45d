"""Random masks that are the same on every machine, for any order of tensors, any chunk and any number of threads.

Every block of 64 K entries has a stream of its own: numpy's Philox, a counter-based generator, keyed by the run's seed,
the tensor and the model. Knows nothing of values or weights.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK = 1 << 16  # entries
LEVELS = 1 << 16  # a density is met to 1/65536: 16 random bits are spent on an entry


@dataclass(frozen=True)
class RandomKey:
    """Whose entries are drawn.

    tensor      name of the tensor in the result
    models      of each tensor passed to the method, the model's reference and which occurrence of it in the recipe
                that is, "org/a#0": a model that is listed twice gets two masks, and leaving one out changes no other's
    """

    tensor: str
    models: tuple[str, ...]


def random_mask(delta: torch.Tensor, density: float, *, seed: int, tensor: str, model: str) -> torch.Tensor:
    """Bool mask in the shape of `delta`, whose entries are kept with probability `density`, rounded to 1/65536.

    seed            of the run
    tensor, model   as in `RandomKey`
    """
    import numpy as np
    import torch

    digest = hashlib.sha256(json.dumps([seed, tensor, model]).encode()).digest()
    key = int.from_bytes(digest[:16], "little")
    threshold = round(density * LEVELS)
    mask = np.empty(delta.numel(), dtype=np.bool_)
    for block, start in enumerate(range(0, mask.size, BLOCK)):
        # The block is the counter's highest word, so that no two blocks can meet.
        stream = np.random.Philox(key=key, counter=block << 192)
        entries = mask[start : start + BLOCK]
        words = stream.random_raw(-(-entries.size // 4)).astype("<u8", copy=False).view("<u2")
        np.less(words[: entries.size], threshold, out=entries)
    return torch.from_numpy(mask).reshape(delta.shape).to(delta.device)
