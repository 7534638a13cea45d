"""Turns the packaged SmolLM2 GGUF into an ordinary model folder: bfloat16 safetensors, tokenizer, template, configs.

Each tensor is dequantised in float32 and rounded once; everything else is written from the GGUF's own fields in a fixed
order, so every machine gets the same bytes. It knows this one file's layout (Llama weights, GPT-2 style tokens) and is
no general GGUF reader; it needs numpy and gguf, and neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_LAYER_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_OTHER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_CONTROL = 3
"""GGUF's token type for special tokens."""


def write_llama(source: Path, folder: Path, identity: str) -> Iterator[tuple[str, float]]:
    """Writes the model folder; `identity` is the hub id that config.json names as the model's own."""
    import gguf
    from gguf.quants import dequantize

    yield "Reading the packaged SmolLM2", 0.0
    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    config = _config(fields, identity)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors = {_name(tensor.name): tensor for tensor in reader.tensors}
    with open(folder / "model.safetensors", "wb") as file:
        # GGUF names the fastest dimension first.
        file.write(_header({name: [int(n) for n in reversed(t.shape)] for name, t in tensors.items()}))
        for done, (name, tensor) in enumerate(sorted(tensors.items())):
            yield f"Converting SmolLM2: {name}", 0.1 + 0.85 * done / len(tensors)
            values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            if (projection := name.split(".")[-2]) in heads:
                values = _unpermute(values, heads[projection])
            file.write(_bfloat16(values).tobytes())
    yield "Writing SmolLM2's tokenizer", 0.95
    for name, content in {
        "config.json": config,
        "generation_config.json": {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "tokenizer.json": _tokenizer(fields),
        "tokenizer_config.json": _tokenizer_config(fields),
    }.items():
        text = json.dumps(content, indent=2, sort_keys=name != "tokenizer.json", ensure_ascii=False)
        (folder / name).write_bytes(text.encode() + b"\n")  # bytes: Windows must not write another line end
    (folder / "chat_template.jinja").write_bytes(fields["tokenizer.chat_template"].encode())


def _name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    stem = gguf_name.removesuffix(".weight")
    if stem in _OTHER_NAMES:
        return f"{_OTHER_NAMES[stem]}.weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"


def _header(shapes: dict[str, list[int]]) -> bytes:
    """A safetensors header for bfloat16 tensors in order of name. Written here because numpy has no bfloat16, which
    `safetensors.numpy` therefore cannot save, and so that no version of that library changes the file's bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _unpermute(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """GGUF stores the rotary halves of each head interleaved; transformers keeps one half after the other."""
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, values.shape[1])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _bfloat16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The upper 16 bits, rounded to nearest even as torch does; numpy has no bfloat16. The weights hold no NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _config(fields: dict[str, Any], identity: str) -> dict[str, Any]:
    return {
        "_name_or_path": identity,
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "initializer_range": 0.041666666666666664,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "rms_norm_eps": 1e-05,  # the GGUF holds its float32 rounding
        "rope_scaling": None,
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": fields["llama.vocab_size"],
    }


def _tokenizer(fields: dict[str, Any]) -> dict[str, Any]:
    """SmolLM2's tokenizer: byte-level BPE after splitting off single digits (GGUF calls this "smollm")."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == _CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True},
                                                                byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
        },
    }  # fmt: skip


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    special = {
        f"{role}_token": tokens[fields[f"tokenizer.ggml.{gguf_role}_token_id"]]
        for role, gguf_role in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
    }
    return {
        **special,
        "add_prefix_space": False,
        "chat_template": fields["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        # Not GPT2Tokenizer, as on the hub: transformers 5 would rebuild it without the splitting of digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
