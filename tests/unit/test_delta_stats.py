"""Statistics of deltas against a plain computation, and the laws that they keep; the picture of one tensor's delta."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_merge import delta_stats
from llm_merge.delta_stats import DeltaProgress, DeltaStats, delta_statistics
from llm_merge.delta_view import binned_delta, tensor_names
from llm_merge.errors import CheckpointError, IncompatibleModels, MergeError, RecipeError, Stopped
from llm_merge.layer_map import kind_of, layer_map
from tests.tiny_models import TinyFamily, make_family, make_tiny_bert, make_tiny_llama, make_tiny_lora

FILE = "model.safetensors"


def run(steps: Generator[DeltaProgress, None, DeltaStats]) -> tuple[list[DeltaProgress], DeltaStats]:
    events = []
    while True:
        try:
            events.append(next(steps))
        except StopIteration as stop:
            return events, stop.value


def stats_of(family: TinyFamily, **settings: Any) -> DeltaStats:
    base, *models = family.references
    return run(delta_statistics(base, models, **settings))[1]


def change(folder: Path, changes: dict[str, torch.Tensor]) -> None:
    save_file(load_file(folder / FILE) | changes, folder / FILE, metadata={"format": "pt"})


def deltas(family: TinyFamily) -> list[dict[str, torch.Tensor]]:
    base, *tunes = (load_file(folder / FILE) for folder in family.folders)
    return [{name: tune[name].double() - base[name].double() for name in base} for tune in tunes]


@pytest.mark.parametrize("chunk", [100, 1 << 14])
def test_every_figure_is_what_a_plain_computation_gives(
    tiny_llama: TinyFamily, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(delta_stats, "CHUNK", chunk)
    stats = stats_of(tiny_llama, top=0.3)
    base, pair = load_file(tiny_llama.base / FILE), deltas(tiny_llama)
    places = layer_map(base)
    for group in stats.groups:
        for kind, sums in group.kinds:
            names = [name for name in base if places.group_of(name).key == group.key and kind_of(name) == kind]
            whole = torch.cat([base[name].double().reshape(-1) for name in names])
            one, other = (torch.cat([delta[name].reshape(-1) for name in names]) for delta in pair)
            assert sums.entries == len(whole)
            assert sums.relative_norm(0) == pytest.approx(float(one.norm() / whole.norm()), rel=1e-12)
            assert sums.changed_share(1) == float((other != 0).double().mean())
            assert sums.cosine(0, 1) == pytest.approx(float(one @ other / one.norm() / other.norm()), rel=1e-9)
            both = (one != 0) & (other != 0)
            assert sums.conflict_share(0, 1) == float((one * other < 0)[both].double().mean())
            largest = [delta[name].abs().reshape(-1).sort(descending=True).values for name in names for delta in pair]
            kept = [values[: max(1, int(0.3 * len(values)))] for values in largest[::2]]
            assert sums.density(0) == sum(int((values != 0).sum()) for values in kept) / len(whole)
            energy = float(torch.cat(kept).square().sum() / one.square().sum())
            assert sums.energy(0) == pytest.approx(energy, rel=1e-6)


def test_sums_of_kinds_are_sums_of_layers_and_of_the_model(tiny_t5: TinyFamily) -> None:
    stats = stats_of(tiny_t5)
    assert [group.key for group in stats.groups] == [
        "embeddings", "encoder.0", "encoder.1", "decoder.0", "decoder.1", "norm",
    ]  # fmt: skip
    for group in stats.groups:
        assert group.total == stats.of(group.key)
        assert group.total.entries == sum(sums.entries for _, sums in group.kinds)
    assert stats.total.entries == sum(tensor.numel() for tensor in load_file(tiny_t5.base / FILE).values())
    pair = deltas(tiny_t5)
    square = sum(float(tensor.square().sum()) for tensor in pair[0].values())
    assert stats.total.dots[0][0] == pytest.approx(square, rel=1e-12)


def test_the_order_of_models_changes_nothing_but_the_order(tiny_bert: TinyFamily) -> None:
    base, one, other = tiny_bert.references
    here = run(delta_statistics(base, [one, other]))[1].total
    there = run(delta_statistics(base, [other, one]))[1].total
    assert here.relative_norm(0) == there.relative_norm(1)
    assert here.kept_square == there.kept_square[::-1]
    assert here.cosine(0, 1) == pytest.approx(there.cosine(0, 1), rel=1e-12)
    assert here.conflicts[0][1] == there.conflicts[0][1] == there.conflicts[1][0]


def test_a_model_beside_itself_and_beside_the_base(tiny_bert: TinyFamily) -> None:
    base, tune, _ = tiny_bert.references
    total = run(delta_statistics(base, [tune, tune, base], top=1.0))[1].total
    assert total.cosine(0, 1) == pytest.approx(1.0)
    assert total.conflict_share(0, 1) == 0.0
    assert (total.density(0), total.energy(0)) == (total.changed_share(0), 1.0)
    assert (total.relative_norm(2), total.changed_share(2), total.density(2)) == (0.0, 0.0, 0.0)
    assert math.isnan(total.energy(2)) and math.isnan(total.cosine(0, 2)) and math.isnan(total.conflict_share(0, 2))


def test_what_is_added_to_a_base_of_zeros_has_no_relative_norm() -> None:
    square = ((4.0,),)
    sums = delta_stats.DeltaSums(4, 0.0, (1,), (1,), (4.0,), square, ((1,),), ((0,),))
    assert math.isnan(sums.relative_norm(0))
    assert replace(sums, dots=((0.0,),)).relative_norm(0) == 0.0


def test_opposite_changes_conflict_everywhere(tmp_path: Path) -> None:
    family = make_family(make_tiny_bert, tmp_path)
    name = "encoder.layer.0.attention.self.query.weight"
    before = load_file(family.base / FILE)[name]
    step = torch.zeros_like(before)
    step[0, :4] = torch.tensor([1.0, 2.0, -3.0, 4.0])
    change(family.fine_tunes[0], {name: before + step})
    change(family.fine_tunes[1], {name: before - 2 * step})
    bias = name.replace("weight", "bias")
    for folder in family.fine_tunes:
        change(folder, {bias: load_file(family.base / FILE)[bias]})
    sums = stats_of(family, top=2 / before.numel()).of("0", "q")
    assert sums is not None
    assert sums.cosine(0, 1) == pytest.approx(-1.0)
    assert sums.conflict_share(0, 1) == 1.0
    assert sums.changed == (4, 4)
    assert sums.kept == (2, 2)
    assert sums.energy(0) == pytest.approx((9 + 16) / 30)


def test_top_p_keeps_at_least_one_entry_of_each_tensor(tiny_bert: TinyFamily) -> None:
    stats = stats_of(tiny_bert, top=1e-9)
    assert stats.total.kept[0] == len(load_file(tiny_bert.base / FILE))


@pytest.mark.parametrize("stored", [False, True])
def test_a_tied_head_is_counted_once(tmp_path: Path, stored: bool) -> None:
    family = make_family(make_tiny_llama, tmp_path, fine_tunes=1)
    if stored:
        for folder in family.folders:
            change(folder, {"lm_head.weight": load_file(folder / FILE)["model.embed_tokens.weight"].clone()})
    stats = stats_of(family)
    assert stats.of("head") is None
    embeddings = load_file(family.base / FILE)["model.embed_tokens.weight"].numel()
    total = stats.of("embeddings")
    assert total is not None and total.entries == embeddings


def test_an_adapter_changes_what_it_is_put_on(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base", 0)
    adapter = make_tiny_lora(tmp_path / "adapter", 1, base, targets=("q_proj",))
    stats = run(delta_statistics(str(base), [f"{base}+{adapter}"]))[1]
    for kind in stats.kinds:
        changed = sum(sums.changed[0] for group in stats.groups for found, sums in group.kinds if found == kind)
        assert (changed > 0) == (kind == "q")


def test_progress_tells_every_tensor_once(tiny_llama: TinyFamily) -> None:
    base, *models = tiny_llama.references
    events, _ = run(delta_statistics(base, models))
    names = list(load_file(tiny_llama.base / FILE))
    assert sorted(event.tensor for event in events) == sorted(names)
    assert [event.done for event in events] == list(range(1, len(names) + 1))
    assert {event.total for event in events} == {len(names)}


def test_statistics_survive_json(tiny_t5: TinyFamily) -> None:
    stats = stats_of(tiny_t5)
    again = DeltaStats.from_dict(json.loads(json.dumps(stats.to_dict(), allow_nan=False)))
    assert again == stats
    assert again.total.relative_norm(0) == stats.total.relative_norm(0)
    for broken in ({}, {**stats.to_dict(), "groups": [{"key": "0"}]}):
        with pytest.raises(MergeError, match="not delta statistics"):
            DeltaStats.from_dict(broken)


def test_stop_ends_it(tiny_llama: TinyFamily) -> None:
    base, *models = tiny_llama.references
    stop = threading.Event()
    steps = delta_statistics(base, models, stop=stop)
    next(steps)
    stop.set()
    with pytest.raises(Stopped):
        next(steps)


def test_what_cannot_be_compared_is_said_before_reading(tiny_llama: TinyFamily, tiny_bert: TinyFamily) -> None:
    base, tune, _ = tiny_llama.references
    with pytest.raises(IncompatibleModels):
        next(delta_statistics(base, [str(tiny_bert.base)]))
    with pytest.raises(RecipeError, match="at least one fine-tune"):
        next(delta_statistics(base, []))
    with pytest.raises(RecipeError, match="share to keep is 0"):
        next(delta_statistics(base, [tune], top=0))


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    family = make_family(make_tiny_bert, tmp_path)
    name = "encoder.layer.1.output.dense.weight"
    broken = load_file(family.fine_tunes[1] / FILE)[name]
    broken[0, 0] = math.nan
    change(family.fine_tunes[1], {name: broken})
    with pytest.raises(CheckpointError, match=r"“tune-2” has values in encoder\.layer\.1\.output\.dense\.weight"):
        stats_of(family)


# ── one tensor's delta ──────────────────────────────────────────────────────────────────────────────────────────────


def test_bins_are_means_of_the_delta(tiny_bert: TinyFamily) -> None:
    base, tune, _ = tiny_bert.references
    name = "encoder.layer.0.intermediate.dense.weight"  # 64 × 32
    delta = deltas(tiny_bert)[0][name]
    found = binned_delta(base, tune, name, bins=(5, 8))
    assert (found.shape, found.model, found.tensor) == ((64, 32), tune, name)
    assert found.row_edges == (0, 12, 25, 38, 51, 64)
    assert found.mean[1][2] == pytest.approx(float(delta[12:25, 8:12].mean()), rel=1e-9)
    assert found.magnitude[4][7] == pytest.approx(float(delta[51:, 28:].abs().mean()), rel=1e-9)
    assert (found.low, found.high) == (min(map(min, found.mean)), max(map(max, found.mean)))


def test_no_more_bins_than_entries(tiny_bert: TinyFamily) -> None:
    base, tune, _ = tiny_bert.references
    pair = deltas(tiny_bert)[0]
    name = "encoder.layer.0.attention.self.query.weight"
    whole = binned_delta(base, tune, name)
    assert torch.equal(torch.tensor(whole.mean, dtype=torch.float64), pair[name])
    vector = binned_delta(base, tune, "encoder.layer.0.attention.self.query.bias", bins=(64, 4))
    assert vector.shape == (1, 32)
    assert [len(line) for line in vector.mean] == [4]


def test_an_unknown_tensor_is_told_with_the_nearest(tiny_bert: TinyFamily) -> None:
    base, tune, _ = tiny_bert.references
    with pytest.raises(MergeError, match=r"nearest are .*encoder\.layer\.0\.attention\.self\.query\.weight"):
        binned_delta(base, tune, "encoder.layer.0.attention.self.query")
    with pytest.raises(MergeError, match="has no weights called “xyz”: its first is"):
        binned_delta(base, tune, "xyz")
    with pytest.raises(MergeError, match="0 × 3 bins"):
        binned_delta(base, tune, "xyz", bins=(0, 3))
    assert "encoder.layer.0.attention.self.query.weight" in tensor_names(base, tune)
