"""The whole way through the page on the real demo models, as a stranger goes it; few rows and few tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from playwright.sync_api import expect

from tests.browser.conftest import PATIENCE_MS

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from tests.browser.conftest import Guard, MakePage

CUT_OFF = "signal is aborted|Connection errored out"  # Gradio's words for streams that a reload cuts
LONG_MS = 240_000  # loading, measuring and answering with a 135 M model on two busy cores
ROWS = (
    "task,input,output\n"
    'verse,Rewrite this verse in King James English: He told them to go.,"And he said unto them, Go."\n'
    'dictionary,Define the word: lamp,"(noun) a piece of furniture holding one or more electric light bulbs"\n'
)

expect.set_options(timeout=PATIENCE_MS)


def opened(page: Page) -> Page:
    """The page once the visitor's session has arrived."""
    expect(page.locator("#recipe-shown")).to_contain_text("King James")
    expect(page.locator("#start-answers article").last).to_be_visible()
    return page


def use_few_rows(page: Page) -> None:
    page.get_by_role("tab", name="Examples").click()
    page.locator("#examples-text textarea").fill(ROWS)
    expect(page.locator("#examples-summary")).to_contain_text("In use: Your text")
    page.get_by_role("tab", name="Start").click()


def test_start_fits_one_screen_and_says_what_is_recorded(make_page: MakePage) -> None:
    page = opened(make_page())
    expect(page.get_by_role("heading", level=1)).to_have_text("Mix fine-tuned models. See why. Try before you save.")
    titles = page.locator("#start-answers h3").all_text_contents()
    assert titles == ["Base", "King James", "Merged"]
    assert all("recorded on" in text for text in page.locator("#start-answers .from").all_text_contents())
    expect(page.locator("#start-result")).to_contain_text("gain")
    for name in ("Run it live", "Use my own models"):
        box = page.get_by_role("button", name=name).bounding_box()
        assert box is not None
        assert box["y"] + box["height"] <= 800, f"{name} ends below the first screen"


def test_on_a_phone_the_merge_comes_first_and_nothing_sticks_out(make_page: MakePage) -> None:
    page = opened(make_page(width=390, height=844))
    tops = {}
    for card in page.locator("#start-answers article").all():
        box = card.bounding_box()
        assert box is not None
        tops[card.locator("h3").text_content()] = box["y"]
    assert tops["Merged"] == min(tops.values())
    for tab in ("Start", "Models", "Examples", "Weights", "Layers", "Try", "Save"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, f"{tab} is wider than the screen"


def test_the_shares_follow_the_temperature_and_the_bar_hears_it_on_release(make_page: MakePage) -> None:
    page = opened(make_page())
    share = page.locator("#start-shares").get_by_label("Share of King James, as a number")
    before, bar = share.input_value(), page.locator("#recipe-shown").text_content()
    slider = page.locator("#start-shares").get_by_label("Weight temperature", exact=True)
    slider.focus()
    page.keyboard.press("Home")  # T = 0.01: one model takes nearly all
    assert share.input_value() != before
    expect(page.locator("#recipe-shown")).to_contain_text("T = 0.01")
    assert page.locator("#recipe-shown").text_content() != bar


def test_the_whole_live_demo(make_page: MakePage, tmp_path: Path) -> None:
    page = opened(make_page())
    use_few_rows(page)
    page.get_by_role("button", name="Run it live").click()
    expect(page.locator("#start-progress [role=progressbar]")).to_be_visible()
    expect(page.locator("#start-answers .from").last).to_contain_text("live at", timeout=LONG_MS)
    expect(page.locator("#run-live")).to_be_visible(timeout=LONG_MS)
    texts = page.locator("#start-answers article .text").all_text_contents()
    assert len(texts) == 3
    assert all(len(text) > 3 for text in texts)
    expect(page.locator("#recipe-shown")).to_contain_text("2 rows measured")

    page.get_by_role("button", name="Save it →").click()
    folder = tmp_path / "merged"
    page.locator("#save-folder textarea, #save-folder input").first.fill(str(folder))
    page.locator("#save-folder textarea, #save-folder input").first.blur()
    page.locator("#save-run").click()
    expect(page.locator("#save-saved")).to_contain_text(f"Saved to {folder}", timeout=LONG_MS)
    expect(page.locator("#recipe-shown")).to_contain_text("· saved")
    files = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "mergekit_config.yml", "README.md"} <= files
    assert list(tmp_path.iterdir()) == [folder]


def test_a_reload_finds_the_run_again_and_stop_ends_it(make_page: MakePage, guard: Guard) -> None:
    guard.allow(CUT_OFF)
    page = opened(make_page())
    page.get_by_role("button", name="Run it live").click()
    expect(page.locator("#start-progress [role=progressbar]")).to_be_visible()
    page.reload()
    opened(page)
    expect(page.locator("#start-progress [role=progressbar]")).to_be_visible()
    page.locator("#stop-live").click()
    expect(page.locator("#start-progress")).to_contain_text("Stopped after", timeout=LONG_MS)
    expect(page.locator("#run-live")).to_be_visible()


def test_two_visitors_never_see_each_others_work(make_page: MakePage, guard: Guard) -> None:
    guard.allow(CUT_OFF)
    first, second = opened(make_page()), opened(make_page())
    use_few_rows(first)
    first.get_by_role("button", name="Run it live").click()
    expect(first.locator("#start-progress [role=progressbar]")).to_be_visible()
    second.reload()
    opened(second)
    expect(second.locator("#start-progress [role=progressbar]")).to_have_count(0)
    expect(second.locator("#recipe-shown")).to_contain_text("64 rows")
    first.locator("#stop-live").click()
    expect(first.locator("#run-live")).to_be_visible(timeout=LONG_MS)


def test_wrong_input_on_the_way_is_answered_and_nothing_is_lost(make_page: MakePage, tmp_path: Path) -> None:
    page = opened(make_page())
    page.get_by_role("tab", name="Models").click()
    field = page.locator("#model-base input").first
    field.fill("/no/such/folder")
    field.press("Enter")
    expect(page.locator("#model-base-found")).to_contain_text("There is no folder “/no/such/folder”")
    assert field.input_value() == "/no/such/folder"

    page.get_by_role("button", name="Chat demo").click()
    expect(page.locator("#models-summary")).to_contain_text("fit together", timeout=LONG_MS)
    page.get_by_role("tab", name="Try").click()
    page.wait_for_timeout(2000)  # the tab fills its fields for the models just chosen, the prompt among them
    page.locator("#try-prompt textarea").fill("   ")
    page.locator("#try-answer").click()
    expect(page.locator("#try-progress")).to_contain_text("The prompt is empty")

    page.get_by_role("tab", name="Save").click()
    (tmp_path / "notes.txt").write_text("mine")
    box = page.locator("#save-folder textarea, #save-folder input").first
    box.fill(str(tmp_path))
    box.blur()
    expect(page.locator("#save-folder-found")).to_contain_text("not empty")
    assert (tmp_path / "notes.txt").read_text() == "mine"
