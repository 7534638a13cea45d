"""Every layer's first-order impact by one backward pass per model and task: a first look, and what to measure first.

α^l ≈ ⟨∇P(θ_x), δ_x^l⟩ and β^l ≈ ⟨∇P(θ_F), δ_x^l⟩ with P = −loss, the first term of the Taylor expansion of what
`contributions.py` defines. Good for ranking layers, not for their sizes: estimates are labelled wherever they go.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llm_merge.contributions import Cell, Setup
from llm_merge.evaluation import Prepared
from llm_merge.gradients import layer_products
from llm_merge.layer_scorer import LayerScorer
from llm_merge.merge import base_source, merged_tensor
from llm_merge.recipe import Recipe

if TYPE_CHECKING:
    import torch


def estimate_cells(
    setup: Setup,
    scorer: LayerScorer,
    prepared: Mapping[str, Prepared],
    groups: Mapping[str, str],
    *,
    stop: threading.Event | None = None,
    checkpointing: bool | None = None,
) -> Iterator[tuple[Cell, float]]:
    """Every cell's estimate in nats, one anchor after the other: the specialists, the base, the merge.

    prepared    each task's rows for the loss
    groups      tensor → key of its layer

    3·M backward passes for M specialists. Deltas are read tensor by tensor; gradients are used and freed so, too.
    """
    keys = [layer.key for layer in setup.layers]
    merged, base = setup.merged(), setup.base_recipe()

    def products(anchor: Recipe, task: str, deltas: Mapping[str, Recipe]) -> dict[tuple[str, str], float]:
        with scorer.holding(anchor) as bench, _padding_as_any_token(bench.model):
            sources = {name: _delta(scorer, recipe) for name, recipe in deltas.items()}
            return layer_products(bench, prepared[task], sources, groups, stop=stop, checkpointing=checkpointing)

    for index, task in enumerate(setup.tasks):
        own = setup.specialist(index)
        found = products(own, task, {"before": own})
        yield from ((Cell(task, "before", "delete", key), found.get(("before", key), 0.0)) for key in keys)
    for index, task in enumerate(setup.tasks):
        found = products(base, task, {"before": setup.specialist(index), "after": merged})
        for key in keys:
            yield Cell(task, "before", "add", key), found.get(("before", key), 0.0)
            yield Cell(task, "after", "add", key), found.get(("after", key), 0.0)
    for task in setup.tasks:
        found = products(merged, task, {"after": merged})
        yield from ((Cell(task, "after", "delete", key), found.get(("after", key), 0.0)) for key in keys)


@contextmanager
def _padding_as_any_token(model: Any) -> Iterator[None]:
    """torch gives the padding token's embedding no gradient, but chat models pad with a token that ends their turns."""
    embeddings = model.get_input_embeddings()
    before = getattr(embeddings, "padding_idx", None)
    if before is None:
        yield
        return
    embeddings.padding_idx = None
    try:
        yield
    finally:
        embeddings.padding_idx = before


def _delta(scorer: LayerScorer, recipe: Recipe) -> Callable[[str], torch.Tensor | None]:
    plan = scorer.plan(recipe)
    tensors = {tensor.name: tensor for tensor in plan.tensors}

    def delta(name: str) -> torch.Tensor | None:
        tensor = tensors[name]
        if not any(tensor.weights):
            return None
        base = scorer.read(plan.base, base_source(plan, tensor))
        # In place: beside a large embedding, every further copy counts.
        return merged_tensor(plan, tensor, scorer.read).float().sub_(base)

    return delta
