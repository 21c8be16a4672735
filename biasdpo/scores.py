"""Likelihoods that were computed once, by content: WORKSPACE/cache/scores/KEY.jsonl, one file for each thing that can score.

The key is a hash of all that a likelihood depends on (the model's files, template, adapter, strength, engine and version), the
lines are [hash of the request, logp, tokens]. So an interrupted evaluation goes on where it stopped, one that is repeated
computes nothing, and base is scored once for all adapters. Losing the file costs time alone, a torn line one likelihood.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from biasdpo.records import Likelihood, Request
from biasdpo.workspace import Workspace, locked, sha256_of, write_json

# Of what a request's tokens are and how they are computed: raise it when a backend's `_request_tokens` changes, or its numbers do
# by more than noise (2: llama.cpp computes no token in a batch of its own, see `backends.llamacpp_context`).
_VERSION = 2


class Scores:
    """The likelihoods of one side, in memory and on disk. `file` None: in memory alone."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._known: dict[str, Likelihood] = {}
        if file is not None and file.is_file():
            for line in file.read_bytes().split(b"\n"):
                with suppress(ValueError, TypeError):  # a torn line
                    key, logp, tokens = json.loads(line)
                    self._known[key] = Likelihood(float(logp), int(tokens))

    def missing(self, requests: Iterable[Request]) -> list[Request]:
        """Those of the requests that are not known, each once."""
        return [request for request in dict.fromkeys(requests) if _key_of(request) not in self._known]

    def of(self, requests: Sequence[Request]) -> list[Likelihood]:
        """The likelihoods of requests of which none is missing."""
        return [self._known[_key_of(request)] for request in requests]

    def add(self, requests: Sequence[Request], likelihoods: Sequence[Likelihood]) -> None:
        """Keep what was computed."""
        new = {_key_of(request): likelihood for request, likelihood in zip(requests, likelihoods, strict=True)}
        self._known |= new
        if self._file is None or not new:
            return
        lines = "".join(json.dumps([key, found.logp, found.tokens]) + "\n" for key, found in new.items())
        with locked(self._file), self._file.open("ab") as file:
            # After a torn line, the next begins on a line of its own; an empty one is no loss.
            file.write(b"\n" + lines.encode())


def open_scores(workspace: Workspace | None, scorer: dict[str, Any]) -> Scores:
    """The likelihoods of what `scorer` describes, all that they depend on; `workspace` None: kept nowhere."""
    if workspace is None:
        return Scores(None)
    text = json.dumps({**scorer, "scores_version": _VERSION}, sort_keys=True)
    return Scores(workspace.cache / "scores" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.jsonl")


def sha256_of_model(files: Sequence[Path], workspace: Workspace | None) -> str:
    """Of all the files' bytes. A file that has the size and the time of change that it had is not read again."""
    memo = None if workspace is None else workspace.cache / "scores" / "files.json"
    known: dict[str, str] = {}
    if memo is not None and memo.is_file():
        with suppress(ValueError, OSError):
            known = dict(json.loads(memo.read_text(encoding="utf-8")))
    found = {}
    for file in files:
        status = file.stat()
        mark = f"{file.resolve()}|{status.st_size}|{status.st_mtime_ns}"
        found[mark] = known.get(mark) or sha256_of(file)
    if memo is not None and not found.keys() <= known.keys():
        write_json(memo, known | found)
    parts = list(found.values())
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


@lru_cache(maxsize=32768)  # a batch's requests are asked for several times, on both sides
def _key_of(request: Request) -> str:
    text = json.dumps([type(request).__name__, asdict(request)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
