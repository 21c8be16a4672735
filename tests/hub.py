"""A stand-in for the Hub's HTTP interface on loopback, for the real `huggingface_hub` client.

    with running_hub(tmp_path / "hub") as hub:
        hub.use(monkeypatch)                           # this process
        subprocess.run(..., env=os.environ | hub.environment())  # another process
        hub.fault("cut", "POST", "/commit/")           # the next commit is made, but its answer never arrives
        assert hub.repository("dataset", "ana/labels").private
        hub.read("dataset", "ana/labels", "README.md")

It covers repositories (model, dataset, space: commits, branches, LFS) and buckets. Files of buckets travel over Xet, which writes
to a folder (`local://`). Jobs only go through the stages that a test plans. Other endpoints answer 404; add one with `@route`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_of_ana"
CREATED = "2026-01-01T00:00:00.000Z"
LFS_BYTES = 1_000_000  # a file of this size or more is uploaded as LFS
_LFS_SUFFIXES = (".safetensors", ".gguf", ".bin", ".parquet", ".png", ".zip")


@dataclass(frozen=True)
class Stored:
    """A file's content, on disk by its SHA-256; in a bucket it has a Xet hash, too."""

    size: int
    sha256: str = ""
    git_oid: str = ""
    lfs: bool = False
    xet_hash: str = ""


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    files: dict[str, Stored]


@dataclass
class Repository:
    """A repository or a bucket. `branches`: the commits of each, oldest first; a bucket has one commit, changed in place."""

    kind: str  # model, dataset, space, bucket
    id: str
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, Stored]:
        return self.branches["main"][-1].files

    @property
    def commits(self) -> list[Commit]:
        return self.branches["main"]

    def at(self, revision: str) -> Commit:
        if revision in self.branches:
            return self.branches[revision][-1]
        for commits in self.branches.values():
            for commit in commits:
                if commit.oid == revision:
                    return commit
        raise RefusedError(404, f"No revision {revision}", "RevisionNotFound")


@dataclass
class Fault:
    """What happens to the next `times` requests whose method and path match.

    refuse  answered with `status`, nothing done
    drop    the connection is closed, nothing done
    cut     done, then the connection is closed without an answer
    twice   done twice, as by a proxy that repeats a request; answered once
    slow    done and answered after `seconds`
    """

    what: str
    method: str
    path: str
    times: int
    status: int
    seconds: float


@dataclass
class Job:
    """A job of Hugging Face Jobs, which runs nothing: each look at it takes the next of `plan`, (stage, lines of its log)."""

    id: str
    namespace: str
    spec: dict[str, Any]
    plan: list[tuple[str, list[str]]]
    stage: str = "SCHEDULING"
    log: list[str] = field(default_factory=list)


class RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: Any
    body: bytes
    user: str | None

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


Route = Callable[..., Any]
_ROUTES: list[tuple[str, re.Pattern[str], Route]] = []


def route(method: str, pattern: str) -> Callable[[Route], Route]:
    """Register `function(hub, request, **groups)`; it returns an Answer or something to send as JSON, or raises RefusedError."""

    def register(function: Route) -> Route:
        _ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class Hub:
    """The state of the stand-in, and what tests ask of it. `users`: names by token. `log`: (method, path) of each request."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs, self.xet = root / "blobs", root / "xet"
        for folder in (self.blobs, self.xet):
            folder.mkdir(parents=True)
        self.users = {TOKEN: "ana"}
        self.organizations = {"ana": ["lab"]}
        self.role = "write"  # of the tokens
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.jobs: dict[str, Job] = {}
        self.plan: list[tuple[str, list[str]]] = [("RUNNING", ["step 1"]), ("RUNNING", ["step 2"]), ("COMPLETED", ["pushed"])]
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self.endpoint = ""
        self.received: dict[str, Stored] = {}  # by Xet hash
        self._commits = self._transfers = 0

    def fault(self, what: str, method: str, path: str, *, times: int = 1, status: int = 503, seconds: float = 0.0) -> None:
        """Arm a fault (see `Fault`) for requests whose path (with query) contains `path`."""
        assert what in ("refuse", "drop", "cut", "twice", "slow"), what
        with self.lock:
            self.faults.append(Fault(what, method, path, times, status, seconds))

    def fault_of(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and fault.path in path:
                    fault.times -= 1
                    return fault
        return None

    def repository(self, kind: str, repo_id: str) -> Repository:
        if (kind, repo_id) not in self.repositories:
            raise RefusedError(404, f"No {kind} {repo_id}", "RepoNotFound")
        return self.repositories[kind, repo_id]

    def visible(self, kind: str, repo_id: str, user: str | None, *, write: bool = False) -> Repository:
        """The repository, if this user may see it (write: change it)."""
        repository = self.repository(kind, repo_id)
        owner = repo_id.split("/")[0]
        owns = user is not None and owner in (user, *self.organizations.get(user, ()))
        if repository.private and not owns:
            raise RefusedError(404, f"No {kind} {repo_id}", "RepoNotFound")
        if write and not owns:
            raise RefusedError(403 if user else 401, "You don't have the rights to write here")
        return repository

    def create(self, kind: str, repo_id: str, *, private: bool, settings: dict[str, Any] | None = None) -> Repository:
        repository = Repository(kind, repo_id, private, settings=settings or {})
        self.repositories[kind, repo_id] = repository
        attributes = {".gitattributes": self.store(b"*.gguf filter=lfs\n")} if kind != "bucket" else {}
        self.commit(repository, "main", "initial commit", attributes)
        return repository

    def commit(self, repository: Repository, branch: str, title: str, files: dict[str, Stored]) -> Commit:
        self._commits += 1
        commit = Commit(hashlib.sha1(f"{repository.id}{self._commits}".encode()).hexdigest(), title, files)
        repository.branches.setdefault(branch, []).append(commit)
        return commit

    def store(self, data: bytes, *, lfs: bool = False) -> Stored:
        sha256 = hashlib.sha256(data).hexdigest()
        git_oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        (self.blobs / sha256).write_bytes(data)
        return Stored(len(data), sha256, git_oid, lfs)

    def write(self, kind: str, repo_id: str, path: str, data: bytes) -> None:
        """Put a file there as somebody else would."""
        repository = self.repository(kind, repo_id)
        stored = self.store(data)
        if kind == "bucket":
            import hf_xet

            source = self.blobs / stored.sha256
            stored = replace(stored, xet_hash=hf_xet.hash_files([str(source)])[0].hash)
        self.commit(repository, "main", f"Add {path}", {**repository.files, path: stored})

    def read(self, kind: str, repo_id: str, path: str, revision: str = "main") -> bytes:
        return self.content(self.repository(kind, repo_id).at(revision).files[path])

    def content(self, stored: Stored) -> bytes:
        return (self.blobs / stored.sha256).read_bytes()

    def new_xet_folder(self, contents: Iterable[bytes] = ()) -> Path:
        """A store for one transfer over Xet: hf_xet locks it for as long as the process lives, so nobody else can open it.
        What is stored in it is copied."""
        import hf_xet

        self._transfers += 1
        folder = self.xet / str(self._transfers)
        if data := list(contents):
            with hf_xet.XetSession().new_upload_commit(endpoint=f"local://{folder}-made") as commit:
                for each in data:
                    commit.start_upload_bytes(each, sha256=hf_xet.SKIP_SHA256)
            shutil.copytree(f"{folder}-made", folder)
        return folder

    def receive_xet(self, xet_hash: str) -> Stored:
        """Fetch what a client has uploaded over Xet."""
        import hf_xet

        if xet_hash in self.received:
            return self.received[xet_hash]
        for number in range(self._transfers, 0, -1):
            with tempfile.TemporaryDirectory() as folder, suppress(Exception):  # it may be in another one
                shutil.copytree(self.xet / str(number), Path(folder, "store"))
                target = Path(folder, "file")
                with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{folder}/store") as group:
                    group.start_download_file(hf_xet.XetFileInfo(xet_hash, None), str(target))
                self.received[xet_hash] = replace(self.store(target.read_bytes()), xet_hash=xet_hash)
                return self.received[xet_hash]
        raise RefusedError(400, f"{xet_hash} was never uploaded")

    def environment(self, token: str | None = TOKEN) -> dict[str, str]:
        """The environment variables of a process that uses this Hub. Without hf_xet models and datasets are uploaded as LFS."""
        home = self.root / "home"
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(home),
            "HF_TOKEN": token or "",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def use(self, monkeypatch: pytest.MonkeyPatch, token: str | None = TOKEN) -> None:
        """Make this process use this Hub: huggingface_hub read its environment variables when it was imported."""
        from huggingface_hub import constants
        from huggingface_hub.utils import disable_progress_bars

        for name, value in self.environment(token).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(self.root / "home" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(self.root / "home" / "token"))
        disable_progress_bars()


# Accounts and repositories


@route("GET", r"/api/whoami-v2")
def _whoami(hub: Hub, request: Request) -> Any:
    if request.user is None:
        raise RefusedError(401, "Invalid credentials in Authorization header")
    organizations = [{"name": name, "type": "org"} for name in hub.organizations.get(request.user, ())]
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": hub.role}}
    return {"type": "user", "name": request.user, "fullname": request.user.title(), "orgs": organizations, "auth": token}


@route("POST", r"/api/validate-yaml")
def _validate_yaml(_hub: Hub, _request: Request) -> Any:
    return {"errors": [], "warnings": []}


def _id_in(request: Request) -> tuple[str, str]:
    value = request.json
    return value.get("type") or "model", f"{value.get('organization') or request.user}/{value['name']}"


def _create(hub: Hub, request: Request, kind: str, repo_id: str) -> Answer:
    if request.user is None:
        raise RefusedError(401, "Invalid username or password.")
    if repo_id.split("/")[0] not in (request.user, *hub.organizations.get(request.user, ())):
        raise RefusedError(403, f"You don't have the rights to create a {kind} under the namespace {repo_id.split('/')[0]!r}.")
    url = f"{hub.endpoint}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
    if (kind, repo_id) in hub.repositories:
        return Answer({"error": f"You already created this {kind} repo", "url": url}, 409)
    value = request.json
    hub.create(kind, repo_id, private=value.get("visibility") == "private" or value.get("private") is True, settings=value)
    return Answer({"url": url, "name": repo_id})


@route("POST", r"/api/repos/create")
def _create_repository(hub: Hub, request: Request) -> Any:
    kind, repo_id = _id_in(request)
    return _create(hub, request, kind, repo_id)


@route("DELETE", r"/api/repos/delete")
def _delete_repository(hub: Hub, request: Request) -> Any:
    kind, repo_id = _id_in(request)
    hub.visible(kind, repo_id, request.user, write=True)
    del hub.repositories[kind, repo_id]
    return {}


_REPOSITORY = r"/api/(?P<kind>model|dataset|space)s/(?P<repo_id>[^/]+/[^/]+)"


@route("GET", _REPOSITORY + r"(/revision/(?P<revision>[^/]+))?")
def _information(hub: Hub, request: Request, kind: str, repo_id: str, revision: str | None) -> Any:
    repository = hub.visible(kind, repo_id, request.user)
    commit = repository.at(unquote(revision or "main"))
    siblings = [{"rfilename": path, "size": stored.size} for path, stored in commit.files.items()]
    names = {"id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0]}
    dates = {"createdAt": CREATED, "lastModified": CREATED}
    return names | dates | {"sha": commit.oid, "private": repository.private, "siblings": siblings, "tags": [], "disabled": False}


@route("PUT", _REPOSITORY + r"/settings")
def _settings(hub: Hub, request: Request, kind: str, repo_id: str) -> Any:
    repository = hub.visible(kind, repo_id, request.user, write=True)
    if "visibility" in request.json or "private" in request.json:
        repository.private = request.json.get("visibility") == "private" or request.json.get("private") is True
    repository.settings |= request.json
    return {}


@route("GET", _REPOSITORY + r"/commits/(?P<revision>[^/]+)")
def _commits(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Any:
    commits = hub.visible(kind, repo_id, request.user).branches[unquote(revision)]
    constant = {"authors": [{"user": "ana"}], "date": CREATED, "message": ""}
    return [constant | {"id": commit.oid, "title": commit.title} for commit in reversed(commits)]


@route("POST", _REPOSITORY + r"/super-squash/(?P<revision>[^/]+)")
def _squash(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Any:
    repository = hub.visible(kind, repo_id, request.user, write=True)
    branch = unquote(revision)
    files = repository.at(branch).files
    repository.branches[branch] = []
    hub.commit(repository, branch, "Super-squash", files)
    return {}


@route("GET", _REPOSITORY + r"/refs")
def _refs(hub: Hub, request: Request, kind: str, repo_id: str) -> Any:
    branches = hub.visible(kind, repo_id, request.user).branches
    heads = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1].oid} for name, commits in branches.items()]
    return {"branches": heads, "converts": [], "tags": []}


# Files


def _entry(path: str, stored: Stored) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": stored.size, "oid": stored.git_oid}
    if stored.lfs:
        entry["lfs"] = {"oid": stored.sha256, "size": stored.size, "pointerSize": 130}
    if stored.xet_hash:
        entry |= {"xetHash": stored.xet_hash, "mtime": CREATED, "uploadedAt": CREATED}
    return entry


def _tree(files: dict[str, Stored], folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, stored in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            name = prefix + "/".join(parts[:depth])
            entries.setdefault(name, {"type": "directory", "path": name, "oid": "0" * 40, "uploadedAt": CREATED})
        if recursive or len(parts) == 1:
            entries[path] = _entry(path, stored)
    return list(entries.values())


def _is_recursive(request: Request) -> bool:
    return request.query.get("recursive", "").lower() in ("true", "1")


@route("GET", _REPOSITORY + r"/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?")
def _list(hub: Hub, request: Request, kind: str, repo_id: str, revision: str, folder: str | None) -> Any:
    files = hub.visible(kind, repo_id, request.user).at(unquote(revision)).files
    entries = _tree(files, unquote(folder or ""), recursive=_is_recursive(request))
    if folder and not entries:
        raise RefusedError(404, f"{folder} does not exist", "EntryNotFound")
    return entries


@route("POST", _REPOSITORY + r"/paths-info/(?P<revision>[^/]+)")
def _paths(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Any:
    files = hub.visible(kind, repo_id, request.user).at(unquote(revision)).files
    paths = parse_qs(request.body.decode()).get("paths", [])
    return [_entry(path, files[path]) for path in paths if path in files]


@route("POST", _REPOSITORY + r"/preupload/(?P<revision>[^/]+)")
def _preupload(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Any:
    files = hub.visible(kind, repo_id, request.user, write=True).at(unquote(revision)).files
    answers = []
    for file in request.json["files"]:
        path, known = file["path"], files.get(file["path"])
        lfs = file["size"] >= LFS_BYTES or path.endswith(_LFS_SUFFIXES)
        oid = {"oid": known.sha256 if known.lfs else known.git_oid} if known else {}
        answers.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, **oid})
    return {"files": answers}


@route("POST", _REPOSITORY + r"/commit/(?P<revision>[^/]+)")
def _commit(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Any:
    repository = hub.visible(kind, repo_id, request.user, write=True)
    branch, title = unquote(revision), ""
    head = repository.at(branch)
    files = dict(head.files)
    for line in request.body.splitlines():
        entry = json.loads(line)
        key, value = entry["key"], entry["value"]
        path = value.get("path", "")
        if key == "header":
            title = value["summary"]
            if value.get("parentCommit", head.oid) != head.oid:
                raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        elif key == "file":
            files[path] = hub.store(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if not (hub.blobs / value["oid"]).is_file():
                raise RefusedError(400, f"LFS object {value['oid']} was never uploaded")
            files[path] = Stored((hub.blobs / value["oid"]).stat().st_size, value["oid"], value["oid"][:40], lfs=True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise RefusedError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        elif key == "deletedFolder":
            files = {name: stored for name, stored in files.items() if not name.startswith(path.rstrip("/") + "/")}
    request_number = sum(name.startswith("refs/pr/") for name in repository.branches) + 1
    if request.query.get("create_pr"):
        branch = f"refs/pr/{request_number}"
    commit = hub.commit(repository, branch, title, files)
    url = f"{hub.endpoint}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
    discussion = f"{url}/discussions/{request_number}"
    return {"success": True, "commitOid": commit.oid, "commitUrl": f"{url}/commit/{commit.oid}", "pullRequestUrl": discussion}


_RESOLVE = r"/((?P<kinds>datasets|spaces)/)?(?P<repo_id>(?!api/)[^/]+/[^/]+)"


@route("POST", _RESOLVE + r"\.git/info/lfs/objects/batch")
def _lfs_batch(hub: Hub, request: Request, kinds: str | None, repo_id: str) -> Any:
    hub.visible((kinds or "models").removesuffix("s"), repo_id, request.user, write=True)
    objects = []
    for entry in request.json["objects"]:
        known = (hub.blobs / entry["oid"]).is_file()
        upload = {} if known else {"actions": {"upload": {"href": f"{hub.endpoint}/lfs/{entry['oid']}", "header": {}}}}
        objects.append({"oid": entry["oid"], "size": entry["size"], **upload})
    return {"transfer": "basic", "objects": objects}


@route("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})")
def _lfs_upload(hub: Hub, request: Request, oid: str) -> Any:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise RefusedError(400, "The content is not what its name says")
    (hub.blobs / oid).write_bytes(request.body)
    return Answer()


@route("GET", _RESOLVE + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def _resolve(hub: Hub, request: Request, kinds: str | None, repo_id: str, revision: str, path: str) -> Any:
    commit = hub.visible((kinds or "models").removesuffix("s"), repo_id, request.user).at(unquote(revision))
    stored = commit.files.get(unquote(path))
    if stored is None:
        raise RefusedError(404, f"{path} does not exist", "EntryNotFound")
    etag = stored.sha256 if stored.lfs else stored.git_oid
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{etag}"', "Content-Type": "application/octet-stream"}
    data, status = hub.content(stored), 200
    if start := re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "")):
        headers["Content-Range"] = f"bytes {start[1]}-{len(data) - 1}/{len(data)}"
        data, status = data[int(start[1]) :], 206
    return Answer(data, status, headers)


# Buckets

_BUCKET = r"/api/buckets/(?P<bucket_id>[^/]+/[^/]+)"


@route("POST", _BUCKET)
def _create_bucket(hub: Hub, request: Request, bucket_id: str) -> Any:
    return _create(hub, request, "bucket", bucket_id)


@route("GET", _BUCKET)
def _bucket(hub: Hub, request: Request, bucket_id: str) -> Any:
    bucket = hub.visible("bucket", bucket_id, request.user)
    sizes = [stored.size for stored in bucket.files.values()]
    counts = {"size": sum(sizes), "totalFiles": len(sizes)}
    return {"id": bucket_id, "private": bucket.private, "createdAt": CREATED, **counts}


@route("DELETE", _BUCKET)
def _delete_bucket(hub: Hub, request: Request, bucket_id: str) -> Any:
    hub.visible("bucket", bucket_id, request.user, write=True)
    del hub.repositories["bucket", bucket_id]
    return {}


@route("GET", _BUCKET + r"/tree(/(?P<folder>.*))?")
def _list_bucket(hub: Hub, request: Request, bucket_id: str, folder: str | None) -> Any:
    files = hub.visible("bucket", bucket_id, request.user).files
    return _tree(files, unquote(folder or ""), recursive=_is_recursive(request))


@route("POST", _BUCKET + r"/paths-info")
def _bucket_paths(hub: Hub, request: Request, bucket_id: str) -> Any:
    files = hub.visible("bucket", bucket_id, request.user).files
    return [_entry(path, files[path]) for path in request.json["paths"] if path in files]


@route("POST", _BUCKET + r"/batch")
def _bucket_batch(hub: Hub, request: Request, bucket_id: str) -> Any:
    bucket = hub.visible("bucket", bucket_id, request.user, write=True)
    files, failed = dict(bucket.files), []
    for line in request.body.splitlines():
        entry = json.loads(line)
        if entry["type"] == "addFile":
            files[entry["path"]] = hub.receive_xet(entry["xetHash"])
        elif entry["type"] == "deleteFile" and files.pop(entry["path"], None) is None:
            failed.append({"path": entry["path"], "error": "File not found"})
    bucket.branches["main"] = []
    hub.commit(bucket, "main", "batch", files)
    return {"success": not failed, "failed": failed}


@route("GET", _BUCKET + r"/xet-(?P<access>read|write)-token")
def _bucket_token(hub: Hub, request: Request, bucket_id: str, access: str) -> Any:
    bucket = hub.visible("bucket", bucket_id, request.user, write=access == "write")
    folder = hub.new_xet_folder(map(hub.content, bucket.files.values()) if access == "read" else ())
    return {"accessToken": "xet", "casUrl": f"local://{folder}", "exp": int(time.time()) + 3600}


@route("GET", r"/buckets/(?P<bucket_id>[^/]+/[^/]+)/resolve/(?P<path>.+)")
def _resolve_bucket(hub: Hub, request: Request, bucket_id: str, path: str) -> Any:
    stored = hub.visible("bucket", bucket_id, request.user).files.get(unquote(path))
    if stored is None:
        raise RefusedError(404, f"{path} does not exist", "EntryNotFound")
    refresh = f"{hub.endpoint}/api/buckets/{bucket_id}/xet-read-token"
    return Answer(hub.content(stored), headers={"X-Xet-Hash": stored.xet_hash, "X-Xet-Refresh-Route": refresh})


# Jobs

_JOB = r"/api/jobs/(?P<namespace>[^/]+)/(?P<job_id>[^/]+)"


def _job_information(job: Job) -> dict[str, Any]:
    owner = {"id": "1", "name": job.namespace, "type": "user"}
    spec = {name: value for name, value in job.spec.items() if name != "secrets"}
    return {**spec, "id": job.id, "createdAt": CREATED, "owner": owner, "status": {"stage": job.stage, "message": None}}


def _own_job(hub: Hub, request: Request, namespace: str, job_id: str) -> Job:
    if request.user is None or namespace not in (request.user, *hub.organizations.get(request.user, ())):
        raise RefusedError(403 if request.user else 401, "You don't have the rights to see this job")
    if job_id not in hub.jobs:
        raise RefusedError(404, f"No job {job_id}")
    return hub.jobs[job_id]


@route("POST", r"/api/jobs/(?P<namespace>[^/]+)")
def _run_job(hub: Hub, request: Request, namespace: str) -> Any:
    job = Job(f"{len(hub.jobs) + 1:024x}", namespace, request.json, list(hub.plan))
    hub.jobs[job.id] = job
    _own_job(hub, request, namespace, job.id)
    return _job_information(job)


@route("GET", _JOB)
def _inspect_job(hub: Hub, request: Request, namespace: str, job_id: str) -> Any:
    job = _own_job(hub, request, namespace, job_id)
    if job.plan and job.stage != "CANCELED":
        job.stage, lines = job.plan.pop(0)
        job.log += lines
    return _job_information(job)


@route("GET", _JOB + r"/logs")
def _job_logs(hub: Hub, request: Request, namespace: str, job_id: str) -> Any:
    lines = _own_job(hub, request, namespace, job_id).log
    events = [f"data: {json.dumps({'timestamp': CREATED, 'data': line})}\n\n" for line in ["===== Job started =====", *lines]]
    return Answer("".join(events).encode(), headers={"Content-Type": "text/event-stream"})


@route("POST", _JOB + r"/cancel")
def _cancel_job(hub: Hub, request: Request, namespace: str, job_id: str) -> Any:
    job = _own_job(hub, request, namespace, job_id)
    job.stage = "CANCELED"
    return _job_information(job)


# The server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _handle(self) -> None:
        hub = self.server.hub
        body = self._body()
        hub.log.append((self.command, self.path))
        fault = hub.fault_of(self.command, self.path)
        what = fault.what if fault else ""
        if what == "drop":
            self.close_connection = True
            return
        if fault and what == "refuse":
            answer = Answer({"error": "The stand-in was told to refuse"}, fault.status)
        else:
            if fault and what == "slow":
                time.sleep(fault.seconds)
            answer = self._answer(body)
            if what == "twice":
                self._answer(body)
        if what == "cut":
            self.close_connection = True
            return
        data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _answer(self, body: bytes) -> Answer:
        hub, parts = self.server.hub, urlsplit(self.path)
        try:
            user = None
            if authorization := self.headers.get("Authorization"):
                user = hub.users.get(authorization.removeprefix("Bearer "))
                if user is None:
                    raise RefusedError(401, "Invalid credentials in Authorization header")
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            request = Request(self.command, parts.path, query, self.headers, body, user)
            for method, pattern, function in _ROUTES:
                wanted = "GET" if self.command == "HEAD" else self.command
                if method == wanted and (match := pattern.fullmatch(parts.path)):
                    with hub.lock:
                        answer = function(hub, request, **match.groupdict())
                    return answer if isinstance(answer, Answer) else Answer(answer)
            raise RefusedError(404, f"The stand-in has no {self.command} {parts.path}")
        except RefusedError as exc:
            headers = {"X-Error-Code": exc.code} if exc.code else {}
            return Answer({"error": exc.message}, exc.status, headers | {"X-Error-Message": exc.message})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.hub = hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that was killed
            super().handle_error(request, client_address)


@contextmanager
def running_hub(root: Path, port: int = 0) -> Iterator[Hub]:
    """A Hub whose files lie in `root`, an empty or missing folder, until the block ends."""
    hub = Hub(root)
    with _Server(hub, port) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()


if __name__ == "__main__":  # for a look by hand: python -m tests.hub
    with tempfile.TemporaryDirectory() as folder, running_hub(Path(folder) / "hub", port=7999) as by_hand:
        print(*(f"export {name}={value}" for name, value in by_hand.environment().items()), sep="\n", flush=True)
        threading.Event().wait()
