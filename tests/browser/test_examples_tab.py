"""The Examples tab in a browser: what is pasted is read at once, mistakes are named by line, nothing is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from playwright.sync_api import expect

from tests.browser.conftest import PATIENCE_MS

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from tests.browser.conftest import Guard, MakePage

BROKEN = "input,output\nWho wrote Emma?,Jane Austen\n<img src=x onerror=alert(1)>,\n"
ROWS = "id;frage;antwort;note\n" + "".join(f'{i};"Was ist\n{i} plus eins?";{i + 1};leicht\n' for i in range(24))


expect.set_options(timeout=PATIENCE_MS)


def open_examples(page: Page) -> None:
    expect(page.locator("#recipe-shown")).to_contain_text("King James")  # the session has arrived
    page.get_by_role("tab", name="Examples").click()
    expect(page.locator("#examples-summary")).to_contain_text("In use")


def test_pasted_rows_are_read_explained_and_kept(make_page: MakePage, guard: Guard) -> None:
    guard.allow("signal is aborted|Connection errored out")  # Gradio's words for streams that a reload cuts
    page = make_page()
    open_examples(page)
    box, reading = page.locator("#examples-text textarea"), page.locator("#examples-reading")
    summary, preview = page.locator("#examples-summary"), page.locator("#examples-preview")

    box.fill(BROKEN)
    expect(reading).to_contain_text("Line 3: the answer (column “output”) is empty.")
    expect(reading).to_contain_text("Until then the rows read last stay in use: 64, Verse + Dictionary (demo).")
    assert box.input_value() == BROKEN

    box.fill(ROWS)
    expect(reading).to_contain_text("Your text: 24 rows read as CSV.")
    expect(summary).to_contain_text("18 rows to measure on, 6 held out for the scoreboard")
    expect(preview.locator("mark").first).to_have_text("1")
    page.locator("#examples-answer input").click()
    page.get_by_role("option", name="note").click()
    expect(preview.locator("mark").first).to_have_text("leicht")
    page.locator("#examples-next").click()
    expect(page.locator("#examples-place")).to_contain_text("Row 2 of 24")

    page.get_by_label("Verse", exact=True).check()
    expect(summary).to_contain_text("In use: Verse (demo)")
    assert box.input_value() == ROWS
    page.reload()
    open_examples(page)
    expect(box).to_have_value(ROWS)
    expect(summary).to_contain_text("In use: Verse (demo)")
    page.locator("#examples-use").click()
    expect(summary).to_contain_text("In use: Your text")


def test_a_file_is_read_beside_what_is_typed(make_page: MakePage) -> None:
    page = make_page(theme="dark", width=390)
    open_examples(page)
    page.locator("#examples-text textarea").fill(BROKEN)
    expect(page.locator("#examples-reading")).to_contain_text("Line 3")
    file = {"name": "<b>café.csv", "mimeType": "text/csv", "buffer": "input;output\nCafé?;Ja\n".encode("cp1252")}
    page.locator("#examples-file input[type=file]").set_input_files(files=[file])  # type: ignore[list-item]
    expect(page.locator("#examples-reading")).to_contain_text("1 row read as CSV.")
    expect(page.locator("#examples-reading")).to_contain_text("read as Windows-1252")
    expect(page.locator("#examples-preview")).to_contain_text("Café?")
    assert page.locator("#examples-text textarea").input_value() == BROKEN
