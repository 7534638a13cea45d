"""What models are called where strangers read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.catalogue import base_choices, fine_tune_choices, resolve_choice
from components.naming import without_demo_paths
from components.settings import Settings
from llm_merge.demo import DEMO_MODELS, demo_path
from llm_merge.recipe import Recipe

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLM_MERGE_HOME", str(tmp_path))
    for model in DEMO_MODELS:
        if model.base is None:
            (tmp_path / "models" / model.reference.split("/")[-1]).mkdir(parents=True)
    return tmp_path


def test_demo_models_lose_the_server_s_folders(home: Path) -> None:
    assert without_demo_paths(demo_path("smollm2")) == BASE
    assert without_demo_paths(demo_path("king-james")) == f"{BASE}+assets/demo/adapters/king-james"
    assert without_demo_paths("/my/model") == "/my/model"
    text = Recipe.linear([demo_path("king-james"), demo_path("smollm2")], [0.5, 0.5]).to_yaml()
    shown = without_demo_paths(text)
    assert str(home) not in shown and str(Path.cwd()) not in shown
    assert Recipe.from_yaml(shown).references == (f"{BASE}+assets/demo/adapters/king-james", BASE)


def test_a_public_page_s_lists_name_no_folder_and_are_understood(home: Path) -> None:
    public = Settings.for_public(home)
    offered = [*base_choices(public), *fine_tune_choices(public)]
    assert len({value for _, value in offered}) == len(DEMO_MODELS)
    for _, value in offered:
        assert not Path(value).is_absolute()
        assert without_demo_paths(resolve_choice(value, public)) == value
