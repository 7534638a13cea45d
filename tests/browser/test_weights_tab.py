"""The Weights tab with three tiny real models: measure, see the rows, move the temperature, and find it all again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from components import weights_tab
from components.jobs import JobRegistry
from components.launch import launch_settings
from components.page import Page, SessionStore
from components.session import Session
from components.settings import Settings
from llm_merge.measurements import MeasurementCache, measure_models
from llm_merge.weights import softmax_weights
from tests.browser.conftest import MakePage, free_port
from tests.tiny_models import TinyFamily

PATIENCE_MS = (
    120_000  # transformers, or 4.6 MB of Plotly, are loaded first; busy machines take half a minute for either
)
ROWS = [
    {"input": f"Define the word: {word}", "output": f"{word} is a place for ships.", "task": "dictionary"}
    for word in ("harbour", "<b>gospel</b>", "heart", "corn")
]


@pytest.fixture
def url(tiny_llama: TinyFamily, tmp_path: Path) -> Iterator[str]:
    """A page with this tab alone, whose visitors arrive with models and examples."""
    import gradio as gr

    settings = Settings(home=tmp_path, device="cpu")
    base, *tunes = tiny_llama.references
    start = Session().with_models("decoder", base, tunes).with_rows(ROWS, "pasted", ())
    with gr.Blocks(analytics_enabled=False) as blocks:
        session, visitor = gr.State(Session()), gr.BrowserState("", storage_key="visitor", secret="test")
        with gr.Tabs(selected="other") as tabs:
            with gr.Tab("Other", id="other"):
                arrive = gr.Button("Arrive")
            with gr.Tab("Weights", id="weights"):
                tab = weights_tab.build(settings)
        cache = MeasurementCache(tmp_path / "measured")
        arrived = arrive.click(lambda: ("somebody", start), None, [visitor, session])
        page = Page(blocks, settings, JobRegistry(), SessionStore(), cache, session, visitor, tabs, arrived)
        weights_tab.wire(tab, page)
    mine = {"server_name": "127.0.0.1", "server_port": free_port(), "prevent_thread_lock": True, "quiet": True}
    _, address, _ = blocks.launch(**launch_settings(settings) | mine)
    yield address
    blocks.close(verbose=False)


def table_means(page: object) -> list[str]:
    return page.locator(".losses tr.mean td").all_text_contents()  # type: ignore[attr-defined, no-any-return]


def test_measure_then_move_the_temperature(make_page: MakePage, url: str, tiny_llama: TinyFamily) -> None:
    page = make_page(url=url)
    page.get_by_role("tab", name="Weights").click()
    measure = page.locator("#measure")
    assert measure.is_disabled()
    page.get_by_text("Choose at least two models first, in Models.").wait_for()

    page.get_by_role("tab", name="Other").click()
    page.get_by_role("button", name="Arrive").click()
    page.get_by_role("tab", name="Weights").click()
    page.get_by_role("button", name=re.compile(r"Measure \(≈ \d+ s\)")).wait_for()
    assert table_means(page) == ["·", "·", "·"]

    measure.click()
    page.get_by_role("button", name=re.compile("Measure again")).wait_for(timeout=PATIENCE_MS)
    run = measure_models(tiny_llama.references, "decoder", ROWS, device="cpu")
    try:
        while True:
            next(run)
    except StopIteration as end:
        table = end.value
    means = [table.mean(model) for model in table.models]
    assert table_means(page) == [f"{mean:.2f}" for mean in means]
    page.get_by_text("Chat format: every model reads the chat template").wait_for()
    assert page.locator(".losses tbody tr").nth(2).locator("th").text_content() == "… <b>gospel</b>"

    exact = page.get_by_label("Weight temperature, exact value")
    exact.fill("0.02")
    exact.press("Enter")
    expected = [0.0, *softmax_weights(means[1:], 0.02)]
    shown = [float(row.get_attribute("data-share") or "nan") for row in page.locator(".wt-row").all()]
    assert shown == pytest.approx(expected, abs=1e-6)

    page.get_by_role("button", name="Every example's loss, drawn").click()
    page.locator("#losses-chart .points path").first.wait_for(timeout=PATIENCE_MS)


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_page(make_page: MakePage, url: str, width: int) -> None:
    page = make_page(url=url, width=width)
    page.get_by_role("button", name="Arrive").click()
    page.get_by_role("tab", name="Weights").click()
    page.locator(".losses tbody tr").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
