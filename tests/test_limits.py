"""What one client can ask for, by raw requests to a running app with low limits; its health and its end."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import socket
import stat
import threading
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import uvicorn
import uvicorn.protocols.http.auto as uvicorn_http
from gradio.state_holder import SessionState
from starlette.responses import PlainTextResponse

from biasdpo import access, prompts
from biasdpo.access import Caller, Role
from biasdpo.config import ServeConfig
from biasdpo.errors import PromptError
from biasdpo.errors import RefusedError as RefusedByApp
from biasdpo.migrations import open_workspace
from biasdpo.ui import limits as limits_module
from biasdpo.ui.connections import LimitedProtocol, limit_connections
from biasdpo.ui.limits import Limits
from biasdpo.ui.security import Page
from tests.app_process import free_port, running_app, start_app, wait_for_page
from tests.perf.load import RefusedError, Visitor

LIMITS = ("--max-request-mb", "1", "--max-upload-mb", "2", "--max-queue", "12", "--max-queue-per-visitor", "10", "--public")
LIMITS += ("--max-uploads-mb-per-visitor", "3", "--max-uploads-mb", "4", "--max-verdicts-per-minute", "3")
LIMITS += ("--max-visits-per-minute", "40", "--max-generation-seconds", "1")
FORM = b'--b\r\nContent-Disposition: form-data; name="files"; filename="%d.txt"\r\n\r\n%s\r\n--b--\r\n'


class Client:
    root: Path

    def __init__(self, url: str) -> None:
        self.host = urllib.parse.urlsplit(url).netloc
        config = json.loads(self.send("GET", "/config")[1])
        self.compare = next(f for f in config["dependencies"] if f["api_name"] == "compare")

    def send(self, method: str, path: str, body: bytes | None = None, timeout: float = 60, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(self.host, timeout=timeout)
        connection.request(method, path, body, {"Content-Type": "application/json"} | headers)
        answer = connection.getresponse()
        try:
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def upload(self, number: int, mib: float, address: str) -> tuple[int, str]:
        body, kind = FORM % (number, b"x" * int(mib * 2**20)), "multipart/form-data; boundary=b"
        return self.send("POST", "/gradio_api/upload", body, **{"Content-Type": kind, "X-Forwarded-For": address})

    def join(self, session: str | None, tokens: int = 200, prompt: str = "Hello", **headers: str) -> tuple[int, str]:
        """Ask for a pair of completions and do not listen."""
        data: list[object] = [prompt, "smollm2", "none", "", 1.0, tokens, 0.0, 1.0, 0, 1.0, 0]
        data += [None] * (len(self.compare["inputs"]) - len(data))
        body = {"fn_index": self.compare["id"], "data": data, "session_hash": session}
        return self.send("POST", "/gradio_api/queue/join", json.dumps(body).encode(), **headers)

    def wait_until_idle(self) -> None:
        end = time.monotonic() + 60
        while self.waiting() and time.monotonic() < end:
            time.sleep(0.5)
        assert self.waiting() == 0

    def waiting(self) -> int:
        return int(json.loads(self.send("GET", "/healthz")[1])["requests"])


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    root = tmp_path_factory.mktemp("workspace")
    with running_app(root, "--model", "smollm2", *LIMITS) as url:
        client = Client(url)
        client.root = root
        yield client


def test_a_body_has_a_length_and_a_limit(client):
    status, text = client.send("POST", "/gradio_api/run/predict", b"x" * (2**20 + 1))
    assert (status, text.count("\n")) == (413, 1)
    assert "--max-request-mb" in text
    assert client.send("POST", "/gradio_api/upload", b"x" * (2 * 2**20 + 1))[0] == 413
    assert client.send("POST", "/gradio_api/queue/join", iter([b"{}"]))[0] == 411  # type: ignore[arg-type]


def test_developers_pages_are_closed(client):
    for path in ("/monitoring", "/monitoring/summary", "/gradio_api/openapi.json", "/openapi.json"):
        assert client.send("GET", path)[0] == 404, path


def test_what_takes_memory_or_disk_uncounted_is_closed(client):
    body = json.dumps({"session_hash": "new", "component_id": 1, "fn_name": "ls", "data": None}).encode()
    assert client.send("POST", "/gradio_api/component_server", body) == (404, "Not Found\n")
    recording = {"Content-Type": "multipart/form-data; boundary=b"}
    assert client.send("POST", "/gradio_api/process_recording/", FORM % (1, b"x"), **recording)[0] == 404
    assert client.send("GET", "/gradio_api/deep_link?session_hash=new")[0] == 404


def test_a_flood_of_clients_that_never_listen_is_bounded_and_dropped(client):
    with ThreadPoolExecutor(20) as clients:
        answers = list(clients.map(client.join, [f"flood-{i}" for i in range(20)]))
    refused = [text for status, text in answers if status != 200]
    assert len(refused) >= 8  # a few may have been answered meanwhile
    assert all("requests under way" in text for text in refused)
    client.wait_until_idle()
    assert client.join("late", tokens=2)[0] == 200
    assert "process_completed" in client.send("GET", "/gradio_api/queue/data?session_hash=late")[1]


def test_the_queue_has_a_limit_for_all(client):
    def join(i: int) -> tuple[int, str]:
        return client.join(f"many-{i}", **{"X-Forwarded-For": f"198.51.101.{i}"})

    with ThreadPoolExecutor(20) as clients:
        answers = list(clients.map(join, range(20)))
    refused = [text for status, text in answers if status != 200]
    assert refused
    assert all("The app is busy with 12 requests: try again in a minute" in text for text in refused)
    client.wait_until_idle()


def test_a_visitors_pair_ends_in_time(client):
    assert client.join("slow", 4000, "Write the numbers from 1 to 999 in words.")[0] == 200
    assert "**stopped**" in client.send("GET", "/gradio_api/queue/data?session_hash=slow")[1]


def test_pages_are_limited_by_address(client):
    address = {"X-Forwarded-For": "198.51.100.20"}
    told = []
    for i in range(48):
        if i % 8 == 0:
            client.wait_until_idle()  # else the limit of requests under way comes first
        told.append(client.join(f"page-{i}", 1, **address)[1])
    assert any("opened more than 40 pages in a minute" in text for text in told)
    assert "session_hash has 1 to 64 characters: got 99" in client.join("s" * 99, 1)[1]
    assert client.join(None, 1)[0] == 400


def _scope(path: str, method: str = "GET", length: int = 0) -> dict[str, Any]:
    headers = [(b"content-length", str(length).encode())]
    return {"type": "http", "path": path, "method": method, "headers": headers, "client": ("198.51.100.9", 1)}


def test_a_page_that_only_says_that_it_lives_is_a_visit():
    """When it leaves, Gradio makes a state for it."""
    limits = Limits(ServeConfig(max_visits_per_minute=2))
    answers = [limits.refusal(_scope(f"/gradio_api/heartbeat/page-{i}")) for i in (0, 1, 0, 2)]
    assert answers == [None, None, None, (429, "Your address opened more than 2 pages in a minute: wait a minute")]


def test_an_ipv6_visitor_counts_by_network():
    counted_as = limits_module.counted_as
    assert counted_as("2001:db8::1") == counted_as("2001:db8:0:0:ffff::2") != counted_as("2001:db8:0:1::1")
    assert counted_as("::ffff:198.51.100.1") == counted_as("198.51.100.1") == "198.51.100.1"


def test_pages_that_are_gone_leave_nothing_in_gradios_queue():

    async def sweep() -> None:
        with Page() as page:
            gr.Button().click(lambda: None)
        page.queue()
        queue, limits, left = page._queue, Limits(ServeConfig()), list[str]()
        page.left = [left.append]
        queue.pending_event_ids_session = {"gone": {"done"}, "closed": set()}
        for now, known in ((0.0, 2), (59.0, 2), (61.0, 0)):
            await limits._drop_unheard(queue, now)
            assert len(queue.pending_event_ids_session) == known
        await queue.clean_events(session_hash="unheard")
        assert left == ["unheard"]

    in_own_thread(sweep())


def test_a_skipped_output_is_not_built_anew():
    """Gradio builds a component anew for each output that a handler skips, at each event: at each token for all of Compare."""

    async def run() -> None:
        with Page() as page:
            text, other, state = gr.Textbox(), gr.Textbox(), gr.State("kept")
            gr.Button().click(lambda: None, None, [text, other, state])
        [function] = page.fns.values()
        session, update = SessionState(page), gr.update(value="b", lines=2)
        assert await page.postprocess_data(function, {text: "a"}, session) == ["a", gr.skip(), None]
        values = await page.postprocess_data(function, {text: update, other: "c"}, session)
        assert values == [{"value": "b", "lines": 2, "__type__": "update"}, "c", None]
        assert (session[text._id] is text, session[other._id] is other) == (False, True)

    in_own_thread(run())


def in_own_thread(coroutine: Any) -> Any:
    """The coroutine's result; Playwright's loop may run in this thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def test_a_full_day_of_uploads_is_over_the_next_day(monkeypatch):
    limits, upload = Limits(ServeConfig(public=True, max_uploads_mb=1)), _scope("/gradio_api/upload", "POST", 2**20)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"x" * 2**20}

    assert limits.refusal(upload) is None
    in_own_thread(limits.receiving(upload, receive)())
    assert limits.refusal(upload) == (429, "All visitors have uploaded 1 MiB today: try again tomorrow (--max-uploads-mb)")
    monkeypatch.setattr(limits_module, "_DAY", 0.0)
    assert limits.refusal(upload) is None


def test_uploads_have_a_budget_for_each_visitor_and_for_all(client):
    assert [client.upload(i, 1.2, "198.51.100.1")[0] for i in range(2)] == [200, 200]
    status, text = client.upload(2, 1.2, "198.51.100.1")
    assert (status, text) == (429, "You may upload 3 MiB a day: try again tomorrow (--max-uploads-mb-per-visitor)\n")
    assert client.upload(3, 1.2, "198.51.100.2")[0] == 200
    status, text = client.upload(4, 1.2, "198.51.100.3")
    assert (status, text) == (429, "All visitors have uploaded 4 MiB today: try again tomorrow (--max-uploads-mb)\n")


def test_verdicts_are_limited_by_visitor(client):
    port, config = int(client.host.rpartition(":")[2]), json.loads(client.send("GET", "/config")[1])
    one, other = Visitor(port, config, 8), Visitor(port, config, 8)

    def judge(visitor: Visitor, i: int) -> None:
        visitor.click("answer-left", visitor.identity, visitor.paste(f"Prompt {i}?"), True, False, "", "")

    for i in range(3):
        judge(one, i)
    with pytest.raises(RefusedError, match="You have stored 3 verdicts within a minute: wait a minute"):
        judge(one, 3)
    judge(other, 3)
    assert len((client.root / "preferences.jsonl").read_text().splitlines()) == 4


def test_stored_bytes_are_limited_for_each_visitor_and_for_all(monkeypatch):
    monkeypatch.setattr(access, "_source", lambda: Caller(Role.annotator, "lee"))
    limits = Limits(ServeConfig(max_stored_mb=10, max_stored_mb_per_visitor=1))
    limits.check_stored(2**19, 0)
    limits.check_stored(2**19, 0)
    with pytest.raises(RefusedByApp, match="You may store 1 MiB of verdicts a day"):
        limits.check_stored(1, 0)
    monkeypatch.setattr(access, "_source", lambda: Caller(Role.annotator, "kim"))
    with pytest.raises(RefusedByApp, match=r"The file of judgments is full, .* \(--max-stored-mb\)"):
        limits.check_stored(1, 10 * 2**20)
    limits.check_stored(1, 10 * 2**20 - 1)


def test_half_open_connections_do_not_keep_a_visitor_out(client):
    """200 clients begin a request and do not go on; so does one that has been answered before."""
    name, _, port = client.host.partition(":")
    begun = [socket.create_connection((name, int(port)), timeout=15) for _ in range(200)]
    for connection in begun:
        connection.sendall(b"GET /config HTTP/1.1\r\nHost: " + client.host.encode() + b"\r\nX-Slow: ")
    assert client.send("GET", "/config", timeout=15)[0] == 200
    assert client.join("patient", tokens=2)[0] == 200
    assert "process_completed" in client.send("GET", "/gradio_api/queue/data?session_hash=patient", timeout=15)[1]
    for connection in begun:  # the oldest were closed at once, the others after some seconds
        with suppress(ConnectionError):
            assert connection.recv(1) == b""
        connection.close()


@contextmanager
def waiting_connections(monkeypatch: pytest.MonkeyPatch, config: ServeConfig, count: int) -> Iterator[tuple[Any, int]]:
    """A server of ours that starts when so many connections wait for it already; and its port."""
    monkeypatch.setattr(uvicorn_http, "AutoHTTPProtocol", uvicorn_http.AutoHTTPProtocol)  # restored
    monkeypatch.setattr(LimitedProtocol, "limits", config)
    limit_connections(config)
    listener = socket.create_server(("127.0.0.1", 0), backlog=100)
    clients = [socket.create_connection(listener.getsockname()) for _ in range(count)]
    server = uvicorn.Server(uvicorn.Config(PlainTextResponse("hello"), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield server, listener.getsockname()[1]
    finally:
        server.should_exit = True
        for one in clients:
            one.close()
        thread.join()


def _answer(port: int, own: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=15, source_address=(own, 0))
    try:
        connection.request("GET", "/")
        return connection.getresponse().status
    finally:
        connection.close()


def test_connections_have_a_limit_for_all(monkeypatch):
    with waiting_connections(monkeypatch, ServeConfig(max_connections=10), 40) as (server, port):
        assert _answer(port, "127.0.0.1") == 200
        assert len(server.server_state.connections) <= 10


def test_connections_have_a_limit_for_each_visitor(monkeypatch):
    config = ServeConfig(max_connections_per_visitor=10, trusted_proxies=("10.0.0.1",))
    with waiting_connections(monkeypatch, config, 40) as (server, port):
        assert _answer(port, "127.0.0.2") == 200
        assert sum(one.client[0] == "127.0.0.1" for one in server.server_state.connections) == 10
        with pytest.raises(ConnectionError):
            _answer(port, "127.0.0.1")


def test_a_body_that_stops_coming_ends_the_request(monkeypatch):
    monkeypatch.setattr(limits_module, "_BODY_SECONDS", 0.05)

    async def receive() -> Any:
        await asyncio.sleep(60)

    receiving = Limits(ServeConfig()).receiving({"path": "/gradio_api/queue/join", "method": "POST"}, receive)
    assert in_own_thread(receiving()) == {"type": "http.disconnect"}


def test_prompts_are_counted_before_they_are_built():
    lines = [str(i) for i in range(2**17)]
    with pytest.raises(PromptError, match="17,179,869,184 prompts are too many for one list: give at most 5,000"):
        prompts.expand("Are {group} {trait}?", lines, lines, "gender")


def test_a_new_workspace_is_its_owners_alone(tmp_path):
    workspace = open_workspace(tmp_path / "new")
    assert stat.S_IMODE(workspace.root.stat().st_mode) == 0o700


def test_the_health_and_the_end(tmp_path: Path):
    port = free_port()
    process = start_app(tmp_path, port, "--model", "smollm2")
    try:
        url = f"http://127.0.0.1:{port}/"
        wait_for_page(url, process, tmp_path / "app.log")
        client = Client(url)
        end = time.monotonic() + 120
        while not json.loads(client.send("GET", "/healthz")[1])["ready"] and time.monotonic() < end:
            time.sleep(0.5)
        assert json.loads(client.send("GET", "/healthz")[1]) == {"ready": True, "requests": 0}
        assert client.join("busy")[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
