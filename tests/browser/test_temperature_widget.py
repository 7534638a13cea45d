"""The weight temperature in a real browser: its numbers are those of `weights.py`, and a drag is the user's alone."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from components.views.choice import Choice, WidgetRow, widget_value
from components.widgets.temperature import HERE, WeightTemperature
from llm_merge.errors import RecipeError
from llm_merge.weights import shares, validate_temperature
from tests.browser.conftest import MakePage, free_port

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROWS = (
    WidgetRow("Base", loss=2.51, base=True),
    WidgetRow("<b id=bold>King James</b>", loss=1.84),
    WidgetRow("Dictionary", loss=1.99),
)
LOSSES = (
    [1.93, 1.14, 1.84],
    [2.0, 2.0],
    [0.0],
    [1e6, -1e6, 3.0],
    [5e-9, 0.0, 4e-9],
    [7.1, 7.2, 7.3, 7.4, 7.5, 7.6, 7.7, 7.8],
)
TEMPERATURES = [0.001, *(0.01 * 10 ** (k / 4) for k in range(13)), 1e4]


@pytest.fixture(scope="module")
def in_browser(browser: Browser) -> Iterator[Callable[[str, Any], Any]]:
    """Evaluates JavaScript beside the widget's own arithmetic."""
    page = browser.new_page()
    page.add_script_tag(content=(HERE / "temperature_math.js").read_text("utf-8"))
    yield lambda script, argument: page.evaluate(script, argument)
    page.close()


def test_the_browser_computes_what_the_library_computes(in_browser: Callable[[str, Any], Any]) -> None:
    cases = []
    for losses, temperature in itertools.product(LOSSES, TEMPERATURES):
        for base in {False, len(losses) == 1}:  # the first model left out, unless it is the only one
            cases.append({"losses": losses, "base": base, "temperature": temperature})
    found = in_browser(
        """cases => cases.map(({losses, base, temperature}) => {
            const rows = losses.map((loss, i) => ({name: String(i), loss, base: i === 0}));
            return TemperatureMath.shares(rows, TemperatureMath.included(rows, base), temperature);
        })""",
        cases,
    )
    for case, weights in zip(cases, found, strict=True):
        uses = [case["base"] or i > 0 for i in range(len(case["losses"]))]
        expected = shares(case["losses"], case["temperature"], uses) if any(uses) else ()
        assert weights[: len(expected)] == pytest.approx(expected, abs=1e-12), case


def test_shares_set_by_hand_leave_locked_ones_alone(in_browser: Callable[[str, Any], Any]) -> None:
    def by_hand(before: list[float], index: int, share: float, locked: list[int]) -> list[float]:
        locks = [i in locked for i in range(len(before))]
        script = "a => TemperatureMath.setByHand(a.before, a.index, a.share, a.locks, a.before.map(() => true))"
        after = in_browser(script, {"before": before, "index": index, "share": share, "locks": locks})
        assert math.fsum(after) == pytest.approx(1)
        return list(after)

    assert by_hand([0.2, 0.2, 0.6], 0, 0.6, []) == pytest.approx([0.6, 0.1, 0.3])  # proportions stay
    assert by_hand([0.2, 0.2, 0.6], 0, 0.3, [2]) == pytest.approx([0.3, 0.1, 0.6])
    assert by_hand([0.2, 0.2, 0.6], 0, 0.9, [2]) == pytest.approx([0.4, 0.0, 0.6])  # no more than what is left
    assert by_hand([0.2, 0.2, 0.6], 0, 0.9, [1, 2]) == pytest.approx([0.2, 0.2, 0.6])  # nothing can move
    assert by_hand([1.0, 0.0, 0.0], 0, 0.5, []) == pytest.approx([0.5, 0.25, 0.25])


def test_the_slider_and_its_axis_are_inverse(in_browser: Callable[[str, Any], Any]) -> None:
    on_axis = TEMPERATURES[1:-1]
    back = in_browser("ts => ts.map(t => TemperatureMath.temperatureAt(TemperatureMath.position(t)))", on_axis)
    assert back == pytest.approx(on_axis)
    assert in_browser("() => TemperatureMath.tidy(5.01, [5])", None) == 5
    assert in_browser("() => TemperatureMath.tidy(4.9, [5])", None) == 4.9  # an arrow key must be able to leave a mark


@pytest.mark.parametrize(
    ("losses", "temperature", "words"),
    [
        ([2.52, 1.21, 2.36], 5, "At T = 5 your examples hardly steer: 0.30 / 0.39 / 0.31. At 0.5: 0.06 / 0.85 / 0.09."),
        ([2.52, 1.21, 2.36], 0.5, "At T = 0.5 your examples favour b: 0.06 / 0.85 / 0.09. At 5: 0.30 / 0.39 / 0.31."),
        ([2.5, 1.2, 2.4], 0.01, "At T = 0.01 b takes nearly everything: 0.00 / 1.00 / 0.00. At 5: 0.30 / 0.39 / 0.31."),
        ([2.0, 2.0], 1, "The losses are equal, so every temperature gives equal shares."),
        ([2.0], 1, "Only a is in the mix: the result is that model."),
        (
            [2.0, None],
            1,
            "Nothing is measured yet, so the shares are equal. "
            "Measure to let your examples decide, or set them by hand.",
        ),
        ([], 1, "No model is in the mix yet: choose models first."),
    ],
)
def test_one_sentence_says_what_the_temperature_does(
    in_browser: Callable[[str, Any], Any], losses: list[float | None], temperature: float, words: str
) -> None:
    rows = [{"name": "abc"[i], "loss": loss, "base": False} for i, loss in enumerate(losses)]
    script = "a => TemperatureMath.sentence(a.rows, a.rows.map(() => true), a.t)"
    said = in_browser(script, {"rows": rows, "t": temperature})
    assert said == words


class Listener:
    """What the server heard, and how long it takes to answer."""

    def __init__(self) -> None:
        self.heard: list[Choice] = []
        self.delay = 0.0
        self.rows = ROWS

    def value(self, choice: Choice) -> dict[str, Any]:
        return widget_value(self.rows, choice, unit="nats per token")

    def hear(self, choice: Choice) -> Choice:
        self.heard.append(choice)
        time.sleep(self.delay)
        return choice


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def url(listener: Listener) -> Iterator[str]:
    """A page with the widget twice, in step through one session value, as Start and Weights have it."""
    import gradio as gr

    with gr.Blocks(analytics_enabled=False) as app:
        session = gr.State(Choice(shares=(0.0, 0.0, 0.0)))
        with gr.Tabs(), gr.Tab("Weights"):
            large = WeightTemperature(listener.value(Choice()), elem_id="large")
            small = WeightTemperature(listener.value(Choice()), compact=True, elem_id="small")
            remeasure = gr.Button("Measure")
        for widget in (large, small):
            widget.release(listener.hear, widget, session, show_progress="hidden")
        session.change(lambda choice: [listener.value(choice)] * 2, session, [large, small], show_progress="hidden")
        remeasure.click(lambda choice: [listener.value(choice)] * 2, session, [large, small], show_progress="hidden")
    mine = {"server_name": "127.0.0.1", "server_port": free_port(), "prevent_thread_lock": True, "quiet": True}
    _, address, _ = app.launch(**mine, ssr_mode=False)
    yield address
    app.close(verbose=False)


def shown(page: Page, widget: str) -> list[float]:
    return [float(row.get_attribute("data-share") or "nan") for row in page.locator(f"#{widget} .wt-row").all()]


def expected(temperature: float) -> list[float]:
    return list(shares([row.loss or 0.0 for row in ROWS], temperature, [False, True, True]))


def wait_for_shares(page: Page, widget: str, wanted: list[float]) -> None:
    page.wait_for_function(
        """([id, wanted]) => [...document.querySelectorAll(`#${id} .wt-row`)]
            .every((row, i) => Math.abs(row.dataset.share - wanted[i]) < 1e-6)""",
        arg=[widget, wanted],
    )


def temperature_in(page: Page, widget: str) -> float:
    return float(page.locator(f"#{widget} .wt-title input").input_value())


def test_a_drag_is_computed_here_and_told_once(make_page: MakePage, url: str, listener: Listener) -> None:
    page = make_page(url=url)
    box = page.locator("#large .wt-slider").bounding_box()
    assert box is not None
    at = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.7, at)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.4, at, steps=12)
    moving = temperature_in(page, "large")
    assert shown(page, "large") == pytest.approx(expected(moving), abs=1e-9)
    assert listener.heard == []  # not while the button is down
    page.mouse.up()
    wait_for_shares(page, "small", expected(moving))  # through the server
    assert [choice.temperature for choice in listener.heard] == [moving]
    assert listener.heard[0].shares == pytest.approx(expected(moving))


def test_keys_move_it_and_a_held_key_is_one_message(make_page: MakePage, url: str, listener: Listener) -> None:
    page = make_page(url=url)
    page.locator("#large .wt-slider").focus()
    for _ in range(15):
        page.keyboard.press("ArrowLeft")
    wait_for_shares(page, "small", expected(temperature_in(page, "large")))
    assert temperature_in(page, "large") < 4
    assert len(listener.heard) < 15
    assert listener.heard[-1].temperature == temperature_in(page, "large")


def test_a_late_answer_does_not_undo_a_later_move(make_page: MakePage, url: str, listener: Listener) -> None:
    listener.delay = 0.7
    page = make_page(url=url)
    exact = page.locator("#large .wt-title input")
    for temperature in ("2", "0.3"):
        exact.fill(temperature)
        exact.press("Enter")
        page.wait_for_timeout(400)  # the second is sent while the server still thinks about the first
    seen = set()
    for _ in range(20):
        seen.add(round(shown(page, "large")[1], 6))
        page.wait_for_timeout(100)
    assert seen == {round(expected(0.3)[1], 6)}
    wait_for_shares(page, "small", expected(0.3))
    assert [choice.temperature for choice in listener.heard] == [2.0, 0.3]


def test_both_widgets_can_be_moved_in_turn(make_page: MakePage, url: str, listener: Listener) -> None:
    page = make_page(url=url)
    for widget, other, tick, temperature in (
        ("large", "small", "spread", 0.15),
        ("large", "small", "default", 5.0),
        ("small", "large", "spread", 0.15),
        ("large", "small", "default", 5.0),
    ):
        page.locator(f"#{widget} .wt-tick").filter(has_text=tick).click()
        wait_for_shares(page, other, expected(temperature))
    assert [round(choice.temperature, 6) for choice in listener.heard] == [0.15, 5.0, 0.15, 5.0]


def test_new_losses_do_not_move_a_thumb_that_is_held(make_page: MakePage, url: str, listener: Listener) -> None:
    page = make_page(url=url)
    slider = page.locator("#large .wt-slider")
    slider.evaluate("(s) => { s.value = 150; s.dispatchEvent(new Event('input', {bubbles: true})); }")  # still held
    listener.rows = (ROWS[0], ROWS[1], replace(ROWS[2], loss=1.0))
    page.get_by_role("button", name="Measure").click()
    page.locator("#large .wt-row").nth(2).get_by_text("1.00").wait_for()
    assert temperature_in(page, "large") == 0.316  # the middle of the log axis
    slider.dispatch_event("change")
    wait_for_shares(page, "small", list(shares([9.0, 1.84, 1.0], 0.316, [False, True, True])))


def test_shares_by_hand_locks_and_the_way_back(make_page: MakePage, url: str, listener: Listener) -> None:
    page = make_page(url=url)
    page.get_by_label("Include Base in the mix").first.check()
    share = page.get_by_label("Share of Dictionary, as a number").first
    share.fill("0.5")
    share.press("Enter")
    wait_for_shares(page, "small", shown(page, "large"))
    assert listener.heard[-1].by_hand
    assert shown(page, "large")[2] == 0.5
    page.get_by_label("Lock the share of Dictionary").first.click()
    first = page.get_by_label("Share of Base, as a number").first
    first.fill("0.9")
    first.press("Enter")
    wait_for_shares(page, "small", [0.5, 0.0, 0.5])
    page.locator("#large").get_by_role("button", name="Compute from the losses again").click()
    wait_for_shares(page, "small", list(shares([2.51, 1.84, 1.99], 5.0, [True] * 3)))
    page.locator("#large").get_by_role("button", name="Back to my own shares").click()
    wait_for_shares(page, "small", [0.5, 0.0, 0.5])  # nothing set by hand is lost


def test_a_bad_temperature_is_refused_in_the_librarys_words(make_page: MakePage, url: str, listener: Listener) -> None:
    page = make_page(url=url)
    page.locator("#large .wt-row").first.wait_for()
    before = shown(page, "large")
    exact = page.locator("#large .wt-title input")
    exact.fill("-1")
    exact.press("Enter")
    with pytest.raises(RecipeError) as error:
        validate_temperature(-1)
    assert page.locator("#large .wt-message").text_content() == error.value.message
    assert shown(page, "large") == before
    assert listener.heard == []


def test_names_are_text(make_page: MakePage, url: str) -> None:
    page = make_page(url=url)
    assert page.locator("#bold").count() == 0
    assert page.locator("#large .wt-name b").nth(1).text_content() == "<b id=bold>King James</b>"


@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_its_place(make_page: MakePage, url: str, width: int) -> None:
    page = make_page(url=url, width=width)
    for widget in ("large", "small"):
        overflow = page.locator(f"#{widget} .wt").evaluate("(w) => w.scrollWidth - w.clientWidth")
        assert overflow <= 0
