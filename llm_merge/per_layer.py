"""A parameter's value for each tensor: one number, a gradient over the depth of the model, or a list of filters.

mergekit's three forms, read, written and evaluated as mergekit does it. This module knows names and depths of tensors;
it knows no methods, no models and no recipe.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_merge.errors import RecipeError

Gradient = tuple[float, ...]


@dataclass(frozen=True)
class Rule:
    """One line of a list of filters: `value` for every tensor whose name contains `filter`; None is every tensor."""

    value: float | Gradient
    filter: str | None = None

    def fits(self, tensor: str) -> bool:
        return self.filter in (None, "*") or str(self.filter) in tensor


Setting = float | Gradient | tuple[Rule, ...]
"""A number for all tensors, a gradient (at least one number, spread over the blocks), or filters in order."""

RULE_KEYS = ("filter", "value")
BLOCK = re.compile(r"(?P<stem>.*\.)(?P<number>\d+)\.")
"""A filter for one transformer block: "layers.7."."""


def value_at(setting: Setting, tensor: str, depth: float = 0.0) -> float | None:
    """The setting's value for one tensor; None when it is a list of filters and none of them fits.

    depth   place of the tensor's block, 0 for the first and 1 for the last; 0 for what lies outside of the blocks. A
            model with a single block has depth 1: mergekit gives it the gradient's last value.
    """
    if not isinstance(setting, tuple):
        return setting
    rules = [entry for entry in setting if isinstance(entry, Rule)]
    if rules:
        fitting = next((rule for rule in rules if rule.fits(tensor)), None)
        return None if fitting is None else value_at(fitting.value, tensor, depth)
    points = [float(entry) for entry in setting if not isinstance(entry, Rule)]
    place = min(max(depth, 0.0), 1.0) * (len(points) - 1)
    low = int(place)
    high = min(low + 1, len(points) - 1)
    return points[low] + (place - low) * (points[high] - points[low]) if high > low else points[low]


def with_filters(setting: Setting, values: Mapping[str, float]) -> Setting:
    """`setting` with these filters' values put before what it says for other tensors.

    A filter that is there already is replaced in its place, unless one before it may fit the same tensors. A value that
    is the setting's own for the rest is left out where nothing else speaks for its tensors: a recipe says only what is
    special.
    """
    rules: list[Rule] = [entry for entry in setting if isinstance(entry, Rule)] if isinstance(setting, tuple) else []
    last = None if rules else Rule(_number_or_gradient(setting))
    named: dict[str, float | Gradient] = {}
    for rule in rules:
        if rule.filter in (None, "*"):  # what comes after it never counts
            last = rule
            break
        named.setdefault(str(rule.filter), rule.value)
    otherwise = last.value if last else None
    for name, value in values.items():
        others = [other for other in named if other != name]
        alone = all(_apart(name, other) for other in others)
        if alone and value == otherwise:
            named.pop(name, None)
        elif alone:
            named[name] = value
        else:
            named = {name: value, **{other: named[other] for other in others}}
    if not named and otherwise is not None:
        return otherwise
    return (*(Rule(value, name) for name, value in named.items()), *([last] if last else []))


def _number_or_gradient(setting: Setting) -> float | Gradient:
    if not isinstance(setting, tuple):
        return setting
    return tuple(point for point in setting if not isinstance(point, Rule))


def _apart(one: str, other: str) -> bool:
    """Whether no tensor can fit both filters, as far as they tell: two blocks of one chain."""
    first, second = BLOCK.fullmatch(one), BLOCK.fullmatch(other)
    if first is None or second is None:
        return False
    return first["stem"] == second["stem"] and first["number"] != second["number"]


def read_setting(raw: object, where: str, *, low: float | None = None, high: float | None = None) -> Setting:
    """mergekit's YAML form → a setting. Raises RecipeError with the path of what is wrong."""
    if isinstance(raw, list):
        if not raw:
            raise RecipeError(f"{where} is an empty list: write one number, or leave it out.", field=where)
        if any(isinstance(entry, dict) for entry in raw):
            return tuple(_rule(entry, f"{where}[{index}]", low, high) for index, entry in enumerate(raw))
        return tuple(_number(entry, f"{where}[{index}]", low, high) for index, entry in enumerate(raw))
    return _number(raw, where, low, high)


def plain_setting(setting: Setting) -> Any:
    """The YAML form, as people write it."""
    if not isinstance(setting, tuple):
        return plain_number(setting)
    written: list[Any] = []
    for entry in setting:
        if not isinstance(entry, Rule):
            written.append(plain_number(entry))
            continue
        value = [plain_number(v) for v in entry.value] if isinstance(entry.value, tuple) else plain_number(entry.value)
        written.append({"value": value} if entry.filter is None else {"filter": entry.filter, "value": value})
    return written


def plain_number(value: float) -> float:
    return int(value) if value == int(value) and abs(value) < 1e9 else value


def unknown_key(key: object, known: tuple[str, ...], where: str, path: str) -> RecipeError:
    """The error for a key that nobody reads, with the nearest known one."""
    near = difflib.get_close_matches(str(key), known, n=1)
    hint = f" Did you mean `{near[0]}`?" if near else f" Known here: {', '.join(known)}."
    return RecipeError(f"Unknown key `{key}` in {where}.{hint}", field=f"{path}.{key}".lstrip("."))


def _rule(entry: object, where: str, low: float | None, high: float | None) -> Rule:
    if not isinstance(entry, dict):
        message = f"{where} is {entry!r}: a list holds either numbers, or `filter:` and `value:` pairs, not both."
        raise RecipeError(message, field=where)
    for key in entry:
        if key not in RULE_KEYS:
            raise unknown_key(key, RULE_KEYS, where, where)
    name = entry.get("filter")
    if name is not None and not (isinstance(name, str) and name):
        raise RecipeError(f"{where}.filter must be a part of a tensor's name, such as layers.7.", field=where)
    if "value" not in entry:
        raise RecipeError(f"{where} has no value: add `value:`.", field=f"{where}.value")
    value = read_setting(entry["value"], f"{where}.value", low=low, high=high)
    if isinstance(value, tuple) and any(isinstance(part, Rule) for part in value):
        raise RecipeError(f"{where}.value may be a number or a list of numbers, not filters again.", field=where)
    return Rule(value, name)  # type: ignore[arg-type]  # filters are refused above


def _number(raw: object, where: str, low: float | None, high: float | None) -> float:
    name = where.rsplit(".", 1)[-1]
    if isinstance(raw, bool) or not isinstance(raw, (int, float)) or not math.isfinite(raw):
        message = f"{where} is {raw!r}: {'a weight' if name == 'weight' else 'it'} must be one finite number."
        raise RecipeError(message, field=where)
    if (low is not None and raw < low) or (high is not None and raw > high):
        span = f"between {low:g} and {high:g}" if low is not None and high is not None else (
            f"at least {low:g}" if low is not None else f"at most {high:g}"
        )  # fmt: skip
        raise RecipeError(f"{where} is {raw:g}: it must be {span}.", field=where)
    return float(raw)
