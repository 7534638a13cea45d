"""The layer map in a real browser: noise never looks like conflict, numbers change in place, keys do what a mouse does.

All numbers here are made up for the test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from components.palette import contrast
from components.views import layer_choice
from components.views.layer_choice import MapCell, MapMark, MapRow, Selection, layer_columns, layer_value
from tests.browser.conftest import MakePage, free_port

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

LAYERS = 30
COLUMNS = layer_columns(LAYERS)
KEYS = [column.key for column in COLUMNS]
SCALE = layer_choice.MapScale(0.08)
EMPTY = "Layers will stand here: choose two fine-tunes, then press Estimate."
ROWS = ("verse", "dictionary", "all")


def made_up(layers: int, task: int) -> tuple[MapCell, ...]:
    """A wave of conflict over the layers, with small errors in the even columns and large ones in the odd."""
    columns = layer_columns(layers)
    values = [0.06 * math.sin(place / 5 + task) for place in range(len(columns))]
    return tuple(MapCell(value, (0.004, 0.05)[place % 2], "exact") for place, value in enumerate(values))


def rows_of(layers: int) -> list[MapRow]:
    verse, dictionary = made_up(layers, 0), made_up(layers, 1)
    both = (MapCell((a.value or 0) + (b.value or 0), 0.01, "exact") for a, b in zip(verse, dictionary, strict=True))
    return [
        MapRow("verse", "γ verse", verse, "How much worse the layer serves verse after merging."),
        MapRow("dictionary", "γ dictionary", dictionary),
        MapRow("all", "Γ <i>all</i> tasks", tuple(both), strong=True),
    ]


class Listener:
    """What the server shows and what it heard."""

    def __init__(self) -> None:
        self.rows = rows_of(LAYERS)
        self.marks = [MapMark(("severe", "partial", "mutual", "none")[i % 4], i % 3 == 0) for i in range(len(COLUMNS))]
        self.heard: list[Selection] = []
        self.read: list[Selection] = []
        self.select: list[str] | None = None

    def value(self) -> dict[str, Any]:
        return layer_value(self.rows, COLUMNS, scale=SCALE, marks=self.marks, selected=self.select, busy=True)

    def set(self, row: int, column: str, cell: MapCell) -> None:
        cells = list(self.rows[row].cells)
        cells[KEYS.index(column)] = cell
        self.rows[row] = replace(self.rows[row], cells=tuple(cells))


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def url(listener: Listener) -> Iterator[str]:
    """A page with the map, an empty one, one of 80 layers, and a button that draws the first again."""
    import gradio as gr

    from components.launch import launch_settings
    from components.settings import Settings
    from components.widgets.layer_map import LayerMap

    listener.set(0, "3", MapCell(0.031, None, "estimate"))
    listener.set(1, "3", MapCell())
    listener.set(0, "head", MapCell(0.0, None, "fixed"))
    with gr.Blocks(analytics_enabled=False) as app:
        with gr.Tabs(), gr.Tab("Layers"):
            layers = LayerMap(listener.value(), name="Conflict by layer", elem_id="map")
            again, read = gr.Button("Draw again"), gr.Button("Read")
            LayerMap(layer_value((), (), scale=SCALE, note=EMPTY), elem_id="empty")
            LayerMap(layer_value(rows_of(80), layer_columns(80), scale=SCALE), elem_id="deep")
        layers.select(
            lambda payload: listener.heard.append(layer_choice.read_selection(payload, KEYS, ROWS)),
            layers,
            trigger_mode="always_last",
            show_progress="hidden",
        )
        again.click(listener.value, None, layers, show_progress="hidden")
        read.click(lambda payload: listener.read.append(layer_choice.read_selection(payload, KEYS, ROWS)), layers)
    mine = {"server_name": "127.0.0.1", "server_port": free_port(), "prevent_thread_lock": True, "quiet": True}
    _, address, _ = app.launch(**launch_settings(Settings.from_environment()) | mine | {"inbrowser": False})
    yield address
    app.close(verbose=False)


def cell(page: Page, row: int, column: str, widget: str = "map") -> Locator:
    place = KEYS.index(column)
    return page.locator(f'#{widget} .lm-cell[data-r="{row}"][data-c="{place}"]')


def wait_until(page: Page, true: Callable[[], bool]) -> None:
    for _ in range(100):
        if true():
            return
        page.wait_for_timeout(50)
    assert true()


def selected_in(page: Page) -> list[str]:
    chosen = page.locator('#map .lm-cell[data-r="0"][aria-selected="true"]').all()
    return [KEYS[int(one.get_attribute("data-c") or -1)] for one in chosen]


def focused(page: Page) -> list[str | None]:
    row, column = page.evaluate("() => [document.activeElement.dataset.r, document.activeElement.dataset.c]")
    return [row, KEYS[int(column)] if column else None]


def test_cells_say_what_they_show(make_page: MakePage, url: str) -> None:
    page = make_page(url=url)
    page.get_by_role("grid", name="Conflict by layer").wait_for()
    labels = [cell(page, 0, key).get_attribute("aria-label") for key in ("embeddings", "1", "2", "3", "29", "head")]
    assert labels == [
        "Embeddings, γ verse: 0.0000 ± 0.0040 nats, within noise",
        "Layer 1, γ verse: 0.0234 ± 0.0040 nats, hurts, beyond noise",
        "Layer 2, γ verse: 0.034 ± 0.050 nats, within noise",
        "Layer 3, γ verse: ≈ 0.031 nats, hurts, estimate, not measured",
        "Layer 29, γ verse: −0.0168 ± 0.0040 nats, helps, beyond noise",
        "Output head, γ verse: 0 nats, known without measuring",
    ]
    assert cell(page, 1, "3").get_attribute("aria-label") == "Layer 3, γ dictionary: not measured yet"
    assert cell(page, 3, "2").get_attribute("aria-label") == "Layer 2: no conflict type, uncertain"
    assert page.locator("#map i i, #map .lm-label i").count() == 0  # names are text
    assert page.locator("#empty .lm").text_content() == EMPTY
    assert page.locator("#empty [role=grid]").count() == 0


def test_noise_is_pale_and_hatched_and_nothing_else_is(make_page: MakePage, url: str, listener: Listener) -> None:
    page = make_page(url=url)
    for row, shown in enumerate(listener.rows):
        for key, one in zip(KEYS, shown.cells, strict=True):
            node = cell(page, row, key)
            assert ("lm-noise" in (node.get_attribute("class") or "")) is one.noise, (row, key)
            assert node.get_attribute("data-state") == one.state
    style = "(node) => getComputedStyle(node).backgroundImage"
    assert "repeating-linear-gradient" in cell(page, 0, "2").evaluate(style)
    assert cell(page, 0, "1").evaluate(style) == "none"
    dots = "(node) => getComputedStyle(node, '::after').borderTopStyle"
    assert [cell(page, 0, key).evaluate(dots) for key in ("3", "1")] == ["dotted", "solid"]


def test_types_do_not_rely_on_colour(make_page: MakePage, url: str, listener: Listener) -> None:
    page = make_page(url=url)
    shapes = {}
    for place, mark in enumerate(listener.marks):
        node = page.locator(f'#map .lm-mark[data-c="{place}"]')
        shapes.setdefault((mark.type, mark.uncertain), set()).add(node.inner_html())
        assert (node.text_content() == "?") is mark.uncertain
    drawings = [drawing for found in shapes.values() for drawing in found]
    assert len(shapes) == len(set(drawings)) == len(drawings) == 8
    legend = page.locator("#map .lm-legend").text_content() or ""
    for word in ("severe", "partial", "mutual", "uncertain", "within noise", "estimate, not measured"):
        assert word in legend


def test_keys_walk_the_map_and_select(make_page: MakePage, url: str, listener: Listener) -> None:
    page = make_page(url=url)
    page.locator('#map [role="gridcell"][tabindex="0"]').focus()  # strict: there is only one
    assert focused(page) == ["0", "embeddings"]
    page.keyboard.press("End")
    assert focused(page) == ["0", "head"]
    page.keyboard.press("Home")
    for key in ("ArrowDown", *["ArrowRight"] * 5):
        page.keyboard.press(key)
    assert focused(page) == ["1", "4"]
    assert listener.heard == []  # walking is not choosing
    page.keyboard.press("Enter")
    wait_until(page, lambda: listener.heard[-1:] == [Selection(("4",), "dictionary", "4")])
    for _ in range(3):
        page.keyboard.press("Shift+ArrowRight")
    assert selected_in(page) == ["4", "5", "6", "7"]
    wait_until(page, lambda: listener.heard[-1] == Selection(("4", "5", "6", "7"), "dictionary", "7"))
    for _ in range(4):
        page.keyboard.press("Shift+ArrowLeft")
    assert selected_in(page) == ["3", "4"]  # the range turns round where it began
    page.keyboard.press("Control+End")
    assert focused(page) == ["3", "head"]
    page.keyboard.press("Control+ ")
    wait_until(page, lambda: listener.heard[-1] == Selection(("3", "4", "head"), "", "head"))
    assert page.locator("#map .lm-said").text_content() == "3 selected: 3–4, head"
    page.keyboard.press("Escape")
    wait_until(page, lambda: listener.heard[-1] == Selection())
    assert selected_in(page) == []
    assert len(listener.heard) <= 5  # a held key is one message
    page.keyboard.press("Tab")
    assert not page.locator("#map .lm-grid").evaluate("(grid) => grid.contains(document.activeElement)")


def test_a_mouse_brushes_extends_and_toggles(make_page: MakePage, url: str, listener: Listener) -> None:
    page = make_page(url=url)
    start, end = cell(page, 0, "5").bounding_box(), cell(page, 1, "9").bounding_box()
    assert start is not None and end is not None
    page.mouse.move(start["x"] + 5, start["y"] + 5)
    page.mouse.down()
    page.mouse.move(end["x"] + 5, end["y"] + 5, steps=8)
    assert selected_in(page) == ["5", "6", "7", "8", "9"]
    assert listener.heard == []  # not while the button is down
    page.mouse.up()
    wait_until(page, lambda: listener.heard == [Selection(("5", "6", "7", "8", "9"), "verse", "9")])
    cell(page, 1, "3").click(modifiers=["Shift"])
    assert selected_in(page) == ["3", "4", "5"]
    cell(page, 2, "head").click(modifiers=["ControlOrMeta"])
    wait_until(page, lambda: listener.heard[-1] == Selection(("3", "4", "5", "head"), "all", "head"))
    cell(page, 2, "4").click(modifiers=["ControlOrMeta"])
    wait_until(page, lambda: listener.heard[-1].selected == ("3", "5", "head"))
    page.get_by_label("Layer 12", exact=True).first.click()  # the head of a column
    wait_until(page, lambda: listener.heard[-1].selected == ("12",))
    page.locator("#map").get_by_role("button", name="Clear").click()
    wait_until(page, lambda: listener.heard[-1] == Selection())


def test_a_measured_number_replaces_an_estimate_in_place(make_page: MakePage, url: str, listener: Listener) -> None:
    page = make_page(url=url)
    cell(page, 1, "4").click()
    wait_until(page, lambda: len(listener.heard) == 1)
    page.keyboard.press("Shift+ArrowRight")
    wait_until(page, lambda: len(listener.heard) == 2)
    before = cell(page, 0, "3").element_handle()
    place = cell(page, 0, "3").bounding_box()
    listener.set(0, "3", MapCell(0.048, 0.004, "exact"))
    page.get_by_role("button", name="Draw again").evaluate("(button) => button.click()")  # focus stays in the map
    page.locator("#map [data-fresh]").wait_for()
    assert page.locator("#map [data-fresh]").evaluate_all(
        "(nodes, one) => nodes.length === 1 && nodes[0] === one", before
    )
    assert cell(page, 0, "3").get_attribute("data-state") == "exact"
    assert "0.0480 ± 0.0040 nats, hurts, beyond noise" in (cell(page, 0, "3").get_attribute("aria-label") or "")
    assert cell(page, 0, "3").bounding_box() == place
    assert focused(page) == ["1", "5"]
    assert selected_in(page) == ["4", "5"]  # a value that says nothing of it leaves the selection
    page.locator("#map [data-fresh]").wait_for(state="detached")
    page.get_by_role("button", name="Read").click()
    wait_until(page, lambda: listener.read == [Selection(("4", "5"), "dictionary", "5")])
    assert len(listener.heard) == 2
    listener.select = ["8", "9"]  # a value that does say sets it
    page.get_by_role("button", name="Draw again").click()
    page.get_by_text("2 selected: 8–9").wait_for()
    cell(page, 1, "12").focus()
    listener.rows[0] = replace(listener.rows[0], label="α verse")  # other rows: the map is built anew
    page.get_by_role("button", name="Draw again").evaluate("(button) => button.click()")
    page.locator("#map .lm-label", has_text="α verse").wait_for()
    assert focused(page) == ["1", "12"]


def test_a_tooltip_follows_pointer_and_focus(make_page: MakePage, url: str) -> None:
    page = make_page(url=url)
    tip = page.locator("#map .lm-tip")
    assert tip.is_hidden()
    cell(page, 0, "1").hover()
    assert "Layer 1 · γ verse" in tip.inner_text()
    assert "0.0234 ± 0.0040 nats, hurts, beyond noise" in tip.inner_text()
    assert "mutual enhancement" in tip.inner_text()
    page.locator("#map .lm-label", has_text="γ verse").hover()
    assert "serves verse" in tip.inner_text()
    page.mouse.move(2, 2)
    assert tip.is_hidden()
    page.locator('#map [tabindex="0"]').focus()
    assert "Embeddings" in tip.inner_text()
    page.keyboard.press("Escape")
    assert tip.is_hidden()


@pytest.mark.parametrize("width", [1280, 820, 390, 320])
def test_it_fits_its_place(make_page: MakePage, url: str, width: int) -> None:
    page = make_page(url=url, width=width)
    cell(page, 0, "1").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [cell(page, 0, key).bounding_box() for key in KEYS]
    assert all(box is not None and box["height"] >= 18 for box in boxes)
    scrolls = "(box) => box.scrollWidth > box.clientWidth + 1"
    if width in (1280, 390):
        assert not page.locator("#map .lm-scroll").evaluate(scrolls)
    deep = page.locator("#deep .lm-scroll")
    assert deep.evaluate(scrolls)
    label = page.locator("#deep .lm-label", has_text="γ verse")
    before = label.bounding_box()
    deep.evaluate("(box) => { box.scrollLeft = 400; }")
    assert label.bounding_box() == before  # labels stay in sight


def test_a_finger_selects_and_brushes(browser: Any, url: str, listener: Listener) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(url)
    cell(page, 1, "6").tap()
    wait_until(page, lambda: listener.heard == [Selection(("6",), "dictionary", "6")])
    session = context.new_cdp_session(page)
    start, end = cell(page, 0, "10").bounding_box(), cell(page, 0, "14").bounding_box()
    points = [(start["x"] + 3, start["y"] + 9), (end["x"] - 20, end["y"] + 9), (end["x"] + 3, end["y"] + 9)]
    for kind, point in zip(("touchStart", "touchMove", "touchMove"), points, strict=True):
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": point[0], "y": point[1]}]})
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    wait_until(page, lambda: listener.heard[-1].selected == ("10", "11", "12", "13", "14"))
    context.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_words_and_colours_can_be_told_apart(make_page: MakePage, url: str, theme: str) -> None:
    page = make_page(theme, url=url)
    cell(page, 0, "1").wait_for()
    color = """(node, name) => {
        const canvas = new OffscreenCanvas(1, 1).getContext("2d");
        canvas.fillStyle = getComputedStyle(node)[name];
        canvas.fillRect(0, 0, 1, 1);
        const bytes = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
        return "#" + bytes.map((byte) => byte.toString(16).padStart(2, "0")).join("");
    }"""
    paper = page.locator("body").evaluate(color, "backgroundColor")
    for words in (".lm-legend", ".lm-column", ".lm-marks .lm-label", ".lm-low", ".lm-said"):
        assert contrast(page.locator(f"#map {words}").first.evaluate(color, "color"), paper) >= 4.5, words
    root = page.locator("#map .lm")
    numbers = "(node, name) => getComputedStyle(node).getPropertyValue(name).match(/[\\d.]+/g).map(Number)"
    cool, middle, warm = (root.evaluate(numbers, name) for name in ("--lm-cool", "--lm-mid", "--lm-warm"))
    # Both halves are equally long steps in a perceptually even space, and blue against orange (OKLCH hues).
    lengths = [math.hypot(end[0] - middle[0], end[1]) for end in (cool, warm)]  # the middle is grey
    assert max(lengths) / min(lengths) < 1.05
    assert 235 <= cool[2] <= 265 and 45 <= warm[2] <= 75


def test_nothing_moves_where_people_asked_for_no_motion(browser: Any, url: str, listener: Listener) -> None:
    context = browser.new_context(reduced_motion="reduce")
    page = context.new_page()
    page.goto(url)
    cell(page, 0, "3").wait_for()
    listener.set(0, "3", MapCell(0.048, 0.004, "exact"))
    page.get_by_role("button", name="Draw again").click()
    page.locator("#map [data-fresh]").wait_for()
    frames = cell(page, 0, "3").evaluate("(n) => n.getAnimations()[0].effect.getKeyframes().map((f) => f.boxShadow)")
    assert len(set(frames)) == 1
    assert "2px" in frames[0]
    context.close()
