"""A test of the tests: the guard notices what it is there to notice."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.browser.conftest import Guard, MakePage, is_local

PAGES = {
    "/quiet/": "<button role=tab>quiet</button><img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='>",
    "/outside/": "<button role=tab>outside</button><img src='http://outside.invalid/pixel.gif'>",
    "/error/": "<button role=tab>error</button><script>console.error('something broke')</script>",
    "/throws/": "<button role=tab>throws</button><script>throw new Error('nobody caught this')</script>",
}


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = PAGES.get(self.path.split("?")[0])
            self.send_response(200 if page else 204)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write((page or "").encode())

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_quiet_page_passes(make_page: MakePage, guard: Guard, site: str) -> None:
    make_page(url=f"{site}/quiet").wait_for_load_state("networkidle")
    assert guard.verdict() == []


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("outside", "request to another host: http://outside.invalid/pixel.gif"),
        ("error", "console error: something broke"),
        ("throws", "uncaught exception: nobody caught this"),
    ],
)
def test_the_guard_names_what_happened(make_page: MakePage, guard: Guard, site: str, path: str, words: str) -> None:
    make_page(url=f"{site}/{path}").wait_for_load_state("networkidle")
    complaints = guard.verdict()
    assert any(words in complaint for complaint in complaints), complaints
    guard.allow(".")
    assert guard.verdict() == []


def test_only_this_machine_is_local() -> None:
    assert is_local("http://127.0.0.1:7860/x") and is_local("data:image/png;base64,AA")
    assert not is_local("https://huggingface.co") and not is_local("http://127.0.0.1.example.org/")
