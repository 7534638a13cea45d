"""The recipe: the small frozen value that everything ends in and everything starts from.

Weights computed from examples, a slider, a search over layers, a hand-written YAML all become a `Recipe`; it is shown,
saved, compared and replayed. It knows mergekit's YAML and nothing of files, tensors or devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from llm_merge.errors import RecipeError
from llm_merge.methods import METHODS, Method, Parameter, get_method
from llm_merge.per_layer import (
    Rule,
    Setting,
    plain_setting,
    value_at,
    with_filters,
)
from llm_merge.recipe_reading import (
    DTYPES,
    MODEL_KEYS,
    TOP_KEYS,
    Parameters,
    read_dtype,
    read_mapping,
    read_parameters,
)

__all__ = ["DTYPES", "ModelEntry", "Recipe", "Rule", "Setting", "validate_weights"]

WEIGHT_TOLERANCE = 1e-3  # LM-Cocktail's; there only on one side, here on both


@dataclass(frozen=True)
class ModelEntry:
    """One model of a recipe: its reference (path or ``org/name[@revision][+adapter]``) and its share.

    weight          its weight, the same for every tensor or one by layers; None: what the recipe says for all models
    parameters      its other parameters, such as ("density", 0.5)
    """

    model: str
    weight: Setting | None = None
    parameters: Parameters = ()

    def get(self, name: str) -> Setting | bool | None:
        """The entry's own value of a parameter, `weight` among them; None if it has none."""
        return self.weight if name == "weight" else dict(self.parameters).get(name)

    def with_parameter(self, name: str, value: Setting) -> ModelEntry:
        if name == "weight":
            return replace(self, weight=value)
        return replace(self, parameters=tuple({**dict(self.parameters), name: value}.items()))


@dataclass(frozen=True)
class Recipe:
    """What to merge and how.

    models          at least one, in order; config and tokenizer come from `base_model`, else from the first
    merge_method    a name in `llm_merge.methods`
    base_model      reference of the model that gives config and tokenizer, and that task vectors are measured from
    dtype           type of the written tensors; None: that of the first model
    normalize       divide by the sum of the weights; None: as the method does by default
    parameters      the method's other parameters, and per-model ones that hold for every model without its own
    """

    models: tuple[ModelEntry, ...]
    merge_method: str = "linear"
    base_model: str | None = None
    dtype: str | None = None
    normalize: bool | None = None
    parameters: Parameters = field(default=())

    @classmethod
    def linear(cls, models: Sequence[str], weights: Sequence[float], *, dtype: str | None = None) -> Recipe:
        """Σ wᵢ·xᵢ with weights used exactly as given (LM-Cocktail's `mix_models`).

        Raises RecipeError unless there are as many weights as models, all finite, with sum 1 within 1e-3.
        """
        validate_weights(weights, len(models))
        entries = tuple(ModelEntry(m, float(w)) for m, w in zip(models, weights, strict=True))
        return cls(models=entries, dtype=read_dtype(dtype), normalize=False)

    @classmethod
    def single(cls, model: str, *, dtype: str | None = None) -> Recipe:
        """One model as it is: what measuring and chatting with a parent uses."""
        return cls.linear([model], [1.0], dtype=dtype)

    @property
    def references(self) -> tuple[str, ...]:
        return tuple(entry.model for entry in self.models)

    @property
    def weights(self) -> tuple[float, ...]:
        """One per model. Of a weight that differs between layers, the one that holds where no layer is named."""
        settled = (_first_value(self._candidates("weight", entry), "", 0.0) for entry in self.models)
        return tuple(0.0 if weight is None else weight for weight in settled)

    @property
    def is_layered(self) -> bool:
        """Whether some parameter differs between tensors."""
        values = [entry.weight for entry in self.models]
        values += [value for entry in self.models for _, value in entry.parameters]
        return any(isinstance(value, tuple) for value in (*values, *(value for _, value in self.parameters)))

    @property
    def normalizes(self) -> bool:
        """Whether weights are divided by their sum: as stated, else as the method does by default."""
        if self.normalize is not None:
            return self.normalize
        method = METHODS.get(self.merge_method)
        parameter = method.parameters.get("normalize") if method else None
        return bool(parameter.default) if parameter else method is None

    def with_dtype(self, dtype: str | None) -> Recipe:
        return replace(self, dtype=read_dtype(dtype))

    def value(self, index: int, name: str, where: str) -> float:
        """A parameter of one model for tensors of which `where` is a part of the name ("layers.7.")."""
        entry = self.models[index]
        parameter = get_method(self.merge_method).parameters[name]
        return float(self._for_model(name, parameter, entry, where, 0.0))

    def with_value(self, index: int, name: str, filters: Sequence[str], value: float) -> Recipe:
        """The recipe with a model's parameter set for the tensors whose names contain one of `filters`."""
        entry = self.models[index]
        given = self._candidates(name, entry)
        parameter = get_method(self.merge_method).parameters[name]
        setting: Setting = given[0] if given else 0.0 if parameter.default is None else float(parameter.default)
        changed = entry.with_parameter(name, with_filters(setting, dict.fromkeys(filters, float(value))))
        return replace(self, models=(*self.models[:index], changed, *self.models[index + 1 :]))

    def settings_for(self, tensor: str, depth: float = 0.0) -> dict[str, Any]:
        """Every parameter of the method for one tensor: a tuple with one value per model, or one value.

        mergekit's precedence: a model's own value, then the recipe's, then the default. Raises RecipeError for a
        parameter that has to be given and is not.
        """
        # Tensors that fit the same filters have the same settings: searches plan hundreds of merges of the same names.
        filters, graded = self._forms
        like = (depth if graded else 0.0, *(name in tensor for name in filters))
        if like not in self._settled:
            self._settled[like] = self._settings(tensor, depth)
        return dict(self._settled[like])

    def _settings(self, tensor: str, depth: float) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, parameter in get_method(self.merge_method).parameters.items():
            if name == "normalize":
                found[name] = self.normalizes
            elif parameter.each:
                found[name] = tuple(self._for_model(name, parameter, entry, tensor, depth) for entry in self.models)
            else:
                given = dict(self.parameters).get(name)
                value: Any = None if given is None else value_at(given, tensor, depth)
                value = parameter.default if value is None else value
                found[name] = int(value) if parameter.kind is int else value
        return found

    @cached_property
    def _settled(self) -> dict[tuple[float, ...], dict[str, Any]]:
        return {}

    @cached_property
    def _forms(self) -> tuple[tuple[str, ...], bool]:
        """All filters that the recipe names, and whether there is a gradient."""
        given = [value for entry in self.models for value in (entry.weight, *dict(entry.parameters).values())]
        settings = [value for value in (*given, *dict(self.parameters).values()) if isinstance(value, tuple)]
        rules = [rule for setting in settings for rule in setting if isinstance(rule, Rule)]
        values = [*settings, *(rule.value for rule in rules)]
        graded = any(isinstance(value, tuple) and not isinstance(value[0], Rule) for value in values)
        return tuple(dict.fromkeys(rule.filter for rule in rules if rule.filter)), graded

    def _candidates(self, name: str, entry: ModelEntry) -> tuple[Setting | bool, ...]:
        """What is said of a model's parameter: by itself, then by the recipe for all models."""
        return tuple(value for value in (entry.get(name), dict(self.parameters).get(name)) if value is not None)

    def _for_model(self, name: str, parameter: Parameter, entry: ModelEntry, tensor: str, depth: float) -> Any:
        given = self._candidates(name, entry)
        value = _first_value(given, tensor, depth)
        if value is not None:
            return value
        if parameter.default is None and entry.model != self.base_model:
            where = f"for {tensor}" if given else "at all"
            fix = "end its list of filters with one `- value:`" if given else f"add `parameters: {{{name}: …}}`"
            raise RecipeError(
                f"“{entry.model}” has no {name} {where}: {fix}.",
                field=f"models[{self.models.index(entry)}].parameters.{name}",
            )
        return 0.0 if parameter.default is None else parameter.default

    # ── mergekit's YAML ──────────────────────────────────────────────────────────────────────────────────────────

    def to_dict(self) -> dict[str, Any]:
        """mergekit's form, in the order in which people write it."""
        models = []
        for entry in self.models:
            own = {"weight": entry.weight} if entry.weight is not None else {}
            own |= dict(entry.parameters)
            written: dict[str, Any] = {"model": entry.model}
            if own:
                written["parameters"] = {name: _written(value) for name, value in own.items()}
            models.append(written)
        result: dict[str, Any] = {"merge_method": self.merge_method, "models": models}
        if self.base_model:
            result["base_model"] = self.base_model
        top = {name: _written(value) for name, value in self.parameters}
        if self.normalize is not None:
            top = {"normalize": self.normalize, **top}
        if top:
            result["parameters"] = top
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
        top = read_mapping(data, "", TOP_KEYS)
        raw = top.get("models")
        if not isinstance(raw, list) or not raw:
            raise RecipeError("The recipe lists no models: add `models:` with at least one `- model:`.", field="models")
        method = get_method(str(top.get("merge_method") or "linear"))
        parameters = dict(read_parameters(top.get("parameters") or {}, "parameters", method, of_model=False))
        normalize = parameters.pop("normalize", None)
        base = top.get("base_model")
        if base is not None and not isinstance(base, str):
            raise RecipeError("base_model must be a path or a hub id.", field="base_model")
        if top.get("tokenizer_source") not in (None, "base"):
            raise RecipeError("tokenizer_source may only be `base` in this version.", field="tokenizer_source")
        recipe = cls(
            models=tuple(_entry(item, f"models[{i}]", method) for i, item in enumerate(raw)),
            merge_method=method.name,
            base_model=base or None,
            dtype=read_dtype(top.get("out_dtype") or top.get("dtype")),
            normalize=None if normalize is None else bool(normalize),
            parameters=tuple(parameters.items()),
        )
        for index, entry in enumerate(recipe.models):
            if not recipe._candidates("weight", entry) and entry.model != base:
                where = f"models[{index}]"
                message = f"{where} has no weight: add `parameters: {{weight: …}}`."
                raise RecipeError(message, field=f"{where}.parameters.weight")
        return recipe


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


def _entry(item: object, path: str, method: Method) -> ModelEntry:
    entry = read_mapping(item, path, MODEL_KEYS)
    model = entry.get("model")
    if not isinstance(model, str) or not model.strip():
        raise RecipeError(f"{path} has no model: write `model: path-or-hub-id`.", field=f"{path}.model")
    parameters = dict(read_parameters(entry.get("parameters") or {}, f"{path}.parameters", method, of_model=True))
    weight = parameters.pop("weight", None)
    return ModelEntry(model.strip(), weight, tuple(parameters.items()))


def _first_value(given: Iterable[Setting | bool], tensor: str, depth: float) -> Any:
    """The first of what is said that has a value for this tensor; None if none has."""
    for setting in given:
        value = value_at(setting, tensor, depth)
        if value is not None:
            return value
    return None


def _written(value: Setting | bool) -> Any:
    return value if isinstance(value, bool) else plain_setting(value)
