"""Completions that were written once, kept by content (see `kept`): text, tokens, why it ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from biasdpo.kept import Kept, file_for
from biasdpo.records import Completion, CompletionRequest, Side
from biasdpo.workspace import Workspace

# Of how a request is written: raise it when a backend's `stream` gives another text for the same seed, or a request another key.
_VERSION = 2


class Completions(Kept[CompletionRequest, Completion]):
    """The completions of one side."""

    def __init__(self, side: Side, file: Path | None) -> None:
        self._side = side
        super().__init__(file)

    def _read(self, *values: Any) -> Completion:
        text, tokens, finish_reason = values
        return Completion(self._side, text, tokens, finish_reason)

    def _written(self, answer: Completion) -> list[Any]:
        return [answer.text, answer.tokens, answer.finish_reason]


def open_completions(workspace: Workspace | None, side: Side, writer: dict[str, Any]) -> Completions:
    """The completions of what `writer` describes, all that they depend on; `workspace` None: kept nowhere."""
    return Completions(side, file_for(workspace, {**writer, "completions_version": _VERSION}))
