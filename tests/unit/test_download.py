"""What opening would download, and the download itself, against a stand-in for the hub."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_merge.checkpoint import open_checkpoint
from llm_merge.download import download, missing_parts
from llm_merge.errors import CheckpointError, Stopped
from tests.tiny_models import TinyFamily, make_tiny_lora

COMMIT = "0" * 40
Hub = Callable[[str, Path], None]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub with the repositories that the test puts on it; downloads go into the real cache layout."""
    repositories: dict[str, Path] = {}
    cache = tmp_path / "hub"

    class Api:
        def model_info(self, name: str, *, revision: str | None, files_metadata: bool) -> Any:
            if name not in repositories:
                raise ConnectionError("no network")
            files = [path for path in repositories[name].rglob("*") if path.is_file()]
            return SimpleNamespace(siblings=[
                SimpleNamespace(rfilename=path.relative_to(repositories[name]).as_posix(), size=path.stat().st_size)
                for path in files
            ])  # fmt: skip

    def fetch(name: str, file: str, *, revision: str | None) -> None:
        folder = cache / f"models--{name.replace('/', '--')}"
        target = folder / "snapshots" / COMMIT / file
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(COMMIT)
        shutil.copyfile(repositories[name] / file, target)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    return repositories.__setitem__


def test_a_model_is_downloaded_once_without_pickles_and_code(hub: Hub, tiny_llama: TinyFamily, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llama.base, tmp_path / "source"))
    for name in ("pytorch_model.bin", "modeling_own.py", "onnx/model.safetensors"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("not wanted")
    hub("acme/small", source)
    assert missing_parts("acme/small") == ("acme/small",)
    steps = list(download("acme/small"))
    shares = [share for _, share in steps]
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert steps[-1] == ("acme/small is here", 1.0)
    assert any(text.startswith("Downloading acme/small: model.safetensors (0 of ") for text, _ in steps)
    checkpoint = open_checkpoint("acme/small", local_only=True)
    assert missing_parts("acme/small") == ()
    names = {path.name for path in checkpoint.folder.rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"pytorch_model.bin", "modeling_own.py"}
    assert not (checkpoint.folder / "onnx").exists()


def test_an_adapter_names_its_base_once_it_is_here(hub: Hub, tiny_llama: TinyFamily, tmp_path: Path) -> None:
    hub("acme/base", tiny_llama.base)
    hub("acme/poet", make_tiny_lora(tmp_path / "poet", 1, tiny_llama.base, base_model_name_or_path="acme/base"))
    assert missing_parts("acme/poet") == ("acme/poet",)
    assert missing_parts("acme/base+acme/poet") == ("acme/base", "acme/poet")
    list(download("acme/poet"))
    assert missing_parts("acme/poet") == ("acme/base",)
    list(download("acme/base"))
    assert missing_parts("acme/poet") == ()
    assert open_checkpoint("acme/poet", local_only=True).base_identity == "acme/base"


def test_stopping_between_files(hub: Hub, tiny_llama: TinyFamily) -> None:
    hub("acme/small", tiny_llama.base)
    stop = threading.Event()
    steps = download("acme/small", stop)
    next(steps)
    stop.set()
    with pytest.raises(Stopped):
        next(steps)
    assert missing_parts("acme/small") == ("acme/small",)


def test_a_hub_that_cannot_be_reached(hub: Hub) -> None:
    with pytest.raises(CheckpointError) as caught:
        list(download("acme/unknown@v2"))
    assert caught.value.message == (
        "There is no folder “acme/unknown@v2”, and the Hugging Face hub could not be reached (the hub cache does not "
        "hold a model of that name). Check the name, or the connection."
    )
    assert caught.value.field == "acme/unknown@v2"


def test_nothing_to_download_for_paths_and_offline(
    hub: Hub, tiny_llama: TinyFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert missing_parts(str(tiny_llama.base)) == ()
    assert missing_parts("/gone/base+/gone/adapter") == ()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert missing_parts("acme/small") == ()
