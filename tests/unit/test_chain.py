"""Standing between blocks: where they are, that a run started in the middle is the whole run, and stopping."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from llm_merge.activation_cache import PrefixCache
from llm_merge.chain import StopHooks, chain_of, replaced_forwards, stacks_of
from llm_merge.errors import Stopped
from llm_merge.evaluation import EvaluationSettings, losses, prepare, resolve_format
from llm_merge.recipe import Recipe
from llm_merge.workbench import bench_for
from tests.tiny_models import TinyFamily

LAYERS = 4
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
WINDOWS = ["sliding_attention", "full_attention"] * 2
DECODERS: dict[str, dict[str, Any]] = {
    "Llama": GROUPED,
    "Qwen2": GROUPED,
    "Qwen3": GROUPED,
    "Mistral": {**GROUPED, "sliding_window": 3},
    "Gemma2": {**GROUPED, "sliding_window": 3, "layer_types": WINDOWS},
    "Gemma3Text": {**GROUPED, "sliding_window": 3, "layer_types": WINDOWS},
    "GPT2": {"vocab_size": 60, "n_embd": 16, "n_layer": LAYERS, "n_head": 2, "n_positions": 64},
    "GPTNeoX": SIZES,
    "Phi3": GROUPED,
    "Falcon": {**SIZES, "alibi": False},
    "Bloom": {"vocab_size": 60, "hidden_size": 16, "n_layer": LAYERS, "n_head": 2},
    "OPT": {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "Mixtral": {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": SIZES,
    "Roberta": SIZES,
    "DistilBert": {"vocab_size": 60, "dim": 16, "hidden_dim": 24, "n_layers": LAYERS, "n_heads": 2},
    "MPNet": SIZES,
    "ModernBert": {
        **SIZES,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "global_attn_every_n_layers": 2,
        "local_attention": 4,
    },
    "DebertaV2": {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "conv_kernel_size": 3},
    "Deberta": {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "Electra": {**SIZES, "embedding_size": 8},
}
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "T5": {
        "vocab_size": 60,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 2,
        "decoder_start_token_id": 0,
    },
    "Bart": {
        "vocab_size": 60,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "max_position_embeddings": 64,
    },
}


def build(name: str, settings: dict[str, Any]) -> Any:
    """A model of the architecture with random weights that are large enough for every block to matter."""
    config = getattr(transformers, f"{name}Config")(**settings)
    auto = "CausalLM" if name in DECODERS else "Seq2SeqLM" if name in SEQ2SEQ else ""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"AutoModelFor{auto}" if auto else "AutoModel").from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def runner(model: Any) -> Callable[[], list[float]]:
    """Two calls of the model on padded batches of different shapes; the numbers that come out."""
    generator = torch.Generator().manual_seed(1)
    calls = []
    for rows, tokens in ((3, 7), (2, 5)):
        ids = torch.randint(3, 60, (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, tokens - 2 :] = 0
        calls.append({"input_ids": ids, "attention_mask": mask})
        if model.config.is_encoder_decoder:
            calls[-1]["labels"] = ids

    def run() -> list[float]:
        values: list[float] = []
        with torch.inference_mode():
            for inputs in calls:
                output = model(**inputs)
                values += output[0 if "labels" not in inputs else 1][:, -3].flatten().tolist()
        return values

    return run


def cache_of(model: Any, budget: int = 10**9, **more: Any) -> PrefixCache:
    return PrefixCache(SimpleNamespace(model=model, device="cpu"), budget, **more)  # type: ignore[arg-type]


@contextmanager
def changed(block: torch.nn.Module, factor: float) -> Iterator[None]:
    before = [parameter.clone() for parameter in block.parameters()]
    for parameter in block.parameters():
        parameter.mul_(factor)
    yield
    for parameter, value in zip(block.parameters(), before, strict=True):
        parameter.copy_(value)


def patched(model: torch.nn.Module) -> bool:
    return any(
        "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks for module in model.modules()
    )


ARCHITECTURES = [pytest.param(name, settings, id=name) for name, settings in {**DECODERS, **ENCODERS}.items()]


# ── where the blocks are ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("Llama", "model.layers"),
        ("Mixtral", "model.layers"),
        ("GPT2", "transformer.h"),
        ("GPTNeoX", "gpt_neox.layers"),
        ("OPT", "model.decoder.layers"),
        ("Bert", "encoder.layer"),
        ("DistilBert", "transformer.layer"),
        ("ModernBert", "layers"),
    ],
)
def test_the_chain_is_found_by_structure(name: str, path: str) -> None:
    chain = chain_of(build(name, {**DECODERS, **ENCODERS}[name]))
    assert chain is not None
    assert (chain.path, len(chain)) == (path, LAYERS)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_two_stacks_are_no_chain(name: str) -> None:
    model = build(name, SEQ2SEQ[name])
    assert chain_of(model) is None
    assert [len(stack) for stack in stacks_of(model)] == [2, 2]


def test_a_model_without_blocks_has_no_chain() -> None:
    lists = torch.nn.ModuleDict({"heads": torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])})
    assert chain_of(lists) is None
    assert stacks_of(lists) == ()


# ── starting in the middle ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "settings"), ARCHITECTURES)
def test_a_replay_after_a_change_is_the_full_pass(name: str, settings: dict[str, Any]) -> None:
    model = build(name, settings)
    run, cache = runner(model), cache_of(model)
    assert cache.works(run)
    chain = chain_of(model)
    assert chain is not None
    with cache.recording("m", range(LAYERS + 1)):
        whole = run()
    assert whole == run()
    assert cache.nbytes > 0
    for layer, block in enumerate(chain.blocks):
        with changed(block, 1.5):
            expected = run()
            assert expected != whole
            for start in range(layer + 1):
                with cache.starting_at("m", start):
                    assert run() == pytest.approx(expected, rel=1e-6)
    with cache.starting_at("m", LAYERS):
        assert run() == pytest.approx(whole, rel=1e-6)
    assert not patched(model)


def test_what_is_skipped_is_not_run() -> None:
    model = build("Llama", DECODERS["Llama"])
    run, cache = runner(model), cache_of(model)
    assert cache.works(run)
    with cache.recording("m", [2]):
        expected = run()
    with changed(model.model.layers[:2], float("nan")):
        for start in (2, 3, LAYERS):  # nothing is kept for 3 and 4: these start at 2
            with cache.starting_at("m", start):
                assert run() == expected


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_models_without_a_chain_run_in_full(name: str) -> None:
    model = build(name, SEQ2SEQ[name])
    run, cache = runner(model), cache_of(model)
    assert not cache.works(run)
    with cache.recording("m", [1, 2]):
        whole = run()
    assert cache.nbytes == 0
    with changed(model.get_encoder(), 1.1), cache.starting_at("m", 2):
        assert run() != whole


def test_blocks_that_hand_on_more_than_their_state_fail_the_self_check() -> None:
    """T5's first block makes the position bias of all others, here in a stack of its own."""
    config = transformers.T5Config(**SEQ2SEQ["T5"], num_decoder_layers=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.T5EncoderModel(config).eval()
    assert chain_of(model) is not None
    ids = torch.arange(3, 15).reshape(2, 6)

    def run() -> list[float]:
        with torch.inference_mode():
            return list(model(input_ids=ids)[0].flatten().tolist())

    cache = cache_of(model)
    assert not cache.works(run)
    with cache.recording("m", [1]):
        whole = run()
    with cache.starting_at("m", 1):
        assert run() == whole
    assert not patched(model)


@pytest.mark.parametrize(("budget", "cpu_budget"), [(0, 10**9), (2000, 2000), (1500, 0), (0, 0)])
def test_any_budget_is_exact_and_kept_to(budget: int, cpu_budget: int) -> None:
    model = build("Qwen3", DECODERS["Qwen3"])
    run, cache = runner(model), cache_of(model, budget, cpu_budget_bytes=cpu_budget)
    assert cache.works(run)
    with cache.recording("m", range(LAYERS + 1)):
        run()
    assert cache.spilled_bytes <= cpu_budget
    assert cache.nbytes - cache.spilled_bytes <= budget
    assert (cache.nbytes > 0) == (budget + cpu_budget > 0)
    for layer in range(LAYERS):
        with changed(model.model.layers[layer], 1.5):
            expected = run()
            with cache.starting_at("m", layer):
                assert run() == pytest.approx(expected, rel=1e-6)


def test_gaps_are_even_where_not_all_fits() -> None:
    model = build("Llama", DECODERS["Llama"])
    run = runner(model)
    one = 4 * 16 * (3 * 7 + 2 * 5)  # float32 states of both calls
    cache = cache_of(model, 2 * one, cpu_budget_bytes=0)
    assert cache.works(run)
    with cache.recording("m", [1, 2, 3, 4]):
        expected = run()
    assert cache.nbytes == 2 * one
    with changed(model.model.layers[1], float("nan")), cache.starting_at("m", 2):
        assert run() == expected


def test_slots_are_apart_and_dropped_alone() -> None:
    model = build("Bert", ENCODERS["Bert"])
    run, cache = runner(model), cache_of(model)
    assert cache.works(run)
    with cache.recording("a", [2]):
        first = run()
    size = cache.nbytes
    with changed(model, 1.1):
        with cache.recording(("b", 1), [2]):
            second = run()
        assert cache.nbytes == 2 * size
        with changed(model.encoder.layer[0], float("nan")), cache.starting_at(("b", 1), 2):
            assert run() == second
    cache.drop("a")
    cache.drop("a")
    assert (cache.nbytes, cache.spilled_bytes) == (size, 0)
    assert first != second


def test_other_inputs_than_recorded_are_not_taken() -> None:
    model = build("Llama", DECODERS["Llama"])
    run, cache = runner(model), cache_of(model)
    assert cache.works(run)
    with cache.recording("m", [2]):
        run()
    with cache.starting_at("m", 2), pytest.raises(RuntimeError, match="call 1 has other inputs"):
        model(input_ids=torch.ones(1, 2, dtype=torch.long))


@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder-decoder"])
def test_losses_of_a_family_are_replayed(
    kind: str, tiny_llama: TinyFamily, tiny_bert: TinyFamily, tiny_t5: TinyFamily
) -> None:
    """Several batches, and several calls to a batch for the embedding model."""
    family = {"decoder": tiny_llama, "encoder": tiny_bert, "encoder-decoder": tiny_t5}[kind]
    bench = bench_for(Recipe.linear(family.references[1:], [0.4, 0.6]), kind, "cpu")
    texts = ["harbour", "the capital of France", "gospel " * 9, "wind and waves", "corn"]
    pairs = [{"query": text, "pos": [text[::-1]], "neg": texts, "input": text, "output": text[::-1]} for text in texts]
    fmt = resolve_format([bench.checkpoint], "plain")
    rows = prepare(pairs, kind, bench.tokenizer, EvaluationSettings(batch_size=2, neg_number=20), fmt)

    def run() -> list[float]:
        return [loss for _, loss in sorted(losses(bench, rows))]

    cache = PrefixCache(bench, 10**9)
    assert cache.works(run) == (kind != "encoder-decoder")
    with bench.lock, cache.recording("m", [1, 2]):
        run()
    last = stacks_of(bench.model)[-1].blocks[-1]
    with changed(last, 1.25):
        expected = run()
        with cache.starting_at("m", 1):
            assert run() == pytest.approx(expected, rel=1e-6)


# ── stopping ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["Llama", "T5"])
def test_stop_answers_at_the_next_block_forwards(name: str) -> None:
    model = build(name, {**DECODERS, **SEQ2SEQ}[name])
    run, stop, seen = runner(model), threading.Event(), []

    def watched(number: int, own: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            seen.append(number)
            if number == 1:
                stop.set()
            return own(*args, **kwargs)

        return forward

    blocks = [block for stack in stacks_of(model) for block in stack.blocks]
    with StopHooks(model, stop), replaced_forwards(blocks, watched), pytest.raises(Stopped):
        run()
    assert seen == [0, 1]
    assert not patched(model)


def test_stop_answers_at_the_next_block_backwards() -> None:
    model = build("Llama", DECODERS["Llama"]).requires_grad_(True)
    stop = threading.Event()
    with StopHooks(model, stop):
        loss = model(input_ids=torch.arange(3, 9).reshape(1, 6)).logits.sum()
        model.model.layers[2].mlp.down_proj.weight.register_post_accumulate_grad_hook(lambda _: stop.set())
        with pytest.raises(Stopped):
            loss.backward()
    assert model.model.layers[3].mlp.down_proj.weight.grad is not None
    assert model.model.layers[1].mlp.down_proj.weight.grad is None


def test_a_model_without_blocks_is_stopped_at_its_next_call() -> None:
    model, stop = torch.nn.Linear(2, 2), threading.Event()
    with StopHooks(model, stop):
        model(torch.zeros(1, 2))
        stop.set()
        with pytest.raises(Stopped):
            model(torch.zeros(1, 2))
    model(torch.zeros(1, 2))


@pytest.mark.parametrize("where", ["works", "recording", "starting"])
def test_a_stop_leaves_the_model_as_it_was(where: str) -> None:
    model, stop = build("Gemma3Text", DECODERS["Gemma3Text"]), threading.Event()
    run, cache = runner(model), cache_of(model, stop=stop)
    if where == "works":
        stop.set()
        with pytest.raises(Stopped):
            cache.works(run)
        stop.clear()
    expected = run()
    assert cache.works(run)
    if where == "recording":
        stop.set()
        with pytest.raises(Stopped), cache.recording("m", [2]):
            run()
        assert cache.nbytes == 0
    else:
        with cache.recording("m", [2]):
            run()
        stop.set()
        with pytest.raises(Stopped), cache.starting_at("m", 2):
            run()
    assert not patched(model)
    assert run() == expected
