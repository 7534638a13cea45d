"""`python app.py` in a process of its own, as a user starts it: it answers, shows its page, and speaks to nobody."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.browser.conftest import MakePage, free_port

REPOSITORY = Path(__file__).resolve().parents[2]
TITLE = "Mix fine-tuned models. See why. Try before you save."

# Python imports sitecustomize before anything else; this one writes down every address that the process asks for.
LISTENER = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background passes on a deaf SIGINT
def listen(event, args):
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event == "socket.connect" and isinstance(args[1], tuple):
        host = args[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    with open(LOG, "a") as log:
        log.write(json.dumps(host) + "\\n")
sys.addaudithook(listen)
"""
# Set by conftest.py for the tests; taken out again here, since the app has to set its own.
SWITCHES = {"GRADIO_ANALYTICS_ENABLED", "HF_HUB_OFFLINE"}
THIS_MACHINE = {None, "", "0.0.0.0", "127.0.0.1", "localhost", "::", "::1"}


@dataclass
class RunningApp:
    process: subprocess.Popen[bytes]
    url: str
    log: Path
    addresses: Path

    def asked_for(self) -> set[str | None]:
        """Every host name or address that the process looked up or connected to so far."""
        return {json.loads(line) for line in self.addresses.read_text().splitlines()}


@pytest.fixture(scope="module")
def running_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    folder = tmp_path_factory.mktemp("app-process")
    addresses = folder / "addresses.jsonl"
    addresses.touch()
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(f"LOG = {str(addresses)!r}\n{LISTENER}")

    environment = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    port = free_port()
    environment |= {"GRADIO_SERVER_PORT": str(port), "PYTHONPATH": str(folder / "site"), "PYTHONUNBUFFERED": "1"}
    log = folder / "output.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    app = RunningApp(process, f"http://127.0.0.1:{port}", log, addresses)
    try:
        wait_until_it_answers(app)
        yield app
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def wait_until_it_answers(app: RunningApp, patience_s: float = 120) -> None:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if app.process.poll() is not None:
            pytest.fail(f"python app.py ended with code {app.process.returncode}:\n{app.log.read_text()}")
        try:
            with urllib.request.urlopen(app.url, timeout=10):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    pytest.fail(f"python app.py did not answer within {patience_s} s:\n{app.log.read_text()}")


def test_the_page_shows_what_it_is_for(running_app: RunningApp, make_page: MakePage) -> None:
    page = make_page(url=running_app.url)
    page.get_by_text(TITLE).first.wait_for()


def test_it_asks_for_no_other_machine(running_app: RunningApp) -> None:
    asked = running_app.asked_for()
    assert "127.0.0.1" in asked, "the listener heard nothing, not even Gradio's probe of its own address"
    assert asked - THIS_MACHINE == set()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for a child process")
def test_ctrl_c_ends_it(running_app: RunningApp) -> None:
    running_app.process.send_signal(signal.SIGINT)
    running_app.process.wait(timeout=60)
    assert "Traceback" not in running_app.log.read_text()
