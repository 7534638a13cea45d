"""What the model fields offer, what a typed text means, and that a public page takes demo models only."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from components.catalogue import PUBLIC_ONLY, base_choices, entries, fine_tune_choices, is_demo, resolve_choice
from components.settings import Settings
from llm_merge import demo
from llm_merge.errors import CheckpointError
from tests.tiny_models import TinyFamily, make_tiny_lora

PRIVATE = Settings()
PUBLIC = Settings(public=True)


@pytest.fixture(autouse=True)
def empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


def test_the_demo_comes_first_by_its_titles() -> None:
    labels = [label for label, _ in base_choices(PRIVATE)]
    assert labels == ["SmolLM2 135M Instruct", "all-MiniLM-L6-v2"]
    assert dict(base_choices(PRIVATE))["all-MiniLM-L6-v2"] == demo.demo_path("minilm")


def test_specialists_are_offered_as_fine_tunes_of_their_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins = tuple(
        replace(model, reference=str(tmp_path / model.key)) if model.base else model for model in demo.DEMO_MODELS
    )
    for model in stand_ins:
        if model.base and model.key != "dictionary":
            (tmp_path / model.key).mkdir()
            (tmp_path / model.key / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(demo, "DEMO_MODELS", stand_ins)
    monkeypatch.setattr("components.catalogue.DEMO_MODELS", stand_ins)

    def labels(model_type: str) -> list[str]:
        return [label for label, _ in fine_tune_choices(PRIVATE, model_type)]

    assert labels("decoder") == ["King James", "King James, overtrained", "SmolLM2 135M Instruct"]
    assert "Spanish search" in labels("encoder")
    assert "King James" not in labels("encoder")
    assert {"King James", "Spanish search"} <= set(labels(""))
    assert "King James" not in [label for label, _ in base_choices(PRIVATE)]


def test_whole_models_of_the_hub_cache(empty_hub_cache: Path, tiny_llama: TinyFamily) -> None:
    assert [entry.source for entry in entries(PRIVATE) if entry.source != "demo"] == []
    for name, whole in (("acme--small", True), ("acme--partial", False)):
        repository = empty_hub_cache / f"models--{name}"
        snapshot = repository / "snapshots" / "abc"
        shutil.copytree(tiny_llama.base, snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
        if not whole:
            (snapshot / "model.safetensors").unlink()
    (empty_hub_cache / "models--acme--no-refs").mkdir()
    assert ("acme/small · hub cache", "acme/small") in base_choices(PRIVATE)
    assert not any("partial" in entry.title or "no-refs" in entry.title for entry in entries(PRIVATE))
    assert not any(entry.source == "hub cache" for entry in entries(PUBLIC))


def test_folders_and_adapters_under_the_models_folder(tmp_path: Path, tiny_llama: TinyFamily) -> None:
    folder = tmp_path / "models"
    shutil.copytree(tiny_llama.base, folder / "plain")
    shutil.copytree(tiny_llama.base, folder / "org" / "inner")
    make_tiny_lora(folder / "poet", 1, tiny_llama.base)
    (folder / "not a model").mkdir()
    (folder / "not a model" / "config.json").write_text('{"colour": "red"}')
    settings = Settings(models_dir=folder)
    assert [entry.title for entry in entries(settings) if entry.source == "folder"] == ["org/inner", "plain", "poet"]
    assert ("plain · folder", str(folder / "plain")) in base_choices(settings)
    assert "poet · folder" not in dict(base_choices(settings))
    assert dict(fine_tune_choices(settings, "decoder"))["poet · folder"] == str(folder / "poet")
    assert not any(entry.source == "folder" for entry in entries(Settings(public=True, models_dir=folder)))


def test_a_models_folder_that_is_gone_offers_nothing(tmp_path: Path) -> None:
    assert entries(Settings(models_dir=tmp_path / "gone")) == entries(PRIVATE)


@pytest.mark.parametrize("settings", [PRIVATE, PUBLIC])
def test_demo_models_by_title_key_and_reference(settings: Settings) -> None:
    for model in demo.DEMO_MODELS:
        expected = demo.demo_path(model.key)
        for text in (model.title, model.title.upper(), model.key, expected, f"  {expected} "):
            assert resolve_choice(text, settings) == expected
        assert is_demo(expected)


@pytest.mark.parametrize(
    "text", ["org/name", "/etc", "../secrets", "gpt2", "King James+org/name", "C:\\models", "x" * 200]
)
def test_a_public_page_takes_nothing_else(text: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve_choice(text, PUBLIC)
    assert caught.value.message == PUBLIC_ONLY
    assert resolve_choice(text, PRIVATE) == text


def test_a_public_page_cannot_be_led_out_by_a_demo_s_name() -> None:
    base = demo.demo_path("smollm2")
    for text in (f"{base}+/etc", f"{base}+org/adapter", f"{base}/../../x", f"{demo.demo_path('king-james')}+x"):
        with pytest.raises(CheckpointError, match="only the demo models"):
            resolve_choice(text, PUBLIC)


def test_a_demo_base_by_its_hub_id() -> None:
    """On a public page the demo's copy; on one's own machine the hub's, whose weights are not the same."""
    assert resolve_choice("HuggingFaceTB/SmolLM2-135M-Instruct", PUBLIC) == demo.demo_path("smollm2")
    assert resolve_choice("HuggingFaceTB/SmolLM2-135M-Instruct", PRIVATE) == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_what_people_paste() -> None:
    assert resolve_choice(' "/models/my model" \n', PRIVATE) == "/models/my model"
    assert resolve_choice("", PRIVATE) == resolve_choice("   ", PUBLIC) == ""
    with pytest.raises(CheckpointError, match="has at most 1000 characters; this one has 5,000"):
        resolve_choice("x" * 5000, PRIVATE)
