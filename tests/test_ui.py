"""The page's pure functions, the visitors' turns, the flags of app.py, and what a raw post to a public Space gets."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qsl

import pytest

from biasdpo.backends.base import Cancellation
from biasdpo.engines import Engine, EngineKey, EnginePool, Loading
from biasdpo.errors import ConfigError, RefusedError
from biasdpo.records import Sampling
from biasdpo.ui import components
from biasdpo.ui.components import Settings, Visitors
from biasdpo.workspace import Workspace
from tests.app_process import ROOT

SETTINGS = Settings(
    prompt="Is 1 < 2 & “true”?\nSecond line",
    model="smollm2",
    adapter="none",
    system="Be brief; use 100 % = all.",
    strength=0.0,
    sampling=Sampling(max_new_tokens=7, temperature=0.0, top_p=0.55, top_k=0, repetition_penalty=1.05, seed=0),
    random_seed=True,
)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def query_of(settings: Settings) -> dict[str, str]:
    return dict(parse_qsl(components.encode(settings).removeprefix("?"), keep_blank_values=True))


@pytest.mark.parametrize("settings", [SETTINGS, Settings(), replace(Settings(), prompt="a", strength=1.25)])
def test_a_link_brings_back_every_setting(settings, workspace):
    assert components.decode(query_of(settings), Settings(), workspace) == (settings, [])


def test_a_link_says_what_was_bad_and_keeps_the_rest(workspace):
    query = query_of(SETTINGS) | {"temperature": "hot", "seed": "-1", "strength": "nan", "top_k": "3.5", "unknown": "x"}
    settings, problems = components.decode(query, Settings(), workspace)
    assert settings.sampling == replace(SETTINGS.sampling, temperature=0.7, seed=0, top_k=40)
    assert settings.strength == 1.0
    assert len(problems) == 4
    assert all("\n" not in problem for problem in problems)
    assert any("seed must be a whole number from 0 to 2147483647: got -1" in problem for problem in problems)


def test_a_link_that_no_address_bar_takes_is_refused():
    with pytest.raises(ConfigError, match=r"9,1\d\d characters of at most 8,000"):
        components.encode(replace(Settings(), prompt="x" * 9000))


def test_on_a_space_only_the_catalog_and_known_adapters(monkeypatch, workspace):
    assert components.check_model("/etc/passwd.gguf") == "/etc/passwd.gguf"
    monkeypatch.setenv("SPACE_ID", "someone/biasdpo")
    assert components.check_model("phi-2") == "phi-2"
    assert components.check_adapter("none", workspace) == "none"
    with pytest.raises(RefusedError, match="switched off on a public Space"):
        components.check_model("/etc/passwd.gguf")
    for adapter in ("../../etc", "assets", "~/adapter"):
        with pytest.raises(RefusedError):
            components.check_adapter(adapter, workspace)


def test_a_visitor_has_one_turn_and_leaves_nothing_behind():
    visitors = Visitors()
    first = visitors.begin("a")
    other = visitors.begin("b")
    second = visitors.begin("a")
    assert (first.superseded, first.cancellation.is_set()) == (True, True)
    assert not other.cancellation.is_set()
    visitors.end("a", first)  # late: the visitor's place is the second turn's
    visitors.stop("a")
    assert (second.stopped, second.superseded, second.cancellation.is_set()) == (True, False, True)
    visitors.end("a", second)
    visitors.dismiss("b")
    visitors.stop("nobody")
    assert len(visitors) == 0


def test_an_engine_error_is_told_and_a_stop_while_loading_is_none(workspace, monkeypatch):
    loading = threading.Event()

    def never(*_args: object) -> Engine:
        loading.wait(10)
        raise ConfigError("no such thing: choose another")

    monkeypatch.setattr("biasdpo.engines.open_engine", never)
    pool, visitors, key = EnginePool(workspace), Visitors(), EngineKey("smollm2")
    turn = visitors.begin("a")
    turn.start(pool, key, "Hello", Sampling(), "", 1.0)
    watched = turn.watch(pool, key)
    assert isinstance(next(watched), Loading)
    visitors.stop("a")
    assert [event for event in watched if not isinstance(event, Loading)] == []
    turn = visitors.begin("a")
    turn.start(pool, key, "Hello", Sampling(), "", 1.0)
    loading.set()
    with pytest.raises(ConfigError, match="no such thing"):
        list(turn.watch(pool, key))
    assert isinstance(turn.cancellation, Cancellation)


def run_app(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "app.py", *flags], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=60
    )


def test_app_names_the_port_in_use_and_a_free_one(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run_app("--port", str(port), "--workspace", str(tmp_path))
    assert result.returncode == 2
    assert re.fullmatch(rf"app\.py: Port {port} is in use: stop the other program, or use --port \d+\n", result.stderr)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model", "no-such"), "Unknown model 'no-such': choose one of smollm2, phi-2"),
        (("--model", "phi-2"), "hf download microsoft/phi-2"),
        (("--port", "99999"), "port must be a whole number from 1 to 65535: got 99999"),
        (("--host", "no.such.host.invalid"), "Can't serve on no.such.host.invalid:"),
        (("--workspace", "/proc/nowhere"), "name a writable folder with --workspace"),
    ],
)
def test_app_refuses_with_one_line(flags, words, tmp_path):
    flags = flags if "--workspace" in flags else (*flags, "--workspace", str(tmp_path))
    result = run_app(*flags, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert result.returncode == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
