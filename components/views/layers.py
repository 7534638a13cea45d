"""The Layers tab's decisions: which report is shown, what the buttons cost, Hi-Merging's steps and result in words.

Pure: a session, a report or an event in, text and HTML out. Opens the base's headers at most, for the cost.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from components.demo_setup import unprepared
from components.feedback import note_html
from components.naming import short_name
from components.recorded import recorded_contributions, recorded_hi_merging
from components.session import Session, row_shape
from components.settings import Settings
from components.views.examples import DEMO_TASKS
from components.views.layer_report import stat_text, unit_of
from components.views.layer_tasks import tasks_for
from components.views.weights import duration
from llm_merge.analysis_cost import AnalysisCost, analysis_cost
from llm_merge.checkpoint import open_checkpoint
from llm_merge.contribution_report import ContributionReport
from llm_merge.demo import demo_path
from llm_merge.errors import MergeError
from llm_merge.hi_merging import Switches, Trial
from llm_merge.hierarchical import HiMergeEvent, Point
from llm_merge.layer_edits import as_task_vectors, edit_layers, special_layers

STOPPED = "Stopped. What was measured is kept, and the next run goes on from there."
STOPPED_MERGE = "Stopped. The recipe reached so far can be used, and what was measured is kept."
STOPPED_EARLY = "Stopped before there was a recipe. What was measured is kept, and the next run goes on from there."
ONE_FINE_TUNE = "Hi-Merging merges two fine-tunes or more: add another one in Models."
GRIDS = [("Every pair of ten steps", "full"), ("Coarse, then around the best", "coarse"), ("None: p = s = 1", "none")]
COMBINES = [("Average", "average"), ("Sum", "sum"), ("Sum after TIES’ sign vote", "ties_sum")]
COMBINE_VALUES = tuple(value for _, value in COMBINES)
TARGETS = [("The one that gains", "enhanced"), ("The one that loses", "weakened")]
SEVERE_BY = [("Before merging", "before"), ("After merging", "after")]
KEPT_EDITS = [("Stays, as published", "always"), ("Is undone", "if_better")]


def cost_of(session: Session, settings: Settings, rows: int) -> AnalysisCost | None:
    """What an analysis would cost here; None while the models or rows cannot be read."""
    if unprepared(session.models):
        return None
    try:
        base = open_checkpoint(session.base, local_only=True)
        return analysis_cost(
            base,
            tasks_for(session, settings, rows),
            held_out=settings.demo_rows,
            gpu=settings.device.startswith("cuda"),
        )
    except (MergeError, OSError):
        return None


def analyse_label(cost: AnalysisCost | None, device: str) -> str:
    """ "Analyse 30 layers (≈ 3 min on this CPU, a first estimate after ≈ 20 s)"."""
    if cost is None:
        return "Analyse the layers"
    where = f" on this {device}" if device in ("CPU", "GPU") else ""
    return (
        f"Analyse {cost.layers} layers (≈ {duration(cost.estimate + cost.exact)}{where}; "
        f"a first estimate after ≈ {duration(cost.estimate)})"
    )


def estimate_label(cost: AnalysisCost | None) -> str:
    return "Estimate only" if cost is None else f"Estimate only (≈ {duration(cost.estimate)})"


def metric_choices(session: Session) -> list[tuple[str, str]]:
    """(label, name) of the metrics by which layers can be measured here; accuracy needs rows with choices."""
    from llm_merge.metrics import metrics_for

    choices = bool(session.rows) and all("choices" in row for row in session.rows)
    kinds = ("loss", "retrieval", *(("choice",) if choices else ()))
    return [(metric.title, metric.name) for metric in metrics_for(session.model_type) if metric.kind in kinds] or [
        ("−loss", "-loss")
    ]


def metric_kept(session: Session, chosen: str | None) -> str:
    """The metric that was chosen if it is still offered, else the first."""
    offered = [name for _, name in metric_choices(session)]
    return chosen if chosen in offered else offered[0]


def merge_label(cost: AnalysisCost | None, grid: str) -> str:
    return "Run Hi-Merging" if cost is None else f"Run Hi-Merging (≈ {duration(cost.hi_merge(grid))})"


def selected_label(count: int) -> str:
    return f"Measure the {count} selected" if count > 1 else "Measure the selected layer"


def can_analyse(session: Session, settings: Settings) -> bool:
    try:
        return bool(tasks_for(session, settings, 1))
    except MergeError:
        return False


def switches_of(
    grid: str, partial: str, severe: str, recompute: bool, most: float | None, accept: str, noise: float
) -> Switches:
    """The switches that a visitor set; `most` 0 or nothing is no limit, since a browser shows an empty number as 0.

    Raises RecipeError, in one sentence, for a value that cannot be.
    """
    count = None if not most else int(most) if float(most).is_integer() else -1
    return Switches(partial, severe, bool(recompute), count, accept, float(noise or 0.0), grid)


# ---- Hi-Merging ------------------------------------------------------------------------------------------------------


def stopped_words(event: HiMergeEvent | None) -> str:
    return STOPPED_EARLY if event is None or event.recipe is None else STOPPED_MERGE


def steps_html(event: HiMergeEvent | None) -> str:
    """A live table of the steps: layer, Γ, γ per task, type, action, metric per task before and after."""
    if event is None or event.report is None or not event.trials:
        return ""
    tasks = event.report.setup.tasks
    heads = ["step", "layer", "Γ", *(f"γ {task}" for task in tasks), "type", "what was done", *tasks]
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in heads)
    lines = "".join(_step_line(trial) for trial in event.trials)
    unit = html.escape(unit_of(event.report))
    return (
        '<div class="layer-steps" tabindex="0" role="region" aria-label="Steps of Hi-Merging"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
        f'<p class="facts">Layers by falling Γ. The last columns: the mean on analysis rows, {unit}, higher is better.'
        "</p>"
    )


def _step_line(trial: Trial) -> str:
    kind = f"{trial.kind}{' (uncertain)' if trial.uncertain else ''}"
    moved = [
        (f"{after:.3f}" if not trial.edits else f"{before:.3f} → {after:.3f}").replace("-", "−")
        for before, after in zip(trial.before, trial.after, strict=True)
    ]
    gammas = [stat_text(gamma) for gamma in trial.gammas]
    cells = [trial.title, stat_text(trial.total), *gammas, kind, trial.action, *moved]
    marked = ' class="edited"' if trial.changed else ""
    rest = "".join(f"<td>{html.escape(text)}</td>" for text in cells)
    return f'<tr{marked}><th scope="row">{trial.step}</th>{rest}</tr>'


def result_html(event: HiMergeEvent | None, *, same_rows: bool = False) -> str:
    """What the merge is worth beside base, specialists and plain average, on rows that never decided.

    same_rows   there were too few rows to hold some out: said, since the numbers look better than they are
    """
    if event is None or not event.points or event.report is None:
        return ""
    names = {"base": "Base", "average": "Plain average", "step 0": "Pruned and scaled, no layer edited"}
    models = dict(zip(event.report.setup.tasks, event.report.setup.models, strict=True))
    shown: list[tuple[str, Point]] = [
        (names.get(point.name) or short_name(models.get(point.name, point.name)), point)
        for point in event.points
        if not point.name.startswith("step ") or point.name == "step 0"
    ]
    if event.points[-1].name.startswith("step ") and event.points[-1].name != "step 0":
        shown.append((f"Hi-Merging, {event.points[-1].name}", event.points[-1]))
    sets = list(event.points[0].held_out)
    held = bool(sets)
    sets = sets or list(event.points[0].analysis)
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in ("merge", *sets))
    lines = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>'
        + "".join(f"<td>{html.escape(stat_text((point.held_out if held else point.analysis)[s]))}</td>" for s in sets)
        + "</tr>"
        for name, point in shown
    )
    counts = {name: (event.points[0].held_out if held else event.points[0].analysis)[name].n for name in sets}
    which = ", ".join(f"{count} rows of {name}" for name, count in counts.items())
    if held and not same_rows:
        which += ", held out: they decide nothing"
    else:
        which += ", the same that decide, so this looks better than it is"
    return (
        '<div class="layer-steps" tabindex="0" role="region" aria-label="Results"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
        f'<p class="facts">Mean in {html.escape(unit_of(event.report))}, higher is better, ± one standard error on '
        f"{html.escape(which)}. {html.escape('; '.join(pruning_words(event)))}.</p>"
        f"<p><b>{html.escape(verdict(event))}</b></p>"
    )


def verdict(event: HiMergeEvent) -> str:
    """One sentence: what the merge won and lost against the plain average, on held-out rows if there are some."""
    by_name = {point.name: point for point in event.points}
    average, last = by_name.get("average"), event.points[-1]
    if average is None or not last.name.startswith("step "):
        return ""
    words = []
    for name in last.values:
        stat = last.against(average, name)
        known = not stat.is_noise and not math.isnan(stat.error)  # of a single row nobody knows
        way = ("better" if stat.value > 0 else "worse") if known else "within the noise"
        words.append(f"{name} {'+' if stat.value > 0 else ''}{stat_text(stat)} ({way})")
    edited, unit = sum(trial.changed for trial in event.trials), unit_of(event.report) if event.report else ""
    return f"{edited} of {len(event.trials)} layers edited. Against the plain average, {unit}: {', '.join(words)}."


# ---- the recipe ------------------------------------------------------------------------------------------------------


def recipe_html(session: Session) -> str:
    """What the recipe on the bar says of layers."""
    if session.layered is None:
        return '<p class="facts">The merge in use has the same shares in every layer.</p>'
    count = special_layers(session.layered)
    if not count:
        return (
            f'<p class="facts">In use: <b>{html.escape(session.layered_from)}</b>; every layer has the same values so '
            "far. Try and Save use it.</p>"
        )
    layers = f"{count} layer{'' if count == 1 else 's'} with values of {'its' if count == 1 else 'their'} own"
    return f'<p class="facts">In use: <b>{html.escape(session.layered_from)}</b>, {layers}. Try and Save use it.</p>'


def model_choices(session: Session) -> list[tuple[str, str]]:
    """(label, value) of the fine-tunes that can be edited by hand; "" is all of them."""
    return [("All fine-tunes", ""), *((short_name(model), model) for model in session.fine_tunes)]


def task_choices(session: Session) -> list[str]:
    return list(dict.fromkeys(str(row.get("task", "")) for row in session.rows if row.get("task")))


def report_matches(report: ContributionReport, session: Session) -> bool:
    """Whether a recorded report is of the session's models."""
    return report.setup.base == session.base and report.setup.models == tuple(session.fine_tunes)


def pruning_words(event: HiMergeEvent) -> Sequence[str]:
    """ "verse: keeps 40 % of its changes, × 0.9", one per specialist."""
    if event.report is None:
        return ()
    pairs = zip(event.report.setup.tasks, event.report.setup.pruning, strict=True)
    return [f"{task}: keeps {100 * p:.0f} % of its changes, × {s:g}" for task, (p, s) in pairs]


def recorded_report(session: Session, combine: str) -> tuple[ContributionReport | None, str]:
    """The demo's recorded analysis with words for where it comes from, if it is of the session's models."""
    if session.demo_tasks != DEMO_TASKS:
        return None, ""
    kind = "decoder" if row_shape(session.model_type) == "answer" else "encoder"
    report = recorded_contributions(kind, combine if combine in COMBINE_VALUES else "average")
    if report is None or not report_matches(report, session):
        return None, ""
    return report, f"Recorded on {report.measured_on}"


def merge_missing(session: Session, settings: Settings) -> str:
    """What Hi-Merging waits for, "" for nothing; what the analysis waits for stands at the top of the tab."""
    if not can_analyse(session, settings):
        return note_html("Hi-Merging waits for what is missing above.")
    return "" if len(session.fine_tunes) > 1 else note_html(ONE_FINE_TUNE)


def checked_switches(
    settings: Settings,
    grid: str,
    partial: str,
    severe: str,
    recompute: bool,
    most: float | None,
    accept: str,
    noise: float,
) -> Switches:
    """`switches_of`, with what a public page does not run refused: one visitor's search keeps the others waiting."""
    switches = switches_of(grid, partial, severe, recompute, most, accept, noise)
    if settings.public and (switches.grid == "full" or switches.recompute):
        raise MergeError(
            "This public page runs the coarse search, measured once: run LLM Merge on your own machine for the rest.",
            field="grid",
        )
    return switches


def edited(
    session: Session, report: ContributionReport | None, keys: Sequence[str], model: str, what: str, value: float
) -> Session:
    """The session with the selected layers edited by hand. Raises MergeError in one sentence."""
    if session.recipe is None or not session.base:
        raise MergeError("Choose a base and fine-tunes in Models first.", field="models")
    if report is None or not keys:
        raise MergeError("No layer is selected: analyse, then click or brush layers in the map.", field="layers")
    filters = [name for key in keys for name in report.setup.layer(key).filters]
    recipe = as_task_vectors(session.recipe, session.base)
    models = [model] if model else [reference for reference in recipe.references if reference != session.base]
    origin = session.layered_from if session.layered is not None else ""
    return session.with_layered(edit_layers(recipe, filters, models, what, value), hand_words(origin))


def hand_words(origin: str) -> str:
    """ "Layers by hand", or "Hi-Merging, edited by hand"."""
    if not origin or "by hand" in origin:
        return origin or "Layers by hand"
    return f"{origin}, edited by hand"


def recorded_result(session: Session) -> str:
    """What was recorded of Hi-Merging on the demo, before anything is run here; "" for other models."""
    data = recorded_hi_merging() if session.demo_tasks == DEMO_TASKS and session.model_type == "decoder" else None
    runs = {run["name"]: run for run in data["runs"]} if data is not None else {}
    keys = [demo_path(key) for key in data["models"]] if data is not None else []
    if data is None or "hi-merging" not in runs or sorted(keys) != sorted(session.fine_tunes):
        return ""
    scores = runs["hi-merging"]["scores"]
    words = []
    for name, rows in data["held_out_rows"].items():
        difference, error = scores[name]["to_average"], scores[name]["to_average_se"]
        way = "within noise" if abs(difference) <= 2 * error else "worse" if difference > 0 else "better"
        words.append(f"{name} {abs(difference):.2f} ± {error:.2f} {way}, {rows} rows")
    return note_html(
        f"Recorded on {data['recorded_on']} with the coarse search, an average and every switch as published: against "
        f"the plain average, in nats, {'; '.join(words)}. A run compares again: look before you use its recipe."
    )
