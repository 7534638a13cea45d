"""The recipe: the small frozen value that everything ends in and everything starts from.

Weights computed from examples, a slider, a hand-written YAML all become a `Recipe`; it is shown, saved, compared and
replayed. It knows mergekit's YAML and nothing of files, tensors or devices.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llm_merge.errors import RecipeError

WEIGHT_TOLERANCE = 1e-3  # LM-Cocktail's; there only on one side, here on both

DTYPES = {"float32": "float32", "fp32": "float32", "float16": "float16", "fp16": "float16"}
DTYPES |= {"bfloat16": "bfloat16", "bf16": "bfloat16", "float64": "float64"}

# Every key of mergekit's YAML that we read today. Anything else is an error: silence there changes someone's model.
TOP_KEYS = ("merge_method", "models", "base_model", "dtype", "out_dtype", "parameters", "tokenizer_source")
MODEL_KEYS = ("model", "parameters")
MODEL_PARAMETERS = ("weight",)
TOP_PARAMETERS = ("normalize", "int8_mask")


@dataclass(frozen=True)
class ModelEntry:
    """One model of a recipe: its reference (path or ``org/name[@revision][+adapter]``) and its share."""

    model: str
    weight: float


@dataclass(frozen=True)
class Recipe:
    """What to merge and how.

    models          at least one, in order; config and tokenizer come from `base_model`, else from the first
    merge_method    a name in `llm_merge.methods`
    base_model      reference of the model that gives config and tokenizer, or None
    dtype           type of the written tensors; None: that of the first model
    normalize       divide by the sum of the weights (mergekit's default for linear)
    """

    models: tuple[ModelEntry, ...]
    merge_method: str = "linear"
    base_model: str | None = None
    dtype: str | None = None
    normalize: bool = True

    @classmethod
    def linear(cls, models: Sequence[str], weights: Sequence[float], *, dtype: str | None = None) -> Recipe:
        """Σ wᵢ·xᵢ with weights used exactly as given (LM-Cocktail's `mix_models`).

        Raises RecipeError unless there are as many weights as models, all finite, with sum 1 within 1e-3.
        """
        validate_weights(weights, len(models))
        entries = tuple(ModelEntry(m, float(w)) for m, w in zip(models, weights, strict=True))
        return cls(models=entries, dtype=_dtype(dtype), normalize=False)

    @classmethod
    def single(cls, model: str, *, dtype: str | None = None) -> Recipe:
        """One model as it is: what measuring and chatting with a parent uses."""
        return cls.linear([model], [1.0], dtype=dtype)

    @property
    def references(self) -> tuple[str, ...]:
        return tuple(entry.model for entry in self.models)

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(entry.weight for entry in self.models)

    def with_dtype(self, dtype: str | None) -> Recipe:
        return replace(self, dtype=_dtype(dtype))

    def to_dict(self) -> dict[str, Any]:
        """mergekit's form, in the order in which people write it."""
        models = [{"model": e.model, "parameters": {"weight": _plain(e.weight)}} for e in self.models]
        result: dict[str, Any] = {"merge_method": self.merge_method, "models": models}
        if self.base_model:
            result["base_model"] = self.base_model
        if not self.normalize:
            result["parameters"] = {"normalize": False}
        if self.dtype:
            result["dtype"] = self.dtype
        return result

    def to_yaml(self) -> str:
        import yaml

        return str(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """Read mergekit's YAML. Raises RecipeError with the path of the first key that is wrong."""
        import yaml

        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"The recipe is not valid YAML: {error}", field="yaml") from error
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: object) -> Recipe:
        top = _mapping(data, "", TOP_KEYS)
        raw = top.get("models")
        if not isinstance(raw, list) or not raw:
            raise RecipeError("The recipe lists no models: add `models:` with at least one `- model:`.", field="models")
        parameters = _mapping(top.get("parameters") or {}, "parameters", TOP_PARAMETERS)
        normalize = parameters.get("normalize", True)
        if not isinstance(normalize, bool):
            raise RecipeError("normalize must be true or false.", field="parameters.normalize")
        base = top.get("base_model")
        if base is not None and not isinstance(base, str):
            raise RecipeError("base_model must be a path or a hub id.", field="base_model")
        if top.get("tokenizer_source") not in (None, "base"):
            raise RecipeError("tokenizer_source may only be `base` in this version.", field="tokenizer_source")
        return cls(
            models=tuple(_entry(item, f"models[{i}]") for i, item in enumerate(raw)),
            merge_method=str(top.get("merge_method") or "linear"),
            base_model=base,
            dtype=_dtype(top.get("out_dtype") or top.get("dtype")),
            normalize=normalize,
        )


def validate_weights(weights: Sequence[float], count: int) -> None:
    """Raise RecipeError unless there are `count` finite weights whose sum is 1 within 1e-3 on both sides."""
    if len(weights) != count:
        message = f"There are {count} models but {len(weights)} weights: give one weight per model."
        raise RecipeError(message, field="weights")
    for index, weight in enumerate(weights):
        if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not math.isfinite(weight):
            message = f"Weight {index + 1} is {weight}: every weight must be a finite number."
            raise RecipeError(message, field=f"weights[{index}]")
    total = math.fsum(weights)
    if abs(total - 1) > WEIGHT_TOLERANCE:
        raise RecipeError(f"The weights sum to {total:.4g}, not 1: change them so that they sum to 1.", field="weights")


def _entry(item: object, path: str) -> ModelEntry:
    entry = _mapping(item, path, MODEL_KEYS)
    model = entry.get("model")
    if not isinstance(model, str) or not model.strip():
        raise RecipeError(f"{path} has no model: write `model: path-or-hub-id`.", field=f"{path}.model")
    parameters = _mapping(entry.get("parameters") or {}, f"{path}.parameters", MODEL_PARAMETERS)
    weight = parameters.get("weight")
    where = f"{path}.parameters.weight"
    if weight is None:
        raise RecipeError(f"{path} has no weight: add `parameters: {{weight: …}}`.", field=where)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise RecipeError(f"{where} is {weight!r}: a weight must be one finite number.", field=where)
    return ModelEntry(model.strip(), float(weight))


def _mapping(data: object, path: str, known: Sequence[str]) -> Mapping[str, Any]:
    where = path or "the recipe"
    if not isinstance(data, dict):
        raise RecipeError(f"{where} must be a mapping of keys to values.", field=path)
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else f" Known here: {', '.join(known)}."
            raise RecipeError(f"Unknown key `{key}` in {where}.{hint}", field=f"{path}.{key}".lstrip("."))
    return data


def _dtype(name: object) -> str | None:
    if name is None or name == "":
        return None
    if name not in DTYPES:
        raise RecipeError(f"dtype `{name}` is not known: use {', '.join(sorted(set(DTYPES.values())))}.", field="dtype")
    return DTYPES[str(name)]


def _plain(weight: float) -> float:
    return int(weight) if weight == int(weight) and abs(weight) < 1e9 else weight
