"""The command line: what is written where, which code it ends with, and one sentence for every wrong input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from llm_merge.analysis import analyze_contributions
from llm_merge.cli import main
from llm_merge.commands import arguments
from llm_merge.commands.console import Console, plain, table, time_text
from llm_merge.commands.files import resolve_model
from llm_merge.commands.inputs import task_and_model
from llm_merge.contribution_report import ContributionReport
from llm_merge.demo import DEMO_MODELS, demo_path
from llm_merge.distributed import in_order
from llm_merge.errors import MergeError
from llm_merge.hi_merging import Switches
from llm_merge.hierarchical import hi_merge
from llm_merge.merge import MemorySink, run
from llm_merge.plan import make_plan
from llm_merge.recipe import Recipe
from tests.tiny_models import TinyFamily

REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = {"verse": ("gospel", "corn", "gladness"), "prose": ("harbour", "Paris", "ships"), "general": ("two", "three")}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_home: Path) -> Path:
    """A folder to work in with a file of rows per task, and a cache of its own."""
    for task, words in WORDS.items():
        rows = [{"input": f"Define the word: {word}.", "output": f"A {word} of {task}."} for word in words]
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def inputs(family: TinyFamily) -> list[str]:
    base, first, second = family.references
    return ["--base", base, "--model", f"verse={first}", "--model", f"prose={second}", "--data", "verse=verse.jsonl",
            "--data", "prose.jsonl", "--device", "cpu"]  # fmt: skip


def rows_of(place: Path, *tasks: str) -> dict[str, list[dict[str, Any]]]:
    return {task: [json.loads(line) for line in (place / f"{task}.jsonl").read_text().splitlines()] for task in tasks}


def linear(family: TinyFamily, weights: tuple[float, ...] = (0.5, 0.5)) -> str:
    return Recipe.linear([str(folder) for folder in family.fine_tunes], weights).to_yaml()


def numbers(report: ContributionReport) -> dict[str, Any]:
    return {name: value for name, value in in_order(report).to_dict().items() if name != "seconds"}


# ── merge ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_merge_writes_what_the_library_computes(
    place: Path, tiny_llama: TinyFamily, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "recipe.yml").write_text(linear(tiny_llama))
    assert main(["merge", "recipe.yml", "out", "--dtype", "float32", "--out-shard-size", "40K", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    sink = MemorySink()
    for _ in run(make_plan(Recipe.from_yaml(linear(tiny_llama)).with_dtype("float32")), sink):
        pass
    assert len(result["files"]) > 1
    written = {name: tensor for file in result["files"] for name, tensor in load_file(place / "out" / file).items()}
    assert result["output"] == str(place / "out")
    assert (result["tensors"], result["dtype"]) == (len(sink.tensors), "float32")
    assert written.keys() == sink.tensors.keys()
    assert all(bool((written[name] == tensor).all()) for name, tensor in sink.tensors.items())
    assert "tensors" in captured.err
    assert "of" in captured.err


def test_quiet_leaves_only_the_result(place: Path, tiny_llama: TinyFamily, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "recipe.yml").write_text(linear(tiny_llama))
    assert main(["merge", "recipe.yml", "out", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith(str(place / "out"))


def test_all_problems_of_a_plan_are_said(
    place: Path, tiny_llama: TinyFamily, tiny_bert: TinyFamily, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [str(tiny_llama.base), str(tiny_bert.base), str(place / "nowhere")]
    entries = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
    (place / "recipe.yml").write_text(yaml.safe_dump({"merge_method": "linear", "models": entries}))
    assert main(["merge", "recipe.yml", "out"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "nowhere" in captured.err
    assert "Bert" in captured.err
    assert not (place / "out").exists()


def test_ctrl_c_leaves_no_part_of_a_merge(
    place: Path, tiny_llama: TinyFamily, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "recipe.yml").write_text(linear(tiny_llama))
    before = {path.name for path in place.iterdir()}
    interrupt_at(monkeypatch, lambda text: text.startswith("Merging: 3 "))
    assert main(["merge", "recipe.yml", "deep/out"]) == 130
    assert capsys.readouterr().err.endswith("Stopped.\n")
    assert {path.name for path in place.iterdir()} - {"home"} == before


def interrupt_at(monkeypatch: pytest.MonkeyPatch, wanted: Callable[[str], bool]) -> None:
    """Ctrl-C once, as soon as the console tells what is `wanted`."""
    asked: list[str] = []

    def watched(own: Callable[..., None], text_at: int) -> Callable[..., None]:
        def tell(self: Console, *words: Any) -> None:
            own(self, *words)
            if wanted(words[text_at]) and not asked:
                asked.append(words[text_at])
                signal.raise_signal(signal.SIGINT)

        return tell

    monkeypatch.setattr(Console, "progress", watched(Console.progress, 1))
    monkeypatch.setattr(Console, "say", watched(Console.say, 0))


# ── analyze ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_analyze_finds_what_the_library_finds(
    place: Path, tiny_llama: TinyFamily, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["analyze", *inputs(tiny_llama), "--pruning", "verse=0.5,0.8", "--out", "report.json"]
    assert main(command) == 0
    said = capsys.readouterr()
    report = ContributionReport.from_dict(json.loads((place / "report.json").read_text()))
    base, first, second = tiny_llama.references
    expected = analyze_contributions(
        base,
        {"verse": first, "prose": second},
        rows_of(place, "verse", "prose"),
        pruning=((0.5, 0.8), (1.0, 1.0)),
        device="cpu",
    )
    assert numbers(report) == numbers(expected)
    lines = said.out.splitlines()
    assert lines[0].split() == ["layer", "γ", "verse", "γ", "prose", "Γ", "type"]
    assert [layer.title for layer in report.setup.layers] == [
        line[:10].strip() for line in lines[1 : len(report.setup.layers) + 1]
    ]
    assert lines[-1] == report.headline()
    assert "32 evaluations of 4 layers and 6 of whole models" in said.err


def test_json_is_the_report_with_what_follows_from_it(
    place: Path, tiny_llama: TinyFamily, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", *inputs(tiny_llama), "--json", "--layers", "0,1"]) == 0
    data = json.loads(capsys.readouterr().out)
    report = ContributionReport.from_dict(data)
    assert data["headline"] == report.headline()
    found = {layer["layer"]: layer for layer in data["layers"]}
    total, gamma = report.total("1"), report.gamma("prose", "1")
    assert total is not None and gamma is not None
    assert found["1"]["Gamma"]["value"] == pytest.approx(total.value, abs=1e-5)  # the values of rows are rounded
    assert found["1"]["gamma"]["prose"]["error"] == pytest.approx(gamma.error, abs=1e-5)
    assert found["1"]["type"] == report.conflict("1").kind
    assert found["embeddings"]["Gamma"] is None


def test_an_estimate_alone_measures_nothing(
    place: Path, tiny_llama: TinyFamily, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", *inputs(tiny_llama), "--estimate-only", "--json", "--store", "cells"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["cells"] == []
    assert all(layer["Gamma"]["estimated"] and layer["Gamma"]["error"] is None for layer in data["layers"])
    assert not (place / "cells").exists()


def test_a_number_of_layers_is_measured_where_the_estimate_is_largest(
    place: Path, tiny_llama: TinyFamily, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", *inputs(tiny_llama), "--layers", "1", "--json"]) == 0
    report = ContributionReport.from_dict(json.loads(capsys.readouterr().out))
    estimates = ContributionReport(report.setup, estimates=report.estimates)
    assert [layer.key for layer in report.setup.layers if report.is_measured(layer.key)] == [estimates.doubtful()[0]]


def test_what_was_measured_is_not_measured_again(
    place: Path, tiny_llama: TinyFamily, capsys: pytest.CaptureFixture[str], own_home: Path
) -> None:
    assert main(["analyze", *inputs(tiny_llama), "--layers", "0,"]) == 0
    first = lines_of(own_home / "cells")
    capsys.readouterr()
    assert main(["analyze", *inputs(tiny_llama)]) == 0
    assert "8 of them measured before" in capsys.readouterr().err
    second = lines_of(own_home / "cells")[len(first) :]
    whole = 6  # models that had to be run again as the ground for new cells
    assert len(set(second) & set(first)) <= whole
    assert len(set(second) - set(first)) == 24  # 3 layers × 2 tasks × 4
    count = len(lines_of(own_home / "cells"))
    assert main(["analyze", *inputs(tiny_llama)]) == 0
    assert len(lines_of(own_home / "cells")) == count


def lines_of(folder: Path) -> list[str]:
    """The keys of a store in the order in which its files were begun."""
    files = sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(line)["key"] for file in files for line in file.read_text().splitlines()]


def test_ctrl_c_keeps_and_shows_what_was_measured(
    place: Path, tiny_llama: TinyFamily, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, lambda text: text.endswith("(20 of 32)"))
    assert main(["analyze", *inputs(tiny_llama), "--out", "report.json", "--store", "cells", "--json"]) == 130
    said = capsys.readouterr()
    report = ContributionReport.from_dict(json.loads((place / "report.json").read_text()))
    assert len(report.cells) == 20
    assert json.loads(said.out)["cells"] == report.to_dict()["cells"]
    assert "goes on from here" in said.err
    assert len(set(lines_of(place / "cells"))) == 26  # with the whole models


def test_held_out_rows_of_a_file_leave_all_others_to_the_analysis(
    place: Path, tiny_llama: TinyFamily, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "kept.jsonl").write_text(json.dumps({"input": "What is Paris?", "output": "A capital."}) + "\n")
    command = ["analyze", *inputs(tiny_llama), "--estimate-only", "--held-out-data", "verse=kept.jsonl"]
    assert main(command) == 0
    assert "verse: 3 rows to analyse, 1 held out." in capsys.readouterr().err


# ── hi-merge ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_hi_merge_reaches_the_librarys_recipe_and_writes_it_everywhere(
    place: Path, tiny_llama: TinyFamily, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["hi-merge", *inputs(tiny_llama), "--data", "general.jsonl", "--grid", "none", "--max-layers", "1",
               "--severe-by", "after", "--partial-target", "weakened", "--accept", "if_better", "--recompute",
               "--min-gamma-se", "0.5", "--dtype", "float32", "--recipe", "hi.yml", "--out", "merged",
               "--report", "report.json", "--trials", "trials.json"]  # fmt: skip
    assert main(command) == 0
    said = capsys.readouterr()
    base, first, second = tiny_llama.references
    switches = Switches("weakened", "after", True, 1, "if_better", 0.5, "none")
    rows = rows_of(place, "verse", "prose", "general")
    expected = hi_merge(base, {"verse": first, "prose": second}, rows, switches=switches, dtype="float32", device="cpu")
    assert (place / "hi.yml").read_text() == expected.recipe.to_yaml()
    assert (place / "merged" / "mergekit_config.yml").read_text() == expected.recipe.to_yaml()
    trials = json.loads((place / "trials.json").read_text())
    assert [trial["action"] for trial in trials["trials"]] == [trial.action for trial in expected.trials]
    report = ContributionReport.from_dict(json.loads((place / "report.json").read_text()))
    assert report.whole.keys() == expected.report.whole.keys()
    for trial in expected.trials:
        assert trial.action in said.out
    names = [line.split("  ")[0] for line in said.out.splitlines()]
    assert [name for name in names if name in ("base", "verse", "prose", "average", "Hi-Merging")] == [
        "base", "verse", "prose", "average", "Hi-Merging"]  # fmt: skip
    assert "general, held out" in said.out
    assert "general, analysis" not in said.out


def test_hi_merge_in_json(place: Path, tiny_llama: TinyFamily, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hi-merge", *inputs(tiny_llama), "--grid", "none", "--held-out", "1", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert Recipe.from_dict(data["recipe"]).merge_method == "breadcrumbs"
    assert data["stopped"] is False and data["written"] is None
    assert data["pruning"] == {"verse": [1.0, 1.0], "prose": [1.0, 1.0]}
    assert {point["name"] for point in data["points"]} >= {"base", "verse", "prose", "average", "step 0"}
    assert data["points"][0]["held_out"]["verse"]["n"] == 1
    assert data["points"][0]["held_out"]["verse"]["error"] is None  # of one row it is not known
    assert ContributionReport.from_dict(data["report"]).setup.tasks == ("verse", "prose")


def test_ctrl_c_keeps_the_recipe_reached(
    place: Path, tiny_llama: TinyFamily, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, lambda text: text.startswith("  1  "))
    command = ["hi-merge", *inputs(tiny_llama), "--grid", "none", "--recipe", "hi.yml", "--out", "merged"]
    assert main([*command, "--trials", "trials.json"]) == 130
    assert "the recipe reached so far is kept" in capsys.readouterr().err
    assert len(json.loads((place / "trials.json").read_text())["trials"]) == 1
    reached = Recipe.from_yaml((place / "hi.yml").read_text())
    assert make_plan(reached).is_task_arithmetic
    assert not (place / "merged").exists()


def test_ctrl_c_before_a_recipe_says_so(
    place: Path, tiny_llama: TinyFamily, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, lambda text: text.startswith("verse: p 1, s 1 "))
    assert main(["hi-merge", *inputs(tiny_llama), "--grid", "coarse", "--recipe", "hi.yml"]) == 130
    assert "no recipe was reached" in capsys.readouterr().err
    assert not (place / "hi.yml").exists()


# ── what can be wrong ───────────────────────────────────────────────────────────────────────────────────────────────

WRONG = [
    (["--model", "verse={1}", "--model", "{2}", "--data", "verse=verse.jsonl"], "has no task"),
    (["--model", "poems={1}", "--data", "verse=verse.jsonl"], "no rows of the task “poems”"),
    (["--model", "verse={1}", "--model", "verse={2}", "--data", "verse=verse.jsonl"], "has two models"),
    (["--model", "verse={1}", "--model", "{1}", "--data", "verse=verse.jsonl"], "named twice"),
    (["--model", "verse=", "--data", "verse=verse.jsonl"], "does not say which model"),
    (["--model", "={1}", "--data", "verse=verse.jsonl"], "does not say which model"),
    (["--model", "", "--data", "verse=verse.jsonl"], "does not say which model"),
    (["--model", "verse=nowhere/at-all", "--data", "verse=verse.jsonl"], "nowhere/at-all"),
    (["--model", "verse={1}", "--data", "verse=missing.jsonl"], "missing.jsonl: the file cannot be read"),
    (["--model", "verse={1}", "--data", "verse="], "does not say which file"),
    (["--model", "verse={1}", "--data", "dataset_info.json:x"], "dataset_info.json"),
    (["--model", "verse={1}", "--data", "verse.jsonl", "--held-out-data", "prose.jsonl"], "has rows of “prose”"),
    (["--model", "verse={1}", "--data", "verse.jsonl", "--metric", "rogue"], "“rogue” is not known"),
    (["--model", "verse={1}", "--data", "verse.jsonl", "--metric", "mrr"], "does not apply to the type decoder"),
    (["--model", "verse={1}", "--data", "verse.jsonl", "--metric", "accuracy"], "has no choices"),
    (["--model", "verse={1}", "--data", "verse.jsonl", "--type", "encoder-decoder"], "encoder-decoder"),
    (["--model", "verse={1}", "--data", "verse.jsonl", "--rows", "0"], "0 analysis rows"),
    (["--model", "verse={1}", "--data", "verse.jsonl", "--device", "tpu"], "`tpu` is not known"),
    (["--model", "verse={1}", "--data", "verse.jsonl", "--store", "verse.jsonl"], "is not a folder"),
]
ANALYZE = [
    (["--layers", "99"], "--layers 99 asks for more than the 4 layers"),
    (["--layers", "0,99"], "no layer “99” in these models: there are embeddings, 0, 1"),
    (["--pruning", "poems=0.5,1"], "“poems” belongs to no specialist"),
    (["--pruning", "verse=0.5,1", "--pruning", "verse=1,1"], "“verse” is given twice"),
    (["--pruning", "verse=1.5,1"], "the share kept must be above 0"),
    (["--out", "no/folder/report.json"], "does not exist"),
    (["--out", "."], "is a folder"),
]
HI_MERGE = [
    (["--out", "full"], "exists and is not empty"),
    (["--recipe", "no/folder/hi.yml"], "--recipe: the folder"),
    (["--trials", "full"], "is a folder"),
    (["--report", ""], "is a folder"),
    (["--max-layers", "-1"], "max_layers is -1"),
    (["--min-gamma-se", "nan"], "min_gamma_se is nan"),
]
FINE = ["--model", "verse={1}", "--data", "verse.jsonl"]
CASES = [
    *((command, words, sentence) for words, sentence in WRONG for command in ("analyze", "hi-merge")),
    *(("analyze", [*FINE, *words], sentence) for words, sentence in ANALYZE),
    *(("hi-merge", [*FINE, *words], sentence) for words, sentence in HI_MERGE),
]


@pytest.mark.parametrize(("command", "words", "sentence"), CASES)
def test_what_is_wrong_is_said_before_any_work(
    place: Path,
    tiny_llama: TinyFamily,
    capsys: pytest.CaptureFixture[str],
    command: str,
    words: list[str],
    sentence: str,
) -> None:
    (place / "full").mkdir()
    (place / "full" / "note").write_text("kept")
    before = {path.name for path in place.iterdir()}
    models = tiny_llama.references
    assert main([command, "--base", models[0], *(word.format(*models) for word in words)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert sentence in said.err
    assert "Traceback" not in said.err
    assert {path.name for path in place.iterdir()} - {"home"} == before - {"home"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["missing.yml", "out"], "The recipe missing.yml cannot be read"),
        (["full", "out"], "The recipe full cannot be read"),
        (["broken.yml", "out"], "not valid YAML"),
        (["bytes.yml", "out"], "not text in UTF-8"),
        (["recipe.yml", "full"], "exists and is not empty"),
        (["recipe.yml", "recipe.yml"], "is a file"),
        (["recipe.yml", ""], "No output folder"),
    ],
)
def test_what_is_wrong_with_a_merge_is_said(
    place: Path, tiny_llama: TinyFamily, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    (place / "full").mkdir()
    (place / "full" / "note").write_text("kept")
    (place / "recipe.yml").write_text(linear(tiny_llama))
    (place / "broken.yml").write_text("models: [")
    (place / "bytes.yml").write_bytes(b"\xff\xfe\xfa")
    assert main(["merge", *words]) == 1
    assert sentence in capsys.readouterr().err
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "COMMAND"),
        (["mix"], "invalid choice"),
        (["merge", "recipe.yml"], "FOLDER"),
        (["merge", "recipe.yml", "out", "--dtype", "int3"], "--dtype"),
        (["merge", "recipe.yml", "out", "--out-shard-size", "big"], "“big” is not a size"),
        (["analyze", "--base", "b", "--model", "m"], "--data"),
        (["analyze", "--base", "b", "--data", "d"], "--model"),
        (["analyze", "--model", "m", "--data", "d"], "--base"),
        (["analyze", "--base", "b", "--model", "m", "--data", "d", "--layers", "-1"], "names no layers"),
        (["analyze", "--base", "b", "--model", "m", "--data", "d", "--layers", ","], "names no layers"),
        (["analyze", "--base", "b", "--model", "m", "--data", "d", "--pruning", "v=0.4"], "is not task=p,s"),
        (["analyze", "--base", "b", "--model", "m", "--data", "d", "--rows", "x"], "--rows"),
        (["analyze", "--base", "b", "--model", "m", "--data", "d", "--type", "reranker"], "--type"),
        (["hi-merge", "--base", "b", "--model", "m", "--data", "d", "--grid", "fine"], "--grid"),
        (["hi-merge", "--base", "b", "--model", "m", "--data", "d", "--held-out", "-1"], "not a number of rows"),
        (["hi-merge", "--base", "b", "--model", "m", "--data", "d", "--combine", "best"], "--combine"),
    ],
)
def test_arguments_that_cannot_be_read_end_with_2(
    capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("command", ["merge", "hi-merge"])
def test_only_an_analysis_runs_in_several_processes(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    words = ["r.yml", "out"] if command == "merge" else ["--base", "b", "--model", "m", "--data", "d"]
    assert main([command, *words]) == 1
    assert capsys.readouterr().err.startswith(f"Process 1: {command} runs in one process")


# ── the pieces ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_program_is_there_and_help_loads_no_model_library() -> None:
    script = "import sys; from llm_merge.cli import main\ntry: main(['analyze', '--help'])\nexcept SystemExit: pass\n"
    script += "print('loaded', *({'torch', 'transformers', 'numpy', 'accelerate'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "--layers" in run.stdout
    assert run.stdout.splitlines()[-1].split() == ["loaded"]
    module = [sys.executable, "-m", "llm_merge", "--version"]
    said = subprocess.run(module, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert said.stdout.startswith("llm-merge ")


@pytest.mark.parametrize(
    ("text", "nbytes"), [("5G", 5 * 10**9), ("5GB", 5 * 10**9), ("500m", 5 * 10**8), ("1.5K", 1500), ("7", 7)]
)
def test_sizes_are_powers_of_ten(text: str, nbytes: int) -> None:
    assert arguments.size(text) == nbytes


@pytest.mark.parametrize(
    ("text", "found"), [("5", 5), ("0", 0), ("0,7", ("0", "7")), ("7,", ("7",)), ("embeddings", ("embeddings",))]
)
def test_layers_are_a_number_or_keys(text: str, found: object) -> None:
    assert arguments.layers(text) == found


def test_a_folder_with_an_equals_sign_is_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "a=b"
    folder.mkdir()
    assert task_and_model(str(folder)) == ("", str(folder))
    assert task_and_model("verse=org/name@main") == ("verse", "org/name@main")
    with pytest.raises(MergeError, match="does not say which model"):
        task_and_model("verse= ")


def test_demo_models_go_by_their_keys_unless_a_folder_has_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llm_merge.demo.is_prepared", lambda key: True)
    for model in DEMO_MODELS:
        assert resolve_model(model.key, Console(quiet=True)) == demo_path(model.key)
    (tmp_path / "dictionary").mkdir()
    assert resolve_model("dictionary", Console(quiet=True)) == "dictionary"
    assert resolve_model("org/name", Console(quiet=True)) == "org/name"


def test_what_is_not_a_number_is_null() -> None:
    assert plain({"a": float("nan"), "b": [1.5, float("inf")], "c": (2, "x")}) == {
        "a": None,
        "b": [1.5, None],
        "c": [2, "x"],
    }


def test_columns_line_up() -> None:
    lines = table(["layer", "γ", "type"], [["7", "+1.0", "severe"], ["embeddings", "-10.0", "none"]]).splitlines()
    assert lines == ["layer           γ  type", "7            +1.0  severe", "embeddings  -10.0  none"]


def test_times_are_said_as_people_do() -> None:
    assert [time_text(seconds) for seconds in (0.1, 45, 130, 7200)] == ["1 s", "45 s", "2 min", "2.0 h"]
