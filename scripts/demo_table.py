"""The recorded scoreboards as Markdown tables, put between the markers in `assets/demo/README.md`.

Reads what `measure_demo.py` recorded and measures nothing.
"""

from __future__ import annotations

import json

from llm_merge.demo import ASSETS, DEMO_MODELS

MEASURED = ASSETS / "measured"
TASKS = ("verse", "dictionary", "general")


def readme_table() -> str:
    """The recorded scoreboards as Markdown, for README.md."""
    titles = {model.key: model.title for model in DEMO_MODELS}
    lines = []
    for model_type, metric in (("decoder", "loss"), ("encoder", "R@1")):
        base = next(model.key for model in DEMO_MODELS if model.model_type == model_type and model.base is None)
        path = MEASURED / f"scoreboard-{model_type}.json"
        if not path.is_file():
            continue
        board = json.loads(path.read_text(encoding="utf-8"))
        what = "nats per answer token, lower is better" if metric == "loss" else "R@1, higher is better"
        counts = ", ".join(f"{task} {count}" for task, count in board["held_out_rows"].items())
        lines += [
            f"**{titles[base]}** ({what}; held-out rows: {counts}; recorded on {board['recorded_on']}, "
            f"base `{board['base_hash'][:12]}`)",
            "",
            "| model | " + " | ".join(f"{task} | to base" for task in TASKS) + " |",
            "| --- |" + " ---: | ---: |" * len(TASKS),
        ]
        places = {(json.dumps(s["weights"]), s["task"]): s for s in board["scores"] if s["metric"] == metric}
        for weights in dict.fromkeys(key for key, _ in places):
            mix = json.loads(weights)
            name = " + ".join(titles[k] if share == 1 else f"{share:.0%} {titles[k]}" for k, share in mix.items())
            cells = []
            for task in TASKS:
                score = places[weights, task]
                cells.append(f"{score['mean']:.3f} ± {score['se']:.3f}")
                cells.append(f"{score['difference']:+.3f} ± {score['difference_se']:.3f}" if mix != {base: 1} else "")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    path = MEASURED / "style.json"
    if path.is_file():
        board = json.loads(path.read_text(encoding="utf-8"))
        lines += [
            f"**Answers in the style they should have**, of {board['counts'][0]['n']} held-out prompts each "
            f"(recorded on {board['recorded_on']})",
            "",
            "| model | verse answers with a King James word | word answers in dictionary form |",
            "| --- | ---: | ---: |",
        ]
        for count in board["counts"]:
            name = " + ".join(
                titles[k] if share == 1 else f"{share:.0%} {titles[k]}" for k, share in count["weights"].items()
            )
            lines.append(f"| {name} | {count.get('verse', '')} | {count.get('dictionary', '')} |")
        lines.append("")
    return "\n".join(lines)


def update_readme() -> None:
    path = ASSETS / "README.md"
    before, _, rest = path.read_text(encoding="utf-8").partition("<!-- table -->\n")
    _, _, after = rest.partition("<!-- /table -->")
    path.write_bytes(f"{before}<!-- table -->\n{readme_table()}<!-- /table -->{after}".encode())


if __name__ == "__main__":
    update_readme()
