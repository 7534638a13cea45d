"""The merge methods: one pure function of tensors each, registered with what the rest of the program asks about it.

A method is found by its mergekit name. Its parameters are read from the function's signature, so that a YAML key, its
range check, its slider and its line in the documentation come from one place. Knows nothing of files, models or YAML.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias, get_args, get_type_hints

from llm_merge.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch


@dataclass(frozen=True)
class Parameter:
    """What a person should know about one parameter; annotate with ``Annotated[float, Parameter(...)]``.

    each            one value per model instead of one for the merge
    low, high       the values allowed, None for no bound
    """

    help: str
    each: bool = False
    low: float | None = None
    high: float | None = None


MergeFunction: TypeAlias = "Callable[..., torch.Tensor]"
"""Takes tensors of one shape, one per model, and its parameters by name; returns the merged tensor."""


@dataclass(frozen=True)
class Method:
    """One merge method.

    element_wise    each entry of the result depends on the same entry of the inputs only: chunks may be merged alone
    precision       the type that inputs are converted to before the function sees them
    """

    name: str
    title: str
    paper: str
    formula: str
    function: MergeFunction
    parameters: Mapping[str, Parameter]
    element_wise: bool
    precision: str


_METHODS: dict[str, Method] = {}
METHODS: Mapping[str, Method] = MappingProxyType(_METHODS)


def register(
    name: str, *, title: str, paper: str, formula: str, element_wise: bool, precision: str = "float32"
) -> Callable[[MergeFunction], MergeFunction]:
    """Decorator that enters a function into `METHODS`; its annotated keyword parameters become the method's."""

    def enter(function: MergeFunction) -> MergeFunction:
        hints = get_type_hints(function, include_extras=True, localns={"torch": _NoTorch})
        found = {
            key: extra for key, hint in hints.items() for extra in get_args(hint)[1:] if isinstance(extra, Parameter)
        }
        _METHODS[name] = Method(name, title, paper, formula, function, MappingProxyType(found), element_wise, precision)
        return function

    return enter


def get_method(name: str) -> Method:
    """The method called `name`. Raises RecipeError, with the nearest name if there is one."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"use one of {', '.join(METHODS)}."
        raise RecipeError(f"There is no merge method `{name}`: {hint}", field="merge_method")
    return METHODS[name]


class _NoTorch:
    """Stands for torch while annotations are read: looking at a method's parameters must not import torch."""

    Tensor = Any


from llm_merge.methods import linear  # noqa: E402  (a method registers itself, so the registry has to exist first)

__all__ = ["METHODS", "Method", "Parameter", "get_method", "linear", "register"]
