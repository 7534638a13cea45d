"""What the layer map and the panel below it say of a report: colours, noise, marks, words, nothing unescaped."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from components.views import layer_report as view
from components.views.layer_choice import NOISE_ERRORS
from llm_merge.contribution_report import BEYOND_NOISE, ContributionReport
from llm_merge.contributions import Cell, Layer, Setup, cells_of
from llm_merge.hi_merging import Switches

HOSTILE = "<img src=x onerror=1>"
LAYERS = (
    Layer("embeddings", "Embeddings", ("embed_tokens.",), block=False),
    *(Layer(str(n), f"Layer {n}", (f"layers.{n}.",)) for n in range(4)),
    Layer("head", "Output head", ("lm_head.",), block=False),
)
SETUP = Setup("base", ("law", "poems"), ("law", "poems"), LAYERS)


def report_of(
    gammas: Mapping[str, tuple[float, ...]], *, spread: float = 0.0, setup: Setup = SETUP, **more: Any
) -> ContributionReport:
    """Four rows a task on which every whole model is worth 0, and γ of each layer is as given, ± `spread` by row."""
    signs = (1, -1, 1, -1)
    whole = {(task, which): (0.0,) * 4 for task in setup.tasks for which in ("base", "before", "after")}
    cells = dict.fromkeys(cells_of(setup, gammas), (0.0,) * 4)
    for layer, values in gammas.items():
        for task, gamma in zip(setup.tasks, values, strict=True):
            cells[Cell(task, "before", "delete", layer)] = tuple(-(gamma + spread * sign) for sign in signs)
    return ContributionReport(setup, whole=whole, cells=cells, **more)


def with_estimates(report: ContributionReport, gammas: Mapping[str, tuple[float, ...]]) -> ContributionReport:
    found = dict.fromkeys(cells_of(report.setup, gammas), 0.0)
    for layer, values in gammas.items():
        for task, gamma in zip(report.setup.tasks, values, strict=True):
            found[Cell(task, "before", "delete", layer)] = gamma
    return replace(report, estimates={**report.estimates, **found})


def numbers(value: dict[str, Any]) -> dict[str, list[float | None]]:
    return {row["key"]: [cell["value"] for cell in row["cells"]] for row in value["rows"]}


FIGHT = {"0": (0.2, 0.1), "1": (0.3, -0.1), "2": (-0.2, -0.3)}


# ---- the map ---------------------------------------------------------------------------------------------------------


def test_the_first_chart_is_gamma_per_task_and_their_sum() -> None:
    value = view.map_value(report_of(FIGHT), view.GAMMA, busy=True)
    assert [column["label"] for column in value["columns"]] == ["emb", "0", "1", "2", "3", "head"]
    assert [column["outside"] for column in value["columns"]] == [True, False, False, False, False, True]
    assert numbers(value)["gamma:law"] == pytest.approx([None, 0.2, 0.3, -0.2, None, None])
    assert numbers(value)["total"] == pytest.approx([None, 0.3, 0.2, -0.5, None, None])
    assert [mark["type"] for mark in value["marks"]] == ["none", "severe", "partial", "mutual", "none", "none"]
    assert value["rows"][-1]["strong"]
    assert value["busy"]
    assert value["scale"]["warm"] == "high"  # a conflict is orange
    assert "merging hurts" in value["scale"]["high"]
    assert "nats" in value["scale"]["high"]


@pytest.mark.parametrize("show", [view.BEFORE_AFTER, view.ALPHA, view.BETA])
def test_the_other_charts_are_each_side_of_each_task(show: str) -> None:
    value = view.map_value(report_of(FIGHT), show)
    assert [row["key"] for row in value["rows"]] == [
        f"{show}:{side}:{task}" for side in ("before", "after") for task in ("law", "poems")
    ]
    assert [row["label"] for row in value["rows"]][1::2] == [
        f"{ {'contribution': 'c', 'alpha': 'α', 'beta': 'β'}[show] } poems, {side}" for side in ("before", "after")
    ]
    assert value["marks"] == []
    assert value["scale"]["warm"] == "low"  # here what lies below 0 hurts
    assert "layer helps" in value["scale"]["high"]


def test_alpha_beta_and_contribution_are_what_they_are_called() -> None:
    cells = {
        Cell("law", "before", "delete", "0"): (-0.5,) * 4,  # without it the specialist loses 0.5
        Cell("law", "before", "add", "0"): (0.25,) * 4,  # alone it brings 0.25
        Cell("law", "after", "delete", "0"): (-0.125,) * 4,
        Cell("law", "after", "add", "0"): (0.0625,) * 4,
    }
    report = report_of({}).with_cells(cells.items())
    seen = {show: numbers(view.map_value(report, show)) for show in (view.ALPHA, view.BETA, view.BEFORE_AFTER)}
    assert seen["alpha"]["alpha:before:law"][1] == 0.5
    assert seen["beta"]["beta:before:law"][1] == 0.25
    assert [seen["contribution"][f"contribution:{side}:law"][1] for side in ("before", "after")] == [0.75, 0.1875]
    assert seen["alpha"]["alpha:before:poems"] == [None] * 6
    assert numbers(view.map_value(report, view.GAMMA))["gamma:law"][1] == 0.5625


def test_every_cell_says_what_kind_of_number_it_is() -> None:
    noisy = report_of({"0": (0.2, 0.1), "2": (0.0, 0.0)}, spread=0.0)
    noisy = noisy.with_cells(report_of({"1": (0.2, 0.1)}, spread=0.5).cells.items())
    report = with_estimates(noisy, {"0": (9.0, 9.0), "3": (0.4, 0.4)})
    cells = dict(zip("e0123h", view.map_value(report, view.GAMMA)["rows"][0]["cells"], strict=True))
    assert [cells[key]["state"] for key in "e0123h"] == ["missing", "exact", "exact", "fixed", "estimate", "missing"]
    assert [cells[key]["noise"] for key in "0123"] == [False, True, False, False]
    assert cells["0"]["value"] == pytest.approx(0.2)  # measured: its estimate is not shown any more
    assert "estimate, not measured" in cells["3"]["text"]
    assert cells["e"]["text"] == "not measured yet"
    assert cells["2"]["text"] == "0 nats, known without measuring"


def test_one_row_has_no_error_and_json_gets_no_nan() -> None:
    report = report_of({})
    one = replace(report, whole=dict.fromkeys(report.whole, (0.0,)),
                  cells={cell: (-0.5,) if cell.kind == "delete" and cell.side == "before" else (0.0,)
                         for cell in cells_of(SETUP, ["0"])})  # fmt: skip
    cell = view.map_value(one, view.GAMMA)["rows"][0]["cells"][1]
    assert (cell["value"], cell["error"]) == (0.5, None)
    assert "error not known" in cell["text"]
    assert not any(isinstance(number, float) and math.isnan(number) for number in cell.values())


def test_what_is_noise_in_the_map_is_noise_in_the_report() -> None:
    assert NOISE_ERRORS == BEYOND_NOISE


def test_a_mark_that_rests_on_noise_is_uncertain_and_no_type_is_never_so() -> None:
    value = view.map_value(report_of({"0": (0.2, 0.1), "1": (0.2, 0.0)}, spread=0.5), view.GAMMA)
    marks = value["marks"]
    assert (marks[1]["type"], marks[1]["uncertain"]) == ("severe", True)
    assert marks[1]["text"] == "severe conflict, uncertain"
    assert (marks[2]["type"], marks[2]["uncertain"]) == ("none", False)
    assert not any(mark["uncertain"] for mark in view.map_value(report_of(FIGHT), view.GAMMA)["marks"])


def test_noise_never_sets_the_scale() -> None:
    report = report_of({"0": (0.1, 0.1)}).with_cells(report_of({"1": (3.0, 3.0)}, spread=9.0).cells.items())
    assert view.map_value(report, view.GAMMA)["scale"]["limit"] == pytest.approx(0.2)  # Γ of layer 0


def test_an_empty_map_says_how_it_fills() -> None:
    for report in (None, replace(report_of({}), setup=replace(SETUP, layers=()))):
        value = view.map_value(report, view.GAMMA)
        assert value["rows"] == value["columns"] == []
        assert "press Analyse" in value["note"]


# ---- the headline ----------------------------------------------------------------------------------------------------


def test_the_headline_counts_what_is_beyond_noise_and_names_its_rows_and_source() -> None:
    report = report_of({str(n): pair for n, pair in enumerate([(0.2, 0.1), (0.3, -0.1), (-1, -1), (-1, -1)])})
    shown = view.headline_html(report, "Recorded on 2026-11-21")
    assert "2 of 4 layers conflict beyond noise (4 rows of law, 4 rows of poems)" in shown
    assert "Recorded on 2026-11-21 · changes as they are, nothing pruned or scaled · merged as an average" in shown
    assert view.DILUTED.format(2) not in shown


def test_what_was_pruned_and_how_it_was_merged_is_said() -> None:
    setup = replace(SETUP, pruning=((0.5, 1.0), (1.0, 1.0)), combine="ties_sum")
    shown = view.headline_html(report_of(FIGHT, setup=setup, notes=("2 rows were <cut>",)))
    assert "changes pruned and scaled as chosen" in shown
    assert "merged with TIES’ signs" in shown
    assert "2 rows were &lt;cut&gt;" in shown


def test_nothing_measured_has_no_headline_and_estimates_are_called_so() -> None:
    for nothing in (None, replace(report_of({}), whole={})):
        assert "Nothing is analysed yet" in view.headline_html(nothing)
        assert "nothing pruned or scaled" in view.headline_html(nothing)
    shown = view.headline_html(with_estimates(replace(report_of({}), whole={}), {"0": (1.0, 1.0)}))
    assert "Estimates for 4 layers: nothing is measured yet" in shown


def test_dilution_is_explained_where_an_average_hurts_nearly_every_layer() -> None:
    everywhere = {str(n): (0.2, 0.1) for n in range(4)}
    note = "an average takes only 1/2 of each change"
    assert note in view.headline_html(report_of(everywhere))
    assert note not in view.headline_html(report_of(everywhere, setup=replace(SETUP, combine="sum")))
    assert note not in view.headline_html(report_of({**everywhere, "2": (-1, -1), "3": (-1, -1)}))
    alone = replace(SETUP, models=("law",), tasks=("law",), pruning=())
    assert note not in view.headline_html(report_of({"0": (0.2,)}, setup=alone))
    assert not view.is_diluted(with_estimates(report_of({}), everywhere))  # estimates are not measured


# ---- the selected layers ---------------------------------------------------------------------------------------------


def test_a_layer_is_told_in_numbers_and_in_words() -> None:
    shown = view.detail_html(report_of(FIGHT, spread=0.01), ["0"], Switches())
    plain = html.unescape(re.sub(r"<[^>]+>", " ", shown))
    assert "Layer 0" in plain
    assert "law  0.2000 ± 0.0058  0  0.2000 ± 0.0058  0  0.2000 ± 0.0058" in plain  # α, β, c before, c after, γ
    assert "Severe: merging makes this layer serve at least two tasks worse" in plain
    assert "Hi-Merging here: keep the layer of law, drop that of poems." in plain
    assert "γ law: 0.2000 ± 0.0058 nats, merging hurts, beyond noise" in plain
    assert "uncertain" not in plain
    assert "reduce the layer of poems" in view.detail_html(report_of(FIGHT), ["1"], Switches())
    assert "reduce the layer of law" in view.detail_html(report_of(FIGHT), ["1"], Switches(partial_target="weakened"))
    assert "nothing: the models agree here" in view.detail_html(report_of(FIGHT), ["2"], Switches())


def test_noise_in_a_layer_is_called_uncertain_and_can_be_left_alone() -> None:
    noisy = report_of(FIGHT, spread=0.9)
    assert "it rests on noise or an estimate: uncertain" in view.detail_html(noisy, ["0"], Switches())
    assert "keep the layer of law" in view.detail_html(noisy, ["0"], Switches())  # as published
    assert "every γ is within the noise" in view.detail_html(noisy, ["0"], Switches(min_gamma_se=2.0))


def test_an_estimate_is_marked_and_a_layer_without_numbers_promises_nothing() -> None:
    shown = view.detail_html(with_estimates(report_of({}), {"3": (0.4, 0.1)}), ["3"], Switches())
    assert "≈ 0.4" in shown
    assert "uncertain" in shown
    nothing = view.detail_html(report_of(FIGHT), ["3"], Switches())
    assert "Not measured yet" in nothing
    assert "Hi-Merging here" not in nothing
    assert "α and β before merging.</p>" in nothing


def test_what_is_no_block_is_shown_and_left_as_it_is() -> None:
    shown = view.detail_html(report_of({"embeddings": (0.2, 0.1)}), ["embeddings"], Switches())
    assert "edits transformer blocks only" in shown


def test_several_layers_are_listed_and_what_is_not_there_is_ignored() -> None:
    report = report_of(FIGHT)
    shown = view.detail_html(report, ["0", "1"], Switches())
    assert "2 layers selected" in shown
    assert "Layer 0, Layer 1" in shown
    assert "Select a layer" in view.detail_html(report, [], Switches())
    assert "Select a layer" in view.detail_html(report, ["99"], Switches())
    assert view.detail_html(None, ["0"], Switches()) == ""
    assert ", …" in view.detail_html(report, [layer.key for layer in LAYERS] + ["0"], Switches())


def test_names_from_outside_are_text() -> None:
    hostile = Setup(f"{HOSTILE}base", (f"{HOSTILE}/law", "poems"), (HOSTILE, "poems"),
                    tuple(replace(layer, title=f"{layer.title} {HOSTILE}") for layer in LAYERS))  # fmt: skip
    report = report_of(FIGHT, setup=hostile, unit=HOSTILE, notes=(HOSTILE,))
    shown = view.headline_html(report, HOSTILE)
    shown += "".join(view.detail_html(report, keys, Switches()) for keys in (["0"], ["1"], ["3"], ["0", "1"]))
    assert "&lt;img" in shown
    assert "<img" not in shown
