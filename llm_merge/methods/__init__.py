"""The merge methods: one pure function of tensors each, registered with what the rest of the program asks about it.

A method is found by its mergekit name. Its parameters are read from the function's signature, so that a YAML key, its
range check, its slider and its line in the documentation come from one place. Knows nothing of files, models or YAML.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias, get_args, get_type_hints

from llm_merge.errors import RecipeError
from llm_merge.methods.random_masks import RandomKey

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


@dataclass(frozen=True)
class Parameter:
    """What a person should know about one parameter; annotate with ``Annotated[float, Parameter(...)]``.

    each            one value per model instead of one for the merge
    low, high       the values allowed, None for no bound
    default         of each value; None: it has to be given
    key             its name in YAML, by default that of the function's argument

    Read from the function by `register`:
    argument        its name in Python, "" if no function takes it
    kind            of one value: float, bool or int
    """

    help: str
    _: KW_ONLY
    each: bool = False
    low: float | None = None
    high: float | None = None
    default: float | bool | None = None
    key: str = ""
    argument: str = ""
    kind: type = float


IGNORED: Mapping[str, Parameter] = MappingProxyType(
    {
        "int8_mask": Parameter(
            "A memory saver of mergekit's: accepted everywhere, changes nothing.",
            default=False,
            key="int8_mask",
            kind=bool,
        )
    }
)

MergeFunction: TypeAlias = "Callable[..., torch.Tensor]"
"""Takes tensors of one shape, one per model, and its parameters by name; returns the merged tensor."""


@dataclass(frozen=True)
class Method:
    """One merge method.

    parameters      by their YAML keys
    element_wise    each entry of the result depends on the same entry of the inputs only: chunks may be merged alone
    precision       the type that inputs are converted to before the function sees them
    uses_base       merges what the models changed in a base, which then is not one of them
    random          draws random numbers, from a `RandomKey`
    """

    name: str
    title: str
    paper: str
    formula: str
    function: MergeFunction
    parameters: Mapping[str, Parameter]
    element_wise: bool
    precision: str
    uses_base: bool = False
    random: bool = False

    def apply(
        self,
        tensors: Sequence[torch.Tensor],
        settings: Mapping[str, Any],
        *,
        base: torch.Tensor | None = None,
        key: RandomKey | None = None,
    ) -> torch.Tensor:
        """The merged tensor, in the shape and type of the inputs, which are left as they are.

        tensors     at least one, without the base, in the method's precision: whole tensors in their true shape, or
                    flat chunks if the method is element-wise; a model of weight 0 is left out by the caller
        settings    by YAML key; a sequence with one value per tensor where the parameter is per model
        base        needed if the method uses one
        key         needed if the method is random

        Raises RecipeError for a setting that is unknown or missing, and for a missing base.
        """
        unknown = [name for name in settings if name not in self.parameters]
        if unknown:
            message = f"`{self.name}` has no parameter `{unknown[0]}`: use {', '.join(self.parameters)}."
            raise RecipeError(message, field=f"parameters.{unknown[0]}")
        arguments: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            if parameter.argument:
                arguments[parameter.argument] = self._value(name, parameter, settings, len(tensors))
        if self.uses_base:
            if base is None:
                raise RecipeError(f"`{self.name}` needs a base: name it as `base_model`.", field="base_model")
            arguments["base"] = base
        if self.random:
            if key is None:
                raise ValueError(f"{self.name} draws random numbers: it needs a key")
            arguments["key"] = key
        return self.function(tensors, **arguments)

    def _value(self, name: str, parameter: Parameter, settings: Mapping[str, Any], count: int) -> Any:
        if name in settings:
            return settings[name]
        if parameter.default is None:
            where = " for every model" if parameter.each else ""
            raise RecipeError(f"`{self.name}` needs `{name}`{where}: add it.", field=f"parameters.{name}")
        return (parameter.default,) * count if parameter.each else parameter.default


_METHODS: dict[str, Method] = {}
METHODS: Mapping[str, Method] = MappingProxyType(_METHODS)


def register(
    name: str,
    *,
    title: str,
    paper: str,
    formula: str,
    element_wise: bool,
    precision: str = "float32",
    uses_base: bool = False,
    random: bool = False,
) -> Callable[[MergeFunction], MergeFunction]:
    """Decorator that enters a function into `METHODS`; its annotated keyword parameters become the method's."""

    def enter(function: MergeFunction) -> MergeFunction:
        found = {parameter.key: parameter for parameter in _parameters(function)}
        _METHODS[name] = Method(
            name=name,
            title=title,
            paper=paper,
            formula=formula,
            function=function,
            parameters=MappingProxyType(found | dict(IGNORED)),
            element_wise=element_wise,
            precision=precision,
            uses_base=uses_base,
            random=random,
        )
        return function

    return enter


def get_method(name: str) -> Method:
    """The method called `name`. Raises RecipeError, with the nearest name if there is one."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"use one of {', '.join(METHODS)}."
        raise RecipeError(f"There is no merge method `{name}`: {hint}", field="merge_method")
    return METHODS[name]


def _parameters(function: MergeFunction) -> list[Parameter]:
    """The annotated parameters of a function, in its order, with what their annotations say."""
    hints = get_type_hints(function, include_extras=True, localns={"torch": _NoTorch})
    found = []
    for argument, hint in hints.items():
        for extra in get_args(hint)[1:]:
            if isinstance(extra, Parameter):
                value = get_args(hint)[0]
                kind = get_args(value)[0] if extra.each else value
                found.append(replace(extra, argument=argument, key=extra.key or argument, kind=kind))
    return found


class _NoTorch:
    """Stands for torch while annotations are read: looking at a method's parameters must not import torch."""

    Tensor = Any


# A method registers itself, so the registry has to exist first.
from llm_merge.methods import linear, task_vectors  # noqa: E402

__all__ = ["METHODS", "Method", "Parameter", "RandomKey", "get_method", "linear", "register", "task_vectors"]
