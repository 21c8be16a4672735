"""Attacks on a running app by pages from other origins, in Chromium: they can neither start nor read anything."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.browser.conftest import FLAGS, TIMEOUT_MS, App, chromium_path

# The attacker's names resolve to the loopback address. Chromium's own protection of local addresses depends on its version;
# it is off, so that only the app's is tested.
NAMES = [
    "--host-resolver-rules=MAP *.example 127.0.0.1, MAP localhost.localdomain 127.0.0.1",
    "--disable-features=LocalNetworkAccessChecks,BlockInsecurePrivateNetworkRequests,PrivateNetworkAccessSendPreflights",
]
ATTACK = """async ([app, call]) => {
    const got = {};
    const attempt = async (name, path, options) => {
        try {
            const answer = await fetch(app + path, options);
            got[name] = answer.ok ? await answer.text() : answer.status || answer.type;
        } catch (error) { got[name] = "failed"; }
    };
    const post = (kind, body) => ({method: "POST", headers: {"Content-Type": kind}, body});
    const file = new FormData();
    file.append("files", new Blob(["hello"]), "attack.txt");
    await attempt("page", "");
    await attempt("config", "config");
    await attempt("json", "gradio_api/run/predict", post("application/json", call));
    await attempt("join", "gradio_api/queue/join", post("application/json", call));
    await attempt("upload", "gradio_api/upload", {method: "POST", body: file});
    await attempt("unread", "gradio_api/run/predict", {...post("text/plain", call), mode: "no-cors"});
    await attempt("unread blob", "gradio_api/run/predict", {method: "POST", body: new Blob([call]), mode: "no-cors"});
    await attempt("unread upload", "gradio_api/upload", {method: "POST", body: file, mode: "no-cors"});
    got.stream = await new Promise(resolve => {
        const stream = new EventSource(app + "gradio_api/heartbeat/attack");
        stream.onmessage = event => { stream.close(); resolve(event.data); };
        stream.onerror = () => { stream.close(); resolve("failed"); };
    });
    got.script = await new Promise(resolve => {
        const script = document.createElement("script");
        script.src = app + "gradio_api/info";
        script.onload = () => resolve("loaded");
        script.onerror = () => resolve("failed");
        document.head.append(script);
    });
    return got;
}"""
FORM = """([app]) => {
    document.body.innerHTML = `<form method="post" enctype="multipart/form-data" action="${app}gradio_api/upload">
        <textarea name="files">hello</textarea></form>`;
    document.forms[0].submit();
}"""


class _Blank(BaseHTTPRequestHandler):
    """Attacker's site: an empty page to run scripts in."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Write no log."""


@pytest.fixture(scope="module")
def other_port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Blank) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def page(browser):
    """Page in a Chromium that resolves the attacker's names to this machine."""
    chromium = browser.browser_type.launch(executable_path=chromium_path(), args=[*FLAGS, *NAMES])
    page = chromium.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    yield page
    chromium.close()


def call_of(url: str, element: str, data: list[Any]) -> str:
    """Body of a request that does what leaving the field `element` does."""
    with urllib.request.urlopen(url + "config", timeout=30) as answer:
        config = json.load(answer)
    target = [next(c["id"] for c in config["components"] if c["props"].get("elem_id") == element), "blur"]
    function = next(f["id"] for f in config["dependencies"] if target in f["targets"] and f["backend_fn"])
    return json.dumps({"fn_index": function, "data": data, "session_hash": "attack"})


def test_a_page_of_another_origin_starts_and_reads_nothing(page, other_port: int, app: App):
    url = app.url
    uploads = app.workspace.root / "uploads"
    note = app.workspace.run_folder("demo") / "note.txt"
    call = call_of(url, "train-note", ["demo", "written by another site"])
    for attacker in (f"http://127.0.0.1:{other_port}", f"http://attacker.example:{other_port}"):
        page.goto(f"{attacker}/")
        got = page.evaluate(ATTACK, [url, call])
        assert set(got.values()) <= {"failed", "opaque"}, (attacker, got)
        page.goto(f"{attacker}/")
        with page.expect_navigation():
            page.evaluate(FORM, [url])
        assert page.inner_text("body").startswith(f"Pages from '{attacker}' may not call this app")
    # DNS rebinding: the attacker served a page on the app's port, then pointed the name at the app.
    for name in ("rebound.example", "localhost.localdomain"):
        attacker = f"http://{name}:{app.port}"
        page.route(f"{attacker}/attack", lambda route: route.fulfill(body="", content_type="text/html"))
        page.goto(f"{attacker}/attack")
        got = page.evaluate(ATTACK, [f"{attacker}/", call])
        assert set(got.values()) <= {403, "failed"}, (attacker, got)
        page.goto(f"{attacker}/")
        assert page.inner_text("body").startswith(f"This app does not answer to the host {name}:{app.port}; ")
    assert not note.exists()
    assert not list(uploads.rglob("attack.txt"))

    page.goto(f"http://attacker.example:{other_port}/")  # a plain link still works
    with page.expect_navigation():
        page.evaluate("url => { location.href = url; }", url)
    page.wait_for_selector("#generate")
    own = page.evaluate(ATTACK, [url, call])  # the same requests work from the app's own page
    assert own["config"].startswith("{")
    assert "event_id" in own["join"]
    assert own["stream"] == "ALIVE"
    assert note.read_text().strip() == "written by another site"
    assert list(uploads.rglob("attack.txt"))
