"""LoRA adapters: the same weights as PEFT's merge_and_unload, and one clear sentence for every other kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_merge.checkpoint import Checkpoint, adapter_base_mismatch, open_checkpoint
from llm_merge.errors import CheckpointError
from tests.tiny_models import TinyFamily, make_tiny_bert, make_tiny_llama, make_tiny_lora, make_tiny_reranker

# PEFT explains itself in warnings (tied embeddings, fan_in_fan_out, no hub to ask); here they are expected.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("lora") / "llama", 0, dtype="float32")


@pytest.fixture(scope="module")
def untied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("lora") / "untied", 0, dtype="float32", tied=False)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 keeps its linear layers transposed; its attention output is square, so that shapes do not tell."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("lora") / "gpt2"
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)).save_pretrained(folder)
    return folder


def with_peft(model: Any, folder: Path, **config: Any) -> dict[str, torch.Tensor]:
    """Trains nothing: gives every adapter weight noise, saves the adapter and returns what PEFT merges it to."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(**config))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(folder)
    merged: dict[str, torch.Tensor] = wrapped.merge_and_unload().state_dict()
    return merged


def assert_same(checkpoint: Checkpoint, merged: dict[str, torch.Tensor], *, changed: int) -> None:
    """Every tensor equals PEFT's to float32 rounding; `changed` of them differ from the base."""
    base = open_checkpoint(str(checkpoint.folder))
    differing = 0
    for name in checkpoint.tensors:
        ours = checkpoint.read(name)
        torch.testing.assert_close(ours, merged[name], rtol=1e-6, atol=1e-6)
        differs = not torch.equal(ours, base.read(name))
        assert differs == checkpoint.changes(name), name
        differing += differs
    assert differing == changed


LLAMA_VARIANTS = {
    "plain": ({"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj"]}, 4),
    "rank-stabilised": ({"r": 4, "lora_alpha": 10, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]}, 4),
    "rank and alpha patterns": (
        {
            "r": 4,
            "lora_alpha": 10,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
            "alpha_pattern": {"layers.0.self_attn.v_proj": 1, "down_proj": 3},
            "target_modules": ["q_proj", "v_proj", "down_proj"],
        },
        6,
    ),
    "patterns, rank-stabilised": (
        {
            "r": 4,
            "lora_alpha": 10,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"v_proj": 1},
            "target_modules": ["q_proj", "v_proj"],
        },
        4,
    ),
    "embeddings": ({"r": 3, "lora_alpha": 10, "target_modules": ["embed_tokens", "q_proj"]}, 3),
    "whole modules": ({"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]}, 2 + 5 + 1),
    "Gaussian start": ({"r": 3, "init_lora_weights": "gaussian", "target_modules": "all-linear"}, 14),
}


@pytest.mark.parametrize("variant", LLAMA_VARIANTS)
def test_the_same_as_peft(variant: str, untied_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config, changed = LLAMA_VARIANTS[variant]
    merged = with_peft(AutoModelForCausalLM.from_pretrained(untied_llama), tmp_path / "a", **config)
    assert_same(open_checkpoint(f"{untied_llama}+{tmp_path / 'a'}"), merged, changed=changed)


def test_embeddings_that_the_output_head_shares(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama)
    merged = with_peft(model, tmp_path / "a", r=3, target_modules=["embed_tokens"])
    assert_same(open_checkpoint(f"{llama}+{tmp_path / 'a'}"), merged, changed=1)


@pytest.mark.parametrize("flag", [True, False])
def test_transposed_layers(flag: bool, gpt2: Path, tmp_path: Path) -> None:
    """GPT-2's Conv1D; PEFT corrects a wrong flag by itself, and so do we."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gpt2)
    targets = ["c_attn", "attn.c_proj", "c_fc"]
    merged = with_peft(model, tmp_path / "a", r=3, fan_in_fan_out=True, target_modules=targets)
    set_config(tmp_path / "a", fan_in_fan_out=flag)
    checkpoint = open_checkpoint(f"{gpt2}+{tmp_path / 'a'}")
    prefix = "" if "transformer.wte.weight" in checkpoint.tensors else "transformer."
    renamed = {name.removeprefix(prefix): tensor for name, tensor in merged.items()}
    assert_same(checkpoint, renamed, changed=6)


def test_a_classifier_kept_whole_and_biases_inside_it(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    base = make_tiny_reranker(tmp_path / "base", 0)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    merged = with_peft(model, tmp_path / "a", task_type="SEQ_CLS", r=3, target_modules=["query", "value"])
    checkpoint = open_checkpoint(f"{base}+{tmp_path / 'a'}")
    assert checkpoint.changes("classifier.bias")
    assert_same(checkpoint, merged, changed=4 + 2)


@pytest.mark.parametrize("prefix", ["", "bert.", "model.model."])
def test_module_names_may_differ_by_a_prefix(prefix: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    base = make_tiny_bert(tmp_path / "base", 0)
    model = AutoModel.from_pretrained(base)
    merged = with_peft(model, tmp_path / "a", r=3, target_modules=["query", "dense"])
    rename(tmp_path / "a", lambda name: name.replace("base_model.model.", f"base_model.model.{prefix}"))
    assert_same(open_checkpoint(f"{base}+{tmp_path / 'a'}"), merged, changed=2 * 4 + 1)


def test_a_base_with_a_prefix_that_the_adapter_lacks(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    base = make_tiny_reranker(tmp_path / "base", 0)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    merged = with_peft(model, tmp_path / "a", r=3, target_modules=["query", "value"])
    rename(tmp_path / "a", lambda name: name.replace("model.bert.", "model."))
    assert_same(open_checkpoint(f"{base}+{tmp_path / 'a'}"), merged, changed=4)


def test_a_16_bit_adapter_on_a_16_bit_base_is_applied_in_float32(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base", 0, dtype="bfloat16")
    adapter = make_tiny_lora(tmp_path / "a", 1, base, rank=4, alpha=8.0, dtype="bfloat16")
    name = "model.layers.0.self_attn.q_proj"
    checkpoint = open_checkpoint(f"{base}+{adapter}")
    stored = load_file(adapter / "adapter_model.safetensors")
    a, b = (stored[f"base_model.model.{name}.lora_{x}.weight"].float() for x in "AB")
    expected = open_checkpoint(str(base)).read(f"{name}.weight").float() + 2.0 * (b @ a)
    result = checkpoint.read(f"{name}.weight")
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(result, result.bfloat16().float())
    assert checkpoint.dtype_of(f"{name}.weight") == "bfloat16"
    assert checkpoint.read("model.norm.weight").dtype == torch.bfloat16


# ── what cannot be applied ──────────────────────────────────────────────────────────────────────────────────────────


REFUSED = {
    "DoRA": ({"use_dora": True}, "is of type DoRA"),
    "IA3": ({"peft_type": "IA3"}, "is of type IA3"),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, "is of type PROMPT_TUNING"),
    "LoHa": ({"peft_type": "LOHA"}, "is of type LOHA"),
    "no type": ({"peft_type": None}, "is of type an unknown type (adapter_config.json has no peft_type)"),
    "lora_bias": ({"lora_bias": True}, "is of type LoRA with a bias"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "is of type activated LoRA (aLoRA)"),
    "tokens": ({"trainable_token_indices": [1]}, "is of type LoRA with trainable tokens"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_are_refused_by_name(kind: str, llama: Path, tmp_path: Path) -> None:
    config, words = REFUSED[kind]
    sentence = refusal(llama, make_tiny_lora(tmp_path / "special", 1, llama, **config))
    assert sentence.startswith(f"The adapter “special” {words}")
    assert "merge it with PEFT (merge_and_unload)" in sentence


def test_dora_is_recognised_by_its_tensors_too(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama)
    with_peft(model, tmp_path / "a", r=3, target_modules=["q_proj"], use_dora=True)
    set_config(tmp_path / "a", use_dora=False)
    assert "of type DoRA" in refusal(llama, tmp_path / "a")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_the_adapter_are_refused(bias: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    base = make_tiny_bert(tmp_path / "base", 0)
    with_peft(AutoModel.from_pretrained(base), tmp_path / "a", r=3, target_modules=["query"], bias=bias)
    assert f"of type LoRA with biases (bias: {bias})" in refusal(base, tmp_path / "a")


@pytest.mark.parametrize(("start", "title"), [("pissa_niter_4", "PiSSA"), ("olora", "OLoRA"), ("loftq", "LoftQ")])
def test_an_adapter_that_also_changed_its_base(start: str, title: str, llama: Path, tmp_path: Path) -> None:
    adapter = make_tiny_lora(tmp_path / "a", 1, llama, init_lora_weights=start)
    sentence = refusal(llama, adapter)
    assert f"is of type {title}, which also changes the base: convert it" in sentence


def test_pissa_that_peft_has_converted_is_plain_lora(untied_llama: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(untied_llama)
    wrapped = get_peft_model(model, LoraConfig(r=3, init_lora_weights="pissa", target_modules=["q_proj"]))
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "start")
    wrapped.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)
    wrapped.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    merged = wrapped.merge_and_unload().state_dict()
    checkpoint = open_checkpoint(f"{untied_llama}+{tmp_path / 'a'}")
    for name in checkpoint.tensors:
        torch.testing.assert_close(checkpoint.read(name), merged[name], rtol=1e-5, atol=1e-5)


def test_a_pickle_adapter_says_how_to_convert_it(llama: Path, tmp_path: Path) -> None:
    folder = make_tiny_lora(tmp_path / "old", 1, llama)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    sentence = refusal(llama, folder)
    assert sentence.startswith(
        "The adapter “old” holds its weights as a pickle (adapter_model.bin), which can run code"
    )
    assert "torch.load('adapter_model.bin', weights_only=True)" in sentence


def test_the_output_head_of_a_tied_base(llama: Path, untied_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(untied_llama)
    with_peft(model, tmp_path / "head", r=3, target_modules=["q_proj", "lm_head"])
    assert "changes the output head alone, and “llama” keeps input embeddings and output head in one tensor" in refusal(
        llama, tmp_path / "head"
    )
    with_peft(model, tmp_path / "whole", r=3, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    assert "changes the input embeddings alone, and “llama” keeps" in refusal(llama, tmp_path / "whole")


# ── an adapter for another base ─────────────────────────────────────────────────────────────────────────────────────


def test_made_for_a_larger_base(llama: Path, tmp_path: Path) -> None:
    large = make_tiny_llama(tmp_path / "large", 0, hidden=64, dtype="float32")
    adapter = make_tiny_lora(tmp_path / "a", 1, large, base_model_name_or_path="org/large")
    assert refusal(llama, adapter) == (
        "The adapter “a” was made for “org/large” and does not fit “llama”: its change to "
        "“model.layers.0.self_attn.q_proj” is 64 × 64 and the base's tensor is 32 × 32. Choose its own base."
    )


def test_made_for_a_deeper_base(llama: Path, tmp_path: Path) -> None:
    deep = make_tiny_llama(tmp_path / "deep", 0, layers=3, dtype="float32")
    adapter = make_tiny_lora(tmp_path / "a", 1, deep, base_model_name_or_path="org/deep")
    sentence = refusal(llama, adapter)
    assert sentence.startswith("The adapter “a” was made for “org/deep” and does not fit “llama”: the base has no ")
    assert "layers.2.self_attn.q_proj" in sentence


def test_made_for_another_architecture(llama: Path, tmp_path: Path) -> None:
    bert = make_tiny_bert(tmp_path / "bert", 0)
    adapter = make_tiny_lora(tmp_path / "a", 1, bert, targets=("query",), base_model_name_or_path="org/bert")
    assert "was made for “org/bert” and does not fit “llama”: the base has no “encoder.layer" in refusal(llama, adapter)


def test_a_resized_vocabulary_kept_whole(untied_llama: Path, tmp_path: Path) -> None:
    adapter = make_tiny_lora(tmp_path / "a", 1, untied_llama, base_model_name_or_path="org/own")
    add_tensor(adapter, "base_model.model.model.embed_tokens.weight", torch.zeros(301, 32))
    assert "“model.embed_tokens.weight” is 301 × 32 in the adapter and 300 × 32 in the base" in refusal(
        untied_llama, adapter
    )


BASES = [
    ("org/base", "org/base", None, ""),
    ("Org/Base", "org/base", None, ""),
    ("org/base", "org/other", "problem", "was made for “org/base”, and the chosen base is “org/other”."),
    ("org/base", "mirror/base", "warning", "made for “org/base”; the chosen base “mirror/base” may be another copy"),
    ("mirror/base-bnb-4bit", "org/base", "warning", "may be another copy"),
    ("org/base", "", "warning", "the chosen base “folder” may be another model"),
    ("org/folder", "", None, ""),
    ("/somewhere/else/base", "org/base", None, ""),
    ("/somewhere/else", "org/base", "warning", "may be another model"),
    ("", "org/base", "warning", "does not say which base it was made for."),
]


@pytest.mark.parametrize(("own", "chosen", "severity", "words"), BASES)
def test_another_base_of_the_same_shape(
    own: str, chosen: str, severity: str | None, words: str, llama: Path, tmp_path: Path
) -> None:
    import shutil

    base = tmp_path / "folder"
    shutil.copytree(llama, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"_name_or_path": chosen}))
    adapter = make_tiny_lora(tmp_path / "a", 1, base, base_model_name_or_path=own)
    checkpoint = open_checkpoint(f"{base}+{adapter}")
    found = adapter_base_mismatch(checkpoint)
    assert (found.severity if found else None) == severity
    if found:
        assert words in found.message
        assert found.model == checkpoint.reference
        assert found.fix


def test_a_base_alone_has_nothing_to_mismatch(tiny_llama: TinyFamily) -> None:
    assert adapter_base_mismatch(open_checkpoint(str(tiny_llama.base))) is None


# ── damaged adapters ────────────────────────────────────────────────────────────────────────────────────────────────


def test_half_a_pair(llama: Path, tmp_path: Path) -> None:
    adapter = make_tiny_lora(tmp_path / "a", 1, llama)
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert "“model.layers.0.self_attn.q_proj” has only one of its two LoRA matrices" in refusal(llama, adapter)


def test_a_rank_that_its_config_contradicts(llama: Path, tmp_path: Path) -> None:
    adapter = make_tiny_lora(tmp_path / "a", 1, llama, rank=4, r=8)
    assert "its config gives “model.layers.0.self_attn.q_proj” rank 8 and its weights have rank 4" in refusal(
        llama, adapter
    )


@pytest.mark.parametrize("rank", [0, -1, "8", None, 2.0])
def test_a_config_without_a_rank(rank: Any, llama: Path, tmp_path: Path) -> None:
    adapter = make_tiny_lora(tmp_path / "a", 1, llama, r=rank)
    assert refusal(llama, adapter) == "The adapter_config.json of “a” gives no rank (r) of 1 or more."


def test_an_empty_adapter(llama: Path, tmp_path: Path) -> None:
    adapter = make_tiny_lora(tmp_path / "a", 1, llama)
    save_file({}, adapter / "adapter_model.safetensors")
    assert "“a” is empty: it holds no LoRA tensors" in refusal(llama, adapter)


def test_a_config_that_is_not_json(llama: Path, tmp_path: Path) -> None:
    adapter = make_tiny_lora(tmp_path / "a", 1, llama)
    (adapter / "adapter_config.json").write_text("{")
    assert refusal(llama, adapter).startswith("The adapter_config.json of “a” is not valid JSON:")


def refusal(base: Path, adapter: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(f"{base}+{adapter}")
    assert caught.value.field == f"{base}+{adapter}"
    return caught.value.message


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename(folder: Path, change: Callable[[str], str]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    renamed = {change(name): tensor for name, tensor in tensors.items()}
    save_file(renamed, path)


def add_tensor(folder: Path, name: str, tensor: torch.Tensor) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    save_file(tensors | {name: tensor}, path)
