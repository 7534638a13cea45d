"""The Models tab's decisions: what fields hold, what the session gets, and which words stand below which field."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from components.catalogue import PUBLIC_ONLY
from components.session import Session
from components.settings import Settings
from components.views.models import (
    ONE_FINE_TUNE,
    TYPES,
    WAITING,
    Models,
    count_text,
    field_html,
    fields_of,
    info_text,
    next_session,
    read_fields,
    summary_html,
    type_html,
)
from llm_merge.demo import demo_path
from tests.tiny_models import TinyFamily, make_tiny_llama, make_tiny_lora

PRIVATE = Settings()


def read(base: object, *tunes: object, settings: Settings = PRIVATE) -> Models:
    return read_fields(str(base), [str(tune) for tune in tunes], settings)


def said(models: Models, place: int = 0) -> list[tuple[str, str]]:
    """What stands below a field: 0 the base, 1 the first fine-tune, …"""
    return list(models.fields[place].messages)


def test_the_page_says_what_the_families_are_called() -> None:
    from llm_merge.families import FAMILIES

    assert {name: family.title for name, family in FAMILIES.items()} == TYPES


# ── what fits together ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_base_and_two_fine_tunes(tiny_llama: TinyFamily) -> None:
    models = read(*tiny_llama.folders)
    assert models.chosen == (str(tiny_llama.base), tuple(map(str, tiny_llama.fine_tunes)))
    assert models.detected == "decoder"
    assert [said(models, place) for place in range(3)] == [[], [], []]
    assert models.messages == (
        ("good", "These 3 models fit together: the merge has 28,192 parameters and takes 56.4 kB in bfloat16."),
    )
    assert '<p class="found">LlamaForCausalLM · 2 layers · 28,192 parameters · bfloat16 · 56.4 kB</p>' in field_html(
        models.base
    )


def test_a_fine_tune_of_another_architecture_is_left_out(tiny_llama: TinyFamily, tiny_bert: TinyFamily) -> None:
    models = read(*tiny_llama.folders, tiny_bert.base)
    assert models.chosen[1] == tuple(map(str, tiny_llama.fine_tunes))
    (kind, sentence), *more = said(models, 3)
    assert kind == "problem"
    assert not more
    assert "two architectures cannot be merged. Choose fine-tunes of one base." in sentence
    assert models.fields[3].text == str(tiny_bert.base)
    assert ("warning", "One fine-tune is left out until the problem beside it is solved.") in models.messages
    assert models.messages[-1][1].startswith("These 3 models fit together")
    assert 'role="alert"' in field_html(models.fields[3])


def test_what_was_typed_is_kept_whatever_it_is(tiny_llama: TinyFamily) -> None:
    models = read(tiny_llama.base, "/gone/model", tiny_llama.fine_tunes[0])
    assert models.fields[1].text == "/gone/model"
    assert said(models, 1) == [("problem", "There is no folder “/gone/model”.")]
    assert models.chosen == (str(tiny_llama.base), (str(tiny_llama.fine_tunes[0]),))


def test_a_base_that_does_not_open(tiny_llama: TinyFamily) -> None:
    models = read("/gone/base", *tiny_llama.fine_tunes)
    assert said(models) == [("problem", "There is no folder “/gone/base”.")]
    assert models.chosen == ("", tuple(map(str, tiny_llama.fine_tunes)))


def test_one_model_only(tiny_llama: TinyFamily) -> None:
    assert read("", "").messages == (("note", "Choose a base and at least one fine-tune of it."),)
    assert read(tiny_llama.base, "").messages == (
        ("note", "“base” alone cannot be merged: choose a fine-tune as well."),
    )
    assert read("", tiny_llama.fine_tunes[0]).messages == (
        ("note", "“tune-1” alone cannot be merged: choose its base, or a second fine-tune as well."),
    )


def test_the_same_model_twice(tiny_llama: TinyFamily) -> None:
    base, tune = tiny_llama.base, tiny_llama.fine_tunes[0]
    models = read(base, tune, tune, base)
    assert models.chosen == (str(base), (str(tune),))
    assert said(models, 2) == [("problem", "This model is chosen above already: choose another one.")]
    assert said(models, 3) == [("problem", "This model is the base already: choose another one.")]
    words = "2 fine-tunes are left out until the problems beside them are solved."
    assert ("warning", words) in models.messages


def test_html_in_a_name_is_text(tiny_llama: TinyFamily) -> None:
    models = read("<img src=x onerror=alert(1)>", tiny_llama.base)
    page = "".join(field_html(found) for found in models.fields) + summary_html(models) + type_html("decoder", models)
    assert "<img" not in page
    assert "&lt;img src=x" in page


def test_a_public_page_opens_nothing_of_the_visitor_s(tiny_llama: TinyFamily) -> None:
    models = read(*tiny_llama.folders, settings=Settings(public=True))
    assert models.chosen == ("", ())
    assert {sentence for found in models.fields for _, sentence in found.messages} == {PUBLIC_ONLY}
    assert [found.text for found in models.fields] == tiny_llama.references


# ── adapters ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_adapter_fills_in_its_own_base(tiny_llama: TinyFamily, tmp_path: Path) -> None:
    poet = make_tiny_lora(tmp_path / "poet", 1, tiny_llama.base)
    models = read("", poet)
    assert models.base.text == str(tiny_llama.base)
    assert said(models) == [("note", "Filled in: the base that “poet” was made for.")]
    assert models.chosen == (str(tiny_llama.base), (f"{tiny_llama.base}+{poet}",))
    assert models.fields[1].text == str(poet)
    assert info_text(models.fields[1].info) == "LoRA adapter of rank 4 · 3.58 kB · on base"  # type: ignore[arg-type]


def test_an_adapter_is_put_on_the_chosen_base(tiny_llama: TinyFamily, tmp_path: Path) -> None:
    poet = make_tiny_lora(tmp_path / "poet", 1, tiny_llama.base)
    other = tiny_llama.fine_tunes[0]
    models = read(other, poet)
    assert models.chosen == (str(other), (f"{other}+{poet}",))


def test_an_adapter_made_for_another_base_of_the_same_shape(tiny_llama: TinyFamily, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama.base, tmp_path / "named"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"_name_or_path": "org/chosen"}))
    adapter = make_tiny_lora(tmp_path / "poet", 1, base, base_model_name_or_path="org/other")
    models = read(base, adapter, tiny_llama.fine_tunes[0])
    assert said(models, 1) == [
        ("problem", "The adapter “poet” was made for “org/other”, and the chosen base is “org/chosen”. "
                    "Choose “org/other” as base, or another adapter.")
    ]  # fmt: skip
    assert models.chosen[1] == (str(tiny_llama.fine_tunes[0]),)


def test_an_adapter_of_another_shape(tiny_llama: TinyFamily, tmp_path: Path) -> None:
    wide = make_tiny_llama(tmp_path / "wide", 0, hidden=64)
    adapter = make_tiny_lora(tmp_path / "poet", 1, wide)
    models = read(tiny_llama.base, adapter)
    (message,) = said(models, 1)
    assert message[0] == "problem"
    assert "does not fit “base”" in message[1]
    assert models.chosen == (str(tiny_llama.base), ())


def test_a_demo_base_that_is_not_ready_yet(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session has the models already; nothing is opened, and nothing is called a problem."""
    monkeypatch.setattr("llm_merge.demo.packaged_file", lambda key: Path("in a package"))
    references = [demo_path(key) for key in ("smollm2", "king-james", "dictionary")]
    models = read(*references)
    assert models.chosen == (references[0], tuple(references[1:]))
    assert models.messages == (("note", WAITING),)
    assert [found.messages for found in models.fields] == [(), (), ()]


# ── the session ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_session_gets_what_opens(tiny_llama: TinyFamily) -> None:
    session = next_session(Session(), read(tiny_llama.base, "/gone", *tiny_llama.fine_tunes))
    assert (session.base, session.fine_tunes) == (str(tiny_llama.base), tuple(map(str, tiny_llama.fine_tunes)))
    assert session.model_type == "decoder"
    assert session.mixed == session.fine_tunes


def test_the_type_is_detected_or_chosen(tiny_bert: TinyFamily, tiny_reranker: TinyFamily) -> None:
    models = read(*tiny_bert.folders)
    assert next_session(Session(), models).model_type == "encoder"
    assert next_session(Session(), models, "reranker").model_type == "reranker"
    assert next_session(Session(), read(*tiny_reranker.folders)).model_type == "reranker"
    assert next_session(Session(model_type="reranker"), read("", "")).model_type == "reranker"
    assert "Detected from" in type_html("encoder", models)
    assert "The base looks like an embedding model; it is used as a reranker, as you chose." in type_html(
        "reranker", models
    )


def test_a_single_fine_tune_is_mixed_with_its_base(tiny_llama: TinyFamily) -> None:
    base, first, second = tiny_llama.folders
    one = next_session(Session(), read(base, first))
    assert one.include_base
    assert one.shares == (0.5, 0.5)
    assert ("note", ONE_FINE_TUNE) in read(base, first).messages
    assert not next_session(one, read(base, first, second)).include_base
    alone = one.with_base_included(False)
    assert not next_session(alone, read(base, first)).include_base  # the visitor's own choice stays
    both = next_session(Session(), read(base, first, second)).with_base_included(True)
    assert next_session(both, read(base, second, first)).include_base


def test_the_fields_of_a_session(tiny_llama: TinyFamily, tmp_path: Path) -> None:
    poet = make_tiny_lora(tmp_path / "poet", 1, tiny_llama.base)
    session = next_session(Session(), read("", poet, tiny_llama.fine_tunes[0]))
    base, tunes = fields_of(session, 4)
    assert (base, tunes) == (str(tiny_llama.base), (str(poet), str(tiny_llama.fine_tunes[0]), "", ""))
    assert next_session(session, read(base, *tunes)) == session


def test_a_demo_specialist_stands_in_its_field_by_its_own_reference() -> None:
    session = Session().with_models("decoder", demo_path("smollm2"), [demo_path("king-james")])
    assert fields_of(session, 2) == (demo_path("smollm2"), (demo_path("king-james"), ""))


@pytest.mark.parametrize(
    ("count", "text"), [(28_192, "28,192"), (134_515_008, "134.5 M"), (7_241_732_096, "7.2 B"), (999_999, "999,999")]
)
def test_numbers_of_parameters(count: int, text: str) -> None:
    assert count_text(count) == text
