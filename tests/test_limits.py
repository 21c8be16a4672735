"""What one client can ask for, by raw requests to a running app with low limits; its health and its end."""

from __future__ import annotations

import http.client
import json
import signal
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.app_process import free_port, running_app, start_app, wait_for_page

LIMITS = ("--max-request-mb", "1", "--max-upload-mb", "2", "--max-queue", "12", "--max-queue-per-visitor", "10")


class Client:
    def __init__(self, url: str) -> None:
        self.host = urllib.parse.urlsplit(url).netloc
        config = json.loads(self.send("GET", "/config")[1])
        self.compare = next(f for f in config["dependencies"] if f["api_name"] == "compare")

    def send(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(self.host, timeout=60)
        connection.request(method, path, body, {"Content-Type": "application/json"} | headers)
        answer = connection.getresponse()
        try:
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def join(self, session: str, tokens: int = 200) -> tuple[int, str]:
        """Ask for a pair of completions and do not listen."""
        data: list[object] = ["Hello", "smollm2", "none", "", 1.0, tokens, 0.0, 1.0, 0, 1.0, 0]
        data += [None] * (len(self.compare["inputs"]) - len(data))
        body = {"fn_index": self.compare["id"], "data": data, "session_hash": session}
        return self.send("POST", "/gradio_api/queue/join", json.dumps(body).encode())

    def waiting(self) -> int:
        return int(json.loads(self.send("GET", "/healthz")[1])["requests"])


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with running_app(tmp_path_factory.mktemp("workspace"), "--model", "smollm2", *LIMITS) as url:
        yield Client(url)


def test_a_body_has_a_length_and_a_limit(client):
    status, text = client.send("POST", "/gradio_api/run/predict", b"x" * (2**20 + 1))
    assert (status, text.count("\n")) == (413, 1)
    assert "--max-request-mb" in text
    assert client.send("POST", "/gradio_api/upload", b"x" * (2 * 2**20 + 1))[0] == 413
    assert client.send("POST", "/gradio_api/queue/join", iter([b"{}"]))[0] == 411  # type: ignore[arg-type]


def test_developers_pages_are_closed(client):
    for path in ("/monitoring", "/monitoring/summary", "/gradio_api/openapi.json", "/openapi.json"):
        assert client.send("GET", path)[0] == 404, path


def test_a_flood_of_clients_that_never_listen_is_bounded_and_dropped(client):
    with ThreadPoolExecutor(20) as clients:
        answers = list(clients.map(client.join, [f"flood-{i}" for i in range(20)]))
    refused = [text for status, text in answers if status != 200]
    assert len(refused) >= 8  # a few may have been answered meanwhile
    assert all("requests under way" in text for text in refused)
    end = time.monotonic() + 60
    while client.waiting() and time.monotonic() < end:
        time.sleep(0.5)
    assert client.waiting() == 0
    assert client.join("late", tokens=2)[0] == 200
    assert "process_completed" in client.send("GET", "/gradio_api/queue/data?session_hash=late")[1]


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
