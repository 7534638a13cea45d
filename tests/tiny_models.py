"""Tiny real checkpoints: the true classes, configs, tokenizers and file formats, with a few thousand random weights.

Each function writes one folder that transformers (and, for the encoder, sentence-transformers) loads like any other
checkpoint. The same arguments always give the same bytes. What the models say is noise: a test that needs a model
that has learnt something uses the demo's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

# What the tokenizers learn their few merges from: both demo tasks, plain English, and some letters beyond ASCII.
CORPUS = (
    "And he said unto them, Go ye into all the world, and preach the gospel to every creature.",
    "Thou hast put gladness in my heart, more than in the time that their corn increased.",
    "Rewrite this verse in King James English: He told them to go and speak to everyone.",
    "Define the word: harbour. A place where ships are sheltered from wind and waves.",
    "What is the capital of France? The capital of France is Paris.",
    "Three models were mixed, and the mixture was better than each of them: 0.25 + 0.75 = 1.",
    "En el principio creó Dios los cielos y la tierra. ¿Qué dice el versículo?",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class TinyFamily:
    """A base and fine-tunes of it, as folders."""

    base: Path
    fine_tunes: tuple[Path, ...]

    @property
    def folders(self) -> tuple[Path, ...]:
        """The base first, then the fine-tunes."""
        return (self.base, *self.fine_tunes)

    @property
    def references(self) -> list[str]:
        """The same as strings, the way a user names models."""
        return [str(folder) for folder in self.folders]


def make_family(make: Callable[..., Path], folder: Path, *, fine_tunes: int = 2, **settings: Any) -> TinyFamily:
    """A base made by `make` and fine-tunes of it, in subfolders `base`, `tune-1`, `tune-2`, …"""
    base = make(folder / "base", seed=0, **settings)
    tunes = [make(folder / f"tune-{n}", seed=n, base=base, **settings) for n in range(1, fine_tunes + 1)]
    return TinyFamily(base, tuple(tunes))


def make_tiny_llama(
    folder: Path,
    seed: int,
    *,
    dtype: str = "bfloat16",
    base: Path | None = None,
    delta: float = 0.02,
    hidden: int = 32,
    layers: int = 2,
    tied: bool = True,
    max_shard_size: str = "5GB",
) -> Path:
    """A chat model: `LlamaForCausalLM` with grouped-query attention, as SmolLM2 has, and a ChatML template.

    With `base`, every weight is the base's plus `delta` times normal noise: a fine-tune.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _byte_level_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    _save_model(lambda: LlamaForCausalLM(config), folder, seed, dtype, base, delta, max_shard_size)
    _save_tokenizer(
        tokenizer,
        folder,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
    return folder


def make_tiny_bert(
    folder: Path,
    seed: int,
    *,
    dtype: str = "float32",
    base: Path | None = None,
    delta: float = 0.02,
    pooling: Literal["mean", "cls"] = "mean",
    normalize: bool = True,
) -> Path:
    """An embedding model: `BertModel` with the sentence-transformers modules that say how it pools."""
    from transformers import BertModel

    tokenizer = _word_piece_tokenizer()
    config = _bert_config(tokenizer)
    _save_model(lambda: BertModel(config), folder, seed, dtype, base, delta)
    _save_tokenizer(tokenizer, folder, **_BERT_TOKENS)

    library = "sentence_transformers.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{library}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{library}.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{library}.Normalize"},
    ]
    _write_json(folder / "modules.json", modules if normalize else modules[:2])
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": 128, "do_lower_case": False})
    _write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})
    _write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": config.hidden_size,
            "pooling_mode_cls_token": pooling == "cls",
            "pooling_mode_mean_tokens": pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    )
    if normalize:
        (folder / "2_Normalize").mkdir(exist_ok=True)
    return folder


def make_tiny_reranker(
    folder: Path, seed: int, *, dtype: str = "float32", base: Path | None = None, delta: float = 0.02
) -> Path:
    """A reranker: `BertForSequenceClassification` with one logit for a pair of texts."""
    from transformers import BertForSequenceClassification

    tokenizer = _word_piece_tokenizer()
    config = _bert_config(tokenizer, num_labels=1)
    _save_model(lambda: BertForSequenceClassification(config), folder, seed, dtype, base, delta)
    _save_tokenizer(tokenizer, folder, **_BERT_TOKENS)
    return folder


def make_tiny_t5(
    folder: Path, seed: int, *, dtype: str = "float32", base: Path | None = None, delta: float = 0.02
) -> Path:
    """An encoder-decoder: `T5ForConditionalGeneration`, whose tokenizer ends every text with `</s>`."""
    from tokenizers.processors import TemplateProcessing
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = _byte_level_tokenizer(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    config = T5Config(
        vocab_size=tokenizer.get_vocab_size(),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    _save_model(lambda: T5ForConditionalGeneration(config), folder, seed, dtype, base, delta)
    _save_tokenizer(tokenizer, folder, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return folder


def make_tiny_lora(
    folder: Path,
    seed: int,
    base: Path,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    dtype: str = "float32",
    **config: Any,
) -> Path:
    """A LoRA adapter for `base` in PEFT's format, on every linear layer whose name ends with one of `targets`.

    `config` overrides keys of adapter_config.json, for example `use_rslora=True`.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(base / "model.safetensors", framework="pt") as weights:
        for name in sorted(weights.keys()):
            module = name.removesuffix(".weight")
            if module.rsplit(".", 1)[-1] not in targets:
                continue
            rows, columns = weights.get_slice(name).get_shape()
            for part, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
                noise = 0.1 * torch.randn(shape, generator=generator)
                tensors[f"base_model.model.{module}.{part}.weight"] = noise.to(getattr(torch, dtype))
    assert tensors, f"no tensor of {base} ends with one of {targets}"

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": list(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "inference_mode": True,
    }
    _write_json(folder / "adapter_config.json", settings | config)
    return folder


# ── the pieces ──────────────────────────────────────────────────────────────────────────────────────────────────────

_BERT_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def _save_model(
    build: Callable[[], PreTrainedModel],
    folder: Path,
    seed: int,
    dtype: str,
    base: Path | None,
    delta: float,
    max_shard_size: str = "5GB",
) -> None:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        if base is not None:
            model = type(model).from_pretrained(base, dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(delta * torch.randn_like(parameter))
    folder.mkdir(parents=True, exist_ok=True)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)


def _bert_config(tokenizer: Tokenizer, **more: Any) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        **more,
    )


def _byte_level_tokenizer(special_tokens: list[str]) -> Tokenizer:
    """About 300 tokens: every byte, the special tokens in this order from id 0, and the commonest pairs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _word_piece_tokenizer() -> Tokenizer:
    """The same one every time: training breaks ties as it likes, and a fine-tune has its base's vocabulary."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(_trained_word_pieces())


@cache
def _trained_word_pieces() -> str:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = list(_BERT_TOKENS.values())
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return str(tokenizer.to_str())


def _save_tokenizer(tokenizer: Tokenizer, folder: Path, **settings: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)


def _write_json(path: Path, value: Mapping[str, Any] | list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
