"""How the session's models read the session's rows, token by token: tokenizers are loaded once and kept.

The first use imports transformers and takes seconds, so nothing here runs until somebody asks to see it. Knows sessions
and the core; draws nothing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.session import Session, row_shape

if TYPE_CHECKING:
    from llm_merge.evaluation import Prepared

KEPT = 4  # sets of models, and sets of rows
QUICK_ROWS = 256  # rows that are turned into tokens at once without being asked to


@dataclass(frozen=True)
class ExactRow:
    """One row as the models read it.

    pieces          the exact text, each piece with whether the loss is taken over it
    tokens, scored  how many tokens the row has, and over how many the loss is taken; 0 where only texts count
    notes           one sentence each: the format, what competes with what, what was cut
    """

    pieces: tuple[tuple[str, bool], ...]
    tokens: int
    scored: int
    notes: tuple[str, ...]


_lock = threading.Lock()
_readers: OrderedDict[tuple[Any, ...], tuple[Any, Any]] = OrderedDict()
_prepared: OrderedDict[tuple[Any, ...], Prepared] = OrderedDict()


def is_quick(session: Session) -> bool:
    """Whether the exact text can be shown at once: the rows are few, and what reads them is loaded or soon read."""
    if not session.models or not session.rows:
        return False
    # An embedding model in a folder: two small files say what is written before its texts.
    at_hand = row_shape(session.model_type) == "search" and Path(session.models[0].partition("+")[0]).is_dir()
    return (at_hand or _models_key(session) in _readers) and len(session.rows) <= QUICK_ROWS


def exact_row(session: Session, index: int) -> ExactRow:
    """Row `index` as the session's models read it.

    Raises CheckpointError for a model that cannot be opened, ExampleError naming every row that cannot be measured.
    """
    from llm_merge.evaluation import preview

    prepared = _prepare(session)
    row = prepared.rows[index]
    ids, scored = getattr(row, "ids", ()), getattr(row, "scored", ())
    notes = prepared.notes if row_shape(session.model_type) == "search" else (prepared.format.why, *prepared.notes)
    return ExactRow(tuple(preview(prepared, index)), len(ids), sum(scored), notes)


def _prepare(session: Session) -> Prepared:
    from llm_merge.evaluation import prepare
    from llm_merge.measurement_keys import default_settings

    with _lock:  # two visitors who ask at once need one tokenizer
        key = _rows_key(session)
        if key not in _prepared:
            tokenizer, fmt = _reader(session)
            settings = default_settings(session.model_type)
            _keep(_prepared, key, prepare(session.rows, session.model_type, tokenizer, settings, fmt))
        return _prepared[key]


def _reader(session: Session) -> tuple[Any, Any]:
    """The tokenizer and the one format for all models; an embedding model's files say enough without a tokenizer."""
    from llm_merge.checkpoint import open_checkpoint
    from llm_merge.evaluation import resolve_format
    from llm_merge.families import get_family
    from llm_merge.families.pooling import read_search

    key = _models_key(session)
    if key not in _readers:
        if row_shape(session.model_type) == "search":
            first = open_checkpoint(session.models[0])
            _keep(_readers, key, (_TextsOnly(read_search(first.folder)), None))
        else:
            checkpoints = [open_checkpoint(model) for model in session.models]
            tokenizer = get_family(session.model_type).load_tokenizer(checkpoints[0])
            _keep(_readers, key, (tokenizer, resolve_format(checkpoints)))
    return _readers[key]


@dataclass(frozen=True)
class _TextsOnly:
    """Stands in for an embedding model's tokenizer where only its prefixes matter."""

    search: Any


def _keep(store: OrderedDict[tuple[Any, ...], Any], key: tuple[Any, ...], value: Any) -> None:
    store[key] = value
    while len(store) > KEPT:
        store.popitem(last=False)


def _models_key(session: Session) -> tuple[Any, ...]:
    return session.model_type, session.models


def _rows_key(session: Session) -> tuple[Any, ...]:
    return *_models_key(session), session.rows_hash
