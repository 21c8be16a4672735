"""ZeroGPU: what crosses to the process that has the GPU, and that it computes what a direct call computes."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qsl, urlsplit
from urllib.request import Request, urlopen

import pytest

from biasdpo import models
from biasdpo.backends import choose_backend, has_llama_cpp, hf, zerogpu
from biasdpo.backends.base import Cancellation
from biasdpo.errors import AdapterError, BackendError, PromptError
from biasdpo.records import LikelihoodRequest
from tests import tiny_models
from tests.app_process import ROOT, running_app
from tests.hf.cases import GREEDY, LONG, PROMPTS, SHORT, Case, read_together
from tests.hf.on_zerogpu import answers


def serve(connection: Connection) -> None:
    """A process that is lent a GPU: all that it gets and gives is pickled."""
    while (request := connection.recv()) is not None:
        stream = zerogpu.on_gpu(*request)
        try:
            for event in stream:
                connection.send(event)
                if connection.recv() == "stop":
                    stream.close()
                    break
            connection.send("end")
        except Exception as exc:
            connection.send(exc)


class Elsewhere:
    """`on_gpu` in a spawned process, which has nothing of this one's memory."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other,), daemon=True)
        self.process.start()
        self.leases: list[list[zerogpu.Call]] = []
        self.seen: list[str] = []  # the visitor of each lease

    def __call__(self, opening: zerogpu.Opening, calls: list[zerogpu.Call]) -> Iterator[zerogpu.Event]:
        self.leases.append(calls)
        self.seen.append(VISITOR.get("nobody"))
        self.connection.send((opening, calls))
        ended = False
        try:
            while (event := self.connection.recv()) != "end":
                if isinstance(event, Exception):
                    ended = True
                    raise event
                yield event
                self.connection.send("next")
            ended = True
        finally:
            if not ended:
                self.connection.send("stop")
                assert self.connection.recv() == "end"


SIDES = ("base", "tuned")
VISITOR: ContextVar[str] = ContextVar("visitor")


@pytest.fixture(scope="module")
def process() -> Iterator[Elsewhere]:
    started = Elsewhere()
    yield started
    started.connection.send(None)
    started.process.join(30)


@pytest.fixture
def elsewhere(process: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    monkeypatch.setattr(zerogpu, "on_gpu", process)
    monkeypatch.setattr(hf, "PAIRING_SECONDS", 60.0)
    process.leases.clear()
    process.seen.clear()
    return process


@pytest.fixture(scope="module")
def lent(case: Case) -> Iterator[zerogpu.ZeroGpuBackend]:
    backend = zerogpu.open_zerogpu(case.folder, case.template, case.adapter, tiny_models.CONTEXT_LENGTH, device="cpu")
    yield backend
    backend.close()


@pytest.mark.slow
def test_the_other_process_computes_what_a_direct_call_does(case, lent, elsewhere):
    token = VISITOR.set("ada")
    try:
        assert answers(lent) == answers(case.backend)
    finally:
        VISITOR.reset(token)
    assert [[call.side for call in calls] for calls in elsewhere.leases] == [["base", "tuned"], ["tuned"], ["base"]]
    assert elsewhere.seen == ["ada"] * 3  # the quota is the visitor's, whatever thread asks


@pytest.mark.slow
def test_what_fails_there_is_an_error_of_ours_here(case, lent, elsewhere):
    with pytest.raises(PromptError, match=r"does not fit the context"):
        lent.loglikelihood([LikelihoodRequest(LONG * 9, "x")], "base")
    assert len(elsewhere.leases) == 1  # only that process can tell; the next is known here
    with pytest.raises(PromptError, match="shorten the prompt"):
        next(lent.stream(LONG * 9, SHORT, "base"))
    moved = zerogpu.ZeroGpuBackend(lent.local, replace(lent.opening, adapter_folder=Path("moved")))
    with pytest.raises(AdapterError, match="moved"):
        moved.loglikelihood([LikelihoodRequest("a", "b")], "base")
    bare = zerogpu.open_zerogpu(case.folder, case.template, None, 512, device="cpu")
    with pytest.raises(BackendError, match="There is no tuned side"):
        next(bare.stream("Hello", SHORT, "tuned"))
    bare.close()
    with pytest.raises(BackendError, match="was closed"):
        bare.score_tokens(LikelihoodRequest("a", "b"), "base")
    assert len(elsewhere.leases) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_a_stop_ends_the_lease(lent):
    cancellation = Cancellation()

    def stopped_at_the_first_piece(stream: Any) -> Iterator[str]:
        yield next(stream)
        cancellation.set()
        return (yield from stream)

    base, tuned = (lent.stream(PROMPTS[0], replace(GREEDY, max_new_tokens=400), s, cancellation=cancellation) for s in SIDES)
    assert [reason for _, reason in read_together(stopped_at_the_first_piece(base), tuned)] == ["cancelled"] * 2
    assert lent.score_tokens(LikelihoodRequest("a", "b"), "base")  # the process is free again


def test_a_refused_gpu_is_one_line(lent, monkeypatch):
    def refuse(*_: object) -> Iterator[Any]:
        raise RuntimeError("You have exceeded your free ZeroGPU quota")
        yield

    monkeypatch.setattr(zerogpu, "on_gpu", refuse)
    with pytest.raises(BackendError, match=r"exceeded your free ZeroGPU quota\): try again later"):
        lent.loglikelihood([LikelihoodRequest("a", "b")], "base")


def test_the_time_to_ask_for_grows_with_the_tokens():
    opening = zerogpu.Opening(Path(), tiny_models.LLAMA_TEMPLATE, None, 512)
    seconds = [zerogpu.seconds_of(opening, [zerogpu.Call("stream", "base", n, {})] * 2) for n in (0, 100, 400, 100_000)]
    assert seconds == [20, 25, 40, 120]


def test_auto_is_transformers_on_zerogpu_and_without_llama_cpp(monkeypatch):
    spec = models.find("smollm2")
    assert choose_backend(spec) == "llamacpp"
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    assert choose_backend(spec) == "transformers"
    assert models.free_gpu_memory_gb() == 0.0
    with pytest.raises(BackendError, match="does not run on ZeroGPU"):
        choose_backend(spec, "transformers-8bit")
    monkeypatch.delenv("SPACES_ZERO_GPU")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # as if it were not installed
    assert not has_llama_cpp()
    assert choose_backend(spec) == "transformers"
    with pytest.raises(BackendError, match=r"llama\.cpp is not installed"):
        choose_backend(spec, "llamacpp")


class DeviceApi(BaseHTTPRequestHandler):
    """ZeroGPU's side of the `spaces` package: always a free GPU, the same process for it."""

    asked: ClassVar[list[tuple[str, dict[str, str]]]] = []

    def do_POST(self) -> None:
        url = urlsplit(self.path)
        self.asked.append((url.path, dict(parse_qsl(url.query))))
        idle = sum(path == "/schedule" for path, _ in self.asked) > 1
        lease = {"idle": idle, "nvidiaIndex": 0, "nvidiaUUID": "GPU-0", "allowToken": "t"}
        body = json.dumps(lease).encode() if url.path == "/schedule" else b""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def device_api() -> Iterator[dict[str, str]]:
    """The environment of a ZeroGPU Space whose GPUs are this stand-in's."""
    if find_spec("spaces") is None:
        pytest.skip("the package `spaces` is not installed")
    DeviceApi.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), DeviceApi) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield {"SPACES_ZERO_GPU": "true", "SPACES_ZERO_DEVICE_API_URL": f"http://127.0.0.1:{server.server_port}"}
        server.shutdown()


@pytest.mark.slow
def test_the_spaces_package_forks_a_process_for_it(tiny_llama, tiny_llama_adapter, device_api):
    """Its own scheduling, forking and pickling; its server and CUDA are stood in for."""
    command = [sys.executable, "-m", "tests.hf.on_zerogpu", str(tiny_llama), str(tiny_llama_adapter)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | device_api, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert (found.pop("decorated"), found.pop("here")) == (True, 0)  # nothing was opened for the GPU in its own process
    direct = hf.open_transformers(tiny_llama, tiny_models.LLAMA_TEMPLATE, tiny_llama_adapter, 512, device="cpu")
    assert found == json.loads(json.dumps(answers(direct)))
    leases = [query for path, query in DeviceApi.asked if path == "/schedule"]
    assert [query["durationSeconds"] for query in leases] == ["21", "21", "21"]
    assert [path for path, _ in DeviceApi.asked].count("/release") == 3


@pytest.mark.slow
def test_the_app_starts_on_zerogpu_and_a_visitor_uses_their_own_quota(tmp_path, tiny_llama, device_api):
    (tmp_path / "sitecustomize.py").write_text("from tests.hf.on_zerogpu import lend_the_cpu\nlend_the_cpu()\n")
    path = os.pathsep.join(filter(None, (str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {"SPACE_ID": "ana/biasdpo", "PYTHONPATH": path, **device_api}
    token = f"a.{base64.urlsafe_b64encode(b'{}').decode()}.c"
    with running_app(tmp_path, "--model", str(tiny_llama), **environment) as url:
        assert DeviceApi.asked == [("/startup-report", {})]
        body = json.dumps({"data": ["Hello", "auto", "none", "", 1.0, 4, 0.0, 1.0, 0, 1.0, 0]}).encode()
        headers = {"Content-Type": "application/json", "X-IP-Token": token}
        with urlopen(Request(f"{url}gradio_api/call/compare", body, headers), timeout=60) as answer:
            event = json.load(answer)["event_id"]
        with urlopen(f"{url}gradio_api/call/compare/{event}", timeout=120) as stream:
            told = stream.read().decode()
    assert "cut at 4 tokens" in told, told[-2000:] + (tmp_path / "app.log").read_text()[-2000:]
    (lease,) = [query for path, query in DeviceApi.asked if path == "/schedule"]
    assert lease["token"] == token
