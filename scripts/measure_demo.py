"""Measures the demo's models and mixes with the library itself, and records the outcome in `assets/demo/measured`.

What is written: the losses of every demo model on the work rows, the scoreboard on the held-out rows, sample answers,
and how many answers have the style they should. Every number is kept under the content hash of models, rows and
settings, so it can be stopped at any time, and a second run measures only what has changed.

    python scripts/measure_demo.py decoder scoreboard      one part of one type
    python scripts/measure_demo.py                         everything (about half an hour on two cores)
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import demo_data
import demo_sources
from demo_table import update_readme

from llm_merge.checkpoint import open_checkpoint
from llm_merge.demo import ASSETS, DEMO_MODELS, DemoModel, cache_folder, demo_examples, demo_path, prepare
from llm_merge.evaluation import mean_and_error, resolve_format
from llm_merge.generation import GenerationSettings, generate
from llm_merge.measurement_cache import MeasurementCache
from llm_merge.measurement_keys import default_settings, row_hash
from llm_merge.measurements import measure_models
from llm_merge.recipe import Recipe
from llm_merge.retrieval import retrieval
from llm_merge.workbench import Workbench

MEASURED = ASSETS / "measured"
TASKS = ("verse", "dictionary", "general")
# What the page offers to measure on. An embedding model's rows compete with each other: two sets are a third one.
WORK_SETS = {**{task: (task,) for task in TASKS}, "both": ("verse", "dictionary")}
BASES = {"decoder": "smollm2", "encoder": "minilm"}
Mix = Mapping[str, float]

SCORED: dict[str, list[Mix]] = {
    "decoder": [
        {"smollm2": 1},
        {"king-james": 1},
        {"dictionary": 1},
        {"king-james-overtrained": 1},
        {"king-james": 0.5, "dictionary": 0.5},
        {"smollm2": 0.5, "king-james-overtrained": 0.5},
    ],
    "encoder": [
        {"minilm": 1},
        {"spanish-search": 1},
        {"reverse-dictionary": 1},
        {"spanish-search-overtrained": 1},
        {"spanish-search": 0.5, "reverse-dictionary": 0.5},
        {"minilm": 0.5, "spanish-search-overtrained": 0.5},
    ],
}
ANSWERED: list[Mix] = [
    {"smollm2": 1},
    *({"king-james": w, "dictionary": round(1 - w, 2)} for w in (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9)),
    {"king-james": 1},
    {"dictionary": 1},
    {"king-james-overtrained": 1},
    {"smollm2": 0.5, "king-james-overtrained": 0.5},
]
# Held-out rows, picked by hand because the difference is easy to see in them.
PROMPTS = {"verse": (5, 0), "dictionary": (13, 25)}
STYLED: list[tuple[Mix, tuple[str, ...]]] = [
    ({"smollm2": 1}, ("verse", "dictionary")),
    ({"king-james": 0.5, "dictionary": 0.5}, ("verse", "dictionary")),
    ({"king-james": 1}, ("verse",)),
    ({"dictionary": 1}, ("dictionary",)),
]
STYLED_ROWS = 50
DICTIONARY_FORM = re.compile(r"^\((noun|verb|adjective|adverb)\) ")


class Lab:
    """One resident model of a type, and the results that are kept already."""

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type
        for _ in prepare(BASES[model_type]):
            pass
        self.base = open_checkpoint(demo_path(BASES[model_type]))
        self.bench = Workbench(self.base, model_type)
        self.settings = default_settings(model_type)  # the page's own
        self.format = resolve_format([self.base], self.settings.format)
        self.kept = cache_folder() / "demo-measured"
        self.cache = MeasurementCache(self.kept / "losses")

    def key(self, what: str, mix: Mix, *more: object) -> str:
        models = [(open_checkpoint(demo_path(key)).content_hash(), round(share, 6)) for key, share in mix.items()]
        return hashlib.sha256(
            json.dumps([what, self.base.content_hash(), models, *map(str, more)]).encode()
        ).hexdigest()

    def once(self, what: str, mix: Mix, measure: Any, *more: object) -> Any:
        """The kept result, or a new one; the model is only moved when something must be measured."""
        path = self.kept / f"{self.key(what, mix, *more)[:32]}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        started = time.monotonic()
        self.bench.follow(recipe_of(mix))
        result = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
        print(f"{what} of {name_of(mix)}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        return result

    def losses(self, mix: Mix, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """The loss of each row, in order."""
        name = demo_path(next(iter(mix))) if len(mix) == 1 else recipe_of(mix)
        running = measure_models([name], self.model_type, rows, cache=self.cache, bench=self.bench)
        while True:
            try:
                next(running)
            except StopIteration as end:
                return list(end.value.of(name))

    def ranks(self, mix: Mix, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
        def measure() -> dict[str, list[float]]:
            found = retrieval(self.bench, rows, self.settings)
            return {
                "R@1": list(found.recall_at_1.values),
                "MRR": list(found.mrr.values),
                "nDCG@10": list(found.ndcg_at_10.values),
            }

        return dict(self.once("retrieval", mix, measure, hash_of(rows)))

    def answer(self, mix: Mix, prompt: str, settings: GenerationSettings) -> str:
        def measure() -> str:
            text = ""
            for text in generate(self.bench, prompt, settings, self.format):  # noqa: B007
                pass
            return text.strip()

        return str(self.once("answer", mix, measure, prompt, settings))


def work_losses(lab: Lab) -> dict[str, Any]:
    """Records the losses of every demo model on the work rows, in the measurement cache's own files.

    What was recorded for this type before is replaced: its models or rows may have changed since.
    """
    models = {m.key: open_checkpoint(demo_path(m.key)).content_hash() for m in demo_models(lab.model_type)}
    means: dict[str, Any] = {}
    rows_there_are = set()
    for key in models:
        for name, tasks in WORK_SETS.items():
            rows = [row for task in tasks for row in demo_examples(lab.model_type, task, "work")]
            means[f"{key} {name}"] = round(mean_and_error(lab.losses({key: 1}, rows))[0], 4)
            rows_there_are |= {row_hash(row) for row in rows}
    for path in MEASURED.glob("*-*.json"):
        if json.loads(path.read_text(encoding="utf-8")).get("name") in models:
            path.unlink()
    for found in lab.cache.own():
        if found.key.model in models.values() and rows_there_are.issuperset(found.rows):
            lab.cache.put(found, MEASURED)
    return {**stamp(lab), "mean_loss": means}


def scoreboard(lab: Lab) -> dict[str, Any]:
    """Every mix on the held-out rows of every task, and its difference to the base row by row."""
    rows = {task: demo_examples(lab.model_type, task, "heldout") for task in TASKS}
    values: dict[tuple[int, str, str], list[float]] = {}
    for number, mix in enumerate(SCORED[lab.model_type]):
        for task in TASKS:
            values[number, task, "loss"] = lab.losses(mix, rows[task])
            if lab.model_type == "encoder":
                for metric, found in lab.ranks(mix, rows[task]).items():
                    values[number, task, metric] = found
    scores = []
    for (number, task, metric), found in values.items():
        mean, error = mean_and_error(found)
        base = values[0, task, metric]
        difference, difference_error = mean_and_error([a - b for a, b in zip(found, base, strict=True)])
        scores.append(
            {
                "weights": rounded(SCORED[lab.model_type][number]),
                "task": task,
                "metric": metric,
                "n": len(found),
                "mean": round(mean, 4),
                "se": round(error, 4),
                "difference": round(difference, 4),
                "difference_se": round(difference_error, 4),
            }
        )
    return {
        **stamp(lab),
        "held_out_rows": {task: len(found) for task, found in rows.items()},
        "rows_sha256": {task: hash_of(found) for task, found in rows.items()},
        "settings": lab.settings.key(lab.model_type),
        "scores": scores,
    }


def answers(lab: Lab) -> dict[str, Any]:
    """What the mixes answer to a few prompts, with the settings that the page starts with."""
    settings = GenerationSettings(max_new_tokens=48)
    prompts = []
    for task, places in PROMPTS.items():
        rows = demo_examples("decoder", task, "heldout")
        prompts += [{"task": task, "prompt": rows[i]["input"], "expected": rows[i]["output"]} for i in places]
    for prompt in prompts:
        prompt["answers"] = []
    for mix in ANSWERED:
        for prompt in prompts:
            text = lab.answer(mix, prompt["prompt"], settings)
            prompt["answers"].append({"weights": rounded(mix), "text": text})
    return {**stamp(lab), "settings": asdict(settings), "picked": "held-out rows, chosen by hand", "prompts": prompts}


def style(lab: Lab) -> dict[str, Any]:
    """On the first held-out prompts: how many answers have a King James word, how many begin like the dictionary's."""
    settings = GenerationSettings(max_new_tokens=32)
    counts = []
    has_style = {"verse": demo_sources.is_king_james, "dictionary": DICTIONARY_FORM.match}
    for mix, tasks in STYLED:
        found: dict[str, Any] = {"weights": rounded(mix), "n": STYLED_ROWS}
        for task in tasks:
            rows = demo_examples("decoder", task, "heldout")[:STYLED_ROWS]
            found[task] = sum(bool(has_style[task](lab.answer(mix, row["input"], settings))) for row in rows)
        counts.append(found)
    tests = {"verse": "a word of ARCHAIC in scripts/demo_sources.py", "dictionary": DICTIONARY_FORM.pattern}
    return {**stamp(lab), "settings": asdict(settings), "tests": tests, "counts": counts}


def stamp(lab: Lab) -> dict[str, Any]:
    models = {
        m.key: open_checkpoint(demo_path(m.key)).content_hash() for m in DEMO_MODELS if m.model_type == lab.model_type
    }
    return {
        "recorded_on": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "base": lab.base.base_identity,
        "base_hash": lab.base.content_hash(),
        "models": models,
    }


def demo_models(model_type: str) -> list[DemoModel]:
    return [model for model in DEMO_MODELS if model.model_type == model_type]


def recipe_of(mix: Mix) -> Recipe:
    return Recipe.linear([demo_path(key) for key in mix], list(mix.values()))


def hash_of(rows: Iterable[Mapping[str, Any]]) -> str:
    return hashlib.sha256(demo_data.as_lines([dict(row) for row in rows]).encode()).hexdigest()


def rounded(mix: Mix) -> dict[str, float]:
    return {key: round(share, 4) for key, share in mix.items()}


def name_of(mix: Mix) -> str:
    return " + ".join(f"{share:.2f} {key}" for key, share in mix.items())


def record(path: Path, found: dict[str, Any]) -> None:
    """Writes a recording, unless it says what the one that is there says: then that one's date is the true one."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if {**known, "recorded_on": ""} != {**found, "recorded_on": ""}:
        write_json(path, found)


def write_json(path: Path, content: Any) -> None:
    aside = path.with_suffix(".part")
    aside.write_bytes(json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")
    aside.replace(path)


PARTS = {
    ("decoder", "losses"): work_losses,
    ("decoder", "scoreboard"): scoreboard,
    ("decoder", "answers"): answers,
    ("decoder", "style"): style,
    ("encoder", "losses"): work_losses,
    ("encoder", "scoreboard"): scoreboard,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("type", nargs="?", choices=["decoder", "encoder"])
    parser.add_argument("part", nargs="?", choices=sorted({part for _, part in PARTS}))
    options = parser.parse_args()
    MEASURED.mkdir(parents=True, exist_ok=True)
    labs: dict[str, Lab] = {}
    for (model_type, part), measure in PARTS.items():
        if options.type in (None, model_type) and options.part in (None, part):
            if model_type not in labs:
                labs[model_type] = Lab(model_type)
            lab = labs[model_type]
            name = f"{part}-{model_type}" if part in ("scoreboard", "losses") else part
            record(MEASURED / f"{name}.json", measure(lab))
            print(f"wrote {name}.json", file=sys.stderr, flush=True)
    update_readme()


if __name__ == "__main__":
    main()
