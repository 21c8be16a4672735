"""What a raw post to a public Space gets: its buttons may be hidden there, but a post needs none. One app serves all tests."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from biasdpo.data import journal
from biasdpo.jobs import store
from biasdpo.ui.train import SETTINGS, to_field
from biasdpo.workspace import Workspace
from tests.app_process import running_app
from tests.evaluation_results import result, write_result
from tests.run_folders import write_run

REFUSED = "only for this app"


class Poster:
    """Posts to functions by the element whose event runs them."""

    def __init__(self, url: str, workspace: Workspace) -> None:
        self.url = url
        self.workspace = workspace
        with urllib.request.urlopen(url + "config", timeout=60) as answer:
            self.config = json.load(answer)
        self.ids = {c["props"].get("elem_id"): c["id"] for c in self.config["components"]}

    def functions(self, element: str, event: str = "click") -> list[dict[str, Any]]:
        target = [self.ids[element], event]
        return [d for d in self.config["dependencies"] if target in d["targets"] and d["backend_fn"]]

    def answer(self, element: str, data: list[Any], event: str = "click") -> str:
        """What the last function of this event answers: one before it only points out what is wrong with the fields."""
        return self.post(self.functions(element, event)[-1], data)

    def post(self, function: dict[str, Any], data: list[Any]) -> str:
        """What a function answers: at once, or through the queue."""
        body = {"fn_index": function["id"], "data": data, "session_hash": "stranger"}
        if function["queue"] is False:
            return self._send("gradio_api/run/predict", body)
        joined = self._send("gradio_api/queue/join", body)
        assert "event_id" in joined, joined
        return self._stream("gradio_api/queue/data?session_hash=stranger", "process_completed")

    def call(self, name: str, data: list[object]) -> str:
        """Call a named endpoint as any program can; its events as text."""
        event = json.loads(self._send(f"gradio_api/call/{name}", {"data": data}))["event_id"]
        return self._stream(f"gradio_api/call/{name}/{event}")

    def _send(self, path: str, body: dict[str, Any]) -> str:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return str(answer.read().decode())

    def _stream(self, path: str, end: str = "") -> str:
        lines = []
        with urllib.request.urlopen(self.url + path, timeout=120) as stream:
            for line in stream:
                lines.append(line.decode())
                if end and end in lines[-1]:
                    break
        return "".join(lines)


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Poster]:
    workspace = Workspace(tmp_path_factory.mktemp("space"))
    write_run(workspace.root, "first")
    write_run(workspace.root, "halted", "stopped", steps=8)
    write_result(workspace.root, "strong", result(8, benchmarks=("crows_pairs",)))
    journal.append(workspace, journal.new_judgment("Whose judgment is it?", "Anyone's.", "Nobody's."))
    with running_app(workspace.root, "--model", "smollm2", SPACE_ID="someone/biasdpo") as url:
        yield Poster(url, workspace)


@pytest.mark.slow
def test_compare_opens_only_the_catalog_and_checks_its_settings(space):
    rest = ["", 1.0, 8, 0.0, 1.0, 0, 1.0, 0]
    assert REFUSED in space.call("compare", ["Hello", "/etc/passwd.gguf", "none", *rest])
    assert REFUSED in space.call("compare", ["Hello", "smollm2", "/etc", *rest])
    assert "seed must be a whole number" in space.call("compare", ["Hello", "smollm2", "none", *rest[:-1], -1])
    assert "prompt must be text" in space.call("compare", [5, "smollm2", "none", *rest])
    assert "cut at 8 tokens" in space.call("compare", ["Hello", "smollm2", "none", *rest])


def test_the_dataset_is_neither_imported_nor_exported(space):
    before = space.workspace.preferences.read_text()
    assert REFUSED in space.answer("import-preview", ["seed", None, ""])
    assert REFUSED in space.answer("export-button", [".jsonl"])
    assert space.workspace.preferences.read_text() == before


def test_training(space):
    root = space.workspace.root
    secret = root / "secret.jsonl"
    secret.write_text('{"prompt": "p", "chosen": "the secret", "rejected": "r"}\n')
    form = ["smollm2", [str(secret)], *(to_field(setting, setting.default) for setting in SETTINGS)]
    assert REFUSED in space.answer("train-start", ["mine", *form])
    assert REFUSED in space.answer("train-estimate", form)
    assert not (root / "runs" / "mine").exists()
    answer = space.answer("train-data", ["", *form], "change")
    assert "for the owner" in answer
    assert "held out" not in answer
    for element, data, event in (
        ("train-model", ["/etc/passwd.gguf"], "input"),
        ("train-upload", [None, []], "upload"),
        ("train-import", [None], "upload"),
        ("train-retry", ["halted"], "click"),
        ("train-stop", ["halted"], "click"),
        ("train-resume", ["halted"], "click"),
        ("train-zip", ["first"], "click"),
        ("train-note", ["first", "graffiti"], "blur"),
        ("train-confirm-delete", ["first"], "click"),
    ):
        assert REFUSED in space.answer(element, data, event), element
    assert (root / "runs" / "first" / "adapter").is_dir()
    assert not (root / "runs" / "first" / "note.txt").exists()


def test_evaluation(space):
    for element in ("measure-start", "measure-estimate"):
        shown = {c["id"]: c["props"].get("value") for c in space.config["components"]}
        asked = [shown[component] for component in space.functions(element)[-1]["inputs"]]
        assert REFUSED in space.answer(element, asked), element
    for element in ("evaluate-stop", "evaluate-resume", "evaluate-confirm-delete", "measure-card"):
        assert REFUSED in space.answer(element, ["strong"]), element
    assert [one.id for one in store.list_jobs(space.workspace, "evaluate")] == ["strong"]


def test_export(space):
    asked = ["first", "lora", "Q8_0", "none", "x.gguf", None, "/etc/passwd.gguf", "auto", 0, None]
    assert REFUSED in space.answer("export-start", asked)
    assert REFUSED in space.answer("export-adapter", asked, "change")
    for element in ("export-stop", "export-resume", "export-confirm-delete", "export-compare"):
        assert REFUSED in space.answer(element, ["x"]), element
    assert store.list_jobs(space.workspace, "export") == []
