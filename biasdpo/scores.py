"""Likelihoods that were computed once, kept by content (see `kept`): logp, tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from biasdpo.kept import Kept, file_for
from biasdpo.records import Likelihood, Request
from biasdpo.workspace import Workspace, sha256_of, write_json

# Of what a request's tokens are and how they are computed: raise it when a backend's `_request_tokens` changes, or its numbers do
# by more than noise (2: llama.cpp computes no token in a batch of its own, see `backends.llamacpp_context`).
_VERSION = 2


class Scores(Kept[Request, Likelihood]):
    """The likelihoods of one side."""

    def _read(self, *values: Any) -> Likelihood:
        logp, tokens = values
        return Likelihood(float(logp), int(tokens))

    def _written(self, answer: Likelihood) -> list[Any]:
        return [answer.logp, answer.tokens]


def open_scores(workspace: Workspace | None, scorer: dict[str, Any]) -> Scores:
    """The likelihoods of what `scorer` describes, all that they depend on; `workspace` None: kept nowhere."""
    return Scores(file_for(workspace, {**scorer, "scores_version": _VERSION}))


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
