"""The pieces of a recipe in mergekit's YAML: which keys there are, and what may stand under them.

Every message names the path of what is wrong. It knows the methods' parameters, and neither recipes nor files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm_merge.errors import RecipeError
from llm_merge.methods import Method
from llm_merge.per_layer import Setting, read_setting, unknown_key

DTYPES = {"float32": "float32", "fp32": "float32", "float16": "float16", "fp16": "float16"}
DTYPES |= {"bfloat16": "bfloat16", "bf16": "bfloat16", "float64": "float64"}

# Every key of mergekit's YAML that we read today. Anything else is an error: silence there changes someone's model.
TOP_KEYS = ("merge_method", "models", "base_model", "dtype", "out_dtype", "parameters", "tokenizer_source")
MODEL_KEYS = ("model", "parameters")

Parameters = tuple[tuple[str, "Setting | bool"], ...]
"""Parameters by mergekit's names, in the order in which they were written."""


def read_parameters(data: object, path: str, method: Method, *, of_model: bool) -> Parameters:
    """The parameters of a model or of the whole recipe, each checked against what the method takes."""
    known = method.parameters
    each = tuple(name for name, parameter in known.items() if parameter.each)
    own = tuple(name for name, parameter in known.items() if not parameter.each)
    given = read_mapping(data, path, each if of_model else (*own, *each), misplaced=own if of_model else ())
    read: dict[str, Setting | bool] = {}
    for name, value in given.items():
        where = f"{path}.{name}"
        parameter = known[name]
        if parameter.kind is bool:
            if not isinstance(value, bool):
                raise RecipeError(f"{name} must be true or false.", field=where)
            read[name] = value
            continue
        if parameter.kind is int and (isinstance(value, bool) or not isinstance(value, int)):
            raise RecipeError(f"{where} is {value!r}: it must be one whole number.", field=where)
        read[name] = read_setting(value, where, low=parameter.low, high=parameter.high)
    return tuple(read.items())


def read_mapping(data: object, path: str, known: Sequence[str], misplaced: Sequence[str] = ()) -> Mapping[str, Any]:
    """The data, if it is a mapping with none but known keys; `misplaced` ones are known elsewhere."""
    where = path or "the recipe"
    if not isinstance(data, dict):
        raise RecipeError(f"{where} must be a mapping of keys to values.", field=path)
    for key in data:
        if key in misplaced:
            message = f"`{key}` in {where} belongs to the whole merge: move it to the `parameters` at the top."
            raise RecipeError(message, field=f"{path}.{key}")
        if key not in known:
            raise unknown_key(key, tuple(known), where, path)
    return data


def read_dtype(name: object) -> str | None:
    """torch's name of a type, None where none is given."""
    if name is None or name == "":
        return None
    if not isinstance(name, str) or name not in DTYPES:
        raise RecipeError(f"dtype `{name}` is not known: use {', '.join(sorted(set(DTYPES.values())))}.", field="dtype")
    return DTYPES[name]
