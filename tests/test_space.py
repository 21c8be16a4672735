"""What a raw post to a public Space gets: its buttons may be hidden there, but a post needs none. One app serves all tests."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from biasdpo.accounts import Accounts
from biasdpo.data import journal
from biasdpo.jobs import store
from biasdpo.ui.train import SETTINGS, to_field
from biasdpo.workspace import Workspace
from tests.app_process import ROOT, running_app
from tests.evaluation_results import result, write_result
from tests.run_folders import write_run

REFUSED = "only for this app"


class Poster:
    """Posts to functions by the element whose event runs them."""

    def __init__(self, url: str, workspace: Workspace, sign_in: dict[str, str] | None = None) -> None:
        self.url = url
        self.workspace = workspace
        self.opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        if sign_in:
            self.opener.open(url + "login", urllib.parse.urlencode(sign_in).encode(), timeout=60).close()
        self.config = json.loads(self.get("config"))
        self.ids = {c["props"].get("elem_id"): c["id"] for c in self.config["components"]}

    def get(self, path: str) -> str:
        with self.opener.open(self.url + path, timeout=60) as answer:
            return str(answer.read().decode())

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
        event = json.loads(joined)["event_id"]  # the stream tells of the session's other events, too
        told = self._stream("gradio_api/queue/data?session_hash=stranger", event)
        return "".join(line for line in told.splitlines(keepends=True) if event in line)

    def call(self, name: str, data: list[object]) -> str:
        """Call a named endpoint as any program can; its events as text."""
        event = json.loads(self._send(f"gradio_api/call/{name}", {"data": data}))["event_id"]
        return self._stream(f"gradio_api/call/{name}/{event}")

    def _send(self, path: str, body: dict[str, Any]) -> str:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with self.opener.open(request, timeout=120) as answer:
            return str(answer.read().decode())

    def _stream(self, path: str, end: str = "") -> str:
        lines = []
        with self.opener.open(self.url + path, timeout=120) as stream:
            for line in stream:
                lines.append(line.decode())
                if end and end in lines[-1] and "process_completed" in lines[-1]:
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
    form = ["first", "ana/m", "", "", False, False, False]
    assert REFUSED in space.answer("publish-preview", form)
    assert REFUSED in space.answer("publish-send", [None, *form])


# Endpoints by the element and event that call them. The owner's refuse a visitor; the others show something, ask before
# acting, or store the visitor's own verdict.
OWNER = set(
    """
    bulk-go.click dataset-go.click dataset-save.click evaluate-confirm-delete.click evaluate-resume.click
    evaluate-stop.click export-adapter.change export-button.click export-compare.click export-confirm-delete.click
    export-name.submit export-resume.click export-stop.click import-button.click import-column-category.input
    import-examples.click import-file.upload import-seed.click import-undo.click measure-card.click measure-estimate.click
    measure-start.click publish-preview.click publish-send.click train-add-own.click train-confirm-delete.click
    train-estimate.click train-import.upload train-model.input train-note.blur train-resume.click train-retry.click
    train-start.click train-stop.click train-upload.upload train-zip.click
    """.split()  # noqa: SIM905
)
VISITOR = set(
    """
    adapter.input agree-here.click answer-both-biased.click answer-both-unusable.click answer-left.click answer-right.click
    answer-skip.click answer-tie.click ask-both.click base-tokens.select begin.click bulk-cancel.click bulk-tag.click
    bulk-withdraw.click change-nickname.click coverage.collapse coverage.expand dataset-cancel.click dataset-charts.expand
    dataset-close.click dataset-edit.click dataset-filter-annotator.change dataset-filter-state.change dataset-next.click
    dataset-previous.click dataset-table.select dataset-train.click dataset-withdraw.click editing.input
    evaluate-delete.click evaluate-jobs.select evaluate-keep.click evaluate-log-box.collapse evaluate-log-box.expand
    examples-gender.click examples-race.click examples-religion.click export-delete.click export-jobs.select
    export-keep.click export-log-box.collapse export-log-box.expand generate.click history.input import-path.submit
    imports.input label-left-text.change label-settings.expand measure-adapters.change measure-by-group.input
    measure-by-strength.input measure-flip-benchmark.input measure-flip-try.click measure-flip-way.input
    measure-flips.select measure-model.input measure-next.click measure-others.input measure-try.click mine.collapse
    mine.expand model.input my-judgments.select next-dataset.click next-label.click next-measure.click next-train.click
    paste-button.click prompt-kind.change prompt.blur publish-box.expand regenerate.click send-to-label.click share.click
    stop.click train-accelerate.change train-cancel.click train-compare.expand train-delete.click train-jobs.select
    train-keep.click train-log-box.collapse train-log-box.expand train-picked.change train-preset.input
    train-probe-earlier.click train-probe-later.click train-to-compare.click train-to-export.click train-to-measure.click
    tuned-tokens.select undo-verdict.click undo.click verdict-both-biased.click verdict-both-unusable.click
    verdict-left.click verdict-right.click verdict-tie.click view.input withdraw.click
    """.split()  # noqa: SIM905
)


def key_of(function: dict[str, Any], elements: dict[int, str]) -> str:
    """ "element.event" of an endpoint, without Gradio's numbers."""
    return min(f"{re.sub(r'-[0-9a-f]{4}$', '', elements.get(target) or 'page')}.{event}" for target, event in function["targets"])


def test_every_endpoint_has_a_role_and_keeps_it(space):
    """Each is called as the page would call it, by a visitor. An endpoint that is not in ENDPOINTS fails here: give it a role."""
    elements = {c["id"]: c["props"].get("elem_id") for c in space.config["components"]}
    values = {c["id"]: c["props"].get("value") for c in space.config["components"]}
    chosen = {"train-selected": "first", "evaluate-selected": "strong", "train-note": "graffiti"}
    values |= {one: chosen[name] for one, name in elements.items() if name in chosen}
    kept = [space.workspace.runs, space.workspace.root / "evaluations", space.workspace.root / "exports"]
    before = {path: path.read_bytes() for folder in kept for path in folder.rglob("*") if path.is_file()}
    found, wrong = set(), []
    for function in space.config["dependencies"]:
        if not function["backend_fn"]:
            continue
        key = key_of(function, elements)
        answer = space.post(function, [values[component] for component in function["inputs"]])
        if key.startswith("page."):  # no element's: what loads, ticks or follows another endpoint
            continue
        found.add(key)
        if (REFUSED in answer) != (key in OWNER):
            wrong.append((key, answer[-300:]))
    after = {path: path.read_bytes() for folder in kept for path in folder.rglob("*") if path.is_file()}
    assert after == before
    assert not wrong
    assert found == OWNER | VISITOR


@pytest.mark.slow
def test_a_space_without_llama_cpp_runs_the_model_with_transformers(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['llama_cpp'] = None\n")  # as if it were not installed
    environment = {"SPACE_ID": "someone/biasdpo", "PYTHONPATH": str(tmp_path)}
    with running_app(tmp_path, "--model", "smollm2", **environment) as url:
        told = Poster(url, Workspace(tmp_path)).call("compare", ["Hello", "smollm2", "none", "", 1.0, 4, 0.0, 1.0, 0, 1.0, 0])
        assert "cut at 4 tokens" in told
    assert "llama.cpp is not installed here, so transformers runs the models." in (tmp_path / "app.log").read_text()
    assert any((tmp_path / "cache" / "hf").glob("SmolLM2*"))  # the transformers copy of the model


@pytest.mark.slow
@pytest.mark.parametrize("role", ["visitor", "annotator"])
def test_no_answer_names_a_folder_of_the_machine(role, tiny_llama_gguf, tmp_path_factory):
    """Every endpoint, page and file that somebody other than the owner gets; jobs, results and models are full of paths."""
    home = tmp_path_factory.mktemp("home")
    workspace = Workspace(home / "work space")
    pairs, benchmarks = home / "secret" / "pairs.jsonl", tmp_path_factory.mktemp("benchmarks")
    (write_run(workspace.root, "first").path / "note.txt").write_text(f"from {pairs}")
    error = f"Can't read {pairs}: restore it; see {workspace.root / 'runs' / 'broken' / 'log.txt'} and /etc/biasdpo/x.toml"
    write_run(workspace.root, "broken", "failed", status={"error": error}, model=str(tiny_llama_gguf), datasets=(str(pairs),))
    model = home / "models" / "tiny.gguf"
    model.parent.mkdir()
    model.symlink_to(tiny_llama_gguf)
    known = {"model": str(model), "adapter": str(home / "adapters" / "mine"), "pairs_source": f"pairs of {pairs}"}
    write_result(workspace.root, "strong", result(8, benchmarks=("crows_pairs",), **known))
    write_result(workspace.root, "damaged", {"benchmarks": str(pairs)})
    journal.append(workspace, journal.new_judgment("Whose judgment is it?", "Anyone's.", "Nobody's."))
    users = Accounts(home / "users.toml")
    users.add("kim", "correct horse", "owner")
    users.add("lee", "correct horse", "annotator")
    who = ("--public",) if role == "visitor" else ("--auth", str(users.file))
    signed_in = None if role == "visitor" else {"username": "lee", "password": "correct horse"}
    flags = ("--model", str(model), "--data-dir", str(benchmarks), *who)
    with running_app(workspace.root, *flags, HOME=str(home)) as url:
        client = Poster(url, workspace, signed_in)
        elements = {c["id"]: c["props"].get("elem_id") for c in client.config["components"]}
        values = {c["id"]: c["props"].get("value") for c in client.config["components"]}
        answers = {path: client.get(path) for path in ("", "config", "healthz", "gradio_api/info")}
        chosen = {"train-selected": "broken", "evaluate-selected": "strong", "measure-others": ["strong"]}
        chosen |= {"model": str(model), "measure-model": str(pairs)}
        values |= {one: chosen[name] for one, name in elements.items() if name in chosen}
        for function in (one for one in client.config["dependencies"] if one["backend_fn"]):
            key = key_of(function, elements)
            given = [values[component] for component in function["inputs"]]
            redraws = key.startswith("page.") and given and given[0] == ""  # when a file of a job changes
            for seen in ("broken", "strong", "damaged") if redraws else ("",):
                told = client.post(function, [f"{seen}\n1", *given[1:]] if seen else given)
                answers[f"{key} {function['id']} {seen}"] = told
        files = set(re.findall(r"/gradio_api/(file=[^\"\\]+)", "".join(answers.values())))
        assert {Path(file).suffix for file in files} >= {".md", ".json", ".csv"}
        answers |= {file: client.get("gradio_api/" + urllib.parse.quote(file, safe="=/")) for file in files}
    folders = [home, workspace.root, tiny_llama_gguf.parent, benchmarks, ROOT, Path("/etc/biasdpo")]
    told = [f"{name}: …{text[max(0, at - 200) : at + 200]}…" for name, text in answers.items()
            for folder in folders if (at := text.replace("\\", "").find(f"{folder}")) >= 0]  # fmt: skip
    assert not told
    assert any("pairs.jsonl: restore it; see runs/broken/log.txt" in text.replace("\\", "") for text in answers.values())
    assert str(home) in (workspace.root / "runs" / "broken" / "status.json").read_text()
