"""The Layers tab on tiny real models, as somebody uses it: estimate, measure, merge, and use the recipe that comes out.

The models are typed as folders and the rows pasted, so that all of the page lies between a visitor and the result.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

from components import recorded
from components.session import Session
from components.settings import Settings
from components.views import examples
from components.views.layer_tasks import tasks_for
from llm_merge.analysis import open_analysis
from llm_merge.hi_merging import Switches
from llm_merge.hierarchical import iter_hi_merge
from llm_merge.recipe import Recipe
from tests.browser.conftest import MakePage, free_port
from tests.tiny_models import TinyFamily, make_family, make_tiny_llama

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

    from tests.browser.conftest import Guard

CUT_OFF = "signal is aborted|Connection errored out"  # Gradio's words for streams that a reload cuts
PATIENCE_MS = 120_000  # transformers and Plotly are loaded first, on busy cores

expect.set_options(timeout=60_000)

HOSTILE = "<img src=x onerror=1>"
SEEN = """(button) => {
    const look = () => {
        const node = document.querySelector(button), shown = Boolean(node && node.offsetParent);
        if (shown) window.seen.appeared = true;
        else if (window.seen.appeared) { window.seen.gone = true; watcher.disconnect(); }
    };
    window.seen = { appeared: false, gone: false };
    const watcher = new MutationObserver(look);
    watcher.observe(document.body, { subtree: true, childList: true, attributes: true });
}"""  # notes that a button came and went, however quickly
WORDS = ["and", "it", "with", "a", "for", "be", "god", "of", "the", "unto", "his", "shall", "was", "lamp", "ship"]


def rows_text(*tasks: str, count: int = 12, words: int = 4) -> str:
    """Rows of these tasks as JSON Lines; without a task where its name is empty."""
    lines = []
    for shift, task in enumerate(tasks, start=1):
        for n in range(count):
            text = " ".join(WORDS[(n * shift + k) % len(WORDS)] for k in range(words))
            row = {"input": f"{n} {text}", "output": text[::-1]} | ({"task": task} if task else {})
            lines.append(json.dumps(row))
    return "\n".join(lines)


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    return make_family(make_tiny_llama, tmp_path_factory.mktemp("trio"), layers=3, delta=0.1)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    """Enough layers for an analysis that takes longer than a reload."""
    return make_family(make_tiny_llama, tmp_path_factory.mktemp("deep"), layers=24, delta=0.1)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("home"), device="cpu")


@pytest.fixture(scope="module")
def url(settings: Settings) -> Iterator[str]:
    """The whole page with a folder of its own, so that nothing is measured yet."""
    from components.launch import launch_settings
    from components.shell import build_app

    app = build_app(settings)
    mine = {"server_name": "127.0.0.1", "server_port": free_port(), "prevent_thread_lock": True, "quiet": True}
    _, address, _ = app.launch(**launch_settings(settings) | mine | {"inbrowser": False})
    yield address
    app.close(verbose=False)


LONG_MS = 240_000  # the demo's base may be converted first


# ---- the way there ---------------------------------------------------------------------------------------------------


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def choose_models(page: Page, models: TinyFamily, fine_tunes: int = 2) -> None:
    expect(page.locator("#recipe-shown")).to_contain_text("King James")  # the session has arrived
    tab(page, "Models")
    # Typed any sooner, a name would be written over by the demo's: its fields are still on their way.
    expect(page.locator("#model-tune-2-found")).to_contain_text("LoRA adapter", timeout=LONG_MS)
    shown = {"#model-base": "No models chosen yet", "#model-tune-1": "tune-1", "#model-tune-2": "tune-2"}
    for (place, words), reference in zip(list(shown.items())[: fine_tunes + 1], models.references, strict=False):
        field = page.locator(f"{place} input").first
        field.fill(reference)
        field.press("Enter")
        expect(page.locator("#recipe-shown")).to_contain_text(words, timeout=PATIENCE_MS)


def paste(page: Page, text: str) -> None:
    tab(page, "Examples")
    page.locator("#examples-text textarea").fill(text)
    expect(page.locator("#examples-summary")).to_contain_text("In use: Your text")


def open_layers(page: Page, models: TinyFamily, text: str, fine_tunes: int = 2) -> None:
    choose_models(page, models, fine_tunes)
    paste(page, text)
    tab(page, "Layers")


def run(page: Page, button: str) -> None:
    """Click a button that starts a job, and wait until the job has ended, be it ever so short."""
    stop = "#himerge-stop" if "himerge" in button else "#layers-stop"
    page.evaluate(SEEN, stop)
    page.locator(button).click()
    page.wait_for_function("window.seen.appeared && window.seen.gone", timeout=PATIENCE_MS)


def cells(page: Page, state: str, row: int | None = None) -> Locator:
    place = "" if row is None else f'[data-r="{row}"]'
    return page.locator(f'#layers-map .lm-cell[data-state="{state}"]{place}')


def pick(page: Page, place: str, option: str) -> None:
    page.locator(f"{place} input").click()
    page.get_by_role("option", name=option).click()


def librarys_recipe(models: TinyFamily, text: str, settings: Settings, switches: Switches) -> Recipe:
    """What the library makes of the same rows with the same switches."""
    base, *tunes = models.references
    session = examples.read(Session(base=base, fine_tunes=tuple(tunes)), text, examples.OWN_TEXT, settings).session
    analysis = open_analysis(base, tasks_for(session, settings, 8), device="cpu", held_out=settings.demo_rows)
    events = iter_hi_merge(analysis, switches)
    while True:
        try:
            next(events)
        except StopIteration as end:
            return end.value.recipe  # type: ignore[no-any-return]


# ---- the whole way ---------------------------------------------------------------------------------------------------


def test_from_an_estimate_to_the_recipe_in_use(
    make_page: MakePage, url: str, trio: TinyFamily, settings: Settings
) -> None:
    page, text = make_page(url=url), rows_text("law", "poems")
    open_layers(page, trio, text)
    expect(page.locator("#layers-headline")).to_contain_text("Nothing is analysed yet")
    expect(page.locator("#layers-analyse")).to_contain_text("Analyse 3 layers (≈ ")

    run(page, "#layers-estimate")
    expect(page.locator("#layers-headline")).to_contain_text("Estimates for 3 layers: nothing is measured yet")
    assert cells(page, "exact").count() == 0
    estimated = cells(page, "estimate").count()
    assert estimated >= 3 * 3  # γ of two tasks and Γ, of three blocks at least

    page.locator('#layers-map [role="gridcell"][tabindex="0"]').focus()
    page.keyboard.press("Home")
    while page.evaluate("document.activeElement.getAttribute('aria-label').startsWith('Layer 1') === false"):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.keyboard.press("Shift+ArrowRight")
    expect(page.locator("#layers-measure")).to_have_text("Measure the 2 selected")
    expect(page.locator("#layers-detail")).to_contain_text("Layer 1, Layer 2")
    run(page, "#layers-measure")
    expect(cells(page, "exact")).to_have_count(2 * 3)
    expect(cells(page, "estimate")).to_have_count(estimated - 2 * 3)
    expect(page.locator("#layers-headline")).to_contain_text("of the 2 layers measured so far")
    page.locator('#layers-map .lm-cell[aria-label^="Layer 2, γ law"]').click()
    expect(page.locator("#layers-detail h4")).to_have_text("Layer 2")
    expect(page.locator("#layers-detail")).to_contain_text("±")
    expect(page.locator("#layers-detail")).to_contain_text("Hi-Merging here:")

    run(page, "#himerge-run")
    expect(page.locator("#himerge-steps tbody tr")).to_have_count(3)
    expect(page.locator("#himerge-result")).to_contain_text("held out: they decide nothing")
    expect(page.locator("#himerge-result")).to_contain_text("Against the plain average")
    expect(page.locator("#himerge-curve .js-plotly-plot")).to_be_visible(timeout=PATIENCE_MS)
    page.locator("#himerge-use").click()
    expect(page.locator("#recipe-shown")).to_contain_text("Hi-Merging, layer by layer")
    expect(page.locator("#layers-recipe")).to_contain_text("In use: Hi-Merging")

    tab(page, "Save")
    shown = page.locator("#save-recipe .cm-content")
    expect(shown).to_contain_text("breadcrumbs")
    expected = librarys_recipe(trio, text, settings, Switches(grid="coarse"))
    assert Recipe.from_yaml(shown.inner_text()).models == expected.models
    assert Recipe.from_yaml(shown.inner_text()) == Recipe.from_yaml(expected.to_yaml())

    tab(page, "Layers")
    page.locator("#hand-back").click()
    expect(page.locator("#recipe-shown")).not_to_contain_text("layer by layer")  # shares again
    expect(page.locator("#himerge-steps tbody tr")).to_have_count(3)  # and what was found stays


def test_switches_reach_the_method_and_nothing_is_limited_unless_asked(
    make_page: MakePage, url: str, trio: TinyFamily, settings: Settings
) -> None:
    page, text = make_page(url=url), rows_text("law", "poems")
    open_layers(page, trio, text)
    page.get_by_role("button", name="What the published description leaves open").click()
    expect(page.locator("#himerge-most input")).to_have_value("0")
    pick(page, "#himerge-grid", "None: p = s = 1")
    pick(page, "#himerge-partial", "The one that loses")
    run(page, "#himerge-run")
    expect(page.locator("#himerge-steps tbody tr")).to_have_count(3)
    page.locator("#himerge-use").click()
    tab(page, "Save")
    shown = page.locator("#save-recipe .cm-content")
    expect(shown).to_contain_text("breadcrumbs")
    expected = librarys_recipe(trio, text, settings, Switches(grid="none", partial_target="weakened"))
    assert Recipe.from_yaml(shown.inner_text()) == Recipe.from_yaml(expected.to_yaml())


def test_layers_are_edited_by_hand_and_put_back(make_page: MakePage, url: str, trio: TinyFamily) -> None:
    page = make_page(url=url)
    open_layers(page, trio, rows_text("law", "poems"))
    page.get_by_role("button", name="Edit the selected layers by hand").click()
    page.locator("#hand-apply").click()
    expect(page.locator("#hand-problem")).to_contain_text("No layer is selected: analyse, then click or brush")
    run(page, "#layers-estimate")
    page.locator('#layers-map .lm-cell[aria-label^="Layer 1, γ law"]').click()
    expect(page.locator("#layers-measure")).to_have_text("Measure the selected layer")
    page.locator("#hand-value input").fill("0.25")
    page.locator("#hand-value input").blur()
    page.locator("#hand-apply").click()
    expect(page.locator("#layers-recipe")).to_contain_text("Layers by hand, 1 layer with values of its own")
    expect(page.locator("#hand-problem")).to_have_text("")
    expect(page.locator("#recipe-shown")).to_contain_text("Layers by hand, layer by layer")
    tab(page, "Save")
    shown = page.locator("#save-recipe .cm-content")
    expect(shown).to_contain_text("breadcrumbs")
    recipe = Recipe.from_yaml(shown.inner_text())
    assert [recipe.value(0, "weight", f"model.layers.{n}.x") for n in range(3)] == [0.5, 0.25, 0.5]
    tab(page, "Layers")
    page.locator("#hand-back").click()
    expect(page.locator("#layers-recipe")).to_contain_text("the same shares in every layer")
    expect(page.locator("#recipe-shown")).to_contain_text("50 %")


# ---- the demo --------------------------------------------------------------------------------------------------------


def test_the_demo_opens_on_its_recorded_analysis(make_page: MakePage, url: str) -> None:
    if recorded.recorded_contributions("decoder") is None:
        pytest.skip("No analysis of the demo's chat models is recorded in assets/demo/measured.")
    page = make_page(url=url)
    expect(page.locator("#recipe-shown")).to_contain_text("King James")
    tab(page, "Layers")
    expect(page.locator("#layers-headline")).to_contain_text("of 30 layers")
    expect(page.locator("#layers-headline")).to_contain_text("Recorded on 20")
    expect(page.locator("#layers-map .lm-label", has_text="γ verse")).to_be_visible()
    assert cells(page, "exact", 0).count() >= 25
    page.locator("#layers-map .lm-cell").first.click()
    expect(page.locator("#layers-detail")).to_contain_text("Hi-Merging here:")


# ---- stop and reload -------------------------------------------------------------------------------------------------


def test_a_reload_finds_the_run_again_and_stop_keeps_what_was_measured(
    make_page: MakePage, url: str, deep: TinyFamily, guard: Guard
) -> None:
    guard.allow(CUT_OFF)
    page = make_page(url=url)
    open_layers(page, deep, rows_text("law", "poems", count=44, words=40))
    page.get_by_label("32", exact=True).check()
    page.locator("#layers-analyse").click()
    expect(cells(page, "exact").first).to_be_visible(timeout=PATIENCE_MS)
    page.reload()
    expect(page.locator("#recipe-shown")).to_contain_text("tune-1")
    tab(page, "Layers")
    expect(page.locator("#layers-progress [role=progressbar]")).to_be_visible()
    expect(page.locator("#layers-analyse")).to_be_hidden()
    expect(cells(page, "exact").first).to_be_visible()
    started = time.monotonic()
    page.locator("#layers-stop").click()
    expect(page.locator("#layers-progress")).to_contain_text("Stopped. What was measured is kept")
    assert time.monotonic() - started < 15  # a whole analysis takes longer
    expect(page.locator("#layers-analyse")).to_be_visible()
    kept = cells(page, "exact").count()
    assert kept > 0
    assert cells(page, "estimate").count() > 0
    expect(page.locator("#layers-headline")).to_contain_text("measured so far")

    page.locator("#layers-analyse").click()  # goes on from there
    expect(page.locator("#layers-stop")).to_be_visible()
    page.locator("#layers-stop").click()
    expect(page.locator("#layers-analyse")).to_be_visible(timeout=PATIENCE_MS)


# ---- wrong input -----------------------------------------------------------------------------------------------------


def test_rows_without_tasks_are_answered_by_a_sentence_and_a_task_name_helps(
    make_page: MakePage, url: str, trio: TinyFamily
) -> None:
    page = make_page(url=url)
    open_layers(page, trio, rows_text("", count=4))
    missing = page.locator("#layers-missing")
    expect(missing).to_contain_text("Some rows do not say which task they are of")
    expect(page.locator("#layers-analyse")).to_be_disabled()
    expect(page.locator("#layers-estimate")).to_be_disabled()
    expect(page.locator("#himerge-run")).to_be_disabled()
    expect(page.locator("#himerge-missing")).to_contain_text("waits for what is missing above")

    tab(page, "Examples")
    page.locator("#examples-task input, #examples-task textarea").first.fill(f"law {HOSTILE}")
    page.locator("#examples-task input, #examples-task textarea").first.blur()
    tab(page, "Layers")
    expect(missing).to_contain_text("“tune-2” has no task")
    tab(page, "Examples")
    page.locator("#examples-task input, #examples-task textarea").first.fill("poems")
    page.locator("#examples-text textarea").fill(rows_text("", count=5))
    expect(page.locator("#examples-reading")).to_contain_text("4 rows of other tasks stay in use")
    tab(page, "Layers")
    expect(missing).to_have_text("")
    expect(page.locator("#layers-analyse")).to_be_enabled()
    page.get_by_role("button", name="Which rows belong to which fine-tune").click()
    expect(page.locator("#layers-owners")).to_contain_text(f"tune-1 on 4 rows of law {HOSTILE}")
    expect(page.locator("#layers-owners")).to_contain_text("look better than they are")
    pick(page, "#layers-task-of", "tune-1")
    pick(page, "#layers-task", "poems")
    expect(page.locator("#layers-owners")).to_contain_text("tune-1 on 5 rows of poems")
    expect(page.locator("#layers-owners")).to_contain_text(f"tune-2 on 4 rows of law {HOSTILE}")

    run(page, "#layers-analyse")
    expect(page.locator("#layers-map .lm-label", has_text=f"γ law {HOSTILE}")).to_be_visible()
    run(page, "#himerge-run")
    expect(page.locator("#himerge-result")).to_contain_text("the same that decide, so this looks better than it is")
    assert page.locator("#layers-map img, #himerge-result img, #himerge-steps img, #layers-detail img").count() == 0


def test_one_fine_tune_can_be_analysed_and_says_what_a_merge_needs(
    make_page: MakePage, url: str, trio: TinyFamily
) -> None:
    page = make_page(url=url)
    open_layers(page, trio, rows_text("law"), fine_tunes=1)
    expect(page.locator("#layers-analyse")).to_be_enabled()
    expect(page.locator("#himerge-run")).to_be_disabled()
    expect(page.locator("#himerge-missing")).to_contain_text("two fine-tunes or more: add another one in Models")
    pick(page, "#layers-show", "How alike two")
    expect(page.locator("#deltas-progress")).to_contain_text("Two fine-tunes are compared here")
    run(page, "#layers-estimate")
    pick(page, "#layers-show", "Conflict: γ per task, and Γ")
    expect(page.locator("#layers-map .lm-label", has_text="γ law")).to_be_visible()


# ---- every entry of the menu, everywhere -----------------------------------------------------------------------------


@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 390)])
def test_every_entry_of_show_is_drawn_and_nothing_sticks_out(
    make_page: MakePage, url: str, trio: TinyFamily, theme: str, width: int
) -> None:
    page = make_page(theme, width, url=url)
    open_layers(page, trio, rows_text("law", "poems"))
    run(page, "#layers-estimate")
    for title, row in (
        ("Contribution c", "c law, before"),
        ("α: what", "α law, before"),
        ("β: what", "β poems, after"),
    ):
        pick(page, "#layers-show", title)
        expect(page.locator("#layers-map .lm-label", has_text=row)).to_be_visible()
        fits(page, width, title)
    pick(page, "#layers-show", "How much each layer changed")
    page.locator("#deltas-read").click()
    chart = page.locator("#deltas-chart .js-plotly-plot")
    for title in ("How much each layer changed", "Where two fine-tunes pull", "How alike two", "One weight matrix"):
        pick(page, "#layers-show", title)
        expect(chart).to_be_visible(timeout=PATIENCE_MS)
        expect(page.locator("#layers-map")).to_be_hidden()
        fits(page, width, title)
    for name in ("Which rows belong", "Edit the selected layers", "What the published", "Score the recipe in use"):
        page.get_by_role("button", name=name).click()
    pick(page, "#layers-show", "Conflict: γ per task, and Γ")
    expect(page.locator("#layers-map .lm-label", has_text="γ law")).to_be_visible()
    page.locator("#layers-map .lm-cell").first.click()
    expect(page.locator("#layers-detail h4")).to_be_visible()
    pick(page, "#himerge-grid", "None: p = s = 1")
    run(page, "#himerge-run")
    expect(page.locator("#himerge-curve .js-plotly-plot")).to_be_visible(timeout=PATIENCE_MS)
    fits(page, width, "everything open")


def fits(page: Page, width: int, what: str) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{what} is wider than the screen"


def test_a_public_page_offers_little_and_measures_no_more(make_page: MakePage, public_app_url: str) -> None:
    page = make_page(url=public_app_url)
    expect(page.locator("#recipe-shown")).to_contain_text("King James")
    tab(page, "Layers")
    expect(page.locator("#layers-rows input")).to_have_count(1)
    page.locator("#himerge-grid input").click()
    expect(page.get_by_role("option")).to_have_count(2)
