"""Links to a comparison, what a public Space refuses, the flags of app.py."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qsl

import pytest

from biasdpo import access
from biasdpo.engines import EngineKey, Startup
from biasdpo.errors import ConfigError, RefusedError
from biasdpo.links import GREEDY, PairSettings, from_query
from biasdpo.records import Sampling
from biasdpo.ui.components import escape, local_time
from biasdpo.workspace import Workspace
from tests.app_process import ROOT

SETTINGS = PairSettings(
    prompt="Is 1 < 2 & “true”?\nSecond line",
    model="smollm2",
    adapter="none",
    system="Be brief; use 100 % = all.",
    strength=0.0,
    sampling=Sampling(max_new_tokens=7, temperature=0.0, top_p=0.55, top_k=0, repetition_penalty=1.05, seed=0),
)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def query_of(settings: PairSettings) -> dict[str, str]:
    return dict(parse_qsl(settings.to_query().removeprefix("?"), keep_blank_values=True))


@pytest.mark.parametrize("settings", [SETTINGS, PairSettings(), replace(PairSettings(), prompt="a", strength=1.25)])
def test_a_link_brings_back_every_setting(settings, workspace):
    assert from_query(query_of(settings), workspace) == (settings, [])
    assert PairSettings.checked(*settings.values()) == settings


def test_a_link_says_what_was_bad_and_keeps_the_rest(workspace):
    bad = {"temperature": "hot", "seed": "-1", "strength": "nan", "top_k": "<img src=x>", "unknown": "x"}
    settings, problems = from_query(query_of(SETTINGS) | bad, workspace)
    assert settings.sampling == replace(SETTINGS.sampling, temperature=GREEDY.temperature, seed=0, top_k=40)
    assert settings.strength == 1.0
    assert len(problems) == 4
    assert all("\n" not in problem for problem in problems)
    assert any("seed must be a whole number from 0 to 2147483647: got -1" in problem for problem in problems)


def test_a_link_that_no_address_bar_takes_is_refused():
    with pytest.raises(ConfigError, match=r"9,1\d\d characters of at most 8,000"):
        replace(PairSettings(), prompt="x" * 9000).to_query()


def test_anyone_can_post_anything():
    good = PairSettings().values()
    for place, bad in ((0, 5), (1, ["x"]), (4, "1"), (4, float("nan")), (5, 0), (6, True), (10, 2**31)):
        with pytest.raises(ConfigError, match=r"must be .*: got"):
            PairSettings.checked(*[*good[:place], bad, *good[place + 1 :]])


def test_on_a_space_only_the_catalog_and_known_adapters(monkeypatch, workspace):
    startup = Startup("smollm2")
    assert startup.key("/etc/passwd.gguf", "none", workspace) == EngineKey("/etc/passwd.gguf", "none")
    monkeypatch.setattr(access, "_source", lambda: access.Caller(access.Role.visitor))
    assert startup.key("phi-2", "none", workspace) == EngineKey("phi-2", "none")
    with pytest.raises(RefusedError, match="only for this app"):
        startup.key("/etc/passwd.gguf", "none", workspace)
    for adapter in ("../../etc", "assets", "~/adapter"):
        with pytest.raises(RefusedError):
            startup.key("smollm2", adapter, workspace)
    settings, problems = from_query({"model": "/etc/passwd.gguf", "adapter": "/etc", "prompt": "Hi"}, workspace)
    assert (settings, len(problems)) == (replace(PairSettings(), prompt="Hi"), 2)


@pytest.mark.parametrize(
    "text", ["<img src=x onerror=alert(1)>", "**bold** _it_ `code` [a](javascript:x)", "| a | b |", "# head", "&lt;"]
)
def test_somebodys_text_in_markdown_is_shown_as_it_is(text):
    from html.parser import HTMLParser

    from markdown_it import MarkdownIt

    class Tags(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: list[str] = []
            self.text = ""

        def handle_starttag(self, tag: str, _attrs: object) -> None:
            self.tags.append(tag)

        def handle_data(self, data: str) -> None:
            self.text += data

    parser = Tags()
    parser.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(escape(text)))
    assert (parser.tags, parser.text.strip()) == (["p"], text)


def test_a_time_is_unambiguous(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    assert local_time("2026-11-30T09:05:59+00:00") == "2026-11-30 09:05"
    assert local_time("yesterday") == ""


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
        (("--public", "--host", "no.such.host.invalid"), "Can't serve on no.such.host.invalid:"),
        (("--workspace", "/proc/nowhere"), "name a writable folder with --workspace"),
    ],
)
def test_app_refuses_with_one_line(flags, words, tmp_path):
    flags = flags if "--workspace" in flags else (*flags, "--workspace", str(tmp_path))
    result = run_app(*flags, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert result.returncode == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
