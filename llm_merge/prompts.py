"""How a model of text reads an example: one format for all models of a run, and which of its tokens are the answer.

Prompt and answer are turned into tokens together, as the model will meet them, and the answer is found again by the
characters that each token covers. Knows tokenizers and chat templates; never weights, devices or losses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_merge.errors import CheckpointError, MergeError, RecipeError

if TYPE_CHECKING:
    from llm_merge.checkpoint import Checkpoint

FORMATS = ("auto", "chat", "plain")
_SENTINEL = "An answer nobody gives."

Question = str | Sequence[Mapping[str, str]]
"""A question, or every turn of a conversation before the answer, each with its role and content."""


@dataclass(frozen=True)
class ResolvedFormat:
    """The one form in which every model of a run reads the rows.

    kind        "chat": the template's turns; "plain": LM-Cocktail's ``input + " " + output``
    template    the chat template's source, None for plain
    eos         what ends an answer and is learned with it; None: the tokenizer's own end token
    why         one sentence for the page: what was chosen and from which model
    """

    kind: str
    template: str | None
    eos: str | None
    why: str


PLAIN = ResolvedFormat("plain", None, None, "Plain text: the question, a space, the answer, and the end token.")


@dataclass(frozen=True)
class TokenRow:
    """One example as the model reads it.

    ids     token ids
    scored  for each token: is it part of the answer (or its end)?
    spans   for each token the characters [start, end) of `text` it covers; (0, 0) for tokens without characters
    """

    text: str
    ids: tuple[int, ...]
    scored: tuple[bool, ...]
    spans: tuple[tuple[int, int], ...]
    whole: int  # tokens before anything was cut away


def resolve_format(checkpoints: Sequence[Checkpoint], format: str = "auto") -> ResolvedFormat:
    """Choose the format for all models of a run.

    auto = the chat template of the first model that has one, else plain. Raises RecipeError for an unknown name, or
    for "chat" when no model has a template.
    """
    if format not in FORMATS:
        raise RecipeError(f"The format `{format}` is not known: use auto, chat or plain.", field="format")
    if format == "plain":
        return PLAIN
    for checkpoint in checkpoints:
        template = chat_template(checkpoint.folder)
        if template is not None:
            eos = _end_of_turn(checkpoint, template)
            name = checkpoint.base_identity
            return ResolvedFormat("chat", template, eos, f"Chat format: every model reads the chat template of {name}.")
    if format == "chat":
        raise RecipeError("None of the models has a chat template: choose the format plain.", field="format")
    return ResolvedFormat("plain", None, None, PLAIN.why + " No model has a chat template.")


def chat_template(folder: Path) -> str | None:
    """The chat template among a model's tokenizer files, or None."""
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.json"):
        if not (folder / name).is_file():
            continue
        found = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
        if isinstance(found, list):  # several named templates
            named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
            found = named.get("default")
        if isinstance(found, str) and found.strip():
            return found
    return None


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's own tokenizer. Raises CheckpointError when it has none that can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(checkpoint.folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, … for the many ways to lack one
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"{checkpoint.reference} has no tokenizer that can be read ({first}): copy its tokenizer files there."
        raise CheckpointError(message, field=checkpoint.reference) from error


def tokenizer_warnings(checkpoints: Sequence[Checkpoint]) -> tuple[str, ...]:
    """A sentence for each model whose tokenizer files differ from the first's: all read the first one's tokens."""
    warnings = []
    for checkpoint in checkpoints[1:]:
        if checkpoint.tokenizer_hash() != checkpoints[0].tokenizer_hash():
            warnings.append(
                f"{checkpoint.reference} has other tokenizer files than {checkpoints[0].reference}: all models are "
                "measured with the first one's, so check that both give the same tokens."
            )
    return tuple(warnings)


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]], template: str) -> str:
    """The text of a conversation up to where the answer begins. Raises MergeError when the template refuses it."""
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # jinja errors, and templates that call raise_exception
        raise MergeError(
            f"The chat template cannot show this conversation ({error}): choose the format plain."
        ) from error
    return str(text)


def prompt_text(tokenizer: Any, question: Question, fmt: ResolvedFormat) -> str:
    """What stands before the answer; in the plain form the space that joins them belongs to neither."""
    turns = [{"role": "user", "content": question}] if isinstance(question, str) else question
    if fmt.template is None:
        return " ".join(str(turn["content"]) for turn in turns)
    return render_chat(tokenizer, turns, fmt.template)


def encode_answers(
    tokenizer: Any, pairs: Sequence[tuple[Question, str]], fmt: ResolvedFormat, max_length: int
) -> list[TokenRow]:
    """Tokens of (question, answer) pairs, at most `max_length` each, cut at the end; the answer's tokens are marked.

    A token that covers characters of both sides of the border belongs to the answer: it cannot be guessed without it.
    """
    texts, borders = [], []
    for question, answer in pairs:
        prompt = prompt_text(tokenizer, question, fmt)
        if fmt.template is None:
            texts.append(f"{prompt} {answer}")
            borders.append(len(prompt) + 1)
        else:
            texts.append(prompt + answer + (fmt.eos or ""))
            borders.append(len(prompt))
    rows = []
    special = fmt.template is None  # a chat template writes its special tokens itself
    for text, border, (ids, spans) in zip(texts, borders, _encode(tokenizer, texts, borders, special), strict=True):
        scored = [end > border for _, end in spans]
        if fmt.template is None:
            eos = tokenizer.eos_token_id
            if ids and eos is not None and ids[-1] == eos and not scored[-1]:
                scored[-1] = True  # the tokenizer ends texts itself
            elif eos is not None and (not ids or ids[-1] != eos):
                ids, spans, scored = [*ids, eos], [*spans, (0, 0)], [*scored, True]
        cut = slice(0, max_length)
        rows.append(TokenRow(text, tuple(ids[cut]), tuple(scored[cut]), tuple(spans[cut]), len(ids)))
    return rows


def marked_text(row: TokenRow, eos_token: str | None) -> list[tuple[str, bool]]:
    """The row's exact text in pieces, each with whether its tokens are scored. What was cut away is not shown."""
    pieces: list[tuple[str, bool]] = []

    def add(text: str, scored: bool) -> None:
        if not text:
            return
        if pieces and pieces[-1][1] == scored:
            pieces[-1] = (pieces[-1][0] + text, scored)
        else:
            pieces.append((text, scored))

    position = 0
    for index, ((start, end), scored) in enumerate(zip(row.spans, row.scored, strict=True)):
        if end > position:
            # Characters between two tokens (an eaten space) go with the token after them.
            add(row.text[position : max(start, position)], scored and pieces[-1:] != [] and pieces[-1][1])
            add(row.text[max(start, position) : end], scored)
            position = end
        elif (start, end) == (0, 0) and index == len(row.ids) - 1 and scored:
            add(eos_token or "", True)
    return pieces


def _encode(
    tokenizer: Any, texts: Sequence[str], borders: Sequence[int], special: bool
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    if not texts:
        return []
    if getattr(tokenizer, "is_fast", False):
        out = tokenizer(list(texts), add_special_tokens=special, return_offsets_mapping=True)
        return [
            (list(ids), [(int(a), int(b)) for a, b in spans])
            for ids, spans in zip(out["input_ids"], out["offset_mapping"], strict=True)
        ]
    # A tokenizer in Python tells no characters: tokens up to where the prompt alone agrees are taken for the prompt.
    result = []
    for text, border in zip(texts, borders, strict=True):
        ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
        alone = list(tokenizer(text[:border], add_special_tokens=special)["input_ids"])
        same = 0
        while same < min(len(ids), len(alone)) and ids[same] == alone[same]:
            same += 1
        result.append((ids, [(0, border)] * same + [(border, len(text))] * (len(ids) - same)))
    return result


def _end_of_turn(checkpoint: Checkpoint, template: str) -> str | None:
    """The special token that the template writes after an assistant's turn; None: it writes none."""
    tokenizer = load_tokenizer(checkpoint)
    turns = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": _SENTINEL}]
    try:
        text = str(tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False))
    except Exception as error:
        raise CheckpointError(
            f"The chat template of {checkpoint.reference} does not work ({error}): choose the format plain.",
            field=checkpoint.reference,
        ) from error
    tail = text.rpartition(_SENTINEL)[2]
    special = set(tokenizer.all_special_tokens)
    special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    found = [(tail.find(token), -len(token), token) for token in special if token and token in tail]
    if found:
        return str(min(found)[2])
    return str(tokenizer.eos_token) if tokenizer.eos_token else None
