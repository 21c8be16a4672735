"""Completions that were written once, by content: WORKSPACE/cache/scores/KEY.jsonl, as `scores` keeps likelihoods.

The key is a hash of all that a completion depends on but its request, the lines are [hash of the request, text, tokens, why it
ended]. So an interrupted evaluation goes on where it stopped, and one that is repeated writes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from biasdpo.records import Completion, CompletionRequest, Side
from biasdpo.workspace import Workspace, locked

_VERSION = 1  # of how a request is written: raise it when a backend's `stream` gives another text for the same seed


class Completions:
    """The completions of one side, in memory and on disk. `file` None: in memory alone."""

    def __init__(self, side: Side, file: Path | None) -> None:
        self._file = file
        self._known: dict[str, Completion] = {}
        if file is not None and file.is_file():
            for line in file.read_bytes().split(b"\n"):
                with suppress(ValueError, TypeError):  # a torn line
                    key, text, tokens, finish_reason = json.loads(line)
                    self._known[key] = Completion(side, text, tokens, finish_reason)

    def missing(self, requests: Iterable[CompletionRequest]) -> list[CompletionRequest]:
        """Those of the requests that are not known, each once."""
        return [request for request in dict.fromkeys(requests) if _key_of(request) not in self._known]

    def of(self, requests: Sequence[CompletionRequest]) -> list[Completion]:
        """The completions of requests of which none is missing."""
        return [self._known[_key_of(request)] for request in requests]

    def add(self, request: CompletionRequest, completion: Completion) -> None:
        """Keep what was written, to its end."""
        key = _key_of(request)
        self._known[key] = completion
        if self._file is not None:
            line = json.dumps([key, completion.text, completion.tokens, completion.finish_reason])
            with locked(self._file), self._file.open("ab") as file:
                # After a torn line, the next begins on a line of its own; an empty one is no loss.
                file.write(b"\n" + line.encode() + b"\n")


def open_completions(workspace: Workspace | None, side: Side, writer: dict[str, Any]) -> Completions:
    """The completions of what `writer` describes, all that they depend on; `workspace` None: kept nowhere."""
    if workspace is None:
        return Completions(side, None)
    text = json.dumps({**writer, "completions_version": _VERSION}, sort_keys=True)
    return Completions(side, workspace.cache / "scores" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.jsonl")


def _key_of(request: CompletionRequest) -> str:
    return hashlib.sha256(json.dumps(asdict(request), sort_keys=True).encode()).hexdigest()[:32]
