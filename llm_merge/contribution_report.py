"""What a contribution analysis found: α, β, c, γ and Γ per layer, with their standard errors, and the layers' types.

Made from the values of rows, cell by cell, while they come in; also a report that is not finished can be read. Numbers
and names only: it measures nothing and decides nothing.
Source: Fu et al., ACL 2025, arXiv:2506.12379, on layer-wise contribution analysis; the standard errors are ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from llm_merge.contributions import KINDS, SIDES, Cell, Layer, Setup, Side, Values
from llm_merge.errors import MergeError

if TYPE_CHECKING:
    import pandas

VERSION = 1
LOSS = "-loss"
BEYOND_NOISE = 2.0
"""Standard errors from which on a contribution or a conflict counts as more than noise."""

SEVERE, PARTIAL, MUTUAL, NEITHER, UNKNOWN = "severe", "partial", "mutual", "none", "unknown"


@dataclass(frozen=True)
class Stat:
    """A mean over n rows with its standard error (NaN: not known), or a first-order estimate of it."""

    value: float
    error: float = math.nan
    n: int = 0
    estimated: bool = False

    @property
    def is_noise(self) -> bool:
        """Within two standard errors of 0. Of an estimate nobody knows, so it is not said."""
        return math.isfinite(self.error) and abs(self.value) <= BEYOND_NOISE * self.error

    def beyond(self, errors: float) -> bool:
        """More than so many standard errors from 0; always, when 0 are asked for."""
        return errors <= 0 or (math.isfinite(self.error) and abs(self.value) > errors * self.error)


@dataclass(frozen=True)
class Conflict:
    """A layer's type, by the signs of its γ per task. `uncertain`: a sign that decides it rests on noise."""

    kind: str
    uncertain: bool = False


@dataclass(frozen=True)
class ContributionReport:
    """The analysis of one setup so far.

    metric      name in `llm_merge.metrics`; all values are in its unit, higher is better
    unit        of all values: "nats per token"
    whole       (task, "base" | "before" | "after") → values of the whole models
    cells       measured evaluations, row by row
    estimates   α (kind "delete") and β ("add") by one backward pass, always of −loss
    seconds     that measuring took; measured_on: ISO date; rows: hash of each task's rows
    """

    setup: Setup
    metric: str = "-loss"
    unit: str = "nats"
    whole: Mapping[tuple[str, str], Values] = field(default_factory=dict)
    cells: Mapping[Cell, Values] = field(default_factory=dict)
    estimates: Mapping[Cell, float] = field(default_factory=dict)
    seconds: float = 0.0
    measured_on: str = ""
    rows: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def with_cells(self, found: Iterable[tuple[Cell, Values]]) -> ContributionReport:
        return replace(self, cells={**self.cells, **dict(found)})

    # ── contributions ────────────────────────────────────────────────────────────────────────────────────────────

    def alpha(self, task: str, side: Side, layer: str) -> Stat | None:
        """Deletion impact P(θ_x) − P(θ_x − δ_x^l): what is lost without this layer's delta. None: not known yet."""
        return self._stat([(1.0, Cell(task, side, "delete", layer))])

    def beta(self, task: str, side: Side, layer: str) -> Stat | None:
        """Addition impact P(θ_F + δ_x^l) − P(θ_F): what this layer's delta brings on its own."""
        return self._stat([(1.0, Cell(task, side, "add", layer))])

    def contribution(self, task: str, side: Side, layer: str) -> Stat | None:
        """c = α + β; before merging x is the task's specialist, after merging x is the merge."""
        return self._stat([(1.0, Cell(task, side, kind, layer)) for kind in KINDS])

    def gamma(self, task: str, layer: str) -> Stat | None:
        """γ = c before − c after: above 0 when merging made the layer serve this task worse."""
        return self._stat(_gamma_parts(task, layer))

    def total(self, layer: str) -> Stat | None:
        """Γ = Σ γ over the tasks, the ranking score. The tasks' rows are different ones: errors add in squares."""
        gammas = [self.gamma(task, layer) for task in self.setup.tasks]
        known = [gamma for gamma in gammas if gamma is not None]
        if len(known) < len(gammas):
            return None
        estimated = any(gamma.estimated for gamma in known)
        error = math.nan if estimated else math.sqrt(math.fsum(gamma.error**2 for gamma in known))
        return Stat(math.fsum(gamma.value for gamma in known), error, sum(g.n for g in known), estimated)

    def conflict(self, layer: str) -> Conflict:
        """severe: at least two γ > 0; partial: signs mixed otherwise; mutual: none above 0; none: one above 0, and the
        others exactly 0 (no rule of the paper's fits, and nothing is done)."""
        gammas = [self.gamma(task, layer) for task in self.setup.tasks]
        known = [gamma for gamma in gammas if gamma is not None]
        if len(known) < len(gammas):
            return Conflict(UNKNOWN)
        kind = kind_of_signs([gamma.value for gamma in known])
        # Of an estimate, and of a single row, nobody knows how sure its sign is.
        return Conflict(kind, any(gamma.is_noise or not math.isfinite(gamma.error) for gamma in known))

    def ranking(self) -> tuple[str, ...]:
        """Keys of the blocks whose Γ is known, the largest Γ first; equal ones in order of depth."""
        known = [(layer.key, self.total(layer.key)) for layer in self.setup.layers if layer.block]
        ranked = sorted(((key, stat) for key, stat in known if stat is not None), key=lambda item: -item[1].value)
        return tuple(key for key, _ in ranked)

    def doubtful(self) -> tuple[str, ...]:
        """Keys of all layers, those first whose estimated |γ| of −loss is largest: the order in which measuring pays,
        by whatever metric."""

        def size(layer: Layer) -> float:
            return max(abs(self._estimate(_gamma_parts(task, layer.key)).value) for task in self.setup.tasks)

        return tuple(layer.key for layer in sorted(self.setup.layers, key=lambda layer: -size(layer)))

    def is_measured(self, layer: str) -> bool:
        """Whether every cell of the layer is exact."""
        return all(
            Cell(task, side, kind, layer) in self.cells for task in self.setup.tasks for side in SIDES for kind in KINDS
        )

    def _stat(self, parts: Sequence[tuple[float, Cell]]) -> Stat | None:
        if all(cell in self.cells and (cell.task, _anchor(cell)) in self.whole for _, cell in parts):
            rows = [[sign * value for value in self._impact(cell)] for sign, cell in parts]
            return mean_stat([math.fsum(values) for values in zip(*rows, strict=True)])
        # An estimate is of −loss: beside values of another metric it would say something else in their place.
        if self.metric == LOSS and all(cell in self.estimates for _, cell in parts):
            return self._estimate(parts)
        return None

    def _estimate(self, parts: Sequence[tuple[float, Cell]]) -> Stat:
        return Stat(math.fsum(sign * self.estimates.get(cell, 0.0) for sign, cell in parts), estimated=True)

    def _impact(self, cell: Cell) -> list[float]:
        """α or β of one cell, row by row."""
        sign, whole = (1.0 if cell.kind == "delete" else -1.0), self.whole[cell.task, _anchor(cell)]
        return [sign * (full - changed) for full, changed in zip(whole, self.cells[cell], strict=True)]

    # ── in words and files ───────────────────────────────────────────────────────────────────────────────────────

    def headline(self) -> str:
        """ "7 of 30 layers conflict beyond noise (32 rows of verse, 32 of dictionary)"."""
        blocks = [layer.key for layer in self.setup.layers if layer.block]
        measured = [key for key in blocks if self.is_measured(key)]
        counts = {task: len(self.whole.get((task, "base"), ())) for task in self.setup.tasks}
        rows = ", ".join(f"{count} rows of {task}" for task, count in counts.items() if count)
        if not measured:
            return f"Estimates for {len(blocks)} layers: nothing is measured yet" if self.estimates else ""
        kinds = [self.conflict(key) for key in measured]
        sure = sum(conflict.kind in (SEVERE, PARTIAL) and not conflict.uncertain for conflict in kinds)
        so_far = f"the {len(measured)} layer{'s' if len(measured) > 1 else ''} measured so far"
        of = f"{len(blocks)} layers" if len(measured) == len(blocks) else so_far
        verb = "conflicts" if sure == 1 else "conflict"
        return f"{sure or 'None'} of {of} {verb} beyond noise" + (f" ({rows})" if rows else "")

    def to_dict(self) -> dict[str, Any]:
        setup = {entry.name: getattr(self.setup, entry.name) for entry in fields(Setup) if entry.name != "edited"}
        setup["layers"] = [{"key": x.key, "title": x.title, "filters": list(x.filters), "block": x.block}
                           for x in self.setup.layers]  # fmt: skip
        return {
            "version": VERSION,
            "setup": {**setup, "models": list(self.setup.models), "tasks": list(self.setup.tasks),
                      "pruning": [list(pair) for pair in self.setup.pruning]},
            "metric": self.metric,
            "unit": self.unit,
            "whole": [[*key, _rounded(values)] for key, values in self.whole.items()],
            "cells": [[*_key(cell), _rounded(values)] for cell, values in self.cells.items()],
            "estimates": [[*_key(cell), float(f"{value:.7g}")] for cell, value in self.estimates.items()],
            "seconds": round(self.seconds, 2),
            "measured_on": self.measured_on,
            "rows": dict(self.rows),
            "notes": list(self.notes),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Any) -> ContributionReport:
        """Raises MergeError for anything that `to_dict` did not write."""
        try:
            if data["version"] != VERSION:
                raise ValueError(f"version {data['version']}")
            raw = data["setup"]
            layers = tuple(Layer(x["key"], x["title"], tuple(x["filters"]), x["block"]) for x in raw["layers"])
            pruning = tuple((float(p), float(s)) for p, s in raw["pruning"])
            setup = Setup(
                raw["base"], tuple(raw["models"]), tuple(raw["tasks"]), layers, pruning, raw["combine"], raw["dtype"]
            )
            whole = {(str(task), str(which)): _numbers(values) for task, which, values in data["whole"]}
            cells = {_cell(entry): _numbers(entry[4]) for entry in data["cells"]}
            rows = {task: len(values) for (task, _), values in whole.items()}
            if any(len(values) != rows.get(cell.task, len(values)) for cell, values in cells.items()):
                raise ValueError("cells of other rows than the whole models")
            return cls(
                setup=setup,
                metric=data["metric"],
                unit=data["unit"],
                whole=whole,
                cells=cells,
                estimates={_cell(entry): float(entry[4]) for entry in data["estimates"]},
                seconds=float(data["seconds"]),
                measured_on=data["measured_on"],
                rows=dict(data["rows"]),
                notes=tuple(data["notes"]),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise MergeError(
                f"This is not a contribution report that can be read ({error}): run the analysis again.", field="report"
            ) from error

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False, separators=(",", ":"))

    def to_frame(self) -> pandas.DataFrame:
        """One line per layer, task and side: α, β, c with errors; γ, Γ and the type beside. Needs pandas."""
        import pandas as pd

        lines = []
        for layer in self.setup.layers:
            total, conflict = self.total(layer.key), self.conflict(layer.key)
            for task in self.setup.tasks:
                gamma = self.gamma(task, layer.key)
                for side in SIDES:
                    line: dict[str, Any] = {"layer": layer.key, "task": task, "side": side}
                    for name, stat in (("alpha", self.alpha(task, side, layer.key)),
                                       ("beta", self.beta(task, side, layer.key)),
                                       ("c", self.contribution(task, side, layer.key)),
                                       ("gamma", gamma), ("Gamma", total)):  # fmt: skip
                        line[name] = stat.value if stat else math.nan
                        line[f"{name}_se"] = stat.error if stat else math.nan
                    lines.append({**line, "estimated": bool(gamma and gamma.estimated), "type": conflict.kind,
                                  "uncertain": conflict.uncertain})  # fmt: skip
        return pd.DataFrame(lines)


def _gamma_parts(task: str, layer: str) -> list[tuple[float, Cell]]:
    signs: tuple[tuple[Side, float], ...] = (("before", 1.0), ("after", -1.0))
    return [(sign, Cell(task, side, kind, layer)) for side, sign in signs for kind in KINDS]


def kind_of_signs(gammas: Sequence[float]) -> str:
    """The type of a layer by its γ per task. With more than two models two above 0 are enough for severe [open]."""
    above = sum(gamma > 0 for gamma in gammas)
    below = sum(gamma < 0 for gamma in gammas)
    if above >= 2:
        return SEVERE
    if above and below:
        return PARTIAL
    return MUTUAL if not above else NEITHER


def mean_stat(values: Sequence[float]) -> Stat:
    """Mean of paired differences with its standard error; of one row the error is not known."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Stat(mean, math.nan, count)
    return Stat(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1) / count), count)


def _anchor(cell: Cell) -> str:
    """Which whole model the cell is compared with."""
    return cell.side if cell.kind == "delete" else "base"


def _key(cell: Cell) -> tuple[str, str, str, str]:
    return cell.task, cell.side, cell.kind, cell.layer


def _cell(entry: Sequence[Any]) -> Cell:
    task, side, kind, layer, _ = entry
    if side not in SIDES or kind not in KINDS:
        raise ValueError(f"{side} {kind}")
    return Cell(str(task), side, kind, str(layer))


def _numbers(values: Sequence[Any]) -> Values:
    if isinstance(values, (str, bytes)):
        raise TypeError("values are text")
    return tuple(float(value) for value in values)


def _rounded(values: Values) -> list[float]:
    return [float(f"{value:.7g}") for value in values]
