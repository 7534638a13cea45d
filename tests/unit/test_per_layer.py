"""A parameter's value for each tensor: mergekit's numbers, gradients and filters, and the way back to YAML."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_merge.errors import RecipeError
from llm_merge.per_layer import Rule, Setting, plain_setting, read_setting, value_at, with_filters

numbers = st.floats(-4, 4, allow_nan=False, width=32)
gradients = st.lists(numbers, min_size=1, max_size=4).map(tuple)
names = st.sampled_from(["layers.0.", "layers.1.", "layers.10.", "mlp", "self_attn.q_proj.weight", "norm", "*"])
rules = st.lists(st.builds(Rule, st.one_of(numbers, gradients), st.one_of(st.none(), names)), min_size=1, max_size=4)
settings = st.one_of(numbers, gradients, rules.map(tuple))
TENSORS = [
    "model.embed_tokens.weight",
    *(f"model.layers.{n}.{part}" for n in (0, 1, 10) for part in ("self_attn.q_proj.weight", "mlp.up_proj.weight")),
    "model.norm.weight",
]
filters = st.sampled_from(["layers.0.", "layers.1.", "layers.10.", "mlp", "q_proj", "model.norm.weight"])


def test_a_number_holds_everywhere() -> None:
    assert value_at(0.5, "anything", 0.3) == 0.5


@pytest.mark.parametrize(
    ("points", "depth", "value"),
    [
        ((0.0, 1.0), 0.0, 0.0),
        ((0.0, 1.0), 1.0, 1.0),
        ((0.0, 1.0), 0.25, 0.25),
        ((0.0, 1.0, 0.0), 0.5, 1.0),  # mergekit's: the points are spread evenly, and drawn straight between
        ((0.0, 0.5, 1.0, 0.2), 1 / 3, 0.5),
        ((0.0, 0.5, 1.0, 0.2), 0.5, 0.75),
        ((3.0,), 0.7, 3.0),
    ],
)
def test_a_gradient_is_drawn_straight_between_its_points(points: tuple[float, ...], depth: float, value: float) -> None:
    assert value_at(points, "t", depth) == pytest.approx(value)


@given(gradients, st.floats(0, 1))
def test_a_gradient_stays_between_its_points_and_meets_its_ends(points: tuple[float, ...], depth: float) -> None:
    value = value_at(points, "t", depth)
    assert value is not None
    assert min(points) - 1e-6 <= value <= max(points) + 1e-6
    assert (value_at(points, "t", 0.0), value_at(points, "t", 1.0)) == (points[0], points[-1])


def test_the_first_filter_that_fits_counts() -> None:
    setting = (Rule(0.1, "layers.1."), Rule(0.2, "mlp"), Rule((0.0, 1.0), "q_proj"), Rule(0.4))
    assert value_at(setting, "model.layers.1.mlp.up_proj.weight") == 0.1
    assert value_at(setting, "model.layers.11.mlp.up_proj.weight") == 0.2
    assert value_at(setting, "model.layers.11.self_attn.q_proj.weight", 0.75) == 0.75
    assert value_at(setting, "model.norm.weight") == 0.4
    assert value_at((Rule(0.1, "mlp"), Rule(0.3, "*"), Rule(0.4)), "model.norm.weight") == 0.3


def test_without_a_rule_for_the_rest_there_is_no_value() -> None:
    assert value_at((Rule(0.1, "mlp"),), "model.norm.weight") is None


@given(settings)
def test_written_and_read_again_it_is_the_same(setting: Setting) -> None:
    assert read_setting(plain_setting(setting), "weight") == setting


@given(settings, filters, numbers)
def test_a_filters_value_reaches_its_tensors_and_no_others(setting: Setting, name: str, value: float) -> None:
    """Whatever was said before, and however often: an edit of one layer is exact."""
    changed = with_filters(setting, {name: value})
    for tensor in TENSORS:
        for depth in (0.0, 0.4, 1.0):
            assert value_at(changed, tensor, depth) == (value if name in tensor else value_at(setting, tensor, depth))
    assert with_filters(changed, {name: value}) == changed


@given(numbers, st.permutations([0, 1, 2, 10]), st.lists(numbers, min_size=4, max_size=4))
def test_layers_set_back_leave_no_trace(setting: float, layers: list[int], values: list[float]) -> None:
    changed: Setting = setting
    for layer, value in zip(layers, values, strict=True):
        changed = with_filters(changed, {f"layers.{layer}.": value})
    for layer in reversed(layers):
        changed = with_filters(changed, {f"layers.{layer}.": setting})
    assert changed == setting


def test_a_filter_that_is_there_is_replaced_in_its_place() -> None:
    setting = (Rule(0.1, "layers.1."), Rule(0.2, "layers.2."), Rule(1.0))
    assert with_filters(setting, {"layers.1.": 0.5}) == (Rule(0.5, "layers.1."), Rule(0.2, "layers.2."), Rule(1.0))
    assert with_filters(setting, {"layers.3.": 0.5})[2:] == (Rule(0.5, "layers.3."), Rule(1.0))


@pytest.mark.parametrize(
    ("raw", "field", "words"),
    [
        ([], "w", "w is an empty list: write one number, or leave it out."),
        ("much", "w", "w is 'much': it must be one finite number."),
        (True, "w", "w is True: it must be one finite number."),
        (float("inf"), "w", "w is inf: it must be one finite number."),
        (1.5, "w", "w is 1.5: it must be between 0 and 1."),
        ([0, -1], "w[1]", "w[1] is -1: it must be between 0 and 1."),
        ([{"filter": "mlp", "valu": 1}], "w[0].valu", "Unknown key `valu` in w[0]. Did you mean `value`?"),
        ([{"filter": "mlp"}], "w[0].value", "w[0] has no value: add `value:`."),
        ([{"filter": 7, "value": 1}], "w[0]", "w[0].filter must be a part of a tensor's name, such as layers.7."),
        ([{"value": [0, 2]}], "w[0].value[1]", "w[0].value[1] is 2: it must be between 0 and 1."),
        ([{"value": [{"value": 1}]}], "w[0]", "w[0].value may be a number or a list of numbers, not filters"),
        ([0.5, {"value": 1}], "w[0]", "w[0] is 0.5: a list holds either numbers, or `filter:` and `value:` pairs"),
    ],
)
def test_wrong_settings_name_the_place(raw: Any, field: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_setting(raw, "w", low=0, high=1)
    assert words in caught.value.message
    assert caught.value.field == field
