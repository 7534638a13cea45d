"""The harness of the browser tests: one app in this process for the whole run, and visitors made on demand.

A test asks for `make_page` and gets a new visitor each time it calls it. Every page is watched: a request to another
host, an error in the console or an uncaught exception fails the test, and a test that fails leaves a picture of each
of its pages in `.cache/screenshots`.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

import pytest

from tests.browser import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Request

SCREENSHOTS = Path(__file__).resolve().parents[2] / ".cache" / "screenshots"
PATIENCE_MS = 30_000  # how long a page may take to show what a test waits for; two shared cores are slow
FAILED = pytest.StashKey[bool]()


class MakePage(Protocol):
    """Opens the app as a new visitor and waits until it is drawn. `url` defaults to the run's own app."""

    def __call__(
        self, theme: str = "light", width: int = 1280, height: int = 800, *, url: str | None = None
    ) -> Page: ...


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def start_app() -> Iterator[Callable[[bool], str]]:
    """Starts the app in private (False) or public (True) mode, once each, and gives its address."""
    from components.launch import launch_settings
    from components.settings import Settings
    from components.shell import build_app

    running = {}

    def start(public: bool) -> str:
        if public not in running:
            settings = Settings.from_environment()
            if public:
                settings = Settings.for_public(settings.home)
            app = build_app(settings)
            mine = {"server_name": "127.0.0.1", "server_port": free_port(), "prevent_thread_lock": True, "quiet": True}
            _, url, _ = app.launch(**launch_settings(settings) | mine | {"inbrowser": False})
            running[public] = (app, url)
        return running[public][1]

    yield start
    for app, _ in running.values():
        app.close(verbose=False)


@pytest.fixture(scope="session")
def app_url(start_app: Callable[[bool], str]) -> str:
    """The address of the app in private mode."""
    return start_app(False)


@pytest.fixture(scope="session")
def public_app_url(start_app: Callable[[bool], str]) -> str:
    """The address of the app as a public Space runs it."""
    return start_app(True)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    path = chromium.find()
    if path is None:
        reason = "No Chromium was found. Install one, or name it: CHROMIUM=/path/to/chromium make test"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(chromium.ARGUMENTS))
        yield browser
        browser.close()


class Guard:
    """Writes down what a page must not do. `allow` names, as patterns, what a test provokes on purpose."""

    def __init__(self) -> None:
        self.complaints: list[str] = []
        self.allowed: list[re.Pattern[str]] = []

    def allow(self, pattern: str) -> None:
        self.allowed.append(re.compile(pattern))

    def watch(self, page: Page) -> None:
        page.on("request", self._request)
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.complaints.append(f"uncaught exception: {error}"))

    def verdict(self) -> list[str]:
        return [text for text in self.complaints if not any(pattern.search(text) for pattern in self.allowed)]

    def _request(self, request: Request) -> None:
        if not is_local(request.url):
            self.complaints.append(f"request to another host: {request.url}")

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.complaints.append(f"console error: {message.text} ({message.location.get('url', '')})")


def is_local(url: str) -> bool:
    """Whether the browser gets this address without leaving the machine."""
    parts = urlsplit(url)
    return parts.scheme in {"data", "blob", "about"} or parts.hostname in {"127.0.0.1", "localhost"}


@pytest.fixture
def guard() -> Guard:
    return Guard()


@pytest.fixture
def make_page(request: pytest.FixtureRequest, browser: Browser, guard: Guard) -> Iterator[MakePage]:
    contexts = []

    def open_page(theme: str = "light", width: int = 1280, height: int = 800, *, url: str | None = None) -> Page:
        address = url or request.getfixturevalue("app_url")
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=theme, locale="en-US", accept_downloads=True
        )
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        # An outside request is refused here and reported by the guard, so that no test depends on a network.
        context.route(lambda target: not is_local(target), lambda route: route.abort())
        context.on("page", guard.watch)
        page = context.new_page()
        page.goto(f"{address.rstrip('/')}/?__theme={theme}")
        page.get_by_role("tab").first.wait_for()  # Gradio measures its tabs before it shows them
        return page

    yield open_page

    failed = request.node.stash.get(FAILED, True)
    complaints = guard.verdict()
    if failed or complaints:
        _take_pictures(request.node.name, [page for context in contexts for page in context.pages])
    for context in contexts:
        context.close()
    if complaints and not failed:
        pytest.fail("The page did what it must not do:\n" + "\n".join(complaints), pytrace=False)


def _take_pictures(test: str, pages: list[Page]) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for number, page in enumerate(pages, start=1):
        path = SCREENSHOTS / f"{re.sub(r'[^A-Za-z0-9_-]+', '-', test)}-{number}.png"
        page.screenshot(path=path, full_page=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.when == "call":
        item.stash[FAILED] = report.failed
    return report
