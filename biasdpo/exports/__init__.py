"""An export from beginning to end: written, proven equal, and only then under its name, with a record of what it is.

`export` does it here and now; `start` in a process of its own, which neither a closed page nor the end of the app stops. Both
leave the same files beside each other: NAME.gguf, NAME.gguf.json (the record), NAME.gguf.Modelfile (for Ollama). While one is
written, all of it lies in the folder `.export-NAME.gguf`, with its status: what is killed leaves nothing under its name.
"""

from __future__ import annotations

from biasdpo.exports.jobs import Export, cancel, delete, find, folder_for, free_name, list_exports, poll, start
from biasdpo.exports.record import ExportRecord
from biasdpo.exports.request import ExportConfig, Format, Source
from biasdpo.exports.unfinished import ExportStatus
from biasdpo.gguf.export import export

__all__ = [
    "Export",
    "ExportConfig",
    "ExportRecord",
    "ExportStatus",
    "Format",
    "Source",
    "cancel",
    "delete",
    "export",
    "find",
    "folder_for",
    "free_name",
    "list_exports",
    "poll",
    "start",
]
