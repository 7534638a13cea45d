"""Whether models fit together, told from their configs and headers: every problem and warning, one sentence each.

Compares each model with the base and collects what it finds. It never stops at the first problem, never reads a weight
and never decides what to do about it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llm_merge import sentence_folders
from llm_merge.checkpoint import Checkpoint, TensorInfo, adapter_base_mismatch, describe
from llm_merge.errors import MergeError, Problem
from llm_merge.methods import get_method
from llm_merge.recipe import Recipe

FLOATS = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}  # bits of precision

# Tensors that some checkpoints store a second time under another name, and where the value is otherwise.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "lm_head.weight": ("model.embed_tokens.weight", "transformer.wte.weight", "shared.weight"),
    "encoder.embed_tokens.weight": ("shared.weight",),
    "decoder.embed_tokens.weight": ("shared.weight",),
    "model.encoder.embed_tokens.weight": ("model.shared.weight",),
    "model.decoder.embed_tokens.weight": ("model.shared.weight",),
}
HEAD = "lm_head.weight"
NO_WEIGHT = 1e-8  # a sum of weights below this is none

# Constants that old versions of transformers saved and new ones make themselves, and a pooler that many embedding
# models are trained without: one model may have them and another not.
OPTIONAL = (".inv_freq", ".masked_bias", "position_ids", ".attn.bias", "pooler.dense.weight", "pooler.dense.bias")

# Settings that change what the same weights compute. The merge takes the base's, so a difference deserves a word.
CALCULATION = (
    "hidden_act", "hidden_activation", "activation_function", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon",
    "rope_scaling", "rope_theta", "sliding_window", "position_embedding_type", "logits_scaling", "attention_multiplier",
)  # fmt: skip

KINDS = {
    "decoder": "a chat model",
    "encoder": "an embedding model",
    "reranker": "a reranker",
    "encoder-decoder": "an encoder-decoder",
}


def recipe_problems(recipe: Recipe) -> list[Problem]:
    """What is wrong with the recipe itself."""
    problems, needs_base = [], False
    try:
        needs_base = get_method(recipe.merge_method).uses_base
    except MergeError as error:
        problems.append(Problem("problem", "", error.message))
    if needs_base and not recipe.base_model:
        problems.append(
            Problem("problem", "", f"{recipe.merge_method} adds what each model learned to a base, and the recipe "
                    "names none.", "Add `base_model:`.")
        )  # fmt: skip
    if not needs_base and not recipe.is_layered and recipe.normalizes and abs(math.fsum(recipe.weights)) < NO_WEIGHT:
        problems.append(
            Problem("problem", "", "The weights sum to 0, and dividing by their sum is not possible.",
                    "Change a weight, or set `normalize: false`.")
        )  # fmt: skip
    return problems


def own_problems(checkpoint: Checkpoint) -> list[Problem]:
    """What keeps this model from being merged with anything, and an adapter that was made for another base."""
    name, found = short_name(checkpoint.reference), []
    odd = sorted({info.dtype for info in checkpoint.tensors.values() if info.is_floating} - set(FLOATS))
    if odd:
        message = f"“{name}” is quantised ({', '.join(odd)}): such weights cannot be mixed."
        fix = "Choose the model's original 16-bit or 32-bit version."
        found.append(Problem("problem", checkpoint.reference, message, fix))
    mismatch = adapter_base_mismatch(checkpoint)
    return found + ([mismatch] if mismatch else [])


def differences(base: Checkpoint, other: Checkpoint) -> list[Problem]:
    """Everything in which `other` does not fit the base. What a larger difference explains is not said again."""
    name, base_name = short_name(other.reference), short_name(base.reference)

    def problem(message: str, fix: str) -> Problem:
        return Problem("problem", other.reference, message, fix)

    if base.architecture != other.architecture:
        kinds = [f"{KINDS.get(c.model_type_guess, 'a model')}, {c.architecture}" for c in (other, base)]
        return [
            problem(f"“{name}” is {kinds[0]}, but “{base_name}” is {kinds[1]}: two architectures cannot be merged.",
                    "Choose fine-tunes of one base.")
        ]  # fmt: skip
    found, mine, theirs = [], describe(base), describe(other)
    sizes = [("layers", mine.layers, theirs.layers), ("hidden values per token", mine.hidden, theirs.hidden)]
    for what, expected, actual in sizes:
        if expected != actual:
            found.append(problem(f"“{name}” has {actual} {what}, “{base_name}” has {expected}.",
                                 "Choose models of the same size."))  # fmt: skip
    heads = [_setting(c, "num_attention_heads") for c in (base, other)]
    if None not in heads and heads[0] != heads[1]:
        found.append(problem(f"“{name}” has {heads[1]} attention heads, “{base_name}” has {heads[0]}.",
                             "Choose models of the same architecture."))  # fmt: skip
    other_size = bool(found)
    vocabularies = (mine.vocabulary or 0, theirs.vocabulary or 0)
    if vocabularies[0] != vocabularies[1]:
        found.append(
            problem(f"“{name}” has a vocabulary of {vocabularies[1]:,} tokens, “{base_name}” of {vocabularies[0]:,}: "
                    "the rows of their embeddings do not mean the same tokens.",
                    "Choose models with the same tokenizer.")
        )  # fmt: skip
    if not other_size:
        found += _tensor_differences(base, other, vocabularies)
        found += sentence_folders.problems(base, other, name)
    if not found:
        found += _setting_warnings(base, other)
    return found


def dtype_warnings(checkpoints: Sequence[Checkpoint], dtype: str) -> list[Problem]:
    """Where the result's type holds less than a model's own."""
    found = []
    for checkpoint in checkpoints:
        own = checkpoint.main_dtype
        name = short_name(checkpoint.reference)
        if FLOATS.get(own, 0) > FLOATS[dtype] and own in ("float32", "float64"):
            message = f"“{name}” is stored in {own} and the result in {dtype}: it is rounded."
            fix = f"Choose {own} as the type to keep every digit."
            found.append(Problem("warning", checkpoint.reference, message, fix))
        elif dtype == "float16" and own != "float16":
            message = f"“{name}” is stored in {own}, whose values may be too large for float16."
            fix = "Choose bfloat16 or float32 as the type."
            found.append(Problem("warning", checkpoint.reference, message, fix))
    return list(dict.fromkeys(found))


def has_separate_head(checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether any model has an output head of its own. A stored head that the config ties is only a copy."""
    return any(HEAD in checkpoint.tensors and not checkpoint.tied for checkpoint in checkpoints)


def result_tensors(base: Checkpoint, checkpoints: Sequence[Checkpoint], separate_head: bool) -> dict[str, TensorInfo]:
    """The tensors that the result has, with the header entry to take shape and type from."""
    tensors = {name: info for name, info in base.tensors.items() if name != HEAD or separate_head}
    if separate_head and HEAD not in tensors:
        tensors[HEAD] = next(c.tensors[HEAD] for c in checkpoints if HEAD in c.tensors and not c.tied)
    return tensors


def source_of(name: str, checkpoint: Checkpoint) -> str | None:
    """The name under which `checkpoint` holds this tensor's value, or None."""
    if name in checkpoint.tensors and not (name == HEAD and checkpoint.tied):
        return name
    if name == HEAD and not checkpoint.tied:
        return None
    return next((alias for alias in ALIASES.get(name, ()) if alias in checkpoint.tensors), None)


def short_name(reference: str) -> str:
    """The part of a reference that a person recognises: the last folder, the adapter of base+adapter."""
    last = reference.rsplit("+", 1)[-1].rstrip("/\\")
    return last.replace("\\", "/").rsplit("/", 1)[-1] or reference


def _tensor_differences(base: Checkpoint, other: Checkpoint, vocabularies: tuple[int, int]) -> Iterator[Problem]:
    name, base_name = short_name(other.reference), short_name(base.reference)
    missing, shapes = [], []
    for tensor, info in base.tensors.items():
        source = source_of(tensor, other)
        if source is None:
            if not _optional(tensor, info) and tensor != HEAD:
                missing.append(tensor)
            continue
        shape = tuple(other.tensors[source].shape)
        if shape != tuple(info.shape) and _rows(info.shape, shape) != vocabularies:
            shapes.append(f"{tensor} is {_shape(shape)} there and {_shape(info.shape)} in “{base_name}”")
    extra = [tensor for tensor, info in other.tensors.items() if tensor not in base.tensors and tensor not in ALIASES
             and not _optional(tensor, info)]  # fmt: skip
    if missing:
        yield Problem("problem", other.reference, f"“{name}” lacks {_some(missing)} of “{base_name}”.",
                      "Check that it is complete and of the same architecture.")  # fmt: skip
    if extra:
        yield Problem("problem", other.reference, f"“{name}” has {_some(extra)} that “{base_name}” does not have.",
                      "Choose the model it was trained from as the base.")  # fmt: skip
    if shapes:
        more = f" ({len(shapes) - 1} more differ)" if len(shapes) > 1 else ""
        yield Problem("problem", other.reference, f"“{name}” has tensors of other shapes: {shapes[0]}{more}.",
                      "Choose models of the same size.")  # fmt: skip


def _setting_warnings(base: Checkpoint, other: Checkpoint) -> Iterator[Problem]:
    name, base_name = short_name(other.reference), short_name(base.reference)
    values = [(key, _setting(base, key), _setting(other, key)) for key in CALCULATION]
    changed = [f"{key} ({theirs} instead of {mine})" for key, mine, theirs in values
               if mine is not None and theirs is not None and mine != theirs]  # fmt: skip
    if changed:
        yield Problem("warning", other.reference, f"“{name}” was trained with other settings: {', '.join(changed)}.",
                      f"The merge computes with those of “{base_name}”.")  # fmt: skip
    if base.tied != other.tied:
        tied, free = (base_name, name) if base.tied else (name, base_name)
        yield Problem("warning", other.reference,
                      f"“{free}” has an output head of its own, “{tied}” uses its input embeddings as the head.",
                      "The result gets a head of its own.")  # fmt: skip
    if base.adapter and other.adapter and base.base_identity != other.base_identity:
        yield Problem("warning", other.reference,
                      f"“{name}” is an adapter of “{other.base_identity}”, “{base_name}” of “{base.base_identity}”.",
                      "Adapters of two bases rarely mix well: choose adapters of one base.")  # fmt: skip
    if base.tokenizer_hash() != other.tokenizer_hash():
        yield Problem("warning", other.reference,
                      f"“{name}” has other tokenizer files than “{base_name}”, with as many tokens.",
                      f"The merge uses those of “{base_name}”: check that both number their tokens alike.")  # fmt: skip


def _setting(checkpoint: Checkpoint, key: str) -> Any:
    """A setting of the language model, wherever the config keeps it (transformers 5 moved the rotary ones)."""
    config = checkpoint.model_config
    return config[key] if key in config else (config.get("rope_parameters") or {}).get(key)


def _optional(name: str, info: TensorInfo) -> bool:
    return not info.is_floating or name.endswith(OPTIONAL)


def _rows(mine: Sequence[int], theirs: Sequence[int]) -> tuple[int, int] | None:
    return (mine[0], theirs[0]) if mine and theirs else None


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) or "one number"


def _some(names: Sequence[str]) -> str:
    """ "the tensor a", or "5 tensors (a, b, c, …)"."""
    if len(names) == 1:
        return f"the tensor {names[0]}"
    return f"{len(names)} tensors ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
