"""What the Save tab shows and when it may save, and the job behind it, without a page."""

from __future__ import annotations

import threading
import zipfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components import save_run
from components.jobs import Step
from components.session import Session
from components.settings import Settings
from components.views import save as view
from llm_merge.errors import MergeError, OutputError, Problem
from llm_merge.layer_edits import as_task_vectors, edit_layers
from llm_merge.merge import Progress
from tests.tiny_models import TinyFamily, make_tiny_llama

PRIVATE = Settings()
PUBLIC = Settings.for_public(Path("/nowhere"))
Usage = namedtuple("Usage", "total used free")


def session_of(family: TinyFamily) -> Session:
    session = Session().with_models("decoder", str(family.base), [str(folder) for folder in family.fine_tunes])
    return session.with_hand_shares([0.4, 0.6])


@pytest.fixture
def session(tiny_llama: TinyFamily) -> Session:
    return session_of(tiny_llama)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder))
    return folder


def run_job(session: Session, folder: str, settings: Settings = PRIVATE) -> tuple[list[Step], view.Saved]:
    steps, work = [], save_run.work(session, folder, settings)(threading.Event())
    while True:
        try:
            steps.append(next(work))
        except StopIteration as end:
            saved: view.Saved = end.value
            return steps, saved


# ── what is shown ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_plan_says_what_will_be_written_and_what_it_takes(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(2 * 10**12, 10**12, 10**12))
    facts = view.facts_html(view.read_plan(session), PRIVATE, str(tmp_path / "out"))
    for text in ("20 tensors in 1 file, 56.4 kB", "bfloat16", "more while merging", "56.4 kB, and 1 TB are free there"):
        assert text in facts
    assert "those of base" in facts
    assert "56.4 kB, as one download" in view.facts_html(view.read_plan(session), PUBLIC, "")


def test_what_is_missing_is_said_and_nothing_can_be_saved() -> None:
    empty = Session()
    alone = Session().with_models("decoder", "/a/base", ["/a/tune"])
    assert view.read_plan(empty).waiting == view.NO_MODELS
    assert view.read_plan(alone).waiting == view.ONE_MODEL
    for session in (empty, alone):
        reading = view.read_plan(session)
        assert not view.can_save(session, reading, PRIVATE)
        assert reading.waiting in view.problems_html(session, reading, PRIVATE)
        assert view.facts_html(reading, PRIVATE, "") == ""


def test_problems_and_warnings_stand_there_with_what_to_do(tiny_llama: TinyFamily, tmp_path: Path) -> None:
    broken = Session().with_models("decoder", "", [str(tiny_llama.base), str(tmp_path / "<b>nowhere</b>")])
    reading = view.read_plan(broken)
    shown = view.problems_html(broken, reading, PRIVATE)
    assert 'class="message problem"' in shown
    assert "&lt;b&gt;nowhere&lt;/b&gt;" in shown
    assert "<b>" not in shown
    assert not view.can_save(broken, reading, PRIVATE)
    precise = make_tiny_llama(tmp_path / "precise", 3, dtype="float32")
    mixed = Session().with_models("decoder", "", [str(tiny_llama.base), str(precise)])
    shown = view.problems_html(mixed, view.read_plan(mixed), PRIVATE)
    assert "Choose float32 as the type to keep every digit." in shown
    assert "Nothing is measured: the models share equally." in shown
    assert view.can_save(mixed, view.read_plan(mixed), PRIVATE)


def test_what_rounding_erases_is_shown_beside_the_rest(session: Session) -> None:
    erased = Problem("warning", "", "Rounding to bfloat16 puts 33 % back.", "Choose float32.")
    shown = view.problems_html(session, view.read_plan(session), PRIVATE, erased)
    assert "Rounding to bfloat16 puts 33 % back. Choose float32." in shown
    assert view.rounding_of(session) is None  # these fine-tunes differ by far more than a step of bfloat16
    assert view.rounding_of(Session()) is None


def test_a_folder_is_suggested_that_does_not_exist_yet(session: Session, tmp_path: Path) -> None:
    first = view.suggested_folder(session, tmp_path)
    assert first == str(tmp_path / "merged" / "tune-1-tune-2")
    Path(first).mkdir(parents=True)
    assert view.suggested_folder(session, tmp_path) == f"{first}-2"
    assert view.suggested_folder(Session(), tmp_path) == ""
    odd = Session().with_models("decoder", "", ["/models/Ünï code!", "/models/" + "x" * 200])
    name = Path(view.suggested_folder(odd, tmp_path)).name
    assert len(name) <= view.MAX_NAME
    assert name.startswith("n-code-xxx")


def test_a_folder_with_something_in_it_is_refused_at_its_field(session: Session, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    reading = view.read_plan(session)
    assert view.folder_message(str(tmp_path), reading) == (
        f"The output folder {tmp_path} exists and is not empty: choose another name, or empty it."
    )
    assert view.folder_message(str(tmp_path / "new"), reading) == ""
    assert view.folder_message("", reading).startswith("No output folder is named")


def test_the_first_models_type_is_named_in_the_choice(session: Session) -> None:
    assert view.type_choices(view.read_plan(session))[0] == ("As the first model (bfloat16)", "")
    assert view.type_choices(view.Reading())[0] == ("As the first model", "")
    wide = replace(session, dtype="float32")
    reading = view.read_plan(wide)
    assert reading.plan is not None
    assert reading.plan.dtype == "float32"


def test_a_public_page_gives_away_only_what_is_small_enough(session: Session) -> None:
    small = replace(PUBLIC, max_download=50_000)
    reading = view.read_plan(session)
    assert reading.plan is not None
    words = (
        "The merged model takes 56.4 kB in bfloat16 and this public page gives at most 50 kB: choose a 16-bit type, or "
        "run LLM Merge on your own machine."
    )
    assert view.too_large(reading.plan, small) == words
    assert words in view.problems_html(session, reading, small)
    assert not view.can_save(session, reading, small)
    assert view.can_save(session, reading, PUBLIC)
    assert view.too_large(reading.plan, replace(PRIVATE, max_download=1)) == ""


def test_progress_is_told_in_tensors_and_bytes() -> None:
    event = Progress("merging", "a", 120, 272, 118_000_000, 269_000_000)
    assert view.progress_text(event) == "Merging: 120 of 272 tensors, 118 MB of 269 MB"
    assert view.progress_text(replace(event, phase="finishing")) == "Writing config, tokenizer and model card"


def test_what_was_saved_is_greyed_when_the_recipe_changes(session: Session) -> None:
    saved = view.Saved(session.recipe_key, "/out/<x>", "", 20, 56_384, 3.2)
    assert view.saved_html(session, None) == ""
    shown = view.saved_html(session, saved)
    assert "Saved to /out/&lt;x&gt;: 20 tensors, 56.4 kB, in 3 s." in shown
    assert "stale" not in shown
    stale = view.saved_html(session.with_hand_shares([0.5, 0.5]), saved)
    assert 'class="stale"' in stale
    assert "The recipe has changed since: save again for the new one." in stale
    assert "Ready to download" in view.saved_html(session, replace(saved, archive="/tmp/x.zip"))
    assert "in less than a second." in view.saved_html(session, replace(saved, seconds=0.2))


def test_the_card_is_shown_without_its_front_matter() -> None:
    card = "---\ntags:\n- merge\n---\n\n# Title\n\n---\nrule"
    assert view.card_body(card) == "# Title\n\n---\nrule"
    assert view.card_body("# Title") == "# Title"


def test_the_card_says_where_the_weights_come_from(session: Session) -> None:
    assert view.provenance(session).notes == ("The weights were set by hand.",)
    equal = Session().with_models("decoder", "", session.fine_tunes)
    assert view.provenance(equal).notes == ("All models share equally.",)
    layered = session.with_layered(as_task_vectors(session.recipe, session.base), "Hi-Merging")
    assert view.provenance(layered).notes == ("Made layer by layer: Hi-Merging.",)


def test_a_recipe_of_layers_is_planned_and_written_like_any_other(session: Session, tmp_path: Path) -> None:
    assert session.recipe is not None
    recipe = edit_layers(as_task_vectors(session.recipe, session.base), ["layers.1."], session.mixed, "set weight", 0.0)
    layered = session.with_layered(recipe, "Layers by hand")
    reading = view.read_plan(layered)
    assert view.can_save(layered, reading, PRIVATE)
    _, saved = run_job(layered, str(tmp_path / "out"))
    merged, base = (load_file(Path(folder) / "model.safetensors") for folder in (saved.folder, session.base))
    same = {name for name in base if torch.equal(merged[name], base[name])}
    assert {name for name in base if ".layers.1." in name} == same  # nothing of the fine-tunes is left there
    yaml = (Path(saved.folder) / "mergekit_config.yml").read_text("utf-8")
    assert "breadcrumbs" in yaml
    assert "layers.1." in yaml


# ── the job ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_job_writes_the_folder_and_says_so(session: Session, tmp_path: Path) -> None:
    steps, saved = run_job(session, str(tmp_path / "out"))
    fractions = [step.fraction for step in steps if step.fraction is not None]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert any(step.message.startswith("Merging: 10 of 20 tensors") for step in steps)
    assert saved.recipe_key == session.recipe_key
    assert saved.folder == str(tmp_path / "out")
    assert saved.card == (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "The weights were set by hand." in saved.card
    assert saved.archive == ""


@pytest.mark.parametrize("settings", [PRIVATE, PUBLIC])
@pytest.mark.parametrize("steps", [1, 8, 23])
def test_a_job_that_is_stopped_leaves_nothing(
    session: Session, tmp_path: Path, temporary: Path, settings: Settings, steps: int
) -> None:
    work = save_run.work(session, str(tmp_path / "out"), settings)(threading.Event())
    for _ in range(steps):
        next(work)
    work.close()
    assert [path for path in tmp_path.rglob("*") if path != temporary] == []


def test_public_mode_packs_the_folder_and_keeps_only_the_download(
    session: Session, tmp_path: Path, temporary: Path
) -> None:
    chosen = tmp_path / "chosen"
    _, saved = run_job(session, str(chosen), PUBLIC)
    assert not chosen.exists()  # what a visitor names is not used
    assert saved.folder == ""
    archive = Path(saved.archive)
    assert archive.is_relative_to(temporary)
    assert [path.name for path in archive.parent.iterdir()] == ["tune-1-tune-2.zip"]
    with zipfile.ZipFile(archive) as packed:
        assert packed.testzip() is None
        names = packed.namelist()
        packed.extractall(tmp_path / "unpacked")
    assert all(name.startswith("tune-1-tune-2/") for name in names)
    private = tmp_path / "private"
    run_job(session, str(private))
    ours = load_file(tmp_path / "unpacked" / "tune-1-tune-2" / "model.safetensors")
    theirs = load_file(private / "model.safetensors")
    assert all(ours[name].equal(tensor) for name, tensor in theirs.items())


def test_old_downloads_make_room_for_new_ones(session: Session, temporary: Path) -> None:
    for number in range(save_run.KEPT_DOWNLOADS + 2):
        _, saved = run_job(session, "", PUBLIC)
        if not number:
            first = saved
    assert len(list(temporary.iterdir())) == save_run.KEPT_DOWNLOADS
    assert view.is_gone(first) and not view.is_gone(saved)


def test_the_job_checks_what_the_page_checks(session: Session, tmp_path: Path, temporary: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(OutputError, match="exists and is not empty"):
        run_job(session, str(tmp_path))
    with pytest.raises(OutputError, match="this public page gives at most"):
        run_job(session, "", replace(PUBLIC, max_download=1000))
    with pytest.raises(MergeError, match="at least two models"):
        run_job(Session().with_models("decoder", "/a", ["/b"]), "")
    with pytest.raises(MergeError, match="No models are chosen"):
        run_job(Session(), "")
    assert list(temporary.iterdir()) == []
