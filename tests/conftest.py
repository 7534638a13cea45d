"""What every test run starts from: no network, no telemetry, folders of its own, and tiny models for who asks.

The environment is set while this file is imported, because Gradio and huggingface_hub read it when they are imported.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import hypothesis
import pytest

from tests.tiny_models import (
    TinyFamily,
    make_family,
    make_tiny_bert,
    make_tiny_llama,
    make_tiny_reranker,
    make_tiny_t5,
)

REPOSITORY = Path(__file__).resolve().parent.parent
RUN_FOLDER = Path(tempfile.mkdtemp(prefix="llm-merge-tests-"))


def _prepare_environment() -> None:
    # Converting the demo's base takes 20 seconds, so the converted models outlive the run: in LLM_MERGE_HOME if the
    # caller names one, else inside the checkout. Everything else the app keeps (measurements above all) is new.
    kept = Path(os.environ.get("LLM_MERGE_HOME") or REPOSITORY / ".cache" / "llm-merge") / "models"
    kept.mkdir(parents=True, exist_ok=True)
    home = RUN_FOLDER / "home"
    home.mkdir()
    (home / "models").symlink_to(kept.resolve(), target_is_directory=True)

    os.environ.update(
        LLM_MERGE_HOME=str(home),
        HF_HOME=str(RUN_FOLDER / "huggingface"),
        HF_HUB_OFFLINE="1",
        GRADIO_ANALYTICS_ENABLED="False",
        GRADIO_TEMP_DIR=str(RUN_FOLDER / "gradio"),
        TOKENIZERS_PARALLELISM="false",
        OMP_WAIT_POLICY="PASSIVE",  # as in app.py: browser and app share the cores
    )
    # Gradio asks its own address when it starts; a proxy would be asked instead. The app's own switches are off.
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        os.environ.pop(name, None)
    for name in ("SPACE_ID", "GRADIO_SERVER_PORT", "GRADIO_SERVER_NAME", "GRADIO_SHARE", "GRADIO_ROOT_PATH"):
        os.environ.pop(name, None)


_prepare_environment()
hypothesis.settings.register_profile("no clock", deadline=None)  # no test is timed, least of all on a busy machine
hypothesis.settings.load_profile("no clock")


def pytest_unconfigure() -> None:
    shutil.rmtree(RUN_FOLDER, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Unit tests first: they fail fastest, and Playwright's event loop is not running yet."""
    order = {"unit": 0, "api": 1, "browser": 2}
    items.sort(key=lambda item: order.get(item.path.relative_to(REPOSITORY / "tests").parts[0], 1))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    """A chat model and two fine-tunes, bfloat16."""
    return make_family(make_tiny_llama, tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_llama_float32(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    """The same in float32."""
    return make_family(make_tiny_llama, tmp_path_factory.mktemp("tiny-llama-float32"), dtype="float32")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    """An embedding model with mean pooling and two fine-tunes, float32."""
    return make_family(make_tiny_bert, tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="session")
def tiny_reranker(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    """A reranker with one logit and two fine-tunes, float32."""
    return make_family(make_tiny_reranker, tmp_path_factory.mktemp("tiny-reranker"))


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    """An encoder-decoder and two fine-tunes, float32."""
    return make_family(make_tiny_t5, tmp_path_factory.mktemp("tiny-t5"))


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder for one test alone, for tests about the cache itself."""
    monkeypatch.setenv("LLM_MERGE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
