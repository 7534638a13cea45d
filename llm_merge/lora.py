"""LoRA adapters in PEFT's format: what one changes in a base, tensor by tensor, without loading PEFT.

LoRA (Hu et al. 2021, arXiv 2106.09685): W' = W + scale·B·A, scale = alpha/r, or alpha/√r for rsLoRA (Kalajdzievski
2023, arXiv 2312.03732). Adapters that are not such a sum (DoRA, IA3, prompts, …) are refused by name. This module
reads adapters only; which base an adapter is put on is `checkpoint.py`'s business.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_merge.errors import CheckpointError
from llm_merge.tensor_file import TensorInfo, read_header, read_tensor

if TYPE_CHECKING:
    import torch

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

_CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Models whose linear layers are stored transposed (transformers' Conv1D)."""

_CHANGED_BASE = {"pissa": "PiSSA", "olora": "OLoRA", "loftq": "LoftQ", "corda": "CorDA", "lora_ga": "LoRA-GA"}
"""Initialisations that take something out of the base's weights. Saved without conversion, the adapter is no longer a
change to the published base. PEFT sets `init_lora_weights` back to true when it converts them."""

_NOT_A_SUM = {
    "use_dora": "DoRA", "lora_bias": "LoRA with a bias (lora_bias)", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA", "arrow_config": "Arrow", "monteclora_config": "MonteCLoRA",
    "alora_invocation_tokens": "activated LoRA (aLoRA)", "layer_replication": "LoRA with repeated layers",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "trainable_token_indices": "LoRA with trainable tokens",
}  # fmt: skip
"""Switches of PEFT's LoraConfig that make the change more, or other, than scale·B·A."""

_PARTS = {
    ".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_A.default.weight": "a", ".lora_B.default.weight": "b",
    ".lora_embedding_A": "ea", ".lora_embedding_B": "eb",
    ".lora_embedding_A.default": "ea", ".lora_embedding_B.default": "eb",
}  # fmt: skip


@dataclass(frozen=True)
class Update:
    """What an adapter does to one tensor: replace it, add scale·B·A (transposed if the base stores it so), or both."""

    replacement: TensorInfo | None = None
    a: TensorInfo | None = None
    b: TensorInfo | None = None
    scale: float = 0.0
    transposed: bool = False

    def apply(self, read_base: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The new tensor in float32; `read_base` is called only if the base's values are needed."""
        import torch

        tensor = read_tensor(self.replacement) if self.replacement else read_base()
        tensor = tensor.to(torch.float32)
        if self.a is None or self.b is None:
            return tensor
        delta = (read_tensor(self.b).to(torch.float32) @ read_tensor(self.a).to(torch.float32)) * self.scale
        return tensor + (delta.T if self.transposed else delta)


@dataclass(frozen=True)
class Adapter:
    """An opened adapter: header and config, and once fitted on a base what it changes there.

    base_name   what its config names as its base: a hub id, a path, or ""
    rank        the rank in its config; single modules may have others
    updates     base tensor → Update, () before `fit`
    """

    reference: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    updates: Mapping[str, Update]

    @property
    def base_name(self) -> str:
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def rank(self) -> int:
        return int(self.config["r"])

    @property
    def title(self) -> str:
        return self.folder.name

    @property
    def file(self) -> Path:
        return self.folder / WEIGHTS


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter and no model of its own."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def open_adapter(folder: Path, reference: str) -> Adapter:
    """Reads the adapter's config and header. Raises CheckpointError, naming its type, if it cannot be applied."""
    name = folder.name
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"“{reference}” is no adapter: it has no {CONFIG}.") from error
    except ValueError as error:
        raise CheckpointError(f"The {CONFIG} of “{name}” is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"The {CONFIG} of “{name}” is not a JSON object.")
    _check_kind(name, config)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(_no_weights(folder))
    tensors = read_header(folder / WEIGHTS)
    for tensor in tensors:
        if "lora_magnitude_vector" in tensor:
            raise _refuse(name, "DoRA")
        if "trainable_tokens" in tensor:
            raise _refuse(name, "LoRA with trainable tokens")
        if re.search(r"\.lora_B(\.default)?\.bias$", tensor):
            raise _refuse(name, _NOT_A_SUM["lora_bias"])
    return Adapter(reference, folder, config, tensors, {})


def fit(adapter: Adapter, base: Mapping[str, TensorInfo], base_identity: str, *, model_type: str = "",
        tied: bool = False) -> Adapter:  # fmt: skip
    """The adapter with what it changes in this base. Module names may differ by a prefix ("model.", "bert.", none).

    `model_type` is the base's in its config.json; `tied` says that its output head is its input embeddings.
    Raises CheckpointError when a tensor of the adapter belongs to nothing in the base or has another shape.
    """
    parts: dict[str, dict[str, TensorInfo]] = {}
    replacements: dict[str, TensorInfo] = {}
    for name, info in adapter.tensors.items():
        plain = name.removeprefix("base_model.model.")
        ending = next((e for e in _PARTS if plain.endswith(e)), None)
        if ending:
            parts.setdefault(plain.removesuffix(ending), {})[_PARTS[ending]] = info
        elif "lora_" in plain:
            raise _refuse(adapter.title, f"an unknown kind of LoRA (with “{name}”)")
        else:
            replacements[_unwrapped(plain)] = info
    rename = _renamer([f"{module}.weight" for module in parts] + list(replacements), base)
    updates: dict[str, Update] = {}
    for name, info in replacements.items():
        target = rename(name)
        if name.endswith(".bias") and adapter.config.get("bias", "none") != "none" and not _saved(adapter, name):
            raise _refuse(adapter.title, f"LoRA with biases (bias: {adapter.config['bias']})")
        _check_target(adapter, name, target, base, base_identity)
        if info.shape != base[target].shape:
            raise _other_base(adapter, base_identity, f"“{name}” is {_shape(info.shape)} in the adapter and "
                              f"{_shape(base[target].shape)} in the base")  # fmt: skip
        if tied and "embed" in name and _saved(adapter, name) and not adapter.config.get("ensure_weight_tying"):
            raise _shared_head(adapter, "input embeddings alone", base_identity)
        updates[target] = Update(replacement=info)
    for module, found in parts.items():
        target = rename(f"{module}.weight")
        _check_target(adapter, module, target, base, base_identity)
        earlier = updates.get(target, Update())
        low_rank = _low_rank(adapter, module, found, base[target], base_identity, model_type)
        updates[target] = Update(earlier.replacement, low_rank.a, low_rank.b, low_rank.scale, low_rank.transposed)
    if not updates:
        raise CheckpointError(f"The adapter “{adapter.title}” is empty: it holds no LoRA tensors. Save it again.")
    return Adapter(adapter.reference, adapter.folder, adapter.config, adapter.tensors, updates)


def _low_rank(adapter: Adapter, module: str, found: Mapping[str, TensorInfo], target: TensorInfo, base_identity: str,
              model_type: str) -> Update:  # fmt: skip
    embedding = "ea" in found or "eb" in found
    a, b = (found.get("ea"), found.get("eb")) if embedding else (found.get("a"), found.get("b"))
    if a is None or b is None:
        raise CheckpointError(f"The adapter “{adapter.title}” is damaged: “{module}” has only one of its two LoRA "
                              "matrices. Download or copy it again.")  # fmt: skip
    if len(a.shape) > 2 or len(b.shape) > 2:
        raise _refuse(adapter.title, "LoRA on a convolution")
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise CheckpointError(f"The adapter “{adapter.title}” is damaged: the two LoRA matrices of “{module}” "
                              f"({_shape(a.shape)} and {_shape(b.shape)}) do not fit each other.")  # fmt: skip
    rank = int(_pattern(adapter.config.get("rank_pattern"), module, adapter.rank))
    if rank != a.shape[0]:
        raise CheckpointError(f"The adapter “{adapter.title}” contradicts itself: its config gives “{module}” rank "
                              f"{rank} and its weights have rank {a.shape[0]}. Save it again with PEFT.")  # fmt: skip
    alpha = float(_pattern(adapter.config.get("alpha_pattern"), module, adapter.config.get("lora_alpha", 8)))
    scale = alpha / math.sqrt(rank) if adapter.config.get("use_rslora") else alpha / rank
    delta = (b.shape[0], a.shape[1])
    if target.shape not in ((delta[::-1],) if embedding else (delta, delta[::-1])):
        raise _other_base(adapter, base_identity, f"its change to “{module}” is {_shape(delta)} and the base's tensor "
                          f"is {_shape(target.shape)}")  # fmt: skip
    if embedding:  # PEFT keeps these as (rank, rows) and (columns, rank): the product is the change transposed
        transposed = True
    elif delta[0] != delta[1]:
        transposed = target.shape != delta
    else:
        transposed = bool(adapter.config.get("fan_in_fan_out")) or model_type in _CONV1D_TYPES
    return Update(None, a, b, scale, transposed)


def _check_kind(name: str, config: Mapping[str, Any]) -> None:
    kind = str(config.get("peft_type") or "")
    if kind.upper() != "LORA":
        raise _refuse(name, kind or f"an unknown type ({CONFIG} has no peft_type)")
    for switch, title in _NOT_A_SUM.items():
        if config.get(switch):
            raise _refuse(name, title)
    start = str(config.get("init_lora_weights", True)).lower()
    for prefix, title in _CHANGED_BASE.items():
        if start.startswith(prefix):
            raise CheckpointError(f"The adapter “{name}” is of type {title}, which also changes the base: convert it "
                                  "to plain LoRA first, with PEFT's save_pretrained("
                                  "path_initial_model_for_weight_conversion=…).")  # fmt: skip
    rank = config.get("r")
    if type(rank) is not int or rank < 1:
        raise CheckpointError(f"The {CONFIG} of “{name}” gives no rank (r) of 1 or more.")


def _refuse(name: str, kind: str) -> CheckpointError:
    return CheckpointError(f"The adapter “{name}” is of type {kind}, which cannot be added to the base's weights here; "
                           "merge it with PEFT (merge_and_unload) and use the saved model.")  # fmt: skip


def _no_weights(folder: Path) -> str:
    pickles = [p.name for p in sorted(folder.glob("adapter_model*")) if p.suffix in (".bin", ".pt", ".pth")]
    if not pickles:
        return f"The adapter “{folder.name}” has no {WEIGHTS}."
    code = (f"import torch; from safetensors.torch import save_file; save_file(torch.load({pickles[0]!r}, "
            f"weights_only=True), {WEIGHTS!r})")  # fmt: skip
    return (f"The adapter “{folder.name}” holds its weights as a pickle ({pickles[0]}), which can run code when it is "
            f'opened; convert it inside its folder with: python -c "{code}"')  # fmt: skip


def _saved(adapter: Adapter, name: str) -> bool:
    """Whether the tensor belongs to a module that the adapter keeps whole (modules_to_save)."""
    modules = adapter.config.get("modules_to_save") or []
    return any(f"{module}." in name for module in modules)  # PEFT compares ends: "norm" means "input_layernorm" too


def _unwrapped(name: str) -> str:
    """PEFT's wrappers around a module leave their name in the tensor's."""
    return re.sub(r"\.(base_layer|original_module|modules_to_save(\.default)?)(?=\.)", "", name)


def _pattern(patterns: Any, module: str, default: Any) -> Any:
    """PEFT's rule (get_pattern_key): the first key that matches the end of the module's name as a regex."""
    for key, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error:
            continue
    return default


def _renamer(names: list[str], base: Mapping[str, TensorInfo]) -> Callable[[str], str]:
    """How the adapter's names become the base's: take a prefix off, put one on, so that most of them are found."""
    prefixes = {""} | {".".join(name.split(".")[:depth]) + "." for name in base for depth in (1, 2)}
    choices = [("", "")] + [(strip, add) for strip in sorted({""} | _first_parts(names)) for add in sorted(prefixes)]
    strip, add = max(choices, key=lambda c: sum(n.startswith(c[0]) and c[1] + n[len(c[0]) :] in base for n in names))

    def rename(name: str) -> str:
        renamed = add + name[len(strip) :] if name.startswith(strip) else name
        return renamed if renamed in base else name  # heads lie outside the prefix

    return rename


def _first_parts(names: Iterable[str]) -> set[str]:
    return {".".join(name.split(".")[:depth]) + "." for name in names for depth in (1, 2)}


def _check_target(adapter: Adapter, name: str, target: str, base: Mapping[str, TensorInfo], base_identity: str) -> None:
    if target in base:
        return
    if "lm_head" in name and not any("lm_head" in tensor for tensor in base):
        raise _shared_head(adapter, "output head alone", base_identity)
    raise _other_base(adapter, base_identity, f"the base has no “{name}”")


def _shared_head(adapter: Adapter, what: str, base_identity: str) -> CheckpointError:
    return CheckpointError(f"The adapter “{adapter.title}” changes the {what}, and “{base_identity}” keeps input "
                           "embeddings and output head in one tensor; untie them, merge the adapter with PEFT "
                           "(merge_and_unload) and use the saved model.")  # fmt: skip


def _other_base(adapter: Adapter, base_identity: str, why: str) -> CheckpointError:
    own = f"for “{adapter.base_name}”" if adapter.base_name else "for another base"
    chosen = f"“{base_identity}”"
    return CheckpointError(f"The adapter “{adapter.title}” was made {own} and does not fit {chosen}: {why}. "
                           "Choose its own base.")  # fmt: skip


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(str(number) for number in shape) or "a single number"
