"""Laws that every merge method obeys, and mergekit's numbers.

A method that is registered is tested here without another line, by what the table says about it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_merge.errors import RecipeError
from llm_merge.methods import METHODS, Method, Parameter, RandomKey, get_method

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "mergekit.json").read_text(encoding="utf-8"))
SHAPES = [(0,), (1,), (64,), (), (3, 0), (5, 7), (300, 211)]
THREE = RandomKey("layer.weight", ("org/a#0", "org/b#0", "org/c#0"))

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
task_vector_methods = pytest.mark.parametrize(
    "method", [method for method in METHODS.values() if method.uses_base], ids=lambda method: method.name
)
thinning_methods = pytest.mark.parametrize(
    "method", [method for method in METHODS.values() if "density" in method.parameters], ids=lambda method: method.name
)


def make(method: Method, shape: tuple[int, ...], count: int = 3) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base and `count` fine-tunes of it, in the method's precision."""
    generator = torch.Generator().manual_seed(5)
    precision = getattr(torch, method.precision)
    base = torch.randn(shape, generator=generator, dtype=precision)
    return base, [base + 0.1 * torch.randn(shape, generator=generator, dtype=precision) for _ in range(count)]


def apply(
    method: Method,
    base: torch.Tensor,
    models: list[torch.Tensor],
    *,
    key: RandomKey | None = THREE,
    weights: tuple[float, ...] = (0.5, 0.3, 0.4),
    **settings: Any,
) -> torch.Tensor:
    """Merge; a setting given as one number for a per-model parameter goes to every model."""
    known = {name: value for name, value in settings.items() if name in method.parameters}
    each = {n: [v] * len(models) for n, v in known.items() if method.parameters[n].each and not isinstance(v, list)}
    names = None if key is None else RandomKey(key.tensor, key.models[: len(models)])
    return method.apply(
        models,
        {"weight": weights[: len(models)]} | known | each,
        base=base if method.uses_base else None,
        key=names if method.random else None,
    )


def close(left: torch.Tensor, right: torch.Tensor, tolerance: float = 1e-6) -> bool:
    """Within `tolerance` of the largest value."""
    size = float(right.abs().max()) if right.numel() else 0.0
    return left.shape == right.shape and bool(((left - right).abs() <= tolerance * size).all())


def golden_cases() -> list[Any]:
    cases = [case for case in GOLDEN["cases"] if case["method"] in METHODS]
    names = [f"{c['method']} {c['params'] or ''} {c['tensor_params'] or ''}" for c in cases]
    return [pytest.param(case, id=name) for case, name in zip(cases, names, strict=True)]


# ── mergekit ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", golden_cases())
def test_the_numbers_are_mergekits(case: dict[str, Any]) -> None:
    method = get_method(case["method"])
    names = [name for name in case["models"] if name != case["base"]]
    settings: dict[str, Any] = {"weight": [case["weights"][name] for name in names]}
    settings |= case["params"] or {}
    each = case["tensor_params"] or {}
    settings |= {key: [each[name][key] for name in names] for key in (each.get(names[0]) or {})}
    merged = method.apply(
        [torch.tensor(GOLDEN[name], dtype=getattr(torch, method.precision)) for name in names],
        settings,
        base=torch.tensor(GOLDEN["base"]) if case["base"] else None,
        key=RandomKey("tensor", tuple(f"{name}#0" for name in names)) if method.random else None,
    )
    assert close(merged.float(), torch.tensor(case["result"]))


def test_every_method_has_mergekits_numbers() -> None:
    assert set(METHODS) <= {case["method"] for case in GOLDEN["cases"]}


# ── laws of all methods ─────────────────────────────────────────────────────────────────────────────────────────────


@every_method
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape_and_type_are_the_inputs_and_the_inputs_stay(method: Method, shape: tuple[int, ...]) -> None:
    base, models = make(method, shape)
    before = [tensor.clone() for tensor in (base, *models)]
    merged = apply(method, base, models, density=0.5)
    assert merged.shape == base.shape and merged.dtype == base.dtype
    assert merged.isfinite().all()
    assert all(torch.equal(left, right) for left, right in zip(before, (base, *models), strict=True))
    assert all(merged.data_ptr() != tensor.data_ptr() for tensor in (base, *models) if tensor.numel())


@every_method
@pytest.mark.parametrize("density", [1.0, 0.6])
def test_the_order_of_the_models_does_not_matter(method: Method, density: float) -> None:
    base, models = make(method, (40, 50))
    order = [2, 0, 1]
    moved = apply(
        method,
        base,
        [models[index] for index in order],
        key=RandomKey(THREE.tensor, tuple(THREE.models[index] for index in order)),
        weights=tuple((0.5, 0.3, 0.4)[index] for index in order),
        density=density,
    )
    assert close(moved, apply(method, base, models, density=density))


@every_method
def test_strided_inputs_are_merged_like_their_copies(method: Method) -> None:
    base, models = make(method, (30, 40))
    turned = [model.t() for model in models]
    expected = apply(method, base.t().contiguous(), [model.contiguous() for model in turned], density=0.5)
    assert torch.equal(apply(method, base.t(), turned, density=0.5), expected)


@every_method
def test_threads_change_no_bit(method: Method) -> None:
    base, models = make(method, (300, 500))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(apply(method, base, models, density=0.5, rescale=True))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.element_wise])
def test_an_element_wise_method_may_be_given_chunks(name: str) -> None:
    method = get_method(name)
    base, models = make(method, (1000,))
    halves = [apply(method, base[part], [m[part] for m in models]) for part in (slice(0, 300), slice(300, None))]
    assert torch.equal(torch.cat(halves), apply(method, base, models))


@every_method
def test_the_function_finds_every_parameter_with_its_kind(method: Method) -> None:
    assert method.parameters["weight"].each and method.parameters["weight"].default is None
    for name, parameter in method.parameters.items():
        assert parameter.key == name and parameter.help
        assert parameter.kind in (float, bool, int)
        assert parameter.default is None or type(parameter.default) is parameter.kind
    base, models = make(method, (4,))
    assert torch.equal(apply(method, base, models, int8_mask=True), apply(method, base, models))


# ── laws of the methods with a base ─────────────────────────────────────────────────────────────────────────────────


@task_vector_methods
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_models_that_changed_nothing_give_the_base(method: Method, density: float) -> None:
    base, _ = make(method, (64, 65))
    assert torch.equal(apply(method, base, [base.clone(), base.clone(), base], density=density), base)


@task_vector_methods
def test_lambda_scales_the_merged_change(method: Method) -> None:
    base, models = make(method, (50, 60))
    change = apply(method, base, models, density=0.5) - base
    assert close(apply(method, base, models, density=0.5, **{"lambda": 2.5}), base + 2.5 * change)
    assert torch.equal(apply(method, base, models, density=0.5, **{"lambda": 0.0}), base)


@task_vector_methods
def test_weights_without_normalize_scale_the_merged_change(method: Method) -> None:
    base, models = make(method, (50, 60))
    change = apply(method, base, models, density=0.5, normalize=False) - base
    doubled = apply(method, base, models, density=0.5, normalize=False, weights=(1.0, 0.6, 0.8))
    assert close(doubled, base + 2 * change)


@task_vector_methods
def test_one_normalised_model_of_full_density_is_itself(method: Method) -> None:
    base, models = make(method, (50, 60))
    assert close(apply(method, base, models[:1], normalize=True, weights=(0.3,)), models[0])


@task_vector_methods
def test_weights_that_cancel_are_not_divided_by(method: Method) -> None:
    base, models = make(method, (50, 60))
    same = [models[0], models[0], models[0]]
    merged = apply(method, base, same, normalize=True, weights=(0.1, 0.2, -0.3))
    assert merged.isfinite().all()
    if "ties" not in method.name:
        assert close(merged, base)


@thinning_methods
def test_full_density_without_a_vote_is_task_arithmetic(method: Method) -> None:
    base, models = make(method, (50, 60))
    plain = apply(get_method("task_arithmetic"), base, models)
    merged = apply(method, base, models, density=1.0, normalize=False)
    agreed = torch.stack([(model - base).sign() for model in models]).sum(0).abs() == 3
    assert close(merged[agreed], plain[agreed])
    if "ties" not in method.name:
        assert close(merged, plain)


@thinning_methods
def test_only_what_is_kept_moves_away_from_the_base(method: Method) -> None:
    base, models = make(method, (100, 100), count=1)
    moved = apply(method, base, models, density=0.2, gamma=0.0) != base
    assert abs(int(moved.sum()) - 2000) < 5 * 40


@thinning_methods
def test_rescaling_keeps_the_sum_of_magnitudes(method: Method) -> None:
    base, models = make(method, (100, 100), count=1)
    settings: dict[str, Any] = {"density": 0.3, "normalize": False, "rescale": True}
    change = apply(method, base, models, weights=(1.0,), **settings) - base
    assert float(change.abs().sum()) == pytest.approx(float((models[0] - base).abs().sum()), rel=1e-4)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_elected_sign_has_the_larger_sum_of_weighted_changes(normalize: bool) -> None:
    base = torch.zeros(4)
    models = [torch.tensor([1.0, 1.0, -1.0, 0.0]), torch.tensor([-3.0, -2.0, -1.0, 0.0])]
    merged = get_method("ties").apply(models, {"weight": [0.5, 0.25], "normalize": normalize}, base=base)
    # −0.75 outvotes 0.5; at 0.5 against −0.5 the sum is 0, which elects +; then both agree.
    expected = [-3.0, 1.0, -1.0, 0.0] if normalize else [-0.75, 0.5, -0.75, 0.0]
    assert merged.tolist() == expected


def test_breadcrumbs_without_outliers_is_magnitude_pruning_written_by_hand() -> None:
    method = get_method("breadcrumbs")
    base, models = make(method, (61, 53))
    expected = base.clone()
    for model, weight, share in zip(models, (0.5, 0.3, 0.4), (0.1, 0.5, 0.9), strict=True):
        delta = (model - base).reshape(-1)
        best = delta.abs().sort(descending=True, stable=True).indices[: int(share * delta.numel())]
        pruned = torch.zeros_like(delta)
        pruned[best] = delta[best]
        expected += weight * pruned.reshape(base.shape)
    assert close(apply(method, base, models, density=[0.1, 0.5, 0.9], gamma=0.0), expected)


def test_linear_divides_its_weights_by_their_sum() -> None:
    method = get_method("linear")
    base, models = make(method, (50, 60))
    divided = apply(method, base, models, weights=(1.0, 0.5, 0.5))
    assert torch.equal(divided, apply(method, base, models, weights=(0.5, 0.25, 0.25), normalize=False))
    with pytest.raises(RecipeError, match="sum to 0"):
        apply(method, base, models, weights=(0.5, -0.25, -0.25))


# ── DARE's random choice ────────────────────────────────────────────────────────────────────────────────────────────

random_methods = pytest.mark.parametrize(
    "method", [method for method in METHODS.values() if method.random], ids=lambda method: method.name
)


@random_methods
def test_a_seed_gives_the_same_bits_and_another_seed_others(method: Method) -> None:
    base, models = make(method, (300, 300))
    first = apply(method, base, models, density=0.5, random_seed=3)
    assert torch.equal(first, apply(method, base, models, density=0.5, random_seed=3))
    assert not torch.equal(first, apply(method, base, models, density=0.5, random_seed=4))
    other = RandomKey("another.weight", THREE.models)
    assert not torch.equal(first, apply(method, base, models, density=0.5, random_seed=3, key=other))


def test_the_choice_of_one_model_does_not_hang_on_the_others() -> None:
    method = get_method("dare_linear")
    base, models = make(method, (300, 300))
    settings: dict[str, Any] = {"density": 0.5, "rescale": False}
    parts = [
        apply(method, base, [model], key=RandomKey(THREE.tensor, (name,)), weights=(weight,), **settings) - base
        for model, name, weight in zip(models, THREE.models, (0.5, 0.3, 0.4), strict=True)
    ]
    assert close(apply(method, base, models, **settings), base + sum(parts))


def test_the_merged_change_of_rescaled_dare_is_on_average_that_of_task_arithmetic() -> None:
    method = get_method("dare_linear")
    base, models = torch.zeros(40), [torch.linspace(-1, 1, 40)]
    runs = [apply(method, base, models, density=0.5, random_seed=seed, weights=(1.0,)) for seed in range(400)]
    # The L1-preserving factor is not 1/p: each run keeps the sum of magnitudes, and so does their mean but for noise.
    assert torch.allclose(torch.stack(runs).mean(0), models[0], atol=0.25)


# ── what a caller is told ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_missing_base_weight_or_key_and_an_unknown_setting_are_named() -> None:
    tensors = [torch.ones(2)]
    with pytest.raises(RecipeError, match="`ties` needs a base"):
        get_method("ties").apply(tensors, {"weight": [1.0]})
    with pytest.raises(RecipeError, match="needs `weight` for every model"):
        get_method("ties").apply(tensors, {}, base=tensors[0])
    with pytest.raises(RecipeError, match="`task_arithmetic` has no parameter `density`"):
        get_method("task_arithmetic").apply(tensors, {"weight": [1.0], "density": [0.5]}, base=tensors[0])
    with pytest.raises(ValueError, match="needs a key"):
        get_method("dare_ties").apply(tensors, {"weight": [1.0]}, base=tensors[0])
    with pytest.raises(RecipeError, match="did you mean `ties`"):
        get_method("tie")


def test_the_table_says_what_recipes_and_controls_ask() -> None:
    assert {name for name, method in METHODS.items() if not method.uses_base} == {"linear"}
    assert {name for name, method in METHODS.items() if method.random} == {"dare_linear", "dare_ties"}
    assert {name for name, method in METHODS.items() if method.element_wise} == {"linear", "task_arithmetic"}
    normalised = {name for name, method in METHODS.items() if method.parameters["normalize"].default}
    assert normalised == {"linear", "ties"}
    scale: Parameter = METHODS["ties"].parameters["lambda"]
    assert (scale.argument, scale.kind, scale.default, scale.each) == ("lambda_", float, 1.0, False)
    density = METHODS["ties"].parameters["density"]
    assert (density.low, density.high, density.default, density.each) == (0, 1, 1.0, True)
    assert METHODS["dare_ties"].parameters["random_seed"].kind is int
