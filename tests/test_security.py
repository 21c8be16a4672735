"""Raw requests to a running app: foreign hosts and origins are refused; the app's page and API clients still work."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from biasdpo.config import ServeConfig
from biasdpo.errors import ConfigError
from biasdpo.ui.limits import Limits
from biasdpo.ui.security import Guard, allowed_hosts
from tests.app_process import running_app
from tests.run_folders import write_run

JSON = {"Content-Type": "application/json"}
MULTIPART = {"Content-Type": "multipart/form-data; boundary=b"}
FILE = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nhello\r\n--b--\r\n'


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: str


class Target:
    """Running app; sends it requests with exactly the given headers."""

    def __init__(self, url: str, root: Path) -> None:
        self.port = urlsplit(url).port
        self.root = root
        config = json.loads(self.get("/config").body)
        self.ids = {c["props"].get("elem_id"): c["id"] for c in config["components"]}
        self.functions = config["dependencies"]

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def note(self) -> Path:
        return self.root / "runs" / "first" / "note.txt"

    def open(self, method: str, path: str, *headers: tuple[str, str], body: bytes = b"", address: str = "127.0.0.1"):
        """Send one request and leave the body of its response unread. `headers` include Host."""
        connection = http.client.HTTPConnection(address, self.port, timeout=20)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers:
            connection.putheader(name, value)
        if body:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body or None)
        return connection, connection.getresponse()

    def send(self, method: str, path: str, *headers: tuple[str, str], body: bytes = b"", address: str = "127.0.0.1") -> Answer:
        connection, response = self.open(method, path, *headers, body=body, address=address)
        answer = Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read().decode())
        connection.close()
        return answer

    def get(self, path: str, host: str | None = None, **headers: str) -> Answer:
        return self.send("GET", path, ("Host", host or self.host), *named(headers))

    def post(self, path: str, body: bytes, kind: dict[str, str] = JSON, host: str | None = None, **headers: str) -> Answer:
        return self.send("POST", path, ("Host", host or self.host), *kind.items(), *named(headers), body=body)

    def call(self, element: str, data: list[Any]) -> bytes:
        """Body of a request that does what leaving the field `element` does."""
        function = next(f for f in self.functions if [self.ids[element], "blur"] in f["targets"] and f["backend_fn"])
        return json.dumps({"fn_index": function["id"], "data": data, "session_hash": "raw"}).encode()

    def attempts(self, host: str | None = None, **headers: str) -> dict[str, Answer]:
        """Send each kind of state-changing request with these headers."""
        note = self.call("train-note", ["first", "written from outside"])
        return {
            "run": self.post("/gradio_api/run/predict", note, host=host, **headers),
            "plain text": self.post("/gradio_api/run/predict", note, {"Content-Type": "text/plain"}, host=host, **headers),
            "join": self.post("/gradio_api/queue/join", note, host=host, **headers),
            "call": self.post("/gradio_api/call/predict", b'{"data": []}', host=host, **headers),
            "cancel": self.post("/gradio_api/cancel", b"{}", host=host, **headers),
            "upload": self.post("/gradio_api/upload", FILE, MULTIPART, host=host, **headers),
        }


def named(headers: dict[str, str]) -> list[tuple[str, str]]:
    return [(name.replace("_", "-"), value) for name, value in headers.items()]


def assert_refused(answer: Answer) -> None:
    assert answer.status == 403
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.body.count("\n") == 1
    assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert_guarded(answer)


def assert_guarded(answer: Answer, frames: str = "'self'") -> None:
    assert answer.headers["content-security-policy"] == f"frame-ancestors {frames}"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "same-origin"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    root = tmp_path_factory.mktemp("workspace")
    write_run(root, "first")
    names = ("--allowed-host", "proxy.example", "--allowed-host", "Named.Example:8443")
    with running_app(root, "--model", "smollm2", *names) as url:
        yield Target(url, root)


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """App on a Space, bound to all addresses."""
    root = tmp_path_factory.mktemp("space")
    write_run(root, "first")
    environment = {"SPACE_ID": "someone/biasdpo", "SPACE_HOST": "someone-biasdpo.hf.space"}
    with running_app(root, "--model", "smollm2", "--host", "0.0.0.0", **environment) as url:
        yield Target(url, root)


FOREIGN_HOSTS = [
    "evil.example",
    "evil.example:{port}",
    "localhost.localdomain:{port}",
    "localhost.evil.example:{port}",
    "127.0.0.1.evil.example:{port}",
    "proxy.example.evil.example",
    "10.1.2.3:{port}",
    "0.0.0.0:{port}",
    "named.example:8444",
    "user@127.0.0.1:{port}",
    "127.0.0.1:{port}, evil.example",
    "127.0.0.1:port",
    "[::1:{port}",
    "[evil]:{port}",
    "<b>localhost</b>",
    "",
]


def test_a_tunnel_may_map_the_port(app):
    """`ssh -L 8888:localhost:7860`: the page is served as localhost:8888. Another local server's page is still refused."""
    tunnel = ("Host", "localhost:8888")
    assert app.send("GET", "/config", tunnel, ("Origin", "http://localhost:8888")).status == 200
    assert_refused(app.send("GET", "/config", tunnel, ("Origin", "http://localhost:9999")))


@pytest.mark.parametrize("foreign", FOREIGN_HOSTS)
def test_a_foreign_host_gets_nothing(app, foreign):
    host = foreign.format(port=app.port)
    for path in ("/", "/config", "/gradio_api/info", "/gradio_api/startup-events", "/gradio_api/queue/data?session_hash=raw"):
        answer = app.send("GET", path, ("Host", host))
        assert_refused(answer)
        assert "--allowed-host" in answer.body
    note = app.call("train-note", ["first", "rebound"])
    origin = ("Origin", f"http://{host}")
    assert_refused(app.send("POST", "/gradio_api/run/predict", ("Host", host), origin, *JSON.items(), body=note))
    asked = ("Access-Control-Request-Method", "POST")
    assert_refused(app.send("OPTIONS", "/gradio_api/queue/join", ("Host", host), origin, asked))
    assert not app.note.exists()


def test_a_missing_or_repeated_host_is_refused(app):
    host = ("Host", app.host)
    for headers in ([], [host, host], [host, ("Host", "evil.example")]):
        assert app.send("GET", "/config", *headers).status in (400, 403)  # the HTTP parser may refuse it first


def test_a_missing_host_is_refused_in_old_http_too(app):
    with socket.create_connection(("127.0.0.1", app.port), timeout=20) as connection:
        connection.sendall(b"GET /config HTTP/1.0\r\n\r\n")
        assert connection.makefile("rb").readline().split()[1] == b"403"


@pytest.mark.parametrize(
    "known",
    [
        "localhost",
        "LOCALHOST:{port}",
        "127.0.0.1",
        "127.0.0.1:{port}",
        "[::1]:{port}",
        "[0:0:0:0:0:0:0:1]",
        "proxy.example",
        "Proxy.Example",
        "proxy.example:9999",
        "named.example:8443",
        "NAMED.example",
    ],
)
def test_the_hosts_of_the_app_are_answered(app, known):
    host = known.format(port=app.port)
    assert app.get("/config", host).status == 200
    assert app.get("/config", host, Origin=f"http://{host}", Sec_Fetch_Site="same-origin").status == 200


FOREIGN_ORIGINS = [
    "http://evil.example",
    "https://evil.example:{port}",
    "http://127.0.0.1",
    "http://127.0.0.1:1",
    "http://localhost:1",
    "http://localhost.evil.example:{port}",
    "https://named.example",
    "http://proxy.example:1",
    "file://127.0.0.1:{port}",
    "127.0.0.1:{port}",
    "http://127.0.0.1:{port}/",
    "http://127.0.0.1:{port}, http://evil.example",
    "",
    "null",
]


@pytest.mark.parametrize("foreign", FOREIGN_ORIGINS)
def test_a_page_of_another_origin_can_start_and_read_nothing(app, foreign):
    origin = foreign.format(port=app.port)
    for answer in app.attempts(Origin=origin).values():
        assert_refused(answer)
        assert "--allowed-host" in answer.body
    for path in ("/", "/config", "/gradio_api/queue/data?session_hash=raw", "/gradio_api/call/predict/1", "/theme.css"):
        assert_refused(app.get(path, Origin=origin))
    for site in ("same-origin", "none", "cross-site"):  # Sec-Fetch-Site does not outweigh Origin
        assert_refused(app.attempts(Origin=origin, Sec_Fetch_Site=site)["run"])
    preflight = app.send(
        "OPTIONS", "/gradio_api/queue/join", ("Host", app.host), ("Origin", origin), ("Access-Control-Request-Method", "POST")
    )
    assert_refused(preflight)
    assert not app.note.exists()


def test_a_second_origin_does_not_hide_behind_the_first(app):
    origins = [("Origin", f"http://{app.host}"), ("Origin", "http://evil.example")]
    assert_refused(app.send("GET", "/config", ("Host", app.host), *origins))


@pytest.mark.parametrize("site", ["cross-site", "same-site", "no such value"])
def test_a_request_that_another_site_makes_without_an_origin_is_refused(app, site):
    for answer in app.attempts(Sec_Fetch_Site=site).values():
        assert_refused(answer)
    page = {"Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
    assert_refused(app.attempts(Sec_Fetch_Site=site, **page)["run"])  # a form
    for path in (
        "/config",
        "/gradio_api/info",
        "/gradio_api/heartbeat/raw",
        "/gradio_api/queue/data?session_hash=raw",
        "/gradio_api/call/predict/1",
        "/gradio_api/file=README.md",
    ):
        assert_refused(app.get(path, Sec_Fetch_Site=site, Sec_Fetch_Mode="no-cors", Sec_Fetch_Dest="script"))
        if path.startswith("/gradio_api/"):
            assert_refused(app.get(path, Sec_Fetch_Site=site, **page))
    assert not app.note.exists()


def test_a_link_from_another_site_opens_the_page(app):
    answer = app.get("/?adapter=none", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate", Sec_Fetch_Dest="document")
    assert answer.status == 200
    assert "window.gradio_config" in answer.body
    assert_guarded(answer)


def test_the_page_and_programs_may_act(app):
    """The app's own page, its page behind a proxy that rewrites Host, and API clients can write the note."""
    own = {"Origin": f"http://{app.host}", "Sec_Fetch_Site": "same-origin"}
    proxied = {"Origin": "https://proxy.example", "Sec_Fetch_Site": "same-origin"}
    for headers in (own, {"Sec_Fetch_Site": "same-origin"}, {"Origin": f"http://localhost:{app.port}"}, proxied, {}):
        answers = app.attempts(**headers)
        assert answers["run"].status == 404  # nothing goes past the queue, which is limited
        assert answers["upload"].status == 200
        assert "event_id" in answers["join"].body
        for _ in range(100):
            if app.note.exists():
                break
            time.sleep(0.1)
        assert app.note.read_text().strip() == "written from outside"
        app.note.unlink()


def test_a_call_through_the_queue_streams(app):
    """Join the queue and read the events, as gradio_client does; a stream's first chunk arrives before the stream ends."""
    function = next(f for f in app.functions if f["backend_fn"] and f["queue"] is not False)
    body = json.dumps({"fn_index": function["id"], "data": [], "session_hash": "client"}).encode()
    assert "event_id" in app.post("/gradio_api/queue/join", body).body
    events = app.get("/gradio_api/queue/data?session_hash=client")
    assert "process_completed" in events.body
    assert_guarded(events)
    connection, stream = app.open("GET", "/gradio_api/heartbeat/client", ("Host", app.host))
    assert stream.readline() == b"data: ALIVE\n"
    connection.close()


def test_every_response_has_the_security_headers(app):
    for path in ("/", "/config", "/theme.css", "/gradio_api/startup-events", "/no/such/page"):
        assert_guarded(app.get(path))
    assert_guarded(app.post("/gradio_api/run/predict", b"no JSON"))


def test_a_space_answers_to_its_own_host_and_the_hub_may_frame_it(space):
    host = "someone-biasdpo.hf.space"
    frame = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "iframe"}
    page = space.get("/", host, **frame)
    assert page.status == 200
    assert_guarded(page, "'self' https://huggingface.co")
    assert space.attempts(host, Origin=f"https://{host}", Sec_Fetch_Site="same-origin")["upload"].status == 200
    assert space.attempts(host, Origin="https://huggingface.co", Sec_Fetch_Site="cross-site")["upload"].status == 403
    assert space.get("/", "other-app.hf.space").status == 403


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux answers on all of 127.0.0.0/8")
def test_an_app_on_every_address_answers_to_the_one_that_a_request_came_in_on(space):
    host = f"127.1.2.3:{space.port}"
    assert space.send("GET", "/config", ("Host", host), address="127.1.2.3").status == 200
    assert space.send("GET", "/config", ("Host", host)).status == 403
    assert space.send("GET", "/config", ("Host", f"10.1.2.3:{space.port}")).status == 403
    assert space.send("GET", "/config", ("Host", f"0.0.0.0:{space.port}")).status == 403


@pytest.mark.parametrize("name", ["https://proxy.example/", "*", "proxy.example:port", "two names", ""])
def test_a_malformed_allowed_host_is_an_error(name):
    with pytest.raises(ConfigError, match=f"^--allowed-host must be a host name, .* got {re.escape(repr(name))}; for example "):
        allowed_hosts("127.0.0.1", [name])


@pytest.mark.parametrize(("origin", "passes"), [("http://127.0.0.1:80", True), (None, True), ("http://evil.example", False)])
def test_websockets_are_checked_and_lifespan_passes(origin, passes):
    reached: list[str] = []
    sent: list[dict[str, Any]] = []

    async def inner(scope, receive, send):  # noqa: ARG001
        reached.append(scope["type"])

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    guard = Guard(inner, allowed_hosts("127.0.0.1"), Limits(ServeConfig()))
    headers = [(b"host", b"127.0.0.1"), *([(b"origin", origin.encode())] if origin else [])]
    scope = {"type": "websocket", "path": "/", "headers": headers, "server": ("127.0.0.1", 80)}
    asyncio.run(guard(scope, receive, send))
    asyncio.run(guard({"type": "lifespan"}, receive, send))
    assert reached == ["websocket"] * passes + ["lifespan"]
    assert [message["type"] for message in sent] == [] if passes else ["websocket.close"]
