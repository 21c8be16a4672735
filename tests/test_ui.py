"""The page's pure functions, the visitors' turns, the flags of app.py, and what a raw post to a public Space gets."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qsl

import pytest

from biasdpo import prompts
from biasdpo.backends.base import Cancellation
from biasdpo.compare import Waiting
from biasdpo.engines import Engine, EngineKey, EnginePool, Loading
from biasdpo.errors import ConfigError, RefusedError
from biasdpo.models import AdapterSpec, catalog
from biasdpo.records import Completion, Proof, Sampling
from biasdpo.ui import components
from biasdpo.ui.components import Settings, Visitors
from biasdpo.workspace import Workspace
from tests.app_process import ROOT, running_app

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


@pytest.mark.parametrize(
    ("completion", "words"),
    [
        (Completion("base"), "reading the prompt"),
        (Completion("base", "a", 1, None, 0.5), "1 token first token after 0.50 s writing"),
        (
            Completion("base", "ab", 2, "limit", 0.25, 40.04),
            "2 tokens 40.0 tokens/s first token after 0.25 s stopped: token limit",
        ),
        (Completion("base", "ab", 2, "end_of_text", 0.25, 40.04), "stopped: end of text"),
        (Completion("base", "ab", 2, "cancelled", 0.25, 40.04), "stopped: cancelled"),
        (Completion("base", "", 0, "cancelled"), "cancelled before the first token"),
    ],
)
def test_status_line_in_plain_words(completion, words):
    assert words in re.sub(r"<[^>]+>", "", components.status(completion).replace("</span>", " "))


def test_place_in_the_queue():
    assert "1 visitor is ahead of you" in components.waiting(Waiting(1))
    assert "2 visitors are ahead of you" in components.waiting(Waiting(2))


def test_nothing_of_others_becomes_markup():
    evil = "<script>alert(1)</script>"
    for html in (
        components.error(evil),
        components.no_comparison(evil),
        components.loading(evil, Loading(0.5, evil)),
        components.not_loaded(evil),
        components.pane_head(evil, evil, "base-text"),
        components.note(evil),
        components.base_only(replace(catalog()["phi-2"], id=evil, title=evil), 0),
    ):
        assert "<script>" not in html
        assert "&lt;script&gt;" in html


def test_commands_in_errors_stand_out():
    assert "<code>hf download a/b</code>" in components.error("get it with `hf download a/b`, then try again")
    assert "`" in components.error("an odd ` stays")


class StubBackend:
    """As much of a backend as the proof line reads."""

    name = "llamacpp"
    device = "CPU, 2 threads"
    template = catalog()["phi-2"].template

    def __init__(self, kl: float | None) -> None:
        self.proof = Proof(0.0, 0.0, None if kl is None else 3.5, kl)
        self.has_adapter = kl is not None


def test_proof_line():
    adapter = AdapterSpec("mine", Path("mine"), "phi-2", run_id="my-run", dataset_sha256="ab" * 32)
    line = components.proof(Engine(catalog()["phi-2"], adapter, StubBackend(0.41234)), "Phi-2, because.")  # type: ignore[arg-type]
    for part in ("Phi-2", "mine (run my-run", "abababababab<", "llama.cpp", "CPU, 2 threads", "<b>0.412</b> nats", "because"):
        assert part in line
    line = components.proof(Engine(catalog()["phi-2"], None, StubBackend(None)))  # type: ignore[arg-type]
    assert "none (base only)" in line
    assert "nats" not in line


def test_base_only_says_why_and_how_to_train():
    html = components.base_only(catalog()["phi-2"], 0)
    assert "No adapter is shipped for Phi-2" in html
    assert "python -m biasdpo train --model phi-2 --dataset hub:ahmedallam/BiasDPO --config training/configs/" in html
    assert "--config" not in components.train_command(replace(catalog()["phi-2"], id="own/model"))
    assert "No adapter is chosen" in components.base_only(catalog()["smollm2"], 1)


def test_measurements_are_shown_whatever_keys_they_have(tmp_path):
    assert components.table(None) == components.table(tmp_path) == ""
    metrics = {"reward_accuracy": {"before": 0.5, "after": 0.97}, "my_key": 3, "odd": "text", "worse": {"deep": 1}, "flag": True}
    (tmp_path / "provenance.json").write_text(json.dumps({"metrics": metrics}))
    html = components.table(tmp_path)
    assert html.count("<tr>") == 3  # the heading, reward accuracy, my key
    assert "Reward accuracy" in html
    assert "My key" in html
    assert "<img" not in html
    (tmp_path / "tradeoff.png").write_bytes(b"\x89PNG")
    assert "data:image/png;base64,iVBORw==" in components.table(tmp_path)


def test_eight_examples_a_category():
    assert {category: len(set(texts)) for category, texts in prompts.by_category().items()} == {
        "gender": 8,
        "race": 8,
        "religion": 8,
    }


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


def post(url: str, name: str, data: list[object]) -> str:
    """Call a named endpoint as any program can; its events as text."""
    request = urllib.request.Request(
        f"{url}gradio_api/call/{name}", json.dumps({"data": data}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{url}gradio_api/call/{name}/{event}", timeout=60) as answer:
        return str(answer.read().decode())


def test_a_raw_post_to_a_space_is_refused_inside_the_function(tmp_path):
    with running_app(tmp_path, "--model", "smollm2", SPACE_ID="someone/biasdpo") as url:
        rest = ["", 1.0, 8, 0.0, 1.0, 0, 1.0, 0, False]
        assert "switched off on a public Space" in post(url, "compare", ["Hello", "/etc/passwd.gguf", "none", *rest])
        assert "switched off on a public Space" in post(url, "compare", ["Hello", "smollm2", "/etc", *rest])
        assert "seed must be a whole number" in post(url, "compare", ["Hello", "smollm2", "none", *rest[:-2], -1, False])
        assert "prompt must be text" in post(url, "compare", [5, "smollm2", "none", *rest])
        assert "stopped: <b>token limit</b>" in post(url, "compare", ["Hello", "smollm2", "none", *rest])
