"""The Models tab's decisions: what each field holds, what was found, what is wrong and beside which field it is said.

A field keeps whatever was typed; the session gets only models that open. This module opens headers through the core and
knows no Gradio; all text from outside is escaped here.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from components.catalogue import is_demo, resolve_choice
from components.demo_setup import unprepared
from components.feedback import error_html, note_html
from components.naming import short_name
from components.session import Session
from components.settings import Settings
from llm_merge.checkpoint import Checkpoint, ModelInfo, describe, open_checkpoint, split_reference
from llm_merge.errors import MergeError, Problem
from llm_merge.plan import check, size_text
from llm_merge.recipe import Recipe

TYPES = {
    "decoder": "chat model",
    "encoder": "embedding model",
    "reranker": "reranker",
    "encoder-decoder": "encoder-decoder model",
}
"""What the page calls the model types; a test compares with `llm_merge.families`, whose import would bring in torch."""


WAITING = "The demo’s base model is being made ready: this happens once and takes some 20 seconds."
ONE_FINE_TUNE = "One fine-tune: the base takes a share of the mix too. Weights can change that."


@dataclass(frozen=True)
class Field:
    """One model field. `text` as it should stand there, `reference` what it means ("" if it does not open), `waiting`
    for a demo base that is being made ready and opens in a moment.
    """

    text: str = ""
    reference: str = ""
    info: ModelInfo | None = None
    messages: tuple[tuple[str, str], ...] = ()  # (problem | warning | note, sentence)
    waiting: bool = False

    def saying(self, kind: str, sentence: str) -> Field:
        if (kind, sentence) in self.messages:
            return self
        return replace(self, messages=(*self.messages, (kind, sentence)))


@dataclass(frozen=True)
class Models:
    """All fields as read: the base, the fine-tunes by place, and what concerns all of them."""

    base: Field
    fine_tunes: tuple[Field, ...]
    detected: str = ""  # model type of the base, else of the first fine-tune that opens
    messages: tuple[tuple[str, str], ...] = field(default=())

    @property
    def fields(self) -> tuple[Field, ...]:
        return (self.base, *self.fine_tunes)

    @property
    def chosen(self) -> tuple[str, tuple[str, ...]]:
        """What the session gets: the base's reference and those of the fine-tunes that open."""
        return self.base.reference, tuple(tune.reference for tune in self.fine_tunes if tune.reference)


def read_fields(base: str, fine_tunes: Sequence[str], settings: Settings) -> Models:
    """Opens what the fields name and checks that it fits together. Never raises for what a visitor typed.

    A chosen adapter fills in an empty base with its own; with a base chosen it is put on that one.
    """
    base_field, base_model = _open(base, settings)
    tunes: list[Field] = []
    opened: dict[str, Checkpoint] = {base_field.reference: base_model} if base_model else {}
    for text in fine_tunes[: settings.max_models]:
        tune, model = _open(text, settings, base_field.reference)
        if model and model.adapter and not base_field.text.strip():
            base_field, base_model = _open(model.base_reference, settings)
            if base_model:
                base_field = base_field.saying("note", f"Filled in: the base that “{tune_name(tune)}” was made for.")
                opened[base_field.reference] = base_model
                tune, model = _open(text, settings, base_field.reference)
        if tune.reference and tune.reference in opened:
            other = "the base" if tune.reference == base_field.reference else "chosen above"
            tune = replace(tune, reference="").saying("problem", f"This model is {other} already: choose another one.")
        elif model:
            opened[tune.reference] = model
        tunes.append(tune)
    detected = base_field.info or next((tune.info for tune in tunes if tune.info), None)
    models = Models(base_field, tuple(tunes), detected.model_type if detected else "")
    return _checked(models, opened)


def next_session(session: Session, models: Models, model_type: str = "") -> Session:
    """The session with these models. `model_type` is the visitor's own choice; "" takes what was detected.

    A single fine-tune can only be mixed with its base, so the base then takes a share; with a second one it leaves the
    mix again.
    """
    base, tunes = models.chosen
    kind = model_type or models.detected or session.model_type
    changed = session.with_models(kind, base, tunes)
    alone, was_alone = len(tunes) == 1 and bool(base), len(session.fine_tunes) == 1
    if alone and not was_alone and not changed.include_base:
        return changed.with_base_included(True)
    if len(tunes) > 1 and was_alone and changed.include_base:
        return changed.with_base_included(False)
    return changed


def fields_of(session: Session, count: int) -> tuple[str, tuple[str, ...]]:
    """What the fields show for a session: the base's text and `count` fine-tunes, "" where there are fewer.

    An adapter that is put on the base stands in its field alone.
    """
    prefix = f"{session.base}+"
    texts = [
        tune if is_demo(tune) or not tune.startswith(prefix) else tune.removeprefix(prefix)
        for tune in session.fine_tunes
    ]
    return session.base, tuple((texts + [""] * count)[:count])


def field_html(found: Field) -> str:
    """What was found and what is wrong, for the place below a field."""
    parts = [f'<p class="found">{html.escape(info_text(found.info))}</p>'] if found.info else []
    for kind, sentence in found.messages:
        parts.append(error_html(sentence) if kind == "problem" else note_html(sentence, kind))
    return "".join(parts)


def summary_html(models: Models) -> str:
    """What concerns all models: too few, what the merge will be, problems of no single one."""
    return "".join(error_html(text) if kind == "problem" else note_html(text, kind) for kind, text in models.messages)


def type_html(model_type: str, models: Models) -> str:
    """Below the type: where it comes from, or that the visitor chose against what the files say."""
    if not models.detected:
        return '<p class="found">Detected when a base is chosen.</p>'
    if model_type == models.detected:
        return '<p class="found">Detected from the base’s config.json.</p>'
    return note_html(
        f"The base looks like {_article(models.detected)}; it is used as {_article(model_type)}, as you chose.",
        "warning",
    )


def info_text(info: ModelInfo) -> str:
    """One line: "LlamaForCausalLM · 30 layers · 134.5 M parameters · bfloat16 · 269 MB", or what an adapter is."""
    if info.adapter_of is not None:
        return f"LoRA adapter of rank {info.adapter_rank} · {size_text(info.adapter_bytes)} · on {info.base}"
    parts = [info.architecture]
    if info.layers is not None:
        parts.append(f"{info.layers} layers")
    parts += [f"{count_text(info.parameters)} parameters", info.dtype, size_text(info.bytes)]
    return " · ".join(parts)


def count_text(count: int) -> str:
    """A number of parameters as people say it: "134.5 M", "7.2 B", "28,192"."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} B"
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def tune_name(found: Field) -> str:
    return found.info.title if found.info else short_name(found.text)


def _open(text: str, settings: Settings, base: str = "") -> tuple[Field, Checkpoint | None]:
    """Reads one field; an adapter alone is put on `base` where one is chosen."""
    try:
        reference = resolve_choice(text, settings)
        if not reference:
            return Field(text.strip()), None
        if unprepared([reference, base]):
            return Field(reference, reference, waiting=True), None
        model = open_checkpoint(reference, base=base or None)
        if base and model.adapter and split_reference(reference)[1] is None:
            reference = f"{base}+{reference}"
            model = open_checkpoint(reference)
        return Field(reference if is_demo(reference) else text.strip(), reference, describe(model)), model
    except MergeError as error:
        return Field(text).saying("problem", error.message), None


def _checked(models: Models, opened: dict[str, Checkpoint]) -> Models:
    """The models with the plan's problems beside those that cause them, and a sentence about all.

    A fine-tune that does not fit is left out of the session until its problem is solved; the others go on.
    """
    if any(found.waiting for found in models.fields):
        return replace(models, messages=(("note", WAITING),))
    models, problems = _fitting(models)
    base, tunes = models.chosen
    references = list(dict.fromkeys(reference for reference in (base, *tunes) if reference))
    general = [(problem.severity, str(problem)) for problem in problems]
    left_out = sum(1 for tune in models.fine_tunes if tune.text.strip() and not tune.reference)
    if left_out:
        one = "One fine-tune is left out until the problem beside it is solved."
        more = f"{left_out} fine-tunes are left out until the problems beside them are solved."
        general.append(("warning", one if left_out == 1 else more))
    if not references:
        general.append(("note", "Choose a base and at least one fine-tune of it."))
    elif len(references) == 1:
        only = "a fine-tune" if base else "its base, or a second fine-tune"
        general.append(("note", f"“{short_name(references[0])}” alone cannot be merged: choose {only} as well."))
    else:
        plan, _ = check(_recipe(base, references))
        if plan is not None:
            count = count_text(describe(opened[references[0]]).parameters)
            size = size_text(plan.output_bytes)
            general.append(("good", f"These {len(references)} models fit together: the merge has {count} parameters "
                                    f"and takes {size} in {plan.dtype}."))  # fmt: skip
            if base and len(tunes) == 1:
                general.append(
                    ("note", "One fine-tune: the base takes a share of the mix too. Weights can change that.")
                )
    return replace(models, messages=tuple(general))


def _fitting(models: Models) -> tuple[Models, list[Problem]]:
    """What the plan finds, beside the fields it concerns; and what it finds of no single one."""
    base, tunes = models.chosen
    references = list(dict.fromkeys(reference for reference in (base, *tunes) if reference))
    if not references:
        return models, []
    _, problems = check(_recipe(base, references))
    fields = []
    for found in models.fields:
        for problem in problems:
            if found.reference and problem.model == found.reference:
                found = found.saying(problem.severity, str(problem))
        blocked = any(kind == "problem" for kind, _ in found.messages)
        fields.append(replace(found, reference="") if blocked else found)
    general = [problem for problem in problems if problem.model not in references]
    return replace(models, base=fields[0], fine_tunes=tuple(fields[1:])), general


def _recipe(base: str, references: Sequence[str]) -> Recipe:
    """Equal shares: whether models fit does not depend on them."""
    recipe = Recipe.linear(references, [1 / len(references)] * len(references))
    return replace(recipe, base_model=base or None)


def _article(model_type: str) -> str:
    title = TYPES.get(model_type, model_type)
    return f"{'an' if title[0] in 'aeiou' else 'a'} {title}"
