"""Opening models: what is read, what is said about it, and one clear sentence for everything that cannot be opened."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_merge import demo, hashing
from llm_merge.checkpoint import describe, open_checkpoint, split_reference
from llm_merge.errors import CheckpointError
from llm_merge.hub import hub_name
from llm_merge.tensor_file import read_header, read_tensor
from tests.tiny_models import TinyFamily, make_tiny_bert, make_tiny_llama, make_tiny_lora


@pytest.fixture
def model(tmp_path: Path, tiny_llama: TinyFamily) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_llama.base, tmp_path / "model"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    return make_tiny_llama(folder / "base", 0, max_shard_size="30KB")


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_tensor_as_stored(tiny_llama: TinyFamily) -> None:
    checkpoint = open_checkpoint(str(tiny_llama.base))
    stored = load_file(tiny_llama.base / "model.safetensors")
    assert set(checkpoint.tensors) == set(stored)
    for name, tensor in stored.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
        assert checkpoint.dtype_of(name) == "bfloat16"
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)


def test_shards_read_like_one_file(sharded: Path, tmp_path: Path) -> None:
    whole = make_tiny_llama(tmp_path / "whole", 0)
    one, many = open_checkpoint(str(whole)), open_checkpoint(str(sharded))
    assert len({info.file for info in many.tensors.values()}) > 1
    assert set(one.tensors) == set(many.tensors)
    for name in one.tensors:
        assert torch.equal(one.read(name), many.read(name))


def test_every_type_and_shape(tmp_path: Path) -> None:
    tensors = {
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "int64": torch.arange(6).reshape(2, 3),
        "half": torch.randn(3, 2, 2).half(),
        "uint8": torch.tensor([0, 255], dtype=torch.uint8),
        "float8": torch.randn(4).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        read = read_tensor(header[name])
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape
        assert torch.equal(read.view(torch.uint8) if name == "float8" else read,
                           tensor.view(torch.uint8) if name == "float8" else tensor)  # fmt: skip


def test_many_threads_read_at_once(tiny_llama: TinyFamily) -> None:
    checkpoint = open_checkpoint(str(tiny_llama.base))
    stored = load_file(tiny_llama.base / "model.safetensors")
    names = list(stored) * 20
    with ThreadPoolExecutor(8) as pool:
        for name, tensor in zip(names, pool.map(checkpoint.read, names), strict=True):
            assert torch.equal(tensor, stored[name])


def test_what_is_read_is_one_s_own(tiny_llama: TinyFamily) -> None:
    checkpoint = open_checkpoint(str(tiny_llama.base))
    before = checkpoint.read("model.norm.weight").clone()
    checkpoint.read("model.norm.weight").zero_()
    assert torch.equal(checkpoint.read("model.norm.weight"), before)


def test_opening_imports_no_torch(tiny_llama: TinyFamily) -> None:
    code = (
        "import sys; from llm_merge.checkpoint import describe, open_checkpoint; "
        f"describe(open_checkpoint({str(tiny_llama.base)!r})); "
        "assert not {'torch', 'transformers', 'peft', 'huggingface_hub'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# ── what is said about a model ──────────────────────────────────────────────────────────────────────────────────────


def test_a_chat_model_described(tiny_llama: TinyFamily) -> None:
    info = describe(open_checkpoint(str(tiny_llama.base)))
    stored = load_file(tiny_llama.base / "model.safetensors")
    assert (info.architecture, info.model_type) == ("LlamaForCausalLM", "decoder")
    assert (info.layers, info.hidden, info.vocabulary) == (2, 32, 300)
    assert info.parameters == sum(tensor.numel() for tensor in stored.values())
    assert info.bytes == 2 * info.parameters
    assert (info.dtype, info.tied, info.title, info.adapter_of) == ("bfloat16", True, "base", None)


def test_an_adapter_described(tiny_llama: TinyFamily, tmp_path: Path) -> None:
    adapter = make_tiny_lora(tmp_path / "poet", 1, tiny_llama.base, rank=4, base_model_name_or_path="org/base")
    alone = describe(open_checkpoint(str(tiny_llama.base)))
    info = describe(open_checkpoint(f"{tiny_llama.base}+{adapter}"))
    assert (info.title, info.adapter_of, info.adapter_rank) == ("poet", "org/base", 4)
    assert info.parameters == alone.parameters
    assert info.bytes == alone.bytes + info.adapter_bytes
    assert info.adapter_bytes == 4 * sum(t.numel() for t in load_file(adapter / "adapter_model.safetensors").values())


@pytest.mark.parametrize(
    ("fixture", "kind"),
    [
        ("tiny_llama", "decoder"),
        ("tiny_bert", "encoder"),
        ("tiny_reranker", "reranker"),
        ("tiny_t5", "encoder-decoder"),
    ],
)
def test_what_a_model_is_for(fixture: str, kind: str, request: pytest.FixtureRequest) -> None:
    family: TinyFamily = request.getfixturevalue(fixture)
    assert open_checkpoint(str(family.base)).model_type_guess == kind


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"architectures": ["MistralModel"], "model_type": "mistral"}, "encoder"),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "encoder"),
        ({"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl"}, "decoder"),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "decoder"),
        ({"architectures": ["BartForConditionalGeneration"], "model_type": "bart"}, "encoder-decoder"),
        ({"type_vocab_size": 2}, "encoder"),  # an old BERT without model type
        ({"model_type": "llama"}, "decoder"),
    ],
)
def test_what_a_config_is_for(config: dict[str, Any], kind: str, model: Path) -> None:
    (model / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(str(model)).model_type_guess == kind


def test_a_decoder_inside_sentence_transformers_is_an_embedding_model(model: Path) -> None:
    (model / "modules.json").write_text("[]")
    assert open_checkpoint(str(model)).model_type_guess == "encoder"


def test_the_main_type_is_that_of_most_weights(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    tensors["counter"] = torch.zeros(100_000, dtype=torch.int64)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, model / "model.safetensors")
    checkpoint = open_checkpoint(str(model))
    assert checkpoint.main_dtype == "bfloat16"
    assert checkpoint.dtype_of("model.norm.weight") == "float32"
    assert describe(checkpoint).parameters == sum(t.numel() for n, t in tensors.items() if n != "counter")


def test_tied_is_told_by_the_config_else_by_the_missing_head(model: Path, tmp_path: Path) -> None:
    assert open_checkpoint(str(model)).tied
    set_config(model, tie_word_embeddings=None)
    assert open_checkpoint(str(model)).tied
    untied = make_tiny_llama(tmp_path / "untied", 0, tied=False)
    assert not open_checkpoint(str(untied)).tied
    set_config(untied, tie_word_embeddings=None)
    assert not open_checkpoint(str(untied)).tied


def test_an_embedding_model_has_no_head_to_tie(tiny_bert: TinyFamily) -> None:
    assert not open_checkpoint(str(tiny_bert.base)).tied


# ── identity ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_equal_models_have_equal_hashes(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    set_config(copy, _name_or_path="/elsewhere", transformers_version="0")
    first = open_checkpoint(str(model)).content_hash()
    assert len(first) == 64
    assert open_checkpoint(str(copy)).content_hash() == first


def test_a_single_changed_byte_changes_the_hash(model: Path) -> None:
    before = open_checkpoint(str(model)).content_hash()
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert open_checkpoint(str(model)).content_hash() != before


def test_config_and_adapter_belong_to_the_hash(model: Path, tmp_path: Path) -> None:
    adapter = make_tiny_lora(tmp_path / "a", 1, model)
    base, both = open_checkpoint(str(model)), open_checkpoint(f"{model}+{adapter}")
    set_adapter(adapter, base_model_name_or_path="org/elsewhere")
    assert open_checkpoint(f"{model}+{adapter}").content_hash() == both.content_hash()
    assert both.base_hash() == base.content_hash() != both.content_hash()
    set_adapter(adapter, lora_alpha=9.0)
    assert open_checkpoint(f"{model}+{adapter}").content_hash() != both.content_hash()
    set_config(model, rope_theta=1.0)
    assert open_checkpoint(str(model)).content_hash() != base.content_hash()


def test_the_tokenizer_has_a_hash_of_its_own(model: Path, tiny_llama: TinyFamily) -> None:
    original = open_checkpoint(str(tiny_llama.base))
    assert open_checkpoint(str(model)).tokenizer_hash() == original.tokenizer_hash()
    (model / "tokenizer_config.json").write_text("{}")
    changed = open_checkpoint(str(model))
    assert changed.tokenizer_hash() != original.tokenizer_hash()
    assert changed.content_hash() == original.content_hash()


def test_file_hashes_are_remembered(own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    first = hashing.file_hash(path)
    assert first == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"  # sha256sum of "one"
    memory = own_home / "hashes.json"
    remembered = json.loads(memory.read_text())
    assert list(remembered.values()) == [first]
    memory.write_text(json.dumps(dict.fromkeys(remembered, "from memory")))
    assert hashing.file_hash(path) == "from memory"
    path.write_bytes(b"another")
    assert hashing.file_hash(path) not in ("from memory", first)
    memory.write_text("{damaged")
    path.write_bytes(b"one")
    assert hashing.file_hash(path) == first


def test_a_hash_needs_no_writable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").write_text("a file where the folder should be")
    monkeypatch.setenv("LLM_MERGE_HOME", str(tmp_path / "home"))
    (tmp_path / "file").write_bytes(b"one")
    assert hashing.file_hash(tmp_path / "file").startswith("7692c3ad")


def test_combined_hashes_keep_their_parts_apart() -> None:
    assert hashing.combined_hash(["ab", "c"]) != hashing.combined_hash(["a", "bc"])


def test_which_model_a_base_is(model: Path, tmp_path: Path) -> None:
    assert open_checkpoint(str(model)).base_identity == "model"
    set_config(model, _name_or_path="org/base")
    assert open_checkpoint(str(model)).base_identity == "org/base"
    adapter = make_tiny_lora(tmp_path / "a", 1, model)
    assert open_checkpoint(f"{model}+{adapter}").base_identity == "org/base"
    assert open_checkpoint(str(adapter)).base_identity == "org/base"
    snapshot = tmp_path / "models--acme--small" / "snapshots" / "abc"
    shutil.copytree(model, snapshot)
    assert open_checkpoint(str(snapshot)).base_identity == "acme/small"


# ── references ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_base_and_adapter_are_told_apart(tmp_path: Path) -> None:
    assert split_reference("org/base") == ("org/base", None)
    assert split_reference(" org/base@v1 + org/poet@main ") == ("org/base@v1", "org/poet@main")
    plus = tmp_path / "a+b"
    (plus / "inner").mkdir(parents=True)
    assert split_reference(str(plus)) == (str(plus), None)
    assert split_reference(f"{plus}+org/poet") == (str(plus), "org/poet")
    assert split_reference(f"org/base+{plus}") == ("org/base", str(plus))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/name", "org/name"),
        ("org/name@v1.0", "org/name"),
        ("gpt2", "gpt2"),
        ("org/name-1.5_x", "org/name-1.5_x"),
        ("/org/name", None),
        ("../name", None),
        ("org/../name", None),
        ("a/b/c", None),
        (r"C:\models\x", None),
        ("org/na me", None),
        ("", None),
    ],
)
def test_what_reads_like_a_hub_id(text: str, name: str | None) -> None:
    assert hub_name(text) == name


def test_an_adapter_alone_finds_its_own_base(model: Path, tmp_path: Path) -> None:
    adapter = make_tiny_lora(tmp_path / "poet", 1, model)
    alone, both = open_checkpoint(str(adapter)), open_checkpoint(f"{model}+{adapter}")
    assert alone.reference == str(adapter)
    assert alone.folder == model
    assert alone.content_hash() == both.content_hash()


def test_an_adapter_alone_on_a_chosen_base(tiny_llama: TinyFamily, tmp_path: Path) -> None:
    adapter = make_tiny_lora(tmp_path / "poet", 1, tiny_llama.base)
    other = tiny_llama.fine_tunes[0]
    checkpoint = open_checkpoint(str(adapter), base=str(other))
    assert checkpoint.folder == other
    assert torch.equal(checkpoint.read("model.norm.weight"), open_checkpoint(str(other)).read("model.norm.weight"))


def test_a_demo_base_is_taken_from_its_package_and_made_ready_once(
    own_home: Path, tiny_llama: TinyFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that names a demo base's hub id opens without the hub: the stand-in package is used instead."""
    made: list[str] = []

    def prepare(key: str) -> list[tuple[str, float]]:
        made.append(key)
        shutil.copytree(tiny_llama.base, demo.demo_path(key))
        return []

    monkeypatch.setattr(demo, "packaged_file", lambda key: Path("in a package"))
    monkeypatch.setattr(demo, "prepare", prepare)
    adapter = make_tiny_lora(
        tmp_path / "poet", 1, tiny_llama.base, base_model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct"
    )
    checkpoint = open_checkpoint(str(adapter))
    assert str(checkpoint.folder) == demo.demo_path("smollm2")
    open_checkpoint(f"{demo.demo_path('smollm2')}+{adapter}")
    assert made == ["smollm2"]


def test_a_hub_model_in_the_cache_needs_no_network(
    tiny_llama: TinyFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    repository = cache / "models--acme--small"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_llama.base, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    checkpoint = open_checkpoint("acme/small")
    assert checkpoint.folder == snapshot
    assert checkpoint.base_identity == "acme/small"
    with pytest.raises(CheckpointError, match="could not be reached"):
        open_checkpoint("acme/small@other")
    (snapshot / "model.safetensors").unlink()
    assert refusal("acme/small") == (
        "There is no folder “acme/small”, and the Hugging Face hub could not be reached (the hub cache holds only part "
        "of it). Check the name, or the connection."
    )


# ── bad input: one clear sentence each ──────────────────────────────────────────────────────────────────────────────


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    assert refusal(f"{tmp_path}/nowhere") == f"There is no folder “{tmp_path}/nowhere”."


def test_a_hub_id_offline() -> None:
    assert refusal("acme/unknown") == (
        "There is no folder “acme/unknown”, and the Hugging Face hub could not be reached (the hub cache does not hold "
        "a model of that name). Check the name, or the connection."
    )
    assert refusal("acme/unknown", local_only=True) == (
        "There is no folder “acme/unknown”, and the hub cache holds no complete model of that name."
    )


def test_no_name() -> None:
    assert refusal("  ") == "No model is named: give a folder or a hub id such as “org/name”."


@pytest.mark.parametrize("text", ["x\0y", "a" * 5000, "<script>", "~nobody-here/x", "org/name@"])
def test_strange_text_is_still_one_sentence(text: str) -> None:
    sentence = refusal(text)
    assert len(sentence) < 400
    assert sentence.startswith(("There is no folder “", "“"))


def test_an_empty_folder(tmp_path: Path) -> None:
    assert refusal(str(tmp_path)) == f"“{tmp_path}” is not a model's folder: it has no config.json."


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_says_how_to_convert_it(name: str, model: Path) -> None:
    (model / "model.safetensors").rename(model / name)
    assert refusal(str(model)) == (
        f"“{model}” holds its weights as a pickle ({name}), which can run code when it is opened; convert it once: "
        'python -c "from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained('
        f"'{model}', weights_only=True).save_pretrained('{model}')\""
    )


def test_the_conversion_of_a_pickle_works(tmp_path: Path) -> None:
    """The line that the sentence gives, run as it stands, makes a folder that opens."""
    folder = make_tiny_bert(tmp_path / "old", 0)
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    line = refusal(str(folder)).partition('python -c "')[2].removesuffix('"')
    exec(line, {})
    checkpoint = open_checkpoint(str(folder))
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)


def test_gguf(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model.gguf")
    words = "holds GGUF files, whose weights are quantised; use the original model in safetensors."
    assert refusal(str(model)).endswith(words)
    (model / "config.json").unlink()
    assert refusal(str(model)).endswith(words)
    assert refusal(str(model / "model.gguf")).startswith("“model.gguf” is a GGUF file, whose weights are quantised;")


def test_a_quantised_model(model: Path) -> None:
    set_config(model, quantization_config={"quant_method": "gptq"})
    assert refusal(str(model)) == (
        f"“{model}” is quantised (gptq), and quantised weights cannot be averaged; use the original model in bfloat16, "
        "float16 or float32."
    )


def test_a_single_file(model: Path) -> None:
    assert refusal(str(model / "model.safetensors")) == (
        "“model.safetensors” is a single file: give the folder it lies in, with its config.json."
    )


def test_no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "has no weights in safetensors (model.safetensors or model.safetensors.index.json)." in refusal(str(model))


@pytest.mark.parametrize(
    ("content", "words"), [("{", "is not valid JSON"), ("[]", "is not a JSON object"), ("\udcff", "is not valid JSON")]
)
def test_a_damaged_config(content: str, words: str, model: Path) -> None:
    (model / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    assert f"The config.json of “{model}” {words}" in refusal(str(model))


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -100, -1])
def test_a_file_that_is_cut_off(kept: int, model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    sentence = refusal(str(model))
    assert sentence.startswith(f"“model.safetensors” in “{model}” is damaged: it is cut off")
    assert sentence.endswith("Download or copy it again.")


def test_bytes_that_no_tensor_has(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"more")
    assert "is damaged: its header describes" in refusal(str(model))


LIES = {
    "a larger shape": ({"shape": [4, 4]}, "8 bytes, and F32 of shape [4, 4] takes 64"),
    "a larger type": ({"dtype": "F64"}, "8 bytes, and F64 of shape [2] takes 16"),
    "offsets beyond the end": ({"data_offsets": [8, 16]}, "a wrong place"),
    "offsets backwards": ({"data_offsets": [8, 0]}, "-8 bytes"),
    "negative offsets": ({"data_offsets": [-8, 0]}, "describes the tensor “b” wrongly"),
    "a shape that is not numbers": ({"shape": ["2"]}, "describes the tensor “b” wrongly"),
    "a missing shape": ({"shape": None}, "describes the tensor “b” wrongly"),
    "three offsets": ({"data_offsets": [0, 4, 8]}, "describes the tensor “b” wrongly"),
    "an unknown type": ({"dtype": "F4"}, "as F4, a type that cannot be merged"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(lie: str, tmp_path: Path) -> None:
    change, words = LIES[lie]
    honest = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    path = tmp_path / "model.safetensors"
    write_file(path, {"b": honest}, bytes(8))
    assert read_header(path)["b"].shape == (2,)
    write_file(path, {"b": honest | change}, bytes(8))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert words in caught.value.message


def test_two_names_for_the_same_bytes(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    write_file(tmp_path / "m.safetensors", {"a": entry, "b": entry}, bytes(8))
    with pytest.raises(CheckpointError, match="gives the tensor “b” a wrong place"):
        read_header(tmp_path / "m.safetensors")


@pytest.mark.parametrize("content", [b"\xff" * 64, b"[]", b'"text"', b"{" * 50_000, b"\xff\xfe"])
def test_headers_that_are_not_headers(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    with pytest.raises(CheckpointError, match=r"is damaged: .* Download or copy it again\."):
        read_header(path)


def test_a_length_beyond_all_files(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"\xff" * 8 + b"{}")
    with pytest.raises(CheckpointError, match="it is cut off, or is not a safetensors file"):
        read_header(tmp_path / "m.safetensors")


def test_a_file_that_shrinks_while_it_is_used(model: Path) -> None:
    checkpoint = open_checkpoint(str(model))
    last = max(checkpoint.tensors.values(), key=lambda info: info.start)
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[: last.start])
    with pytest.raises(CheckpointError, match="it became shorter after it was opened"):
        checkpoint.read(last.name)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        checkpoint.read(last.name)


def test_a_missing_shard(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "copy"))
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[1].unlink()
    assert refusal(str(folder)) == (
        f"“{folder}” is incomplete: “{shards[1].name}” of its {len(shards)} files is missing. "
        "Download or copy it again."
    )


def test_an_index_that_promises_too_much(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "copy"))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.extra"] = shard
    path.write_text(json.dumps(index))
    assert f"its index promises the tensor “model.extra” in “{shard}”, which does not hold it" in refusal(str(folder))


@pytest.mark.parametrize("weight_map", [{"a": "../other/model.safetensors"}, {"a": "/etc/passwd"}])
def test_an_index_may_not_leave_its_folder(weight_map: dict[str, str], model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "names files outside the model's folder" in refusal(str(model))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": ["b"]}}'])
def test_a_damaged_index(content: str, model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(content)
    assert "(model.safetensors.index.json) is damaged. Download or copy it again." in refusal(str(model))


def test_adapters_and_bases_in_the_wrong_place(model: Path, tmp_path: Path) -> None:
    adapter = make_tiny_lora(tmp_path / "a", 1, model)
    assert refusal(f"{model}+{model}") == f"“{model}” is no adapter: it has no adapter_config.json."
    assert f"“{adapter}” is an adapter, so it cannot be the base of" in refusal(f"{adapter}+{adapter}")
    set_adapter(adapter, base_model_name_or_path="")
    assert refusal(str(adapter)) == (
        "The adapter “a” does not say which base it was made for: choose one, or write base+adapter."
    )
    set_adapter(adapter, base_model_name_or_path=str(adapter))
    assert refusal(str(adapter)) == f"“{adapter}” is an adapter, so it cannot be the base of “a”."
    set_adapter(adapter, base_model_name_or_path="/gone/base")
    assert refusal(str(adapter)) == "The adapter “a” needs its base “/gone/base”. There is no folder “/gone/base”."


def refusal(reference: str, **settings: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(reference, **settings)
    assert caught.value.field == reference
    assert "\n" not in caught.value.message
    return caught.value.message


def set_config(folder: Path, **changes: Any) -> None:
    """Changes keys of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def set_adapter(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_file(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
