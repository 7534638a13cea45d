"""The exact preview shows what a model is really given, only when that is at hand or asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from components import exact_preview
from components.session import Session
from llm_merge.errors import ExampleError, MergeError
from tests.tiny_models import make_tiny_bert, make_tiny_llama

PAIRS = [{"input": "hot?", "output": "cold", "task": ""}, {"input": "up?", "output": "down", "task": ""}]
PASSAGES = [{"query": "hot", "pos": ["warm", "mild"], "neg": ["cold"], "task": ""},
            {"query": "up", "pos": ["high"], "neg": [], "task": ""}]  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    exact_preview._readers.clear()
    exact_preview._prepared.clear()


def test_a_chat_model_is_read_once_it_is_asked_for(tmp_path: Path) -> None:
    folder = str(make_tiny_llama(tmp_path / "a", 0))
    session = Session(base=folder).with_rows(PAIRS, "mine", ())
    assert not exact_preview.is_quick(session)
    first = exact_preview.exact_row(session, 0)
    assert exact_preview.is_quick(session)
    assert exact_preview.is_quick(session.with_rows(PAIRS[:1], "mine", ()))
    assert not exact_preview.is_quick(session.with_rows(PAIRS * 200, "mine", ()))
    scored = "".join(text for text, is_scored in first.pieces if is_scored)
    assert scored.startswith("cold")
    assert "hot?" in "".join(text for text, is_scored in first.pieces if not is_scored)
    assert 0 < first.scored < first.tokens
    assert exact_preview.exact_row(session, 1).pieces != first.pieces


def test_an_embedding_model_in_a_folder_needs_no_tokenizer(tmp_path: Path) -> None:
    folder = str(make_tiny_bert(tmp_path / "a", 0))
    session = Session("encoder", folder).with_rows(PASSAGES, "mine", ())
    assert exact_preview.is_quick(session)
    row = exact_preview.exact_row(session, 0)
    assert [text.strip() for text, _ in row.pieces] == ["hot", "warm", "cold"]
    assert "Each query competes with 3 passages." in row.notes


def test_without_models_or_rows_nothing_is_at_hand() -> None:
    assert not exact_preview.is_quick(Session("encoder", "somewhere"))
    assert not exact_preview.is_quick(Session().with_rows(PAIRS, "mine", ()))
    assert not exact_preview.is_quick(Session("encoder", "org/on-the-hub").with_rows(PASSAGES, "mine", ()))


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    missing = Session(base=str(tmp_path / "nowhere")).with_rows(PAIRS, "mine", ())
    with pytest.raises(MergeError, match="nowhere"):
        exact_preview.exact_row(missing, 0)
    folder = str(make_tiny_llama(tmp_path / "a", 0))
    long = [*PAIRS, {"input": "word " * 3000, "output": "b", "task": ""}]
    with pytest.raises(ExampleError, match="Row 3") as caught:
        exact_preview.exact_row(Session(base=folder).with_rows(long, "mine", ()), 0)
    assert "nothing of the answer is left" in str(caught.value)
