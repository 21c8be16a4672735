"""The live probes of a run, as HTML: three prompts, completed by the base model and by the policy so far. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from biasdpo.label import DiffPiece, word_diff
from biasdpo.ui import render

_DIFF_CHARACTERS = 4_000  # as on Compare: difflib's time grows with the square

Rows = Sequence[Mapping[str, Any]]


def steps(rows: Rows) -> list[int]:
    """The steps at which there was a probe, in order."""
    return sorted({row["step"] for row in rows if isinstance(row.get("step"), int)})


def step_shown(rows: Rows, wanted: int | None) -> int | None:
    """The probe that is shown: the wanted one, else (None, or it is gone after a resume) the latest; None where there is none."""
    known = steps(rows)
    return wanted if wanted in known else (known[-1] if known else None)


def turned(rows: Rows, shown: int | None, by: int) -> int | None:
    """The probe `by` places later (or earlier), as `wanted`: None is the latest, and stays the latest as others follow."""
    known = steps(rows)
    at = step_shown(rows, shown)
    if at is None:
        return None
    place = min(max(known.index(at) + by, 0), len(known) - 1)
    return None if place == len(known) - 1 else known[place]


def position(rows: Rows, wanted: int | None) -> str:
    """Which of the probes is shown."""
    known, at = steps(rows), step_shown(rows, wanted)
    if at is None:
        return ""
    number = known.index(at) + 1
    latest = ", the latest" if number == len(known) else ""
    return f'<span class="bd-position">After step <b>{at:,}</b> · probe {number} of {len(known)}{latest}</span>'


def probes(rows: Rows, wanted: int | None, expected: bool) -> str:
    """The prompts with both completions; words that only one of them has are marked. `expected`: the run makes probes."""
    at = step_shown(rows, wanted)
    if at is None:
        return render.note(
            "The first probe comes before the first step." if expected else "This run makes no probes (probe_every 0)."
        )
    return "".join(_probe(row) for row in rows if row.get("step") == at)


def _probe(row: Mapping[str, Any]) -> str:
    prompt, base, tuned = (str(row.get(name, "")) for name in ("prompt", "base", "tuned"))
    category = f'<span class="bd-chip">{escape(str(row["category"]))}</span>' if row.get("category") else ""
    if base == tuned:
        left = right = escape(base)
    elif max(len(base), len(tuned)) > _DIFF_CHARACTERS:
        left, right = escape(base), escape(tuned)
    else:
        pieces = word_diff(base, tuned)
        left, right = _side(pieces, "out", "del"), _side(pieces, "in", "ins")
    same = ' <span class="bd-same">the same so far</span>' if base == tuned else ""
    return (
        f'<article class="bd-probe"><h4>{escape(prompt)} {category}</h4><div class="bd-probe-sides">'
        f'<div class="bd-probe-base"><h5>Base</h5><p>{left}</p></div>'
        f'<div class="bd-probe-tuned"><h5>Tuned so far{same}</h5><p>{right}</p></div></div></article>'
    )


def _side(pieces: Sequence[DiffPiece], own: str, tag: str) -> str:
    kept = (f"<{tag}>{escape(text)}</{tag}>" if kind == own else escape(text) for kind, text in pieces if kind in ("same", own))
    return "".join(kept)
