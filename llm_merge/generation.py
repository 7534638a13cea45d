"""Text from a model in memory, token by token: what comes next is computed only when it is asked for.

Several answers can therefore be drawn side by side from one thread, and closing an iterator ends its answer before
another token is computed. Knows settings and stopping; not where the prompt comes from nor who reads the answer.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_merge.errors import MergeError
from llm_merge.prompts import PLAIN, Question, ResolvedFormat, prompt_text

if TYPE_CHECKING:
    from llm_merge.workbench import Workbench


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are drawn. The defaults are for models whose own generation_config.json says nothing.

    temperature         randomness: near 0 the likeliest token, 1 as the model was trained
    top_p               only the likeliest tokens that together have this probability
    repetition_penalty  above 1, tokens that were already used become less likely
    max_new_tokens      the longest answer
    greedy              always the likeliest token
    seed                the same seed gives the same noise to every model, so answers differ only where models do
    """

    temperature: float = 0.2
    top_p: float = 0.9
    repetition_penalty: float = 1.1
    max_new_tokens: int = 128
    greedy: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {
            "temperature": (0.0, 5.0, self.temperature),
            "top_p": (0.0, 1.0, self.top_p),
            "repetition_penalty": (0.1, 10.0, self.repetition_penalty),
        }
        for name, (low, high, value) in limits.items():
            if not low < value <= high:
                hint = " For no randomness choose greedy." if name == "temperature" else ""
                raise MergeError(f"{name} is {value}: it must be above {low:g} and at most {high:g}.{hint}", field=name)
        if self.max_new_tokens < 1:
            raise MergeError("The answer must have at least 1 token.", field="max_new_tokens")

    @classmethod
    def of_model(cls, folder: Path) -> GenerationSettings:
        """What the model's own generation_config.json recommends, else the defaults."""
        path = folder / "generation_config.json"
        if not path.is_file():
            return cls()
        stated = json.loads(path.read_text(encoding="utf-8"))
        chosen: dict[str, Any] = {}
        for name in ("temperature", "top_p", "repetition_penalty", "max_new_tokens"):
            if isinstance(stated.get(name), (int, float)):
                chosen[name] = stated[name]
        if stated.get("do_sample") is False:
            chosen["greedy"] = True
        try:
            return cls(**chosen)
        except MergeError:  # a file written by a stranger
            return cls()


def generate(
    bench: Workbench,
    prompt: Question,
    settings: GenerationSettings | None = None,
    fmt: ResolvedFormat = PLAIN,
    stop: threading.Event | None = None,
) -> Iterator[str]:
    """The answer so far, after each token; the last one is whole. `prompt`: a question, or the messages of a chat.

    Ends at an end token, at the longest answer, when `stop` is set, or when the iterator is closed. The bench's lock
    is the caller's. Raises MergeError for a prompt that leaves no room for an answer.
    """
    settings = settings or GenerationSettings()
    tokenizer = bench.tokenizer
    ids = _prompt_ids(tokenizer, prompt, fmt)
    room = _room(bench, len(ids))
    if room < 1:
        raise MergeError(
            f"The prompt has {len(ids)} tokens and leaves no room for an answer: shorten it.", field="prompt"
        )
    steps = _Steps(bench, ids, settings, min(settings.max_new_tokens, room), _end_ids(bench, fmt))
    text = shown = ""
    try:
        for answer in steps:
            text = str(tokenizer.decode(answer, skip_special_tokens=True))
            # Half a character (a token may hold a part of one) is not shown until the rest is there.
            if not text.endswith("�") and text != shown:
                shown = text
                yield shown
            if stop is not None and stop.is_set():
                return
        if text != shown:
            yield text.rstrip("�")
    finally:
        steps.close()


class _Steps:
    """`model.generate` turned inside out: its thread computes one token each time the next one is asked for."""

    def __init__(self, bench: Workbench, ids: list[int], settings: GenerationSettings, longest: int, ends: list[int]):
        self._arguments = (bench, ids, settings, longest, ends)
        self._asked, self._ready = threading.Semaphore(0), threading.Semaphore(0)
        self._closed = False
        self._answer: list[int] = []
        self._done = False
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def __iter__(self) -> Iterator[list[int]]:
        self._thread = threading.Thread(target=self._run, daemon=True, name="generate")
        self._thread.start()
        while True:
            self._asked.release()
            self._ready.acquire()
            if self._error is not None:
                raise self._error
            yield self._answer
            if self._done:
                return

    def close(self) -> None:
        """End the thread: it waits for a token to be asked for, and ends instead of computing it."""
        self._closed = True
        self._asked.release()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._asked.acquire()
            if not self._closed:
                self._generate()
        except Exception as error:  # handed to whoever waits for the next token
            self._error = error
        finally:
            self._done = True
            self._ready.release()

    def _generate(self) -> None:
        import torch
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

        bench, ids, settings, longest, ends = self._arguments
        skip = 1 if bench.model.config.is_encoder_decoder else len(ids)

        class OneAtATime(StoppingCriteria):
            def __call__(criteria, input_ids: Any, scores: Any, **_: Any) -> Any:
                answer = input_ids[0, skip:].tolist()
                last = answer[-1:] and answer[-1] in ends
                self._answer = answer[:-1] if last else answer
                ended = bool(last) or len(answer) >= longest
                if not ended:
                    self._ready.release()
                    self._asked.acquire()
                return torch.tensor([ended or self._closed], device=input_ids.device)

        # The model's own settings are read by `GenerationSettings.of_model`, shown, and perhaps changed: here only the
        # visitor's count. Ends are recognised above, so that the answer never contains one.
        config = GenerationConfig(
            max_new_tokens=longest,
            do_sample=False,
            num_beams=1,
            repetition_penalty=settings.repetition_penalty,
            pad_token_id=ends[0] if ends else 0,
            eos_token_id=None,
            use_cache=True,
            decoder_start_token_id=getattr(bench.model.generation_config, "decoder_start_token_id", None),
        )
        tokens = torch.tensor([ids], device=bench.device)
        with torch.inference_mode():
            bench.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                generation_config=config,
                logits_processor=LogitsProcessorList(_drawing(settings)),
                stopping_criteria=StoppingCriteriaList([OneAtATime()]),
            )


def _drawing(settings: GenerationSettings) -> list[Any]:
    """Temperature, top-p, then Gumbel noise: the largest of log-probability plus noise is a fair draw (Gumbel 1954).

    The noise comes from a generator of its own, so answers drawn at the same time do not disturb each other, and two
    models with the same seed meet the same noise.
    """
    if settings.greedy:
        return []
    import torch
    from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

    class GumbelNoise(LogitsProcessor):
        def __init__(self) -> None:
            self.generator = torch.Generator().manual_seed(settings.seed)

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            uniform = torch.rand(scores.shape[-1], generator=self.generator).clamp_(min=1e-20)
            return scores - torch.log(-torch.log(uniform)).to(scores)

    return [TemperatureLogitsWarper(settings.temperature), TopPLogitsWarper(settings.top_p), GumbelNoise()]


def _prompt_ids(tokenizer: Any, prompt: Question, fmt: ResolvedFormat) -> list[int]:
    last = prompt if isinstance(prompt, str) else str(prompt[-1].get("content", "")) if prompt else ""
    if not last.strip():
        raise MergeError("The prompt is empty: write something first.", field="prompt")
    text = prompt_text(tokenizer, prompt, fmt)
    return list(tokenizer(text, add_special_tokens=fmt.template is None)["input_ids"])  # a template writes its own


def _end_ids(bench: Workbench, fmt: ResolvedFormat) -> list[int]:
    """Every token that ends an answer: the format's, the tokenizer's, and those of the model's generation config."""
    tokenizer = bench.tokenizer
    found = [tokenizer.convert_tokens_to_ids(fmt.eos)] if fmt.eos else []
    found.append(tokenizer.eos_token_id)
    stated = getattr(bench.model.generation_config, "eos_token_id", None)
    found += stated if isinstance(stated, list) else [stated]
    return list(dict.fromkeys(int(token) for token in found if token is not None))


def _room(bench: Workbench, used: int) -> int:
    """Tokens that still fit behind the prompt."""
    if bench.model.config.is_encoder_decoder:
        return 1 << 30
    longest = getattr(bench.model.config.get_text_config(), "max_position_embeddings", None)
    return int(longest) - used if isinstance(longest, int) else 1 << 30
