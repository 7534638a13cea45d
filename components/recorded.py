"""What was measured beforehand on the demo models, as files in `assets/demo/measured`: sample answers and scores.

A recording is shown as one, with its date and the hash of the base it was made with; when a file is missing the page
simply has nothing recorded to show. Losses are recorded too, but those are read through the measurement cache.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_merge.errors import MergeError

if TYPE_CHECKING:
    from llm_merge.contribution_report import ContributionReport

MEASURED = Path(__file__).resolve().parent.parent / "assets" / "demo" / "measured"
Mix = Mapping[str, float]  # demo key → share


@dataclass(frozen=True)
class Answer:
    """What one mix of demo models answered."""

    mix: tuple[tuple[str, float], ...]
    text: str


@dataclass(frozen=True)
class Prompt:
    """A recorded prompt with the answers of several mixes."""

    task: str
    text: str
    answers: tuple[Answer, ...]

    def nearest(self, mix: Mix) -> Answer | None:
        """The recorded answer whose mix of the same models lies nearest; None if these models were never mixed."""
        models = {key for key, share in mix.items() if share > 0}
        fitting = [answer for answer in self.answers if models <= {key for key, _ in answer.mix}]
        return min(fitting, key=lambda answer: _distance(mix, dict(answer.mix)), default=None)

    def exact(self, mix: Mix) -> Answer | None:
        """The recorded answer of exactly this mix."""
        near = [answer for answer in self.answers if _distance(mix, dict(answer.mix)) < 1e-9]
        return near[0] if near else None


@dataclass(frozen=True)
class Recording:
    """The recorded answers: when, on which base, with which generation settings."""

    recorded_on: str
    base_hash: str
    settings: Mapping[str, Any]
    prompts: tuple[Prompt, ...]


@lru_cache(maxsize=4)
def recorded_answers(folder: Path = MEASURED) -> Recording | None:
    """The recorded sample answers, or None when none are there."""
    data = _read(folder / "answers.json")
    if data is None:
        return None
    prompts = tuple(
        Prompt(p["task"], p["prompt"], tuple(Answer(tuple(a["weights"].items()), a["text"]) for a in p["answers"]))
        for p in data["prompts"]
    )
    return Recording(data["recorded_on"], data["base_hash"], data.get("settings", {}), prompts)


@lru_cache(maxsize=4)
def recorded_scores(model_type: str, folder: Path = MEASURED) -> Mapping[str, Any] | None:
    """The recorded scoreboard of a model type as its JSON says it, or None."""
    return _read(folder / f"scoreboard-{model_type}.json")


def _distance(one: Mix, other: Mix) -> float:
    keys = set(one) | set(other)
    return sum(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in keys)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return data if isinstance(data, dict) else None


@lru_cache(maxsize=8)
def recorded_contributions(
    model_type: str, combine: str = "average", folder: Path = MEASURED
) -> ContributionReport | None:
    """The recorded contribution analysis of the demo's specialists merged in this way, with their references here.

    None when there is none, or when it does not name the adapter of each specialist that is here, or another base.
    """
    merged_as = "" if combine == "average" else f"-{combine}"
    data = _read(folder / f"contributions-{model_type}{merged_as}.json")
    if data is None:
        return None
    from llm_merge.checkpoint import open_checkpoint
    from llm_merge.contribution_report import ContributionReport
    from llm_merge.demo import demo_model, demo_path, is_prepared
    from llm_merge.hashing import file_hash

    hashes = data.get("adapter_hashes", {})
    for key, known in hashes.items():
        file = Path(demo_model(key).reference) / "adapter_model.safetensors"
        if not file.is_file() or file_hash(file) != known:
            return None
    try:
        report = ContributionReport.from_dict(data["report"])
    except (KeyError, MergeError):
        return None
    if not set(report.setup.models) <= set(hashes):
        return None
    known = data.get("base_hash")
    if known and is_prepared(report.setup.base):
        base = open_checkpoint(demo_path(report.setup.base), local_only=True)
        if base.content_hash() != known:
            return None
    setup = replace(
        report.setup, base=demo_path(report.setup.base), models=tuple(demo_path(key) for key in report.setup.models)
    )
    return replace(report, setup=setup)


@lru_cache(maxsize=4)
def recorded_hi_merging(folder: Path = MEASURED) -> Mapping[str, Any] | None:
    """What Hi-Merging was worth on the demo's held-out rows beside other merges, as its JSON says it, or None."""
    return _read(folder / "hi-merging-decoder.json")
