"""Names of real architectures: every tensor in its block, every block's filter exact, every module's kind known."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from llm_merge.errors import MergeError
from llm_merge.layer_map import kind_of, layer_map

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 12, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 1}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 12, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 12, "num_heads": 4}
BART = {"vocab_size": 64, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "eos_token_id": 1}
BART |= {"encoder_layers": 12, "decoder_layers": 11, "bos_token_id": 1, "forced_eos_token_id": 1}
MOE = {"num_local_experts": 2}
QWEN_MOE = {"num_experts": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
RELATIVE = {"relative_attention": True, "norm_rel_ebd": "layer_norm", "pos_att_type": ["p2c", "c2p"]}

ATTENTION, GATED = {"q": 1, "k": 1, "v": 1, "o": 1}, {"gate": 1, "up": 1, "down": 1}
BIASED = {"q": 2, "k": 2, "v": 2, "o": 2, "up": 2, "down": 2, "norm": 4}  # weights and biases, no gate

# Class, config, the filter of block 1, the kinds of block 1's tensors.
CHAINS: list[tuple[str, str, dict[str, Any], str, dict[str, int]]] = [
    ("LlamaForCausalLM", "LlamaConfig", SIZES, "layers.1.", ATTENTION | GATED | {"norm": 2}),
    ("MistralForCausalLM", "MistralConfig", SIZES, "layers.1.", ATTENTION | GATED | {"norm": 2}),
    ("Qwen2ForCausalLM", "Qwen2Config", SIZES, "layers.1.", {"q": 2, "k": 2, "v": 2, "o": 1} | GATED | {"norm": 2}),
    ("Qwen3ForCausalLM", "Qwen3Config", SIZES, "layers.1.", ATTENTION | GATED | {"norm": 4}),
    ("Gemma2ForCausalLM", "Gemma2Config", SIZES, "layers.1.", ATTENTION | GATED | {"norm": 4}),
    ("Phi3ForCausalLM", "Phi3Config", SIZES, "layers.1.", {"qkv": 1, "o": 1, "mlp": 1, "down": 1, "norm": 2}),
    ("Olmo2ForCausalLM", "Olmo2Config", SIZES, "layers.1.", ATTENTION | GATED | {"norm": 4}),
    ("StableLmForCausalLM", "StableLmConfig", SIZES, "layers.1.", ATTENTION | GATED | {"norm": 4}),
    (
        "MixtralForCausalLM",
        "MixtralConfig",
        SIZES | MOE,
        "layers.1.",
        ATTENTION | {"mlp": 1, "down": 1, "other": 1, "norm": 2},
    ),
    (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        SIZES | QWEN_MOE,
        "layers.1.",
        {"q": 2, "k": 2, "v": 2, "o": 1, "gate": 1, "up": 1, "mlp": 1, "down": 2, "other": 2, "norm": 2},
    ),
    ("GPT2LMHeadModel", "GPT2Config", GPT2, "h.1.", {"qkv": 2, "o": 2, "up": 2, "down": 2, "norm": 4}),
    ("GPT2Model", "GPT2Config", GPT2, "h.1.", {"qkv": 2, "o": 2, "up": 2, "down": 2, "norm": 4}),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES, "layers.1.", {"qkv": 2, "o": 2, "up": 2, "down": 2, "norm": 4}),
    ("FalconForCausalLM", "FalconConfig", SIZES, "h.1.", {"qkv": 1, "o": 1, "up": 1, "down": 1, "norm": 2}),
    ("BertModel", "BertConfig", SIZES, "layer.1.", BIASED),
    ("BertForMaskedLM", "BertConfig", SIZES, "layer.1.", BIASED),
    ("RobertaForMaskedLM", "RobertaConfig", SIZES, "layer.1.", BIASED),
    ("XLMRobertaForSequenceClassification", "XLMRobertaConfig", SIZES, "layer.1.", BIASED),
    ("ElectraForPreTraining", "ElectraConfig", SIZES, "layer.1.", BIASED),
    ("MPNetModel", "MPNetConfig", SIZES, "layer.1.", BIASED),
    ("DebertaV2Model", "DebertaV2Config", SIZES | RELATIVE, "layer.1.", BIASED | {"q": 4, "k": 4}),
    ("ModernBertModel", "ModernBertConfig", SIZES, "layers.1.", {"qkv": 1, "o": 1, "mlp": 1, "down": 1, "norm": 2}),
    (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 64, "dim": 32, "n_layers": 12, "n_heads": 4, "hidden_dim": 48},
        "layer.1.",
        BIASED,
    ),
    ("T5EncoderModel", "T5Config", T5, "block.1.", ATTENTION | {"up": 1, "down": 1, "norm": 2}),
]
PAIRS = [
    ("T5ForConditionalGeneration", "T5Config", T5, "{}.block.1.", 12, 12),
    ("BartForConditionalGeneration", "BartConfig", BART, "{}.layers.1.", 12, 11),
]


def names_of(model: str, config: str, settings: dict[str, Any]) -> tuple[str, ...]:
    import torch
    import transformers

    with torch.device("meta"):
        return tuple(getattr(transformers, model)(getattr(transformers, config)(**settings)).state_dict())


@pytest.mark.parametrize(("model", "config", "settings", "filter_", "kinds"), CHAINS, ids=[row[0] for row in CHAINS])
def test_every_tensor_of_a_chain_has_its_block(
    model: str, config: str, settings: dict[str, Any], filter_: str, kinds: dict[str, int]
) -> None:
    names = names_of(model, config, settings)
    found = layer_map(names)
    assert found.known
    assert [block.key for block in found.blocks] == [str(number) for number in range(12)]
    assert [block.layer for block in found.blocks] == list(range(12))
    assert found.block("1").filter == filter_
    assert found.block("11").title == "Layer 11"
    assert Counter(kind_of(name) for name in found.block("1").tensors) == Counter(kinds)
    assert sorted(name for group in found.groups for name in group.tensors) == sorted(names)  # each of them once
    for block in found.blocks:
        assert tuple(name for name in names if block.filter in name) == block.tensors
    outside = [group.key for group in found.groups if group.layer is None]
    assert outside == [key for key in ("embeddings", "norm", "head", "other") if key in outside]
    assert found.groups[0].key == "embeddings"
    assert set(outside) <= {"embeddings", "norm", "head"} or model == "MPNetModel"  # its bias of positions is shared


@pytest.mark.parametrize(("model", "config", "settings", "filter_", "encoders", "decoders"), PAIRS)
def test_encoder_and_decoder_are_two_chains(
    model: str, config: str, settings: dict[str, Any], filter_: str, encoders: int, decoders: int
) -> None:
    names = names_of(model, config, settings)
    found = layer_map(names)
    expected = [f"encoder.{number}" for number in range(encoders)] + [f"decoder.{number}" for number in range(decoders)]
    assert [block.key for block in found.blocks] == expected
    assert [block.layer for block in found.blocks] == list(range(encoders + decoders))
    assert found.block("encoder.1").filter == filter_.format("encoder")
    assert found.block("decoder.1").filter == filter_.format("decoder")
    assert found.block("decoder.3").title == "Decoder layer 3"
    for block in found.blocks:
        assert tuple(name for name in names if block.filter in name) == block.tensors
    kinds = Counter(kind_of(name) for name in found.block("decoder.1").tensors if not name.endswith(".bias"))
    assert kinds == {"q": 2, "k": 2, "v": 2, "o": 2, "up": 1, "down": 1, "norm": 3}  # two attentions
    assert {group.key for group in found.groups if group.layer is None} <= {"embeddings", "norm", "head"}


@pytest.mark.parametrize(
    ("name", "place", "kind"),
    [
        ("model.embed_tokens.weight", "embeddings", "embeddings"),
        ("model.norm.weight", "norm", "norm"),
        ("lm_head.weight", "head", "head"),
        ("lm_head.layer_norm.weight", "head", "norm"),
        ("classifier.out_proj.weight", "head", "head"),
        ("rotary.inv_freq", "other", "other"),
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj.weight", "other", "q"),
    ],
)
def test_what_lies_outside_of_the_blocks(name: str, place: str, kind: str) -> None:
    found = layer_map([name, "model.layers.0.mlp.up_proj.weight"])
    assert found.group_of(name).key == place
    assert found.group_of(name).layer is None and found.group_of(name).filter == ""
    assert kind_of(name) == kind


def test_a_filter_is_as_long_as_it_must_be() -> None:
    own = ["model.language_model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.down_proj.weight"]
    other = ["model.vision_tower.encoder.layers.0.mlp.fc1.weight"]
    assert layer_map(own).block("0").filter == "layers.0."
    assert layer_map(own + other).block("0").filter == "language_model.layers.0."
    # "layers.0." of a model saved without a prefix is part of the other name: no substring can tell them apart.
    assert layer_map(["layers.0.mlp.Wi.weight", "mtp.layers.0.mlp.Wi.weight"]).block("0").filter == ""


def test_experts_as_they_are_stored() -> None:
    block = "model.layers.0.block_sparse_moe"
    kinds = [kind_of(f"{block}.experts.7.{part}.weight") for part in ("w1", "w3", "w2")]
    assert kinds == ["gate", "up", "down"]
    assert kind_of(f"{block}.gate.weight") == "other"  # the router is no gate projection


def test_blocks_are_in_order_of_depth_whatever_the_order_of_names() -> None:
    names = [f"model.layers.{number}.mlp.up_proj.weight" for number in (10, 2, 0, 1)]
    assert [block.key for block in layer_map(names).blocks] == ["0", "1", "2", "10"]


def test_unknown_names_are_other_and_said_to_be() -> None:
    found = layer_map(["embed_tokens.weight", "stage.3.mixer.weight"])
    assert not found.known and found.blocks == ()
    assert [group.key for group in found.groups] == ["other"]
    with pytest.raises(MergeError, match="no layers were recognised"):
        found.block("0")


def test_unknown_layers_and_tensors_are_told_in_a_sentence() -> None:
    found = layer_map([f"model.layers.{number}.mlp.up_proj.weight" for number in range(3)])
    with pytest.raises(MergeError, match="no layer “7”: choose from 0 to 2"):
        found.block("7")
    with pytest.raises(MergeError, match=r"called “model\.x”"):
        found.group_of("model.x")
    assert layer_map([]).groups == ()
