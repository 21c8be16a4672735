"""Models that are not of the catalog in the page's pickers: how their names are read, and how they are shown."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from biasdpo import models


def pasted(name: str | None) -> str:
    """A name or path as it was typed or pasted: file managers put quotes around it, or file:// before it."""
    name = (name or "").strip().strip("'\"").strip()
    return unquote(urlsplit(name).path) if name.startswith("file://") else name


def own_choices(names: Iterable[str]) -> list[tuple[str, str]]:
    """Those that are not of the catalog, for a picker: a path by its last two parts, where that tells them apart.

    Not by the whole path: a dropdown takes typed text for the choice that contains it, and a folder's path would then be taken
    for that of a file in it.
    """
    own = dict.fromkeys(name for name in names if name and name != "auto" and name not in models.catalog())
    titles = [f"{Path(name).name} · in {Path(name).parent.name}" if Path(name).is_absolute() else name for name in own]
    return [(title if titles.count(title) == 1 else name, name) for title, name in zip(titles, own, strict=True)]
