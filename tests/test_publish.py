"""Publishing a run: the preview, what arrives at the Hub and what never does, the way back, and one line for what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from biasdpo import access, models, publish
from biasdpo.config import PublishConfig
from biasdpo.data.journal import append, new_judgment, withdraw
from biasdpo.data.splits import WORKSPACE
from biasdpo.errors import BiasDPOError, RefusedError
from biasdpo.jobs.job import JobFolder
from biasdpo.workspace import Workspace, read_json, sha256_of, write_json
from tests import commands
from tests.evaluation_results import result, write_result
from tests.hub import Hub, running_hub
from tests.run_line import CommandLine

NAMES = ("Wilhelmina-Q", "Bartholomew-X")
MODEL_FILES = {"README.md", "adapter_model.safetensors", "adapter_config.json", "provenance.json", "curves.png"}
DATASET_FILES = {"README.md", "pairs.jsonl"}
TO = ("--to", "ana/less-biased", "--dataset-to", "ana/verdicts")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_bytes: Path, pairs_file: Path) -> Path:
    """A workspace with the run "first", trained on twelve judgments of two annotators and on a file."""
    workspace = Workspace(tmp_path_factory.mktemp("trained") / "workspace")
    for i in range(12):
        texts = (f"Who is p{i} at q{i}?", f"Anyone {i}.", f"Only they {i}!")
        edited = {"original_rejected": "They!"} if i == 3 else {}
        append(workspace, new_judgment(*texts, annotator=NAMES[i % 2], note="a private note", source="label", **edited))
    line = CommandLine(workspace, tiny_bytes, pairs_file)
    line.train_here("first", learning_rate=0.01, held_out_share=0.3, datasets=(WORKSPACE, str(pairs_file)))
    return workspace.root


@pytest.fixture
def workspace(trained: Path, tmp_path: Path) -> Workspace:
    """A copy of it, to be changed."""
    return Workspace(Path(shutil.copytree(trained, tmp_path / "workspace")))


@pytest.fixture
def folder(workspace: Workspace) -> JobFolder:
    return JobFolder(workspace.run_folder("first"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub(tmp_path / "hub") as hub:
        hub.use(monkeypatch)
        yield hub


def run(workspace: Workspace, *arguments: object) -> commands.Done:
    return commands.run("publish", "first", "--workspace", workspace.root, *arguments)


def plan(workspace: Workspace, **settings: Any) -> publish.Plan:
    return publish.plan("first", PublishConfig(**{"to": "ana/m", "dataset_to": "ana/d"} | settings), workspace)


def contents(planned: publish.Plan) -> Iterator[tuple[str, bytes]]:
    for one in planned.repositories:
        for name, content in one.files.items():
            yield f"{one.type}/{name}", content.read_bytes() if isinstance(content, Path) else content


def evaluate(workspace: Workspace, name: str = "full", *, n: int = 8, limit: int | None = None, sha256: str = "") -> None:
    sha256 = sha256 or sha256_of(workspace.run_folder("first") / "adapter" / "adapter_model.safetensors")
    made = result(n, benchmarks=("crows_pairs",), adapter="first", adapter_sha256=sha256, limit=limit)
    write_result(workspace.root, name, made)


# Before anything is sent


def test_the_preview_names_files_cards_license_people_and_gaps(workspace):
    done = run(workspace, *TO, "--dry-run", "--json")  # offline: it asks nobody
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    data, model = shown["repositories"]
    assert (data["type"], data["id"], model["type"], model["id"]) == ("dataset", "ana/verdicts", "model", "ana/less-biased")
    assert {file["name"] for file in data["files"]} == DATASET_FILES
    assert {file["name"] for file in model["files"]} == MODEL_FILES
    weights = next(file for file in model["files"] if file["name"] == "adapter_model.safetensors")
    file = workspace.run_folder("first") / "adapter" / "adapter_model.safetensors"
    assert (weights["bytes"], weights["sha256"]) == (file.stat().st_size, sha256_of(file))
    assert (shown["public"], shown["license"]) == (False, "other")
    assert shown["personal"][0] == "2 annotators as numbers, without nicknames; days without times"
    assert "12 pairs with their prompts (1 edited by hand)" in shown["personal"][1]
    gaps = "\n".join(shown["missing"])
    for words in ("An evaluation on benchmarks", "base model's name", "license", "40 of the run's 52 pairs: they are of pairs"):
        assert words in gaps
    assert "Not evaluated on benchmarks." in model["card"]
    assert "## Limitations" in model["card"]
    assert "Annotators: 2, under pseudonyms." in data["card"]
    text = run(workspace, *TO, "--dry-run").stdout
    assert "Model ana/less-biased: 5 files" in text
    assert "private" in text
    assert f"ana/less-biased/adapter_model.safetensors: {file.stat().st_size:,} bytes" in text
    assert "--- ana/verdicts/README.md ---" in text


def test_no_path_no_name_and_nothing_else_of_the_workspace_is_sent(workspace, folder):
    write_json(folder.adapter / "adapter_config.json", read_json(folder.adapter / "adapter_config.json")
               | {"base_model_name_or_path": str(workspace.root / "base")})  # fmt: skip
    provenance = read_json(folder.adapter / "provenance.json")
    provenance["confounds"]["annotators"] = [{"annotator": NAMES[0]}]  # as version 0.1 wrote it
    write_json(folder.adapter / "provenance.json", provenance)
    (folder.adapter / "optimizer.pt").write_bytes(b"state")
    evaluate(workspace)
    planned = plan(workspace)
    assert [set(one.files) for one in planned.repositories] == [DATASET_FILES, MODEL_FILES]
    private = [str(workspace.root), str(Path.home()), str(Path(__file__).parents[1]), os.sep + "tmp", "a private note", *NAMES]
    for name, content in contents(planned):
        for words in private:
            assert words.encode() not in content, f"{words} in {name}"


def test_names_and_times_only_if_chosen_and_no_withdrawn_judgment(workspace):
    rows = [json.loads(line) for line in dict(contents(plan(workspace)))["dataset/pairs.jsonl"].splitlines()]
    assert [row["annotator"] for row in rows[:3]] == ["annotator 1", "annotator 2", "annotator 1"]
    assert {len(row["created_at"]) for row in rows} == {len("2026-11-30")}
    withdraw(workspace, [rows[0]["id"]])
    planned = plan(workspace, with_annotators=True)
    named = [json.loads(line) for line in dict(contents(planned))["dataset/pairs.jsonl"].splitlines()]
    assert [row["id"] for row in named] == [row["id"] for row in rows[1:]]
    assert {row["annotator"] for row in named} == set(NAMES)
    assert "T" in named[0]["created_at"]
    assert f"({', '.join(NAMES)})" in planned.personal[0]


def test_a_text_that_tells_of_a_folder_here_is_refused(workspace, folder):
    card = folder.adapter / "README.md"
    card.write_text(card.read_text() + f"\nSee https://example.org{workspace.root}.\n")  # no folder of this machine
    (folder.adapter / "curves.png").write_bytes(b"")
    assert run(workspace, "--to", "ana/m", "--dry-run").returncode == 0
    card.write_text(card.read_text() + f"\nTrained in {workspace.root}.\n")
    assert "README.md would tell of" in run(workspace, "--to", "ana/m", "--dry-run").error


def test_the_card_has_the_newest_full_evaluation_of_these_weights(workspace):
    from huggingface_hub import ModelCard

    evaluate(workspace, "of-others", sha256="0" * 64)
    evaluate(workspace, "full")
    evaluate(workspace, "a-trial", n=4, limit=4)
    planned = plan(workspace, gguf="")
    card = ModelCard(planned.repositories[-1].card)
    found = {(one.dataset_type, one.metric_type): one.metric_value for one in card.data.eval_results}
    made = result(8, benchmarks=("crows_pairs",))["benchmarks"]["crows_pairs"]["tuned"]
    assert found["crows_pairs", "stereotype_percent"] == round(made["stereotype_percent"]["value"], 4)
    assert (card.data.library_name, card.data.datasets, card.data.model_name) == ("peft", ["ana/d"], "first")
    assert "| crows_pairs |" in card.text
    assert "Not evaluated" not in card.text
    assert 'PeftModel.from_pretrained(base, "ana/m")' in card.text
    assert not any("evaluation" in text for text in planned.missing)
    (workspace.root / "evaluations" / "full.json").unlink()
    assert any("at most 4 items" in text for text in plan(workspace).missing)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("publish", "nope", "--to", "ana/m"), "No run 'nope'"),
        (("publish", "first", "--to", "m"), "to must be OWNER/NAME"),
        (("publish", "first", "--to", "ana/a b"), "to can't be the name of a repository"),
        (("publish", "first", "--to", "ana/m", "--dataset-to", "x"), "dataset_to must be OWNER/NAME"),
        (("publish", "first", "--to", "ana/m", "--gguf", "nope"), "No export 'nope'"),
    ],
)
def test_bad_input_is_one_line(arguments, words, workspace):
    assert words in commands.run(*arguments, "--workspace", workspace.root).error


def test_what_can_not_be_published_says_why(workspace, folder, monkeypatch):
    weights = folder.adapter / "adapter_model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert "was changed after the run ended" in run(workspace, "--to", "ana/m").error
    weights.write_bytes(before)
    workspace.preferences.unlink()
    assert "was not trained on any judgment in this workspace" in run(workspace, *TO).error
    folder.write_status(folder.read_status().__class__("stopped"))
    assert "Run 'first' is stopped: only a finished run" in run(workspace, "--to", "ana/m").error
    monkeypatch.setattr(access, "_source", lambda: access.Caller(access.Role.visitor))
    for call in (lambda: plan(workspace), lambda: publish.publish(None, workspace)):  # type: ignore[arg-type]
        with pytest.raises(RefusedError, match="Publishing is only for"):
            call()


# At the Hub


def test_one_private_commit_then_nothing_changed_then_an_update(workspace, hub):
    done = run(workspace, *TO, "--json")
    assert done.returncode == 0, done.stderr
    data, model = json.loads(done.stdout)
    assert model["url"] == f"{hub.endpoint}/ana/less-biased"
    assert data["url"] == f"{hub.endpoint}/datasets/ana/verdicts"
    for kind, name, files in (("model", "ana/less-biased", MODEL_FILES), ("dataset", "ana/verdicts", DATASET_FILES)):
        repository = hub.repository(kind, name)
        assert repository.private
        assert set(repository.files) == files | {".gitattributes"}
        assert len(repository.commits) == 2  # its making, and one
    for name, content in contents(plan(workspace, to="ana/less-biased", dataset_to="ana/verdicts")):
        kind, _, path = name.partition("/")
        assert hub.read(kind, "ana/verdicts" if kind == "dataset" else "ana/less-biased", path) == content
    audited = [json.loads(line) for line in (workspace.root / "audit.jsonl").read_text().splitlines()]
    logged = [row["repository"] for row in audited if row["action"] == "publish"]
    assert logged == ["dataset/ana/verdicts", "model/ana/less-biased"]

    assert run(workspace, *TO).stdout.count("nothing changed") == 2
    assert len(hub.repository("model", "ana/less-biased").commits) == 2

    evaluate(workspace)
    refused = run(workspace, *TO).error
    assert "ana/less-biased has other content (README.md, adapter_config.json, " in refused
    assert "(--update) to write README.md there" in refused
    assert run(workspace, *TO, "--update").returncode == 0
    assert len(hub.repository("model", "ana/less-biased").commits) == 3
    assert len(hub.repository("dataset", "ana/verdicts").commits) == 2
    assert b"crows_pairs" in hub.read("model", "ana/less-biased", "README.md")


@pytest.mark.usefixtures("hub")
def test_a_published_adapter_comes_back_and_completes_the_same(workspace, tiny_bytes, tmp_path):
    from huggingface_hub import snapshot_download

    assert run(workspace, "--to", "lab/less-biased").returncode == 0
    back = snapshot_download("lab/less-biased", local_dir=tmp_path / "back")

    def completions(adapter: str) -> Any:
        asked = ("--model", tiny_bytes, "--adapter", adapter, "--prompt", "Is a1 more b1 than c1?", "--json", "--temperature", 0)
        done = commands.run("compare", *asked, "--max-new-tokens", 12, "--workspace", workspace.root)
        assert done.returncode == 0, done.stderr
        row = json.loads(done.stdout)
        return row["base"]["text"], row["tuned"]["text"]

    base, tuned = completions("first")
    assert completions(back) == (base, tuned)
    assert base != tuned
    spec = models.find(str(tiny_bytes))
    found = models.find_adapter(back, spec, workspace)
    assert found is not None
    assert not models.misfit(found, spec)


def test_an_export_goes_along_with_its_record(workspace, hub, tiny_bytes):
    arguments = ("--format", "merged", "--quantization", "F32", "--proof", "none", "--workspace", workspace.root)
    out = workspace.root / "exports" / "first-F32.gguf"
    done = commands.run("export", "--run", "first", *arguments, "--out", out)
    assert done.returncode == 0, done.stderr
    other = workspace.root / "exports" / "base.gguf"
    assert commands.run("export", "--adapter", "none", "--model", tiny_bytes, *arguments, "--out", other).returncode == 0
    assert "holds none, not the adapter of run 'first'" in run(workspace, "--to", "ana/m", "--gguf", "base").error
    assert run(workspace, "--to", "ana/m", "--gguf", "first-F32").returncode == 0
    names = {f"first-F32.gguf{suffix}" for suffix in ("", ".json", ".Modelfile")}
    assert set(hub.repository("model", "ana/m").files) == MODEL_FILES | names | {".gitattributes"}
    assert hub.read("model", "ana/m", "first-F32.gguf") == out.read_bytes()
    assert json.loads(hub.read("model", "ana/m", "first-F32.gguf.json"))["out"] == "first-F32.gguf"
    for name in MODEL_FILES | names:
        assert str(workspace.root).encode() not in hub.read("model", "ana/m", name)
    assert sha256_of(out).encode() in hub.read("model", "ana/m", "README.md")
    with out.open("ab") as file:
        file.write(b"more")
    assert "was changed after it was exported" in run(workspace, "--to", "ana/m", "--gguf", "first-F32").error


def test_what_the_hub_refuses_before_anything_is_sent(workspace, hub, monkeypatch):
    def refusal(*arguments: str) -> str:
        before = dict(hub.repositories)
        text = run(workspace, *(arguments or TO)).error
        assert hub.repositories == before
        return text

    assert "ben/m is somebody else's: the token may write for ana, lab" in refusal("--to", "ben/m")
    hub.role = "read"
    assert "The Hub token can only read" in refusal()
    hub.role = "write"
    hub.create("model", "ana/less-biased", private=False)
    assert "ana/less-biased is public already" in refusal()
    hub.create("model", "ana/less-biased", private=True)
    assert "ana/less-biased is private already" in refusal(*TO, "--public")
    hub.write("model", "ana/less-biased", "weights.bin", b"theirs")
    assert "ana/less-biased has other content (weights.bin)" in refusal()
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    assert "Nothing is published: the Hub does not accept the token" in refusal()
    monkeypatch.setenv("HF_TOKEN", "")
    assert "Publishing needs a Hub token that may write there, and there is none" in refusal()


def test_a_broken_connection_is_one_line_and_publishing_again_ends_it(workspace, hub, monkeypatch):
    hub.fault("refuse", "POST", "/api/repos/create", status=403)
    assert "ana/verdicts is not published: the token may not do this: make one" in run(workspace, *TO).error
    hub.fault("refuse", "POST", "/api/validate-yaml", status=400)
    assert "the Hub's client refuses it: Invalid metadata in README.md" in run(workspace, *TO).error
    hub.fault("drop", "POST", "/ana/less-biased/commit/", times=20)
    text = run(workspace, *TO).error
    assert "ana/less-biased is not published (ana/verdicts is): the Hub can't be reached" in text
    assert "publish again" in text
    assert set(hub.repository("model", "ana/less-biased").files) == {".gitattributes"}
    hub.faults.clear()
    hub.fault("cut", "POST", "/ana/less-biased/commit/", times=20)  # it arrives, its answer does not
    assert "publish again" in run(workspace, *TO).error
    audited = [json.loads(line).get("repository") for line in (workspace.root / "audit.jsonl").read_text().splitlines()]
    assert "model/ana/less-biased" in audited  # though nobody knows that it is there
    hub.faults.clear()
    again = run(workspace, *TO)
    assert again.stdout.count("nothing changed") == 2, again
    assert set(hub.repository("model", "ana/less-biased").files) == MODEL_FILES | {".gitattributes"}

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", closed)
    assert "Nothing is published: the Hub can't be reached" in run(workspace, *TO).error
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in run(workspace, *TO).error


def test_a_write_by_somebody_else_in_between_is_not_overwritten(workspace, hub):
    planned = plan(workspace, dataset_to="")
    publish.publish(planned, workspace)
    evaluate(workspace)
    changed = plan(workspace, dataset_to="", update=True)

    def meanwhile(what: str) -> None:
        if what.startswith("sending"):
            hub.write("model", "ana/m", "README.md", b"by hand")

    with pytest.raises(BiasDPOError, match="somebody else wrote there meanwhile"):
        publish.publish(changed, workspace, meanwhile)
    assert hub.read("model", "ana/m", "README.md") == b"by hand"
