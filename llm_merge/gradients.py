"""One backward pass and what it says of every group of weights at once: the products of the gradient with deltas.

The first-order impact of a delta δ on P = −(mean loss) is ⟨∇P(θ), δ⟩ (a Taylor expansion; Hi-Merging, arXiv
2506.12379, measures the impact itself). An estimate: good for ranking, never the answer. Gradients are used and freed
tensor by tensor, so that no model's worth of them is ever held. Knows nothing of checkpoints, recipes or layers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llm_merge.chain import StopHooks, entering, replaced_forwards, stacks_of
from llm_merge.errors import MergeError
from llm_merge.families import get_family
from llm_merge.families.base import check_stop

if TYPE_CHECKING:
    import torch

    from llm_merge.evaluation import Prepared
    from llm_merge.workbench import Workbench

BUDGET_BYTES = 2 * 1024**3
"""Memory beside the weights: half for activations, half for deltas that are not read again for every batch."""

PRODUCT_CHUNK = 1 << 22
"""Numbers multiplied at a time, so that float64 copies stay small beside the largest embeddings."""

ACTIVATIONS = 1.5
"""What a block keeps for its backward pass, as a multiple of what enters and leaves its matrices."""

Delta = Callable[[str], "torch.Tensor | None"]
"""Takes a checkpoint tensor's name; returns its delta in float32, or None where there is none."""


def layer_products(
    bench: Workbench,
    prepared: Prepared,
    deltas: Mapping[str, Delta],
    groups: Mapping[str, str],
    *,
    stop: threading.Event | None = None,
    checkpointing: bool | None = None,
    budget_bytes: int = BUDGET_BYTES,
) -> dict[tuple[str, str], float]:
    """(delta's name, group) → ⟨∇P(θ), δ⟩ over the group's tensors, P = −(mean loss over all rows), in nats.

    deltas          name → the delta by tensor; asked again for each batch where it does not fit into the budget
    groups          checkpoint tensor → group; tensors that this kind of model has no use for count as 0
    checkpointing   run blocks again instead of keeping their activations: all, none, or (None) those beyond the budget
    budget_bytes    memory beside the weights, see `BUDGET_BYTES`

    θ is what the bench holds now, unchanged afterwards; its lock is the caller's. A tied parameter is one parameter:
    its first name in `groups` counts. Raises MergeError for a model whose files arrange its weights otherwise than
    its classes do, Stopped when asked to stop, within a block's time.
    """
    import torch

    store = _Deltas(deltas, budget_bytes // 2)
    wanted: dict[str, torch.Tensor] = {}
    for name, parameter in _one_name_each(bench, groups).items():
        check_stop(stop)
        if store.any(name):
            wanted[name] = parameter
    sums = {(key, group): 0.0 for key in deltas for group in dict.fromkeys(groups.values())}
    family, rows, settings = get_family(prepared.model_type), prepared.rows, prepared.settings
    kept = budget_bytes // 2 if checkpointing is None else 0 if checkpointing else None
    products: dict[tuple[str, str], torch.Tensor] = {}

    def consume(name: str, parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        check_stop(stop)
        for key, delta in store.of(name):
            place = (key, groups[name])
            product = _product(gradient, delta)
            products[place] = products[place] + product if place in products else product

    gradients = _requiring_gradients(bench.model, wanted, consume)
    with torch.inference_mode(False), torch.enable_grad(), StopHooks(bench.model, stop), gradients:
        for batch in family.batch_plan(bench, rows, settings) if wanted else ():
            check_stop(stop)
            with _checkpointed(bench.model, kept):
                # Summed, and divided at the end: the gradients of a mean may vanish in 16 bits.
                torch.autograd.backward(-family.batch_losses(bench, rows, batch, settings, stop).sum())
    for place, product in products.items():
        sums[place] = float(product) / len(rows)
    return sums


class _Deltas:
    """The deltas of every name by tensor; the first ones that fit into `budget` bytes are read only once.

    Backward passes ask in the same order every time: keeping the first serves more than keeping the latest.
    """

    def __init__(self, deltas: Mapping[str, Delta], budget: int) -> None:
        self._deltas = deltas
        self._room = budget
        self._kept: dict[tuple[str, str], torch.Tensor | None] = {}

    def any(self, tensor: str) -> bool:
        return any(self._get(key, tensor) is not None for key in self._deltas)

    def of(self, tensor: str) -> Iterator[tuple[str, torch.Tensor]]:
        for key in self._deltas:
            delta = self._get(key, tensor)
            if delta is not None:
                yield key, delta

    def _get(self, key: str, tensor: str) -> torch.Tensor | None:
        if (key, tensor) in self._kept:
            return self._kept[key, tensor]
        delta = self._deltas[key](tensor)
        size = 0 if delta is None else delta.nbytes
        if size <= self._room:
            self._kept[key, tensor] = delta
            self._room -= size
        return delta


def _one_name_each(bench: Workbench, groups: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Checkpoint tensor → resident parameter, each parameter once. Raises MergeError where some cannot be reached."""
    held = [tensor.name for tensor in bench.plan.tensors] if bench.plan is not None else bench.checkpoint.tensors
    found = bench.places([*groups, *held])
    reached = {id(parameter) for parameter in found.values()}
    for name, parameter in bench.model.named_parameters():
        if id(parameter) not in reached and not any(part in name for part in bench.family.optional):
            raise MergeError(
                f"There is no estimate for {bench.checkpoint.reference}: its files arrange {name} otherwise than "
                "transformers does. Measure the contributions exactly."
            )
    seen: set[int] = set()
    result = {}
    for name in groups:
        place = found.get(name)
        if place is not None and place.is_floating_point() and id(place) not in seen and _is_parameter(place):
            seen.add(id(place))
            result[name] = place
    return result


def _is_parameter(tensor: torch.Tensor) -> bool:
    import torch

    return isinstance(tensor, torch.nn.Parameter)


@contextmanager
def _requiring_gradients(
    model: torch.nn.Module, wanted: Mapping[str, torch.Tensor], consume: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Inside, `consume` gets each wanted parameter as soon as its gradient is complete. Nothing is left afterwards."""
    handles = []
    try:
        for name, parameter in wanted.items():
            parameter.requires_grad_(True)
            hook = parameter.register_post_accumulate_grad_hook(lambda ready, name=name: consume(name, ready))
            handles.append(hook)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in model.parameters():
            parameter.grad = None
            parameter.requires_grad_(False)


@contextmanager
def _checkpointed(model: torch.nn.Module, budget: int | None) -> Iterator[None]:
    """Inside, blocks keep their activations while an estimate of them fits into `budget` bytes (None: always).

    Later ones keep what enters them and run again in the backward pass; in eval mode they give the same again.
    """
    from torch.utils.checkpoint import checkpoint

    room = budget

    def make(number: int, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal room
            assert room is not None
            state = entering(args, kwargs)
            need = state.numel() // state.shape[-1] * state.element_size() * widths[number]
            if need <= room:
                room -= int(need)
                return own(*args, **kwargs)
            return checkpoint(own, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return forward

    blocks = [block for stack in stacks_of(model) for block in stack.blocks]
    widths = [ACTIVATIONS * sum(sum(p.shape) for p in block.parameters() if p.dim() == 2) for block in blocks]
    with replaced_forwards(blocks if room is not None else [], make):
        yield


def _product(gradient: torch.Tensor | None, delta: torch.Tensor) -> torch.Tensor:
    """⟨gradient, delta⟩ as a number on the gradient's device, summed in float64 where that exists."""
    import torch

    assert gradient is not None
    exact = torch.float32 if gradient.device.type == "mps" else torch.float64
    total = torch.zeros((), dtype=exact, device=gradient.device)
    left, right = gradient.reshape(-1), delta.reshape(-1)
    for start in range(0, left.numel(), PRODUCT_CHUNK):
        part = right[start : start + PRODUCT_CHUNK].to(gradient.device)
        total += torch.dot(left[start : start + PRODUCT_CHUNK].to(exact), part.to(exact))
    return total
