"""What the Layers tab says: costs on the buttons, Hi-Merging's steps and result, the recipe in use, edits by hand."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components import recorded
from components.session import Session
from components.settings import Settings
from components.views import examples, layer_deltas, layer_report, layer_scores
from components.views import layers as view
from llm_merge.analysis_cost import AnalysisCost
from llm_merge.contribution_report import ContributionReport, Stat, mean_stat
from llm_merge.contributions import Layer, Setup
from llm_merge.demo import demo_model, demo_path
from llm_merge.errors import MergeError, RecipeError
from llm_merge.hashing import file_hash
from llm_merge.held_out import HeldOutTable
from llm_merge.hi_merging import Edit, Switches, Trial
from llm_merge.hierarchical import HiMergeEvent, Point
from llm_merge.recipe import Recipe
from tests.tiny_models import TinyFamily

PRIVATE = Settings(home=Path("/nowhere"))
PUBLIC = Settings.for_public(Path("/nowhere"))
HOSTILE = "<img src=x onerror=1>"
COST = AnalysisCost(30, 240, estimate=20.0, exact=150.0, full_grid=360.0, coarse_grid=60.0, layer_pass=90.0)
LAYERS = tuple(Layer(str(n), f"Layer {n}", (f"layers.{n}.",)) for n in range(3))
SETUP = Setup("/m/base", ("/m/a", "/m/b"), ("law", "poems"), LAYERS, pruning=((0.4, 0.9), (1.0, 1.0)))
SWITCHES: dict[str, Any] = {"grid": "coarse", "partial": "enhanced", "severe": "before", "recompute": False,
                            "most": None, "accept": "always", "noise": 0.0}  # fmt: skip


def chosen(**more: Any) -> Session:
    rows = [{"input": f"{task} {n}", "output": "x", "task": task} for task in ("law", "poems") for n in range(2)]
    session = Session().with_models("decoder", "/m/base", ("/m/a", "/m/b")).with_rows(rows, "mine", ())
    return replace(session, **more)


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text))).strip()


def trial(step: int, kind: str, *, uncertain: bool = False, edits: int = 0, accepted: bool = True) -> Trial:
    made = tuple(Edit(0, 0.0) for _ in range(edits))
    return Trial(step, str(step), f"Layer {step}", Stat(0.3, 0.01, 8), (Stat(0.2, 0.01, 8), Stat(0.1, 0.2, 8)), kind,
                 uncertain, "keep law's layer", made, (-2.0, -3.0), (-1.5, -3.25), accepted,
                 SETUP.merged())  # fmt: skip


def point(name: str, law: float, poems: float, spread: float = 0.0) -> Point:
    """Four held-out rows a task: the mean of law and poems, ± `spread` by row; analysis rows are worth 1 more."""
    values = {
        task: tuple(mean + sign * spread for sign in (1, -1, 1, -1)) for task, mean in (("law", law), ("poems", poems))
    }
    inside = {"law": Stat(law + 1, 0.01, 8), "poems": Stat(poems + 1, 0.01, 8)}
    return Point(name, inside, {task: mean_stat(found) for task, found in values.items()}, values)


def event(**more: Any) -> HiMergeEvent:
    points = (point("base", -5.0, -6.0), point("law", -3.0, -6.5), point("poems", -5.5, -4.0),
              point("average", -4.0, -5.0), point("step 0", -3.9, -4.9),
              point("step 1", -3.5, -5.015, 0.02))  # fmt: skip
    trials = (trial(1, "severe", edits=1), trial(2, "partial", uncertain=True, edits=1, accepted=False),
              trial(3, "mutual"))  # fmt: skip
    made = HiMergeEvent("done", "", 3, 3, (), ContributionReport(SETUP), trials, points, SETUP.merged())
    return replace(made, **more)


# ---- the buttons -----------------------------------------------------------------------------------------------------


def test_the_cost_stands_on_the_buttons_before_anything_starts() -> None:
    assert view.analyse_label(COST, "CPU") == "Analyse 30 layers (≈ 3 min on this CPU; a first estimate after ≈ 20 s)"
    assert "on this" not in view.analyse_label(COST, "GPU if there is one")
    assert view.estimate_label(COST) == "Estimate only (≈ 20 s)"
    assert view.merge_label(COST, "coarse") == "Run Hi-Merging (≈ 5 min)"
    assert view.merge_label(COST, "full") == "Run Hi-Merging (≈ 10 min)"
    labels = (view.analyse_label(None, "CPU"), view.estimate_label(None), view.merge_label(None, "none"))
    assert labels == ("Analyse the layers", "Estimate only", "Run Hi-Merging")


def test_the_cost_of_real_models_is_known_and_of_none_is_not(tiny_llama: TinyFamily) -> None:
    base, *tunes = tiny_llama.references
    real = chosen().with_models("decoder", base, tunes)
    few, more = view.cost_of(real, PRIVATE, 1), view.cost_of(real, PRIVATE, 32)
    assert few is not None
    assert more is not None
    assert few.exact < more.exact
    assert view.cost_of(chosen(), PRIVATE, 8) is None  # there are no such folders
    assert view.cost_of(real.with_rows((), "", ()), PRIVATE, 8) is None


def test_how_many_layers_are_measured_again_is_said() -> None:
    assert view.selected_label(1) == "Measure the selected layer"
    assert view.selected_label(7) == "Measure the 7 selected"


def test_one_fine_tune_can_be_analysed_and_not_merged() -> None:
    alone = chosen().with_models("decoder", "/m/base", ("/m/a",))
    assert view.can_analyse(alone, PRIVATE)
    assert view.ONE_FINE_TUNE in view.merge_missing(alone, PRIVATE)
    assert view.can_analyse(chosen(), PRIVATE)
    assert view.merge_missing(chosen(), PRIVATE) == ""
    without = chosen().with_rows([{"input": "a", "output": "b"}], "mine", ())
    assert not view.can_analyse(without, PRIVATE)
    assert "missing above" in view.merge_missing(without, PRIVATE)


def test_only_metrics_that_a_search_can_use_are_offered() -> None:
    assert view.metric_choices(chosen()) == [("−loss", "-loss")]
    choices = [{"input": "q", "choices": ["a", "b"], "answer": 0, "output": "a", "task": "law"}]
    assert [name for _, name in view.metric_choices(replace(chosen(), rows=tuple(choices)))] == ["-loss", "accuracy"]
    search = replace(chosen(), model_type="encoder")
    assert [name for _, name in view.metric_choices(search)] == ["-loss", "r@1", "mrr", "ndcg@10"]
    assert view.metric_kept(search, "mrr") == "mrr"
    assert view.metric_kept(chosen(), "mrr") == view.metric_kept(chosen(), None) == "-loss"
    assert view.metric_choices(replace(chosen(), model_type="reranker")) == [("−loss", "-loss")]


# ---- the switches ----------------------------------------------------------------------------------------------------


def test_the_controls_begin_with_the_methods_own_switches_but_for_the_search() -> None:
    assert view.switches_of(**SWITCHES) == Switches(grid="coarse")
    assert view.switches_of(**{**SWITCHES, "most": 3, "noise": 2}) == Switches(
        grid="coarse", max_layers=3, min_gamma_se=2.0
    )
    assert view.switches_of(**{**SWITCHES, "most": 0}).max_layers is None  # an empty number arrives as 0


@pytest.mark.parametrize(
    "change", [{"most": -1}, {"most": 2.5}, {"grid": "tiny"}, {"partial": "both"}, {"noise": -1}, {"accept": ""}]
)
def test_switches_that_cannot_be_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        view.switches_of(**{**SWITCHES, **change})


def test_a_public_page_refuses_what_keeps_others_waiting() -> None:
    for change in ({"grid": "full"}, {"recompute": True}):
        with pytest.raises(MergeError, match="This public page runs the coarse search"):
            view.checked_switches(PUBLIC, **{**SWITCHES, **change})
        assert view.checked_switches(PRIVATE, **{**SWITCHES, **change})
    assert view.checked_switches(PUBLIC, **SWITCHES) == Switches(grid="coarse")


# ---- Hi-Merging's steps and result -----------------------------------------------------------------------------------


def test_every_step_tells_layer_conflict_action_and_what_came_of_it() -> None:
    shown = view.steps_html(event())
    lines = [plain(line) for line in re.findall(r"<tr.*?</tr>", shown)]
    assert lines[0] == "step layer Γ γ law γ poems type what was done law poems"
    assert lines[1] == (
        "1 Layer 1 0.300 ± 0.010 0.200 ± 0.010 0.10 ± 0.20 severe keep law's layer −2.000 → −1.500 −3.000 → −3.250"
    )
    assert "partial (uncertain)" in lines[2]
    assert lines[3].endswith("mutual keep law's layer −1.500 −3.250")  # nothing was edited: one number
    assert shown.count('class="edited"') == 1  # a step that was undone is no edit
    assert "analysis rows, nats, higher is better" in shown
    assert view.steps_html(None) == view.steps_html(event(trials=())) == view.steps_html(event(report=None)) == ""


def test_the_result_stands_beside_base_fine_tunes_and_average_on_rows_that_decide_nothing() -> None:
    shown = view.result_html(event())
    names = [plain(cell) for cell in re.findall(r'<th scope="row">(.*?)</th>', shown)]
    assert names == ["Base", "a", "b", "Plain average", "Pruned and scaled, no layer edited", "Hi-Merging, step 1"]
    text = plain(shown)
    assert "Hi-Merging, step 1 −3.500 ± 0.012 −5.015 ± 0.012" in text  # held out; the analysis rows' mean is 1 higher
    assert "4 rows of law, 4 rows of poems, held out: they decide nothing" in text
    assert "law: keeps 40 % of its changes, × 0.9; poems: keeps 100 % of its changes, × 1" in text
    assert view.result_html(None) == view.result_html(event(points=())) == ""


def test_rows_that_decide_and_are_reported_are_never_called_held_out() -> None:
    inside = tuple(replace(entry, held_out={}, values={}) for entry in event().points)
    for shown in (view.result_html(event(points=inside)), view.result_html(event(), same_rows=True)):
        assert "the same that decide, so this looks better than it is" in shown
        assert "decide nothing" not in shown
    assert "8 rows of law" in view.result_html(event(points=inside))


def test_scores_on_rows_that_decide_are_not_called_held_out_either() -> None:
    names = ("Base", layer_scores.AVERAGE, layer_scores.IN_USE)
    table = HeldOutTable("-loss", "nats", names, ("law",), {(name, "law"): (-1.0, -2.0) for name in names})
    assert "held-out rows: 2 of law" in layer_scores.table_html(table)
    assert "rows that also decide, so this looks better than it is: 2 of law" in layer_scores.table_html(
        table, same_rows=True
    )


def test_the_verdict_says_what_is_beyond_noise_and_what_is_not() -> None:
    def ending_in(*last: Any) -> str:
        return view.verdict(event(points=(*event().points[:-1], point("step 1", *last))))

    assert ending_in(-3.5, -5.0, 0.01) == (
        "1 of 3 layers edited. Against the plain average, nats: "
        "law +0.5000 ± 0.0058 (better), poems 0.0000 ± 0.0058 (within the noise)."
    )
    assert "law −0.5000 ± 0.0058 (worse)" in ending_in(-4.5, -5.0, 0.01)
    assert "law +0.50 ± 0.58 (within the noise)" in ending_in(-3.5, -5.0, 1.0)
    assert view.verdict(event(points=event().points[:4])) == ""


def test_differences_are_paired_row_by_row() -> None:
    spread = (*event().points[:3], point("average", -4.0, -5.0, 1.0), point("step 1", -3.9, -5.1, 1.0))
    assert "law +0.1 (better), poems −0.1 (worse)" in re.sub(
        r"(\.\d)0* ± [\d.]+", r"\1", view.verdict(event(points=spread))
    )


def test_of_a_single_row_nothing_is_called_better() -> None:
    points = [replace(entry, values={"law": entry.values["law"][:1]}) for entry in event().points]
    assert "law +0.52 (within the noise)" in view.verdict(event(points=tuple(points)))


def test_a_task_keeps_its_name_in_the_verdict() -> None:
    points = [Point(entry.name, {}, {}, {"low-land": entry.values["poems"]}) for entry in event().points]
    assert "low-land −0.0" in view.verdict(event(points=tuple(points)))


def test_a_stop_promises_a_recipe_only_where_there_is_one() -> None:
    assert "can be used" in view.stopped_words(event())
    assert view.stopped_words(None) == view.stopped_words(event(recipe=None)) == view.STOPPED_EARLY


def test_names_from_outside_are_text() -> None:
    setup = replace(SETUP, tasks=(HOSTILE, "poems"), models=(f"/m/{HOSTILE}", "/m/b"))
    points = tuple(
        replace(entry, held_out={HOSTILE: entry.held_out["law"]}, values={HOSTILE: entry.values["law"]})
        for entry in event().points
    )
    odd = event(report=ContributionReport(setup, unit=HOSTILE), points=points,
                trials=(replace(trial(1, HOSTILE), title=HOSTILE, action=HOSTILE),))  # fmt: skip
    shown = view.steps_html(odd) + view.result_html(odd) + view.result_html(odd, same_rows=True)
    shown += view.recipe_html(chosen().with_layered(SETUP.merged(), HOSTILE))
    assert "&lt;img" in shown
    assert "<img" not in shown


# ---- the recipe in use -----------------------------------------------------------------------------------------------


def test_what_the_recipe_says_of_layers() -> None:
    session = chosen()
    assert "the same shares in every layer" in view.recipe_html(session)
    edited = view.edited(session, ContributionReport(SETUP), ("1",), "/m/a", "set weight", 0.0)
    assert plain(view.recipe_html(edited)) == (
        "In use: Layers by hand , 1 layer with values of its own. Try and Save use it."
    )
    same = view.edited(session, ContributionReport(SETUP), ("1",), "", "set weight", 0.5)
    assert "every layer has the same values so far" in view.recipe_html(same)
    more = view.edited(edited, ContributionReport(SETUP), ("0", "2"), "", "set density", 0.5)
    assert "3 layers with values of their own" in view.recipe_html(more)


def test_layers_are_edited_by_hand_in_the_merge_as_it_stands() -> None:
    session = chosen().with_hand_shares((0.2, 0.8))
    report = ContributionReport(SETUP)
    edited = view.edited(session, report, ("1",), "/m/b", "multiply weight", 0.5)
    assert edited.recipe is not None
    assert edited.origin == "layers"
    values = [[edited.recipe.value(model, "weight", f"layers.{n}.x") for n in range(3)] for model in (0, 1)]
    assert values == [pytest.approx([0.2, 0.2, 0.2]), pytest.approx([0.8, 0.4, 0.8])]
    again = view.edited(edited, report, ("1",), "", "multiply weight", 0.5)
    assert again.recipe is not None
    assert again.recipe.value(1, "weight", "layers.1.x") == pytest.approx(0.2)
    assert again.layered_from == "Layers by hand"
    assert again.with_layered(None).recipe == session.recipe  # back to the shares


def test_where_a_recipe_comes_from_is_not_forgotten() -> None:
    merged = chosen().with_layered(SETUP.merged(), "Hi-Merging")
    once = view.edited(merged, ContributionReport(SETUP), ("1",), "", "set weight", 0.1)
    assert once.layered_from == "Hi-Merging, edited by hand"
    assert view.edited(once, ContributionReport(SETUP), ("1",), "", "set weight", 0.2).layered_from == once.layered_from


@pytest.mark.parametrize(
    ("session", "report", "keys", "model", "value", "words"),
    [
        (chosen(), ContributionReport(SETUP), (), "", 0.5, "No layer is selected"),
        (chosen(), None, ("1",), "", 0.5, "No layer is selected"),
        (chosen(), ContributionReport(SETUP), ("99",), "", 0.5, "There is no layer “99”"),
        (chosen(), ContributionReport(SETUP), ("1",), "/etc/passwd", 0.5, "This model is not in the recipe"),
        (chosen(), ContributionReport(SETUP), ("1",), "", None, "give a number from -2 to 2"),
        (chosen(), ContributionReport(SETUP), ("1",), "", 9.0, "give a number from -2 to 2"),
        (Session(), ContributionReport(SETUP), ("1",), "", 0.5, "Choose a base and fine-tunes"),
        (Session(fine_tunes=("/m/a", "/m/b")), ContributionReport(SETUP), ("1",), "", 0.5, "Choose a base"),
    ],
)
def test_edits_that_cannot_be_are_told_in_one_sentence(
    session: Session, report: ContributionReport | None, keys: tuple[str, ...], model: str, value: Any, words: str
) -> None:
    with pytest.raises(MergeError, match=re.escape(words)):
        view.edited(session, report, keys, model, "set weight", value)


def test_the_base_in_the_mix_is_part_of_the_merge_and_no_model_to_edit() -> None:
    session = chosen().with_base_included(True)
    edited = view.edited(session, ContributionReport(SETUP), ("1",), "", "set weight", 0.0)
    assert edited.layered is not None
    assert edited.layered.references == ("/m/a", "/m/b")
    assert [value for _, value in view.model_choices(session)] == ["", "/m/a", "/m/b"]


# ---- what was recorded -----------------------------------------------------------------------------------------------


def demo() -> Session:
    session = Session(base=demo_path("smollm2"), fine_tunes=(demo_path("king-james"), demo_path("dictionary")))
    return examples.use_demo(session, "both")


def write_recording(folder: Path, **change: Any) -> None:
    setup = replace(SETUP, base="smollm2", models=("king-james", "dictionary"), tasks=("verse", "dictionary"))
    report = ContributionReport(setup, measured_on="2026-11-21")
    hashes = {key: file_hash(Path(demo_model(key).reference) / "adapter_model.safetensors")
              for key in ("king-james", "dictionary")}  # fmt: skip
    data = {"adapter_hashes": hashes, "report": report.to_dict()} | change
    (folder / "contributions-decoder.json").write_text(json.dumps(data))


def test_a_recording_is_read_for_the_models_that_it_was_made_with(tmp_path: Path) -> None:
    write_recording(tmp_path)
    report = recorded.recorded_contributions("decoder", "average", tmp_path)
    assert report is not None
    assert report.measured_on == "2026-11-21"
    assert view.report_matches(report, demo())
    assert not view.report_matches(report, chosen())
    assert recorded.recorded_contributions("decoder", "sum", tmp_path) is None
    assert recorded.recorded_contributions("encoder", "average", tmp_path) is None


@pytest.mark.parametrize(
    "change",
    [
        {"adapter_hashes": {"king-james": "0" * 64}},
        {"adapter_hashes": {}},
        {"report": {"version": 99}},
        {"report": {}},
    ],
)
def test_a_recording_of_other_adapters_or_of_another_time_is_not_shown(tmp_path: Path, change: dict[str, Any]) -> None:
    write_recording(tmp_path, **change)
    assert recorded.recorded_contributions("decoder", "average", tmp_path) is None


def test_a_recording_is_shown_with_its_date_for_the_demo_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_recording(tmp_path)
    made = recorded.recorded_contributions("decoder", "average", tmp_path)
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(view, "recorded_contributions", lambda *key: (asked.append(key), made)[1])
    assert view.recorded_report(demo(), "average") == (made, "Recorded on 2026-11-21")
    assert view.recorded_report(chosen(), "average") == (None, "")
    fewer = demo().with_models("decoder", demo_path("smollm2"), (demo_path("king-james"),))
    assert view.recorded_report(fewer, "average") == (None, "")
    view.recorded_report(demo(), "../../etc")
    assert asked[-1] == ("decoder", "average")  # what a browser sends names no file


# ---- deltas ----------------------------------------------------------------------------------------------------------


def test_every_two_fine_tunes_can_be_compared() -> None:
    three = chosen().with_models("decoder", "/m/base", ("/m/a", "/m/b", "/m/c"))
    assert layer_deltas.pairs(three) == [("a and b", "0,1"), ("a and c", "0,2"), ("b and c", "1,2")]
    assert layer_deltas.pair_of("1,2") == (1, 2)
    assert layer_deltas.pair_of(None) == layer_deltas.pair_of("x,y") == (0, 1)


def test_a_comparison_needs_two_and_everything_needs_a_base() -> None:
    alone = chosen().with_models("decoder", "/m/base", ("/m/a",))
    layer_deltas.check_deltas(alone, layer_report.DELTAS)
    for show in (layer_report.SIGNS, layer_report.COSINE):
        with pytest.raises(MergeError, match="Two fine-tunes are compared"):
            layer_deltas.check_deltas(alone, show)
    with pytest.raises(MergeError, match="Choose a base and a fine-tune"):
        layer_deltas.check_deltas(Session(), layer_report.DELTAS)


def test_one_matrix_close_up_is_drawn_for_each_fine_tune(tiny_llama: TinyFamily) -> None:
    base, *tunes = tiny_llama.references
    session = chosen().with_models("decoder", base, tunes)
    names = layer_deltas.tensor_choices(session)
    tensor = layer_deltas.first_tensor(names)
    assert tensor.endswith("q_proj.weight")
    figure = json.loads(layer_deltas.close_up(session, tensor).to_json())
    assert [title["text"] for title in figure["layout"]["annotations"]] == ["tune-1", "tune-2"]
    assert len(figure["data"]) == 2
    with pytest.raises(MergeError):
        layer_deltas.close_up(session, "no.such.tensor")


def test_what_was_read_of_the_weights_is_drawn_as_the_menu_says(tiny_llama: TinyFamily) -> None:
    from llm_merge.delta_stats import delta_statistics

    base, *tunes = tiny_llama.references
    session = chosen().with_models("decoder", base, tunes)
    events = delta_statistics(base, tunes)
    while True:
        try:
            next(events)
        except StopIteration as end:
            stats = end.value
            break
    shown = {show: layer_deltas.chart(stats, session, show, "relative_norm", "0,1").to_json()
             for show in (layer_report.DELTAS, layer_report.SIGNS, layer_report.COSINE)}  # fmt: skip
    assert len(set(shown.values())) == 3
    unknown = layer_deltas.chart(stats, session, layer_report.DELTAS, "../secret", None).to_json()
    assert unknown == shown[layer_report.DELTAS]


def test_every_entry_of_the_show_menu_has_a_title() -> None:
    keys = [key for _, key in layer_report.SHOWS]
    assert len(keys) == len(set(keys)) == 8
    assert keys[0] == layer_report.GAMMA


def test_a_recipe_of_layers_keeps_its_type(tiny_llama: TinyFamily) -> None:
    session = chosen(dtype="float16").with_layered(SETUP.merged(), "Hi-Merging")
    assert isinstance(session.recipe, Recipe)
    assert session.recipe.dtype == "float16"


def test_what_was_recorded_of_the_demo_is_said_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {
        "verse": {"to_average": 0.5, "to_average_se": 0.01},
        "general": {"to_average": 0.01, "to_average_se": 0.01},
    }
    data = {
        "recorded_on": "2026-11-21",
        "models": {"king-james": "", "dictionary": ""},
        "held_out_rows": {"verse": 200, "general": 150},
        "runs": [{"name": "hi-merging", "scores": scores}],
    }
    monkeypatch.setattr(view, "recorded_hi_merging", lambda: data)
    demo = start_tab_session()
    assert "verse 0.50 ± 0.01 worse, 200 rows; general 0.01 ± 0.01 within noise, 150 rows" in view.recorded_result(demo)
    assert view.recorded_result(replace(demo, fine_tunes=demo.fine_tunes[:1])) == ""
    assert view.recorded_result(Session()) == ""


def start_tab_session() -> Session:
    """The session that a new visitor opens on, without its losses."""
    from llm_merge.demo import demo_examples, demo_path

    tunes = (demo_path("king-james"), demo_path("dictionary"))
    rows = [{**row, "task": task} for task in ("verse", "dictionary") for row in demo_examples("decoder", task, "work")]
    return (
        Session().with_models("decoder", demo_path("smollm2"), tunes).with_rows(rows, "demo", ("verse", "dictionary"))
    )
