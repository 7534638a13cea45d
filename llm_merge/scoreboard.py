"""What a merge won and lost: every model and the merge on the same rows, compared row by row with the base.

A standard error here is that of the paired differences, so that easy and hard rows do not count as noise. Within two of
them nothing is claimed: no percentage, no winner. Numbers and names only; who measured them, and on what, is not known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BEYOND_NOISE = 2.0
"""Standard errors from which on a difference counts."""
BASE, SPECIALIST, MERGED = "base", "specialist", "merged"


@dataclass(frozen=True)
class ScoredModel:
    """A model's values, one tuple per set of rows, each row's value at the same place for every model.

    role    "base" (one, at most), "specialist" or "merged"; specialists are the merge's parents
    task    the set of rows that a specialist was made for; "" finds the one where it gains most
    """

    name: str
    role: str
    values: tuple[tuple[float, ...], ...]
    task: str = ""


@dataclass(frozen=True)
class Cell:
    """One model on one set of rows. `gain` is against the base, positive when better; NaN where there is no base."""

    n: int
    mean: float
    error: float
    gain: float = math.nan
    gain_error: float = math.nan

    @property
    def is_noise(self) -> bool:
        """Whether the gain is within two standard errors, or its error is not known."""
        return not abs(self.gain) > BEYOND_NOISE * self.gain_error


@dataclass(frozen=True)
class Line:
    """One model's cells, in the order of the sets. `worst`: is it worse than each parent there, beyond noise?"""

    name: str
    role: str
    cells: tuple[Cell, ...]
    task: str = ""
    worst: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Scoreboard:
    """The whole comparison.

    metric          "loss" (nats, lower is better) or one where higher is better: "R@1", "MRR", "nDCG@10"
    same_rows       the weights were computed from these very rows: the merge looks better than it is
    seen            sets that the weights were computed from, beside held-out ones: shown, and claimed nothing of
    """

    sets: tuple[str, ...]
    lines: tuple[Line, ...]
    metric: str = "loss"
    same_rows: bool = False
    seen: tuple[str, ...] = ()

    @property
    def merged(self) -> Line | None:
        return next((line for line in self.lines if line.role == MERGED), None)


def score(
    models: Sequence[ScoredModel],
    sets: Sequence[str],
    *,
    metric: str = "loss",
    same_rows: bool = False,
    seen: Sequence[str] = (),
) -> Scoreboard:
    """Compare models on the same rows. `sets` names the sets of rows, in the order of each model's `values`."""
    base = next((model for model in models if model.role == BASE), None)
    parents = [model for model in models if model.role == SPECIALIST]
    better = -1.0 if metric == "loss" else 1.0
    lines = []
    for model in models:
        cells, worst = [], []
        for place, values in enumerate(model.values):
            mean, error = mean_and_error(values)
            gain, gain_error = math.nan, math.nan
            if base is not None:
                gain, gain_error = _paired(values, base.values[place], better)
            cells.append(Cell(len(values), mean, error, gain, gain_error))
            losses = [_paired(values, parent.values[place], -better) for parent in parents]
            worst.append(model.role == MERGED and bool(losses) and all(d > BEYOND_NOISE * e for d, e in losses))
        lines.append(Line(model.name, model.role, tuple(cells), model.task, tuple(worst)))
    return Scoreboard(tuple(sets), tuple(lines), metric, same_rows, tuple(seen))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of one value is not known (infinite: it proves nothing)."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.inf
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def summary(board: Scoreboard) -> str:
    """One sentence: what the merge keeps of each specialist's gain over the base, and what it costs elsewhere."""
    merged = board.merged
    specialists = [(line, _own_set(board, line)) for line in board.lines if line.role == SPECIALIST]
    if merged is None or not board.sets or math.isnan(merged.cells[0].gain):
        return ""
    kept, asides, owned = [], [], set()
    for line, place in specialists:
        own, mine = line.cells[place], merged.cells[place]
        owned.add(place)
        if own.is_noise or own.gain <= 0:
            how = "within noise of the base" if own.is_noise else "worse than the base"
            asides.append(f"{line.name} itself is {how} on {board.sets[place]}")
        elif mine.is_noise or mine.gain <= 0:
            kept.append(f"nothing of {line.name}'s gain" + (" beyond noise" if mine.is_noise else ""))
        else:
            kept.append(f"{100 * mine.gain / own.gain:.0f} % of {line.name}'s" + ("" if kept else " gain"))
    others = [
        _change(board, place, merged)
        for place, name in enumerate(board.sets)
        if place not in owned and name not in board.seen
    ]
    parts = [f"keeps {', '.join(kept)}"] if kept else []
    sentence = "; ".join([*parts, *asides, *others])
    return f"The merge {sentence}." if kept else _capital(f"{sentence}.") if sentence else ""


def worse_than_parents(board: Scoreboard) -> str:
    """A warning naming the sets on which the merge is worse than each of its parents, or ""."""
    merged = board.merged
    bad = zip(board.sets, merged.worst, strict=True) if merged is not None else ()
    sets = [name for name, worse in bad if worse and name not in board.seen]
    if not sets:
        return ""
    return (
        f"On {' and '.join(sets)} the merge is worse than each of its parents: "
        "leave a model out, or give the base a share."
    )


def from_recorded(data: Mapping[str, Any], mix: Mapping[str, float], *, metric: str = "loss") -> Scoreboard | None:
    """The board of a recorded scoreboard file: base, the mix's specialists, and the recorded mix of the same models
    that lies nearest to `mix` (demo key → share). None when no such mix was recorded, or the file is another one."""
    from llm_merge.demo import demo_model

    try:
        scores = [entry for entry in data["scores"] if entry["metric"] == metric]
        sets = tuple(dict.fromkeys(entry["task"] for entry in scores))
        near = nearest_mix(data, mix)
        keys = [key for key, share in mix.items() if share > 0]
        base = next((demo_model(key).base or key for key in keys), "")
        specialists = [key for key in keys if key != base]
        if near is None or not specialists:
            return None
        lines = [_recorded_line(scores, {base: 1.0}, sets, demo_model(base).title, BASE, "", metric)]
        for key in specialists:
            model = demo_model(key)
            lines.append(_recorded_line(scores, {key: 1.0}, sets, model.title, SPECIALIST, model.task, metric))
        lines.append(_recorded_line(scores, near, sets, "Merged", MERGED, "", metric))
        return Scoreboard(sets, tuple(lines), metric)
    except (KeyError, TypeError, StopIteration):
        return None


def nearest_mix(data: Mapping[str, Any], mix: Mapping[str, float]) -> dict[str, float] | None:
    """The recorded mix of the same models (those with a share) nearest to `mix`."""
    models = {key for key, share in mix.items() if share > 0}
    mixes = [dict(entry["weights"]) for entry in data["scores"]]
    fitting = [known for known in mixes if set(known) == models and len(known) > 1]
    return min(fitting, key=lambda known: sum(abs(known[key] - mix[key]) for key in models), default=None)


def recorded_sentence(data: Mapping[str, Any], mix: Mapping[str, float]) -> str:
    """`summary` of what was recorded for the mix nearest to `mix`; says which mix that was unless it is this one."""
    board = from_recorded(data, mix)
    text = summary(board) if board is not None else ""
    near = nearest_mix(data, mix) if text else None
    if near is None or all(abs(near[key] - mix[key]) < 0.015 for key in near):
        return text
    shares = " / ".join(f"{near[key]:.2f}" for key in mix if key in near)
    return f"At {shares} the{text[3:]}" if text.startswith("The merge") else f"At {shares}: {text}"


def _recorded_line(
    scores: Sequence[Mapping[str, Any]],
    weights: Mapping[str, float],
    sets: Sequence[str],
    name: str,
    role: str,
    task: str,
    metric: str,
) -> Line:
    better = -1.0 if metric == "loss" else 1.0
    cells = []
    for task_set in sets:
        entry = next(e for e in scores if e["task"] == task_set and dict(e["weights"]) == dict(weights))
        cells.append(Cell(entry["n"], entry["mean"], entry["se"], better * entry["difference"], entry["difference_se"]))
    return Line(name, role, tuple(cells), task, (False,) * len(cells))


def _paired(values: Sequence[float], others: Sequence[float], sign: float) -> tuple[float, float]:
    return mean_and_error([sign * (value - other) for value, other in zip(values, others, strict=True)])


def _own_set(board: Scoreboard, line: Line) -> int:
    """The set a specialist is judged by: the one it was made for, else where it gains most."""
    if line.task in board.sets:
        return board.sets.index(line.task)
    unseen = [place for place, name in enumerate(board.sets) if name not in board.seen]
    return max(unseen, key=lambda place: line.cells[place].gain)


def _change(board: Scoreboard, place: int, merged: Line) -> str:
    cell = merged.cells[place]
    unit = " nats" if board.metric == "loss" else ""
    way = "worse" if cell.gain < 0 else "better"
    error = f" ± {cell.gain_error:.2f}" if math.isfinite(cell.gain_error) else ""
    noise = " (within noise)" if cell.is_noise else ""
    return f"{board.sets[place]} {abs(cell.gain):.2f}{error}{unit} {way}{noise}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
