"""Losses: which tokens count, that they are transformers' own numbers, and that padding and batches never show."""

from __future__ import annotations

import json
import math
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_merge.checkpoint import open_checkpoint
from llm_merge.errors import ExampleError, RecipeError, Stopped
from llm_merge.evaluation import (
    EvaluationSettings,
    Prepared,
    embed,
    losses,
    mean_and_error,
    prepare,
    preview,
    resolve_format,
    saturation,
    similarity,
)
from llm_merge.families.encoder import contrast_groups
from llm_merge.prompts import PLAIN, chat_template, tokenizer_warnings
from llm_merge.recipe import Recipe
from llm_merge.retrieval import Retrieval, retrieval
from llm_merge.workbench import Workbench, bench_for
from tests.tiny_models import TinyFamily

ROWS: list[dict[str, Any]] = [
    {"task": "verse", "input": "Say it as the King James Version does", "output": "And he said unto them, Go ye"},
    {"task": "verse", "input": "Capital?", "output": "Paris."},
    {"task": "verse", "input": "Was sagt der Vers über die Völker?", "output": "Él creó 😀 los cielos"},
    {"task": "verse", "input": "Define the word: harbour.", "output": "A place where ships are sheltered. " * 3},
    {"task": "verse", "input": "Yes or no?", "output": "no"},
]
SEARCH: list[dict[str, Any]] = [
    {"query": "harbour", "pos": ["a place where ships are sheltered"], "neg": ["a city", "a wind", "a wave"]},
    {"query": "the capital of France", "pos": ["Paris"], "neg": []},
    {"query": "gospel", "pos": ["preach to every creature", "good news"], "neg": ["heart"]},
    {"query": "gladness", "pos": ["in my heart"]},
    {"query": "corn", "pos": ["their corn increased"]},
]


@pytest.fixture(scope="module")
def llama(tiny_llama: TinyFamily) -> Workbench:
    return bench_for(Recipe.linear(tiny_llama.references[1:], [0.4, 0.6]), "decoder", "cpu")


@pytest.fixture(scope="module")
def bert(tiny_bert: TinyFamily) -> Workbench:
    return bench_for(Recipe.linear(tiny_bert.references[1:], [0.4, 0.6]), "encoder", "cpu")


def prepared(bench: Workbench, rows: list[dict[str, Any]], format: str = "auto", **settings: Any) -> Prepared:
    fmt = resolve_format([bench.checkpoint], format)
    return prepare(rows, bench.model_type, bench.tokenizer, EvaluationSettings(format=format, **settings), fmt)


def in_order(bench: Workbench, rows: Prepared) -> list[float]:
    return [loss for _, loss in sorted(losses(bench, rows))]


# ── the format ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_first_model_with_a_chat_template_decides_for_all(tmp_path: Path, tiny_llama: TinyFamily) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama.base, bare)
    (bare / "chat_template.jinja").unlink()
    models = [open_checkpoint(str(bare)), open_checkpoint(str(tiny_llama.base))]
    fmt = resolve_format(models)
    assert (fmt.kind, fmt.eos) == ("chat", "<|im_end|>")
    assert fmt.why == "Chat format: every model reads the chat template of base."
    assert resolve_format(models[:1]).why.endswith("the answer, and the end token. No model has a chat template.")
    assert resolve_format(models, "plain") == PLAIN


def test_format_that_cannot_be_is_told(tiny_t5: TinyFamily) -> None:
    with pytest.raises(RecipeError, match="The format `chta` is not known: use auto, chat or plain"):
        resolve_format([], "chta")
    with pytest.raises(RecipeError, match="None of the models has a chat template: choose the format plain"):
        resolve_format([open_checkpoint(str(tiny_t5.base))], "chat")


def test_templates_inside_the_tokenizer_s_config_are_found(tmp_path: Path) -> None:
    for stored in ("T", [{"name": "tool", "template": "no"}, {"name": "default", "template": "T"}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": stored}))
        assert chat_template(tmp_path) == "T"
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert chat_template(tmp_path) is None


def test_other_tokenizer_files_of_the_same_size_are_pointed_out(tmp_path: Path, tiny_llama: TinyFamily) -> None:
    shutil.copytree(tiny_llama.base, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer_config.json"
    path.write_text(path.read_text().replace("<|endoftext|>", "<|im_start|>"))
    models = [open_checkpoint(str(folder)) for folder in (tiny_llama.base, tiny_llama.base, tmp_path / "other")]
    (warning,) = tokenizer_warnings(models)
    assert warning.startswith(f"{tmp_path / 'other'} has other tokenizer files than {tiny_llama.base}")


# ── chat models ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_answer_and_its_end_are_scored_and_nothing_else(llama: Workbench) -> None:
    rows = prepared(llama, ROWS)
    for index, row in enumerate(ROWS):
        assert preview(rows, index) == [
            (f"<|im_start|>user\n{row['input']}<|im_end|>\n<|im_start|>assistant\n", False),
            (f"{row['output']}<|im_end|>", True),
        ]


def test_a_conversation_is_read_turn_by_turn(llama: Workbench) -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Capital?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rows = [{"input": "Capital?", "output": "Paris.", "messages": messages}]
    shown = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    expected = [(f"{shown}<|im_start|>assistant\n", False), ("Paris.<|im_end|>", True)]
    assert preview(prepared(llama, rows), 0) == expected
    plain = "".join(text for text, _ in preview(prepared(llama, rows, "plain"), 0))
    assert plain == "Be brief. Hi Hello Capital? Paris.<|im_end|>"


def test_plain_rows_are_lm_cocktail_s(llama: Workbench) -> None:
    rows = prepared(llama, ROWS, "plain")
    for index, row in enumerate(ROWS):
        pieces = preview(rows, index)
        assert "".join(text for text, _ in pieces) == f"{row['input']} {row['output']}<|im_end|>"
        assert pieces[-1][1]
        assert pieces[-1][0].lstrip() == f"{row['output']}<|im_end|>"
        assert rows.rows[index].ids[-1] == llama.tokenizer.eos_token_id


def test_a_token_over_the_border_belongs_to_the_answer(tiny_llama: TinyFamily) -> None:
    """In the plain form " said" is one token: space and word cannot be parted, so the token is scored whole."""
    bench = bench_for(Recipe.single(str(tiny_llama.base)), "decoder", "cpu")
    rows = prepared(bench, [{"input": "he", "output": "said"}], "plain")
    tokens = [bench.tokenizer.convert_ids_to_tokens(token) for token in rows.rows[0].ids]
    scored = [token for token, marked in zip(tokens, rows.rows[0].scored, strict=True) if marked]
    assert "".join(scored).lstrip("Ġ") == "said<|im_end|>"
    assert "".join(tokens) == "heĠsaid<|im_end|>"


@pytest.mark.parametrize("format", ["chat", "plain"])
def test_the_loss_is_transformers_own_one_row_at_a_time(llama: Workbench, format: str) -> None:
    rows = prepared(llama, ROWS, format)
    for row, loss in zip(rows.rows, in_order(llama, rows), strict=True):
        ids = torch.tensor([row.ids])
        labels = ids.masked_fill(~torch.tensor([row.scored]), -100)
        with torch.inference_mode():
            expected = float(llama.model(input_ids=ids, labels=labels).loss)
        assert loss == pytest.approx(expected, abs=1e-5)


def test_batches_change_no_loss_although_the_pad_token_is_the_end_token(llama: Workbench) -> None:
    assert llama.tokenizer.pad_token_id == llama.tokenizer.eos_token_id
    alone = in_order(llama, prepared(llama, ROWS, batch_size=1))
    assert in_order(llama, prepared(llama, ROWS, batch_size=5)) == pytest.approx(alone, abs=1e-5)
    assert in_order(llama, prepared(llama, ROWS, batch_size=2)) == pytest.approx(alone, abs=1e-5)
    shuffled = in_order(llama, prepared(llama, ROWS[::-1], batch_size=3))
    assert shuffled[::-1] == pytest.approx(alone, abs=1e-5)


def test_logits_that_would_not_fit_are_made_in_smaller_batches(
    llama: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = llama.model.forward

    def watched(**inputs: Any) -> Any:
        seen.append(len(inputs["input_ids"]))
        return forward(**inputs)

    whole = in_order(llama, prepared(llama, ROWS))
    monkeypatch.setattr("llm_merge.families.base.LOGIT_BYTES", 4 * 300 * 40)
    monkeypatch.setattr("llm_merge.families.decoder.takes", lambda model, parameter: True)
    monkeypatch.setattr(llama.model, "forward", watched)
    assert in_order(llama, prepared(llama, ROWS)) == pytest.approx(whole, abs=1e-5)
    assert max(seen) < len(ROWS)
    assert sum(seen) == len(ROWS)


def test_a_tokenizer_without_a_pad_token_measures_the_same(tmp_path: Path, tiny_llama: TinyFamily) -> None:
    folder = tmp_path / "no-pad"
    shutil.copytree(tiny_llama.base, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    bare = bench_for(Recipe.single(str(folder)), "decoder", "cpu")
    assert bare.tokenizer.pad_token_id is None
    full = bench_for(Recipe.single(str(tiny_llama.base)), "decoder", "cpu")
    assert in_order(bare, prepared(bare, ROWS)) == in_order(full, prepared(full, ROWS))


def test_every_row_without_an_answer_is_named(llama: Workbench) -> None:
    rows = [*ROWS, {"task": "verse", "input": "What?", "output": "  "}, {"input": "What?", "output": ""}]
    with pytest.raises(ExampleError) as caught:
        prepared(llama, rows)
    assert caught.value.problems == (
        "Row 6 (verse) has an empty answer: fill in its output or remove the row.",
        "Row 7 has an empty answer: fill in its output or remove the row.",
    )


def test_an_answer_that_is_cut_away_is_an_error_and_not_nan(llama: Workbench) -> None:
    rows = [{"input": "word " * 100, "output": "yes"}, ROWS[1]]
    with pytest.raises(ExampleError) as caught:
        prepared(llama, rows, max_input_length=60)
    (problem,) = caught.value.problems
    assert problem.startswith("Row 1: its ")
    assert problem.endswith(
        " tokens are cut at 60 and nothing of the answer is left: shorten the question or raise the longest input."
    )


def test_an_answer_that_is_partly_cut_is_measured_and_noted(llama: Workbench) -> None:
    rows = prepared(llama, [ROWS[1], {"input": "word?", "output": "word " * 100}], max_input_length=60)
    assert rows.notes == ("1 of 2 answers are cut at 60 tokens.",)
    assert all(math.isfinite(loss) for loss in in_order(llama, rows))
    assert len(rows.rows[1].ids) == 60


def test_no_rows_at_all(llama: Workbench) -> None:
    with pytest.raises(ExampleError, match="There are no example rows: paste some or choose a demo set"):
        prepared(llama, [])


def test_measuring_stops_when_asked(llama: Workbench) -> None:
    stop = threading.Event()
    running = losses(llama, prepared(llama, ROWS, batch_size=1), stop)
    next(running)
    stop.set()
    with pytest.raises(Stopped):
        next(running)


def test_the_key_names_what_changes_a_loss() -> None:
    assert EvaluationSettings(batch_size=2).key("decoder") == EvaluationSettings(batch_size=8).key("decoder")
    assert EvaluationSettings(batch_size=2).key("encoder") != EvaluationSettings(batch_size=8).key("encoder")
    assert EvaluationSettings(format="chat").key("decoder") != EvaluationSettings(format="plain").key("decoder")


# ── encoder-decoder ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_encoder_decoder_s_loss_is_transformers_own(tiny_t5: TinyFamily) -> None:
    bench = bench_for(Recipe.linear(tiny_t5.references[1:], [0.4, 0.6]), "encoder-decoder", "cpu")
    rows = prepared(bench, ROWS, batch_size=2)
    assert preview(rows, 1) == [("Capital?</s>", False), ("Paris.</s>", True)]
    for row, loss in zip(rows.rows, in_order(bench, rows), strict=True):
        with torch.inference_mode():
            labels = torch.tensor([row.answer])
            expected = float(bench.model(input_ids=torch.tensor([row.question]), labels=labels).loss)
        assert loss == pytest.approx(expected, abs=1e-5)


def test_an_encoder_decoder_needs_a_question(tiny_t5: TinyFamily) -> None:
    bench = bench_for(Recipe.single(tiny_t5.references[0]), "encoder-decoder", "cpu")
    with pytest.raises(ExampleError, match="Row 1 has an empty question: fill in its input or remove the row"):
        prepared(bench, [{"input": "", "output": "yes"}])


# ── embedding models ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("batch_size", [2, 32])
def test_each_query_competes_with_all_passages_of_its_batch(bert: Workbench, batch_size: int) -> None:
    """The loss written out: −log softmax of the passage's similarity / 0.05 among the batch's passages."""
    rows = prepared(bert, SEARCH, batch_size=batch_size)
    measured = in_order(bert, rows)
    for group in contrast_groups([3, 0, 1, 0, 0], batch_size):
        passages = [text for index in group for text in (SEARCH[index]["pos"][0], *(SEARCH[index].get("neg") or []))]
        for index in group:
            query = embed(bert, [SEARCH[index]["query"]], "query")
            scores = similarity(query, embed(bert, passages))[0].astype(float) / 0.05
            own = scores[passages.index(SEARCH[index]["pos"][0])]
            assert measured[index] == pytest.approx(np.log(np.exp(scores - own).sum()), abs=1e-4)


def test_a_last_row_alone_joins_the_batch_before() -> None:
    assert contrast_groups([0] * 5, 2) == [[0, 1], [2, 3, 4]]
    assert contrast_groups([0, 0, 0, 0, 1], 2) == [[0, 1], [2, 3], [4]]  # it has a negative to compete with
    assert contrast_groups([0], 2) == [[0]]


def test_one_row_without_negatives_is_declined(bert: Workbench) -> None:
    with pytest.raises(ExampleError) as caught:
        prepared(bert, [{"query": "a", "pos": ["b"]}])
    assert str(caught.value) == "One row without negatives has nothing to compete with: add rows or give it negatives."


def test_rows_without_query_or_passage_are_named(bert: Workbench) -> None:
    with pytest.raises(ExampleError) as caught:
        prepared(bert, [{"query": " ", "pos": ["b"]}, {"query": "a", "pos": []}])
    assert caught.value.problems == (
        "Row 1 has an empty query: fill in its query or remove the row.",
        "Row 2 has no passage to find: fill in its pos or remove the row.",
    )


def test_negatives_are_drawn_by_the_seed_and_fewer_is_fine(bert: Workbench) -> None:
    rows = [
        {"query": "a", "pos": ["b"], "neg": [f"n{i}" for i in range(20)]},
        {"query": "c", "pos": ["d"], "neg": ["e"]},
    ]
    first, again = prepared(bert, rows, neg_number=4), prepared(bert, rows, neg_number=4)
    assert first.rows == again.rows
    assert [len(row.negatives) for row in first.rows] == [4, 1]
    assert prepared(bert, rows, neg_number=4, seed=1).rows != first.rows


def test_the_competition_is_told(bert: Workbench) -> None:
    assert prepared(bert, SEARCH, batch_size=32).notes[0] == "Each query competes with 9 passages."
    assert prepared(bert, SEARCH, batch_size=2).notes[0] == "Each query competes with 4 to 5 passages."


def test_a_saturated_loss_is_pointed_out(bert: Workbench) -> None:
    rows = prepared(bert, SEARCH, batch_size=32)
    assert saturation(rows, [0.01, 0.5]) == ""
    assert saturation(rows, [0.01, 0.002]).startswith(
        "Every model finds nearly every passage (losses below 0.04, chance is 2.20): use more rows to a batch"
    )


def test_prefixes_are_the_model_s_own(tmp_path: Path, tiny_bert: TinyFamily) -> None:
    shutil.copytree(tiny_bert.base, tmp_path / "e5")
    prompts = {"prompts": {"query": "query: ", "passage": "passage: "}}
    (tmp_path / "e5" / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    bench = bench_for(Recipe.single(str(tmp_path / "e5")), "encoder", "cpu")
    rows = prepared(bench, SEARCH)
    assert preview(rows, 1) == [("query: the capital of France\n", False), ("passage: Paris", True)]
    plain = bench_for(Recipe.single(str(tiny_bert.base)), "encoder", "cpu")
    assert np.array_equal(embed(bench, ["harbour"], "query"), embed(plain, ["query: harbour"], "query"))


# ── retrieval ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ranks_are_counted_over_all_passages(bert: Workbench) -> None:
    found = retrieval(bert, SEARCH)
    pool = list(dict.fromkeys(t for row in SEARCH for t in (*row["pos"], *row.get("neg", []))))
    assert found.pool == len(pool) == 10
    scores = similarity(embed(bert, [row["query"] for row in SEARCH], "query"), embed(bert, pool))
    for rank, row, line in zip(found.ranks, SEARCH, scores, strict=True):
        by_text = dict(zip(pool, line.tolist(), strict=True))
        best = max(by_text[text] for text in row["pos"])
        assert rank == 1 + sum(by_text[text] > best for text in pool if text not in row["pos"])


def test_a_model_that_cannot_tell_texts_apart_finds_nothing(bert: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "llm_merge.retrieval.embed", lambda bench, texts, kind, stop: np.ones((len(texts), 4), np.float32)
    )
    assert retrieval(bert, SEARCH).ranks == (10, 10, 9, 10, 10)  # "gospel" has two right ones


def test_summaries_of_ranks() -> None:
    found = Retrieval((1, 2, 11), 20)
    assert found.recall_at_1.mean == pytest.approx(1 / 3)
    assert found.mrr.mean == pytest.approx((1 + 1 / 2 + 1 / 11) / 3)
    assert found.ndcg_at_10.values == pytest.approx((1.0, 1 / math.log2(3), 0.0))
    assert found.recall_at_1.error == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 2))  # sd / √n with n − 1


def test_mean_and_error() -> None:
    assert mean_and_error([2.0, 4.0]) == (3.0, 1.0)
    assert math.isnan(mean_and_error([2.0])[1])
