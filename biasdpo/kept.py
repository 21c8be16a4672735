"""What a model answered once, kept by content: WORKSPACE/cache/scores/KEY.jsonl, one file for each thing that can answer.

The key is a hash of all that an answer depends on but its request, each line is a list: a hash of the request, and the answer. So
an interrupted evaluation goes on where it stopped, one that is repeated computes nothing, and base is computed once for all
adapters. Losing the file costs time alone, a torn line one answer.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from biasdpo.records import CompletionRequest, Request
from biasdpo.workspace import Workspace, locked

R = TypeVar("R", bound=Request | CompletionRequest)
A = TypeVar("A")


class Kept(ABC, Generic[R, A]):
    """The answers of one side to requests, in memory and on disk. `file` None: in memory alone."""

    def __init__(self, file: Path | None) -> None:
        self._file: Path | None = file
        self._known: dict[str, A] = {}
        if file is not None and file.is_file():
            for line in file.read_bytes().split(b"\n"):
                with suppress(ValueError, TypeError):  # a torn line
                    key, *values = json.loads(line)
                    self._known[key] = self._read(*values)

    @abstractmethod
    def _read(self, *values: Any) -> A:
        """The answer that `_written` wrote; a ValueError or TypeError where it can't be one."""

    @abstractmethod
    def _written(self, answer: A) -> list[Any]:
        """The answer as JSON's values."""

    def missing(self, requests: Iterable[R]) -> list[R]:
        """Those of the requests that are not known, each once."""
        return [request for request in dict.fromkeys(requests) if _key_of(request) not in self._known]

    def of(self, requests: Sequence[R]) -> list[A]:
        """The answers to requests of which none is missing."""
        return [self._known[_key_of(request)] for request in requests]

    def add(self, requests: Sequence[R], answers: Sequence[A]) -> None:
        """Keep what was computed."""
        new = {_key_of(request): answer for request, answer in zip(requests, answers, strict=True)}
        self._known |= new
        if self._file is None or not new:
            return
        lines = "".join(json.dumps([key, *self._written(answer)]) + "\n" for key, answer in new.items())
        with locked(self._file), self._file.open("ab") as file:
            # After a torn line, the next begins on a line of its own; an empty one is no loss.
            file.write(b"\n" + lines.encode())


def file_for(workspace: Workspace | None, of: dict[str, Any]) -> Path | None:
    """Where answers are kept that depend on `of` and their request alone; `workspace` None: nowhere."""
    if workspace is None:
        return None
    text = json.dumps(of, sort_keys=True)
    return workspace.cache / "scores" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.jsonl"


@lru_cache(maxsize=32768)  # a batch's requests are asked for several times, on both sides
def _key_of(request: Request | CompletionRequest) -> str:
    text = json.dumps([type(request).__name__, asdict(request)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
