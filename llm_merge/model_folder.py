"""A model's folder: its config.json and where each of its tensors lies, or why it cannot be used.

What cannot be averaged or must not be opened is refused here in one sentence: pickles, GGUF, quantised weights, shards
that are missing or damaged. This module opens no tensor and knows no adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from llm_merge.errors import CheckpointError
from llm_merge.hub import hub_name
from llm_merge.tensor_file import TensorInfo, read_header

ModelType = Literal["decoder", "encoder", "reranker", "encoder-decoder"]

INDEX = "model.safetensors.index.json"
_ENCODER_DECODERS = ("bart", "blenderbot", "led", "longt5", "m2m_100", "marian", "mbart", "mt5", "pegasus", "t5",
                     "umt5")  # fmt: skip
_ENCODERS = ("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "mobilebert",
             "modernbert", "mpnet", "nomic_bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "new")  # fmt: skip
_LOADERS = {"decoder": "AutoModelForCausalLM", "encoder": "AutoModel", "encoder-decoder": "AutoModelForSeq2SeqLM",
            "reranker": "AutoModelForSequenceClassification"}  # fmt: skip


def read_config(folder: Path, text: str) -> dict[str, Any]:
    """The config.json of the folder that the user named as `text`. Raises CheckpointError, also if it is quantised."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if any(folder.glob("*.gguf")):
            raise CheckpointError(_gguf(text)) from error
        raise CheckpointError(f"“{text}” is not a model's folder: it has no config.json.") from error
    except OSError as error:
        raise CheckpointError(f"“{path}” cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise CheckpointError(f"The config.json of “{text}” is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"The config.json of “{text}” is not a JSON object.")
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            method = config[key].get("quant_method") if isinstance(config[key], dict) else None
            kind = f" ({method})" if method else ""
            raise CheckpointError(f"“{text}” is quantised{kind}, and quantised weights cannot be averaged; use the "
                                  "original model in bfloat16, float16 or float32.")  # fmt: skip
    return config


def find_tensors(folder: Path, text: str, config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Every tensor by name, from one safetensors file or from the shards of an index. Raises CheckpointError."""
    if (folder / "model.safetensors").is_file():
        return read_header(folder / "model.safetensors")
    if (folder / INDEX).is_file():
        return _sharded(folder, text)
    pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    pickles = [name for name in pickles if "training_args" not in name and "optimizer" not in name]
    if pickles:
        raise CheckpointError(_convert(folder, text, pickles[0], config))
    if any(folder.glob("*.gguf")):
        raise CheckpointError(_gguf(text))
    hint = ""
    if hub_name(text) and not Path(text).is_dir():  # pickles are not downloaded, so they cannot be seen
        target = text.split("/")[-1] + "-safetensors"
        hint = f" If it has a pickle (.bin), convert it: {_conversion(text, target, config)}"
    raise CheckpointError(f"“{text}” has no weights in safetensors (model.safetensors or {INDEX}).{hint}")


def guess_type(architecture: str, config: Mapping[str, Any], sentence_transformer: bool) -> ModelType:
    """What the model is for. `sentence_transformer`: a modules.json lies beside it, so a decoder can be an encoder."""
    kind = str(config.get("model_type") or "")
    if architecture.endswith("ForSequenceClassification"):
        return "reranker"
    if sentence_transformer:
        return "encoder"
    if config.get("is_encoder_decoder") or kind in _ENCODER_DECODERS:
        return "encoder-decoder"
    if architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return "decoder"
    if architecture.endswith(("Model", "ForMaskedLM", "ForPreTraining")) or kind in _ENCODERS:
        return "encoder"
    # A config without architectures and model type, as some old BERTs have: only an encoder has these two keys.
    return "encoder" if "type_vocab_size" in config and not config.get("is_decoder") else "decoder"


def _sharded(folder: Path, text: str) -> dict[str, TensorInfo]:
    try:
        shard_of = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(shard_of.values()))
        safe = all(isinstance(shard, str) and Path(shard).name == shard for shard in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"The index of “{text}” ({INDEX}) is damaged. Download or copy it again.") from error
    if not safe:
        raise CheckpointError(f"The index of “{text}” ({INDEX}) names files outside the model's folder.")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"“{text}” is incomplete: “{missing[0]}”{more} of its {len(shards)} files is missing. "
                              "Download or copy it again.")  # fmt: skip
    headers = {shard: read_header(folder / shard) for shard in shards}
    for name, shard in shard_of.items():
        if name not in headers[shard]:
            raise CheckpointError(f"“{text}” is damaged: its index promises the tensor “{name}” in “{shard}”, which "
                                  "does not hold it. Download or copy it again.")  # fmt: skip
    return {name: headers[shard][name] for name, shard in shard_of.items()}


def _convert(folder: Path, text: str, pickle: str, config: Mapping[str, Any]) -> str:
    return (f"“{text}” holds its weights as a pickle ({pickle}), which can run code when it is opened; convert it "
            f"once: {_conversion(text, str(folder), config)}")  # fmt: skip


def _conversion(source: str, target: str, config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else ""
    loader = _LOADERS[guess_type(architecture, config, False)]
    return (f'python -c "from transformers import {loader}; '
            f'{loader}.from_pretrained({source!r}, weights_only=True).save_pretrained({target!r})"')  # fmt: skip


def _gguf(text: str) -> str:
    return f"“{text}” holds GGUF files, whose weights are quantised; use the original model in safetensors."
