"""The Layers tab's words for what was read from the weights alone: which measures, which pair, which matrix.

Pure but for one matrix close up, which is read when somebody asks for it.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

from components.delta_charts import binned, delta_cosine, delta_norms, sign_conflict
from components.demo_setup import unprepared
from components.naming import short_name
from components.session import Session
from components.views import layer_report
from llm_merge.errors import MergeError

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from llm_merge.delta_stats import DeltaStats

DELTA_MEASURES = [
    ("Size of the change, relative to the base", "relative_norm"),
    ("Share of the numbers that changed", "changed_share"),
    ("Share left when the largest 20 % are kept", "density"),
    ("Share of the change’s energy in the largest 20 %", "energy"),
]
READ_FIRST = "The weights are read once, a few seconds for a small model: press Read the weights."
CLOSE_UP = 4  # fine-tunes side by side


def pairs(session: Session) -> list[tuple[str, str]]:
    """(label, "0,1") of every two fine-tunes."""
    names = [short_name(model) for model in session.fine_tunes]
    return [(f"{names[i]} and {names[j]}", f"{i},{j}") for i, j in combinations(range(len(names)), 2)]


def pair_of(value: str | None) -> tuple[int, int]:
    """The two places of a value of `pairs`; the first two for anything else."""
    one, _, other = (value or "").partition(",")
    return (int(one), int(other)) if one.isdigit() and other.isdigit() else (0, 1)


def check_deltas(session: Session, show: str) -> None:
    """Raise MergeError, in one sentence, for models that have nothing to show."""
    if not session.base or not session.fine_tunes:
        raise MergeError("Choose a base and a fine-tune in Models first.", field="models")
    if show in (layer_report.SIGNS, layer_report.COSINE) and len(session.fine_tunes) < 2:
        raise MergeError("Two fine-tunes are compared here: add another one in Models.", field="models")
    if show == layer_report.TENSOR and unprepared(session.models):
        raise MergeError("The demo models are being made ready: come back in half a minute.", field="models")


def chart(stats: DeltaStats, session: Session, show: str, measure: str, pair: str | None) -> go.Figure:
    """The statistic that the Show menu names."""
    one, other = pair_of(pair)
    if show == layer_report.SIGNS:
        return sign_conflict(stats, one, other)
    if show == layer_report.COSINE:
        return delta_cosine(stats, one, other)
    names = [short_name(model) for model in session.fine_tunes]
    known = measure if measure in [value for _, value in DELTA_MEASURES] else "relative_norm"
    return delta_norms(stats, names, known)


def tensor_choices(session: Session) -> list[str]:
    """Names of the tensors that can be shown close up."""
    from llm_merge.delta_view import tensor_names

    return list(tensor_names(session.base, session.fine_tunes[0]))


def first_tensor(names: list[str]) -> str:
    """An attention matrix from the middle of the model, where fine-tunes differ most often."""
    matrices = [name for name in names if name.endswith(("q_proj.weight", "query.weight", "q.weight"))] or names
    return matrices[len(matrices) // 2]


def close_up(session: Session, tensor: str) -> go.Figure:
    """One tensor's change in each fine-tune, side by side. Raises MergeError for a name that is not there."""
    from llm_merge.delta_view import binned_delta

    models = session.fine_tunes[:CLOSE_UP]
    return binned([binned_delta(session.base, model, tensor) for model in models], [short_name(m) for m in models])
