"""Publishes a finished run on the Hugging Face Hub: its adapter with the model card, an exported GGUF, the judgments behind it.

`plan` builds, without the network, the very files that `publish` sends: one commit for each repository.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from biasdpo import models
from biasdpo.access import audit, require_owner
from biasdpo.config import PublishConfig
from biasdpo.data.exporting import public_pairs
from biasdpo.data.splits import WORKSPACE, public_name, read_snapshot
from biasdpo.errors import BiasDPOError, PublishError, plural
from biasdpo.evaluation import report
from biasdpo.gguf.export import ExportRecord, modelfile, read_record
from biasdpo.gguf.proof import ExportProof
from biasdpo.hub import TOKENS, client, explained, require_token
from biasdpo.jobs import store
from biasdpo.jobs.job import ROOT, Job
from biasdpo.jobs.resolve import command_of
from biasdpo.model_card import CARD, CURVES
from biasdpo.workspace import Workspace, as_json, read_json, sha256_of

_WEIGHTS, _CONFIG, _PROVENANCE, _PAIRS = "adapter_model.safetensors", "adapter_config.json", "provenance.json", "pairs.jsonl"
_SHOWN_FILES = 6
_LARGE_BYTES = 10_000_000
_AGAIN = ". Then publish again: what is there already is not sent twice"


@dataclass(frozen=True)
class Repository:
    """What one repository gets. `type`: model or dataset; `files`: by their names there, content or where it lies."""

    id: str
    type: str
    files: Mapping[str, bytes | Path]

    @property
    def card(self) -> str:
        text = self.files[CARD]
        assert isinstance(text, bytes)
        return text.decode("utf-8")

    @cached_property
    def listing(self) -> list[tuple[str, int, str]]:
        """Name, size in bytes and SHA-256 of each file."""
        return [
            (name, content.stat().st_size, sha256_of(content))
            if isinstance(content, Path)
            else (name, len(content), hashlib.sha256(content).hexdigest())
            for name, content in self.files.items()
        ]

    def to_json(self) -> dict[str, Any]:
        files = [{"name": name, "bytes": size, "sha256": sha256} for name, size, sha256 in self.listing]
        return {"id": self.id, "type": self.type, "files": files, "card": self.card}


@dataclass(frozen=True)
class Plan:
    """A publication before it is sent. `personal`: what the dataset says about people; `missing`: what a reader will look for."""

    run: str
    config: PublishConfig
    license: str
    repositories: tuple[Repository, ...]
    personal: tuple[str, ...]
    missing: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The object of `publish --dry-run --json`."""
        return {
            "run": self.run,
            "public": self.config.public,
            "license": self.license,
            "repositories": [one.to_json() for one in self.repositories],
            "personal": list(self.personal),
            "missing": list(self.missing),
        }

    def summary(self) -> Iterator[str]:
        """What would be sent, line by line, without the cards and the files."""
        who = "everybody may see it" if self.config.public else "private"
        for one in self.repositories:
            total = sum(size for _name, size, _sha256 in one.listing)
            yield f"{one.type.capitalize()} {one.id}: {len(one.files)} files, {total:,} bytes; {who}"
        yield f"License: {self.license or 'not stated'}"
        yield from (f"Personal data: {text}" for text in self.personal)
        yield from (f"Missing: {text}" for text in self.missing)

    @property
    def digest(self) -> str:
        """The same for two plans that would send the same."""
        return hashlib.sha256(json.dumps(self.to_json()).encode()).hexdigest()


def plan(run: str, config: PublishConfig, workspace: Workspace) -> Plan:
    """Build what would be sent. Raises RefusedError for a visitor, JobError or PublishError for what can't be published,
    DatasetError where there are no judgments to publish."""
    require_owner("Publishing")
    job = store.find_job(run, workspace, "train")
    if job.state != "finished" or not job.has_adapter:
        raise PublishError(f"Run {job.id!r} is {job.state}: only a finished run with an adapter can be published")
    folder, missing = job.folder.adapter, list[str]()
    provenance, adapter_config = (read_json(folder / name) for name in (_PROVENANCE, _CONFIG))
    weights_sha256 = sha256_of(models.from_run(workspace, job.id).weights)
    if provenance.get("adapter_sha256", weights_sha256) != weights_sha256:
        raise PublishError(f"{folder / _WEIGHTS} was changed after the run ended: restore it from a backup, or train again")
    if isinstance(provenance.get("confounds"), dict):
        provenance["confounds"]["annotators"] = []  # early versions named them
    gguf = _export_of(job, weights_sha256, config.gguf, workspace) if config.gguf else None
    card, license_name = _model_card(job, weights_sha256, config, workspace, gguf, missing)
    files: dict[str, bytes | Path] = {CARD: card.encode(), _WEIGHTS: folder / _WEIGHTS}
    files |= {name: _json(value) for name, value in ((_CONFIG, adapter_config), (_PROVENANCE, provenance))}
    if (folder / CURVES).is_file():
        files[CURVES] = folder / CURVES
    if gguf is not None:
        files[gguf.out.name] = gguf.out
        files[f"{gguf.out.name}.json"] = _json(gguf.to_json())
        files[f"{gguf.out.name}.Modelfile"] = modelfile(replace(gguf, base_gguf=public_name(gguf.base_gguf))).encode()
    repositories, personal = [Repository(config.to, "model", files)], ["None: no dataset is published"]
    if config.dataset_to:
        personal.clear()
        repositories.insert(0, _dataset(job, config, workspace, personal, missing))  # first, since the model's card links it
    elif WORKSPACE in job.config.datasets:
        missing.append("The judgments that it was trained on: name a dataset repository to publish them, too")
    for repository in repositories:
        _check_paths(repository, job, workspace)
    return Plan(job.id, config, license_name, tuple(repositories), tuple(personal), tuple(missing))


# The model's card


def _model_card(
    job: Job, sha256: str, config: PublishConfig, workspace: Workspace, gguf: ExportRecord | None, missing: list[str]
) -> tuple[str, str]:
    """The run's card with the repository's name, the newest evaluation and the GGUF; the license in it."""
    import yaml  # type: ignore[import-untyped]
    from huggingface_hub import ModelCard

    path = job.folder.adapter / CARD
    if not path.is_file():
        raise PublishError(f"Run {job.id!r} has no model card ({path} is missing): restore it from a backup, or train again")
    evaluation, result = _evaluation(sha256, workspace) or (None, None)
    command = () if evaluation is None or evaluation.config is None else command_of(evaluation.config)
    text = report.with_evaluation(path.read_text(encoding="utf-8"), result, command)
    text = text.replace("PATH/OF/THIS/FOLDER", config.to)
    if gguf is not None:
        proof = ExportProof.from_json(gguf.proof).sentence() if gguf.proof else "Not verified"
        kind = f"the model with this adapter, {gguf.quantization}" if gguf.format == "merged" else "this adapter for llama.cpp"
        text += f"\n## GGUF\n\n`{gguf.out.name}`: {kind}. {proof}. SHA-256: `{gguf.sha256}`\n"
        if gguf.proof.get("passed") is not True:
            missing.append(f"A verification of {gguf.out.name} (the card says so)")
    try:
        card = ModelCard(text)
    except (ValueError, TypeError, yaml.YAMLError) as exc:
        raise PublishError(f"The front matter of {path} can't be read ({' '.join(str(exc).split())[:200]}): correct it") from exc
    data: Any = card.data
    data.library_name = "peft"
    data.datasets = list(dict.fromkeys([*(data.datasets or ()), *filter(None, [config.dataset_to])])) or None
    if result is None:
        missing.append("An evaluation on benchmarks (the card says so): evaluate the run first")
    else:
        data.model_name = data.model_name or job.id
        data.eval_results = [*(data.eval_results or ()), *report.hub_metrics(result)]
        if limit := result["provenance"].get("limit"):
            missing.append(f"A full evaluation: the one on the card has at most {limit:,} items per benchmark")
    if not data.base_model:
        missing.append("The base model's name on the Hub: without that model nobody can use the adapter")
    if data.license in (None, "other"):
        missing.append("The base model's license: the card says “other”")
    return str(card), data.license or ""


def _evaluation(adapter_sha256: str, workspace: Workspace) -> tuple[Job, dict[str, Any]] | None:
    """The newest evaluation of these weights on all items, else the newest on some."""
    found = []
    for job in store.list_jobs(workspace, "evaluate"):
        if job.state == "finished" and job.has_result:
            with suppress(BiasDPOError):
                result = store.load_result(job)
                if result["provenance"].get("adapter_sha256") == adapter_sha256 and not result["provenance"].get("interrupted"):
                    found.append((job, result))
    return min(found, key=lambda one: bool(one[1]["provenance"].get("limit")), default=None)


def _export_of(job: Job, adapter_sha256: str, export: str, workspace: Workspace) -> ExportRecord:
    """The record of a finished export of these weights."""
    made = store.find_job(export, workspace, "export")
    if made.state != "finished":
        raise PublishError(f"Export {made.id!r} is {made.state}: wait for it, or choose a finished one")
    record = read_record(made.file)
    if record.parents.get(f"adapter/{_WEIGHTS}") != adapter_sha256:
        raise PublishError(f"Export {made.id!r} holds {record.adapter}, not the adapter of run {job.id!r}: export that run")
    if sha256_of(made.file) != record.sha256:
        raise PublishError(f"{made.file} was changed after it was exported: export it again")
    return record


# The dataset


def _dataset(job: Job, config: PublishConfig, workspace: Workspace, personal: list[str], missing: list[str]) -> Repository:
    """The judgments that the run was trained on. Files and Hub datasets have licenses of their own and are left out."""
    trained = read_snapshot(job.folder.path).pairs
    found = public_pairs(workspace, trained, _PAIRS, with_annotators=config.with_annotators)
    files = ", ".join(public_name(name) for name in job.config.datasets if name != WORKSPACE)
    if not found.rows:
        raise PublishError(
            f"Run {job.id!r} was not trained on any judgment in this workspace ({files or 'all were withdrawn'}): leave "
            "the dataset repository out; a file that you may publish can be imported (`dataset import`)"
        )
    if len(found.rows) < len(trained):
        why = f"they are of {files}, or" if files else "they"
        missing.append(
            f"{len(trained) - len(found.rows):,} of the run's {plural(len(trained), 'pair')}: {why} were withdrawn since"
        )
    if imported := sorted({row.source for row in found.rows if row.source.startswith("import:")}):
        missing.append(f"Your own check that the license of {', '.join(imported)} lets you publish its rows")
    count = plural(len(found.annotators), "annotator")
    personal += [
        f"The nicknames of {count} ({', '.join(found.annotators)}), and when they judged what"
        if config.with_annotators
        else f"{count} as numbers, without nicknames; days without times",
        f"{plural(len(found.rows), 'pair')} with their prompts ({found.edited:,} edited by hand): read them for private facts",
    ]
    return Repository(config.dataset_to, "dataset", {CARD: found.card.encode(), _PAIRS: found.content})


# No folder of this machine


def _without_folders(value: Any) -> Any:
    """A JSON value in which every absolute path is cut to its last part."""
    if isinstance(value, dict):
        return {key: _without_folders(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(one) for one in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~/")) else value


def _json(value: Any) -> bytes:
    return as_json(_without_folders(value)).encode("utf-8")


def _check_paths(repository: Repository, job: Job, workspace: Workspace) -> None:
    """Raise PublishError where a file holds a folder of this machine, in whatever place."""
    own = [workspace.root.absolute(), workspace.root.resolve(), Path.home(), Path.cwd(), ROOT]
    own += [path.expanduser() for path in map(Path, (job.config.model, *job.config.datasets))]
    found = {str(path) if len(path.parts) > 2 else f"{path}/" for path in own if path.is_absolute() and len(path.parts) > 1}
    for name, content in repository.files.items():
        for path in found:
            if _contains(content, path.encode()):
                raise PublishError(f"{name} would tell of {path}, a folder of this machine: correct the text, then publish again")


def _contains(content: bytes | Path, folder: bytes) -> bool:
    if isinstance(content, bytes):
        return re.search(rb"(?<![\w.-])" + re.escape(folder), content) is not None  # not as a part of a URL or another path
    if not content.stat().st_size:  # can't be mapped
        return False
    with content.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return mapped.find(folder) >= 0


# The Hub


@dataclass(frozen=True)
class Published:
    """A repository after publishing. `commit`: "" if nothing had changed."""

    id: str
    type: str
    url: str
    commit: str

    def __str__(self) -> str:
        return f"{self.url}: {f'commit {self.commit[:12]}' if self.commit else 'nothing changed'}"


def publish(plan: Plan, workspace: Workspace, on_progress: Callable[[str], object] = lambda _what: None) -> list[Published]:
    """Send a plan: one commit for each repository, none where nothing changed. All is checked before anything is sent.

    Raises RefusedError for a visitor, PublishError for whatever the Hub has against it.
    """
    from huggingface_hub import CommitOperationAdd

    require_owner("Publishing")
    require_token("Publishing")
    api, done = client(), list[Published]()
    on_progress("asking the Hub")
    with explained("Nothing is published", PublishError, _AGAIN):
        _check_token(api, plan)
        known = [_look(api, one, plan.config) for one in plan.repositories]
    for one, (parent, changed) in zip(plan.repositories, known, strict=True):
        url = f"{api.endpoint}/{'datasets/' if one.type == 'dataset' else ''}{one.id}"
        commit = ""
        if changed:
            on_progress(f"sending {one.id}")
            # Before it: a commit whose answer is lost may have arrived.
            audit(workspace.root, "publish", repository=f"{one.type}/{one.id}", run=plan.run)
            before = "".join(f" ({each.id} is)" for each in done)
            with explained(f"{one.id} is not published{before}", PublishError, _AGAIN):
                if parent is None:
                    api.create_repo(one.id, repo_type=one.type, private=not plan.config.public)
                commit = api.create_commit(
                    one.id,
                    [CommitOperationAdd(name, one.files[name]) for name in changed],
                    commit_message=f"Publish run {plan.run} with BiasDPO",
                    repo_type=one.type,
                    parent_commit=parent,
                ).oid
        done.append(Published(one.id, one.type, url, commit))
    return done


def _check_token(api: Any, plan: Plan) -> None:
    me = api.whoami()
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PublishError(f"The Hub token can only read: make one that may write at {TOKENS}")
    mine = [me["name"], *(org["name"] for org in me.get("orgs", ()))]
    for one in plan.repositories:
        if one.id.partition("/")[0] not in mine:
            raise PublishError(
                f"{one.id} is somebody else's: the token may write for {', '.join(mine)}; choose OWNER among these"
            )


def _look(api: Any, one: Repository, config: PublishConfig) -> tuple[str | None, list[str]]:
    """The commit that a repository is at (None: there is none yet), and the names of the files that differ there."""
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils.sha import git_hash

    try:
        info = api.repo_info(one.id, repo_type=one.type)
    except RepositoryNotFoundError:
        return None, list(one.files)
    if info.private == config.public:
        now = "private" if info.private else "public"
        raise PublishError(f"{one.id} is {now} already: publish it as {now} (“Public”, --public), or change that in its settings")
    tree = api.list_repo_tree(one.id, recursive=True, revision=info.sha, repo_type=one.type)
    there = {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in tree if hasattr(file, "blob_id")}
    there.pop(".gitattributes", None)

    changed = []
    for name, size, sha256 in one.listing:
        content = one.files[name]
        hashes = [sha256]  # in LFS, which large files always are; else Git's
        if size < _LARGE_BYTES:
            hashes.append(git_hash(content if isinstance(content, bytes) else content.read_bytes()))
        if there.get(name) not in hashes:
            changed.append(name)
    if changed and there and not config.update:
        shown = ", ".join(sorted(there)[:_SHOWN_FILES]) + ", …" * (len(there) > _SHOWN_FILES)
        raise PublishError(
            f"{one.id} has other content ({shown}): choose “{config.settings()['update'].label}” (--update) to write "
            f"{', '.join(changed)} there, or choose another name"
        )
    return info.sha, changed
