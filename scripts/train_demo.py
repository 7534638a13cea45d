"""Trains the demo's specialists: LoRA adapters on the two demo bases, with fixed seeds, steps and rows.

It can be stopped at any time: the state is kept about once a minute, and the same command goes on from there. It writes
PEFT adapter folders and knows nothing about merging; `measure_demo.py` says what came out.

    python scripts/train_demo.py --all                 every specialist, one after the other
    python scripts/train_demo.py --only king-james     one of them (may be repeated)
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on shared cores, spinning threads cost more than they bring
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import demo_data
import demo_sources
import torch

from llm_merge.demo import ADAPTERS, cache_folder, demo_model, demo_path, prepare

SEED = 7
DECODER_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHARED_TOKENS = 40
"""The template's system prompt and the first words of the instruction."""
ENCODER_LAYERS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")


@dataclass(frozen=True)
class Training:
    """How one specialist is trained; everything here is written beside its adapter."""

    key: str
    steps: int
    batch_size: int
    """Rows in a step; for an encoder also the number of passages each query competes with, negatives not counted."""
    learning_rate: float
    """The peak: reached after `warmup` steps, falling in a straight line to zero."""
    replay: float
    """The share of rows that are general ones, so that the specialist keeps what the base could do."""
    rows: int | None = None
    """How many of the task's training rows are used; None for all."""
    rank: int = 8
    alpha: int = 16
    warmup: int = 10
    gradient_norm: float = 1.0
    temperature: float = 0.05
    """Encoders: cosine similarities are divided by it."""
    strength: float = 1.0
    """The share of the learned change that is stored. Less than all merges better where a specialist learned much more
    than the other one: chosen on rows of the work part, which neither trains a model nor scores one."""


TRAININGS = (
    Training("king-james", steps=100, batch_size=8, learning_rate=1.5e-3, replay=0.2),
    Training("dictionary", steps=110, batch_size=12, learning_rate=1.5e-3, replay=0.2),
    Training("king-james-overtrained", steps=80, batch_size=8, learning_rate=6e-3, replay=0.0, rows=320),
    Training(
        "spanish-search",
        steps=240,
        batch_size=32,
        learning_rate=2e-3,
        replay=0.15,
        rank=12,
        alpha=24,
        strength=0.6,
    ),
    Training("reverse-dictionary", steps=240, batch_size=32, learning_rate=7e-4, replay=0.15, rank=12, alpha=24),
    Training(
        "spanish-search-overtrained",
        steps=160,
        batch_size=32,
        learning_rate=6e-3,
        replay=0.0,
        rows=2000,
        rank=12,
        alpha=24,
    ),
)

Batch = Any
Loss = Callable[[Batch], torch.Tensor]


# --- Rows and batches -----------------------------------------------------------------------------------------------


def plan_rows(training: Training) -> tuple[list[demo_data.Row], str]:
    """All rows in the order of training, and the hash that tells whether they are the same ones another time."""
    model = demo_model(training.key)
    task = demo_data.training_rows(model.model_type, model.task)[: training.rows]
    general = demo_data.training_rows(model.model_type, "general") if training.replay else []
    chooser = random.Random(SEED)
    rows, taken = [], {"task": 0, "general": 0}
    for _ in range(training.steps * training.batch_size):
        kind, source = ("general", general) if chooser.random() < training.replay else ("task", task)
        rows.append(source[taken[kind] % len(source)])
        taken[kind] += 1
    return rows, hashlib.sha256(demo_data.as_lines(rows).encode()).hexdigest()[:16]


def batches_by_length(rows: list[Any], size: int, length: Callable[[Any], Any]) -> list[list[Any]]:
    """Batches of rows of similar length, in a random order: neighbours among `16 * size` rows are sorted together."""
    window = 16 * size
    batches = []
    for start in range(0, len(rows), window):
        near = sorted(rows[start : start + window], key=length)
        part = [near[i : i + size] for i in range(0, len(near), size)]
        random.Random(f"{SEED}:{start}").shuffle(part)
        batches += part
    return batches


# --- Decoder --------------------------------------------------------------------------------------------------------


def encode_chat(tokenizer: Any, row: demo_data.Row, max_length: int = 320) -> tuple[list[int], int]:
    """(token ids, how many of them are prompt), tokenised in one piece; the answer ends as the template ends it."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": row["input"]}], tokenize=False, add_generation_prompt=True
    )
    encoded = tokenizer(prompt + row["output"] + tokenizer.eos_token, return_offsets_mapping=True)
    prompt_tokens = sum(start < len(prompt) for start, _ in encoded["offset_mapping"])
    return encoded["input_ids"][:max_length], prompt_tokens


def decoder_parts(training: Training, rows: list[demo_data.Row]) -> tuple[Any, list[Batch], Loss]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    base = demo_path(demo_model(training.key).base or "")
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = with_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), training, DECODER_LAYERS)
    body, head = model.base_model.model.model, model.base_model.model.lm_head
    encoded = [encode_chat(tokenizer, row) for row in rows]

    def begun(prefix: list[int], count: int) -> DynamicCache:
        """The keys and values of a beginning that `count` rows share, computed once.

        Half of a row or more is the system prompt and the instruction. No gradient goes through them: the steps are
        twice as fast, the loss is exactly the same, and what is learned is learned from the rest of the row.
        """
        cache = DynamicCache(config=body.config)
        # Casts made without gradients must not be reused for the part with gradients.
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            body(input_ids=torch.tensor([prefix]), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(count)
        return cache

    def loss(batch: list[tuple[list[int], int]]) -> torch.Tensor:
        """Nats per answer token, mean over all answer tokens of the batch."""
        columns = zip(*(ids[: prompt - 1] for ids, prompt in batch), strict=False)
        shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        longest = max(len(ids) for ids, _ in batch)
        tokens = torch.full((len(batch), longest), tokenizer.pad_token_id)  # [rows, tokens]
        mask = torch.zeros(len(batch), longest, dtype=torch.long)
        scored = torch.zeros(len(batch), longest, dtype=torch.bool)
        for i, (ids, prompt) in enumerate(batch):
            tokens[i, : len(ids)] = torch.tensor(ids)
            mask[i, : len(ids)] = 1
            scored[i, prompt : len(ids)] = True
        hidden = body(
            input_ids=tokens[:, shared:],
            attention_mask=mask,
            past_key_values=begun(batch[0][0][:shared], len(batch)),
            use_cache=True,
        ).last_hidden_state  # [rows, tokens - shared, width]
        following, wanted = scored[:, shared + 1 :], tokens[:, shared + 1 :]
        # The head is a fifth of the work: it is computed only where an answer token follows.
        logits = head(hidden[:, :-1][following])  # [answer tokens, vocabulary]
        return torch.nn.functional.cross_entropy(logits.float(), wanted[following])

    # Rows with the same instruction come together, so that what they share is long.
    return model, batches_by_length(encoded, training.batch_size, lambda e: (e[0][:SHARED_TOKENS], len(e[0]))), loss


# --- Encoder --------------------------------------------------------------------------------------------------------


def encoder_parts(training: Training, rows: list[demo_data.Row]) -> tuple[Any, list[Batch], Loss]:
    from transformers import AutoModel, AutoTokenizer

    base = demo_path(demo_model(training.key).base or "")
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = with_adapter(AutoModel.from_pretrained(base, dtype=torch.float32), training, ENCODER_LAYERS)

    def embed(texts: list[str]) -> torch.Tensor:
        """[texts, width], of length one: the mean over a text's tokens, as the model's own pooling has it."""
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        hidden = model(**encoded).last_hidden_state
        mask = encoded["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def loss(batch: list[demo_data.Row]) -> torch.Tensor:
        """Each query must find its own passage among those of the whole batch, and each passage its query."""
        similarity = embed([r["query"] for r in batch]) @ embed([r["pos"][0] for r in batch]).T / training.temperature
        target = torch.arange(len(batch))
        both = [torch.nn.functional.cross_entropy(s.float(), target) for s in (similarity, similarity.T)]
        return (both[0] + both[1]) / 2

    # Not sorted by length: the rows of a batch are each other's negatives, and length would give the answer away.
    size = training.batch_size
    return model, [rows[i : i + size] for i in range(0, len(rows), size)], loss


# --- Training -------------------------------------------------------------------------------------------------------


def with_adapter(model: Any, training: Training, layers: tuple[str, ...]) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(SEED)  # PEFT draws A at random; B is zero, so that training begins at the base
    config = LoraConfig(r=training.rank, lora_alpha=training.alpha, target_modules=list(layers), lora_dropout=0.0)
    return get_peft_model(model, config)


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def rate(training: Training, step: int) -> float:
    rising = (step + 1) / training.warmup
    falling = (training.steps - step) / max(1, training.steps - training.warmup)
    return training.learning_rate * min(1.0, rising, falling)


def train(training: Training) -> Iterator[str]:
    """Trains one adapter, going on from the kept state if there is one, and yields lines for a log."""
    yield from (message for message, fraction in prepare(training.key) if fraction == 1.0)
    rows, rows_hash = plan_rows(training)
    parts = decoder_parts if demo_model(training.key).model_type == "decoder" else encoder_parts
    model, batches, loss = parts(training, rows)
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=training.learning_rate, weight_decay=0.0)
    identity = hashlib.sha256(json.dumps([asdict(training), rows_hash, SEED]).encode()).hexdigest()[:16]
    state = cache_folder() / "demo-training" / f"{training.key}-{identity}.pt"
    step = _resume(state, parameters, optimizer)
    yield f"{training.key}: {len(rows)} rows, starting at step {step} of {training.steps}"
    model.train()
    kept, losses = time.monotonic(), []
    while step < training.steps:
        for group in optimizer.param_groups:
            group["lr"] = rate(training, step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(batches[step])
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), training.gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        losses.append(value.item())
        if step % 20 == 0 or step == training.steps:
            yield f"{training.key}: step {step}, loss {sum(losses) / len(losses):.3f}"
            losses = []
        if time.monotonic() - kept > 60 or step == training.steps:
            _keep(state, parameters, optimizer, step)
            kept = time.monotonic()
    write_adapter(training, model, rows_hash)
    yield f"{training.key}: written"


def _keep(state: Path, parameters: dict[str, Any], optimizer: torch.optim.Optimizer, step: int) -> None:
    state.parent.mkdir(parents=True, exist_ok=True)
    aside = state.with_suffix(".part")
    values = {name: p.detach() for name, p in parameters.items()}
    torch.save({"step": step, "parameters": values, "optimizer": optimizer.state_dict()}, aside)
    aside.replace(state)


def _resume(state: Path, parameters: dict[str, Any], optimizer: torch.optim.Optimizer) -> int:
    if not state.is_file():
        return 0
    saved = torch.load(state, weights_only=True)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved["parameters"][name])
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["step"])


def write_adapter(training: Training, model: Any, rows_hash: str) -> None:
    """The adapter in PEFT's format and 16 bits, with the settings that made it; written aside, renamed when whole."""
    target = ADAPTERS / training.key
    aside = target.with_name(f".{training.key}.part")
    base = demo_model(demo_model(training.key).base or "").reference
    for name, parameter in trainable(model).items():
        share = training.strength if "lora_B" in name else 1.0
        parameter.data = (parameter.data * share).to(torch.float16)
    model.peft_config["default"].base_model_name_or_path = base
    model.peft_config["default"].target_modules = sorted(model.peft_config["default"].target_modules)
    model.save_pretrained(aside, save_embedding_layers=False)
    (aside / "README.md").unlink(missing_ok=True)  # PEFT's empty model card: the facts are in training.json
    record = asdict(training) | {"seed": SEED, "rows_sha256": rows_hash, "base": base, "torch": torch.__version__}
    (aside / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--all", action="store_true")
    choice.add_argument("--only", action="append", choices=[t.key for t in TRAININGS])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    demo_sources.fetch_sources()
    for training in TRAININGS:
        if options.all or training.key in options.only:
            started = time.monotonic()
            for line in train(training):
                print(f"{time.monotonic() - started:6.0f} s  {line}", flush=True)


if __name__ == "__main__":
    main()
