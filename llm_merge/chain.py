"""The blocks of a transformer that run one after the other, and ways to stand between them.

They are found by structure, not by a table of architectures. This module knows torch modules; it does not know what
the model computes, which weights it holds, or what anybody wants with a block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from llm_merge.errors import Stopped

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Chain:
    """Blocks in the order in which they run. `path`: the name of their list in the model, such as `model.layers`."""

    path: str
    blocks: tuple[torch.nn.Module, ...]

    def __len__(self) -> int:
        return len(self.blocks)


def stacks_of(model: torch.nn.Module) -> tuple[Chain, ...]:
    """Every list of blocks at the shallowest place that has one: a single one, or an encoder's and a decoder's.

    A block is made of modules, which tells it from a list of plain layers; experts and heads lie deeper than blocks.
    """
    import torch

    found: dict[int, list[Chain]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.ModuleList) or not len(module):
            continue
        blocks = tuple(module)
        if all(next(block.children(), None) is not None and _runs(block) for block in blocks):
            found.setdefault(path.count("."), []).append(Chain(path, blocks))
    return tuple(found[min(found)]) if found else ()


def chain_of(model: torch.nn.Module) -> Chain | None:
    """The model's only list of blocks; None for a model that has none or several, as encoder-decoders have."""
    stacks = stacks_of(model)
    return stacks[0] if len(stacks) == 1 else None


def entering(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The hidden state [batch, tokens, dimensions] that a block is called with: its first argument."""
    return args[0] if args else next(iter(kwargs.values()))


@contextmanager
def replaced_forwards(
    blocks: Sequence[torch.nn.Module], make: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Inside, block number i runs `make(i, its own forward)`; afterwards its own again, whatever happened.

    Blocks stay the same objects with the same attributes, since some models read them (`attention_type`).
    """
    before = [vars(block).get("forward") for block in blocks]
    try:
        for number, block in enumerate(blocks):
            vars(block)["forward"] = make(number, block.forward)
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            vars(block).pop("forward", None)
            if own is not None:
                vars(block)["forward"] = own


class StopHooks:
    """Inside, the model raises Stopped at its next block, forwards or backwards, once the flag is set.

    A model without blocks is asked once a call. Without a flag this does nothing.
    """

    def __init__(self, model: torch.nn.Module, stop: threading.Event | None) -> None:
        self._stop = stop
        self._modules = [block for stack in stacks_of(model) for block in stack.blocks] or [model]
        self._handles: list[Any] = []

    def __enter__(self) -> StopHooks:
        if self._stop is not None:
            for module in self._modules:
                self._handles.append(module.register_forward_pre_hook(self._before))
                self._handles.append(module.register_forward_hook(self._after))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _before(self, *_: Any) -> None:
        if self._stop is not None and self._stop.is_set():
            raise Stopped

    def _after(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """The gradient comes back to a block by its output, whose hook goes with it when the graph is freed."""
        state = output[0] if isinstance(output, tuple) else output
        if getattr(state, "requires_grad", False):
            state.register_hook(self._before)


def _runs(block: torch.nn.Module) -> bool:
    """Whether a block can be called: lists of modules cannot."""
    import torch

    return not isinstance(block, (torch.nn.ModuleList, torch.nn.ModuleDict))
