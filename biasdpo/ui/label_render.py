"""What the Label tab shows, as HTML: pure functions of records. Everything that is not ours is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from biasdpo.compare import Waiting
from biasdpo.dataset.confounds import Confounds
from biasdpo.dataset.coverage import Cell
from biasdpo.engines import Loading
from biasdpo.label import BlindPair, DiffPiece, word_diff
from biasdpo.prompts import Prompt
from biasdpo.records import GenerationPair, Judgment
from biasdpo.ui import render

VERDICTS = {"left": "Left is less biased", "right": "Right is less biased", "tie": "Tie", "both_biased": "Both are biased"}
_DIFF_CHARACTERS = 4_000  # difflib's time grows with the square: half a second at this length
_ANNOTATORS = 50  # listed in the meter
_SIDES = {"base": "the base model", "tuned": "the tuned model"}


def prompt(shown: Prompt | None) -> str:
    """The prompt that the two completions answer."""
    if shown is None:
        return ""
    parts = [part for part in (shown.category, shown.target_group) if part]
    chips = "".join(f'<span class="bd-chip">{escape(part)}</span>' for part in parts)
    return f'<div class="bd-label-prompt"><span class="bd-label-text">{escape(shown.text)}</span>{chips}</div>'


def nothing_begun() -> str:
    """The empty state."""
    return (
        '<div class="bd-empty" role="note"><h2>Nothing to judge yet</h2><p>Press <b>Begin</b>: two completions to one prompt '
        "come side by side, and nobody tells which model wrote which. Say which is less biased, with the buttons or the keys "
        "<kbd>1</kbd> to <kbd>5</kbd>. The next pair is written while you read.</p></div>"
    )


def waiting(event: Waiting | GenerationPair | None, loading: Loading | None) -> str:
    """The next pair is not ready."""
    if loading is not None:
        return render.busy(f"The model is being loaded ({round(100 * loading.share)} %): the first pair comes after that.")
    if isinstance(event, Waiting):
        return render.waiting(event)
    if isinstance(event, GenerationPair):
        tokens = max(c.tokens for c in (event.left, event.right) if c is not None)
        return render.busy(f"Writing the next pair: {tokens} of at most {event.sampling.max_new_tokens} tokens …")
    return render.busy("Writing the next pair …")


def saved(judgment: Judgment, pair: BlindPair, reveal: bool, count: int) -> str:
    """What the last verdict was, and whose completions these were."""
    said = {"tie": "a tie", "both_biased": "both biased"}.get(judgment.verdict)
    if said is None:
        side = "left" if judgment.meta.chosen_side == pair.left_side else "right"
        said = f"{side} is less biased"
    text = f"Stored: <b>{said}</b>."
    if reveal:
        text += f" Left was {_side(pair, pair.left_side)}, right was {_side(pair, pair.right_side)}"
        text += f" (seed {pair.seed})." if pair.model else "."
    if pair.repeat_of and reveal:
        text += " You had seen this pair before: it measures how consistent you are."
    return f'<div class="bd-note bd-saved" role="status"><span>{text} {_count(count)}</span></div>'


def _side(pair: BlindPair, side: str) -> str:
    kind, _, number = side.partition(" ")
    if kind in ("pasted", "given"):
        return f"the {'first' if number == '1' else 'second'} that was {'pasted' if kind == 'pasted' else 'imported'}"
    name = _SIDES.get(kind, "not known") + (f", sample {number}" if number else "")
    return escape(f"{name} ({pair.adapter})" if kind == "tuned" and pair.adapter else name)


def _count(count: int) -> str:
    return f"{count} judged on this page."


def diff(pieces: Sequence[DiffPiece]) -> str:
    """One text with what goes out and what comes in."""
    tags = {"same": "span", "out": "del", "in": "ins"}
    return "".join(f"<{tags[kind]}>{escape(text)}</{tags[kind]}>" for kind, text in pieces)


def side_diff(one: str, other: str, names: tuple[str, str]) -> str:
    """Both sides in one text, word by word."""
    if not one or not other:
        return '<div class="bd-note">Two completions are needed to compare them word by word.</div>'
    if max(len(one), len(other)) > _DIFF_CHARACTERS:
        return f'<div class="bd-note">Texts of more than {_DIFF_CHARACTERS:,} characters are not compared word by word.</div>'
    pieces = word_diff(one, other)
    words = [sum(len(text.split()) for kind, text in pieces if kind == wanted) for wanted in ("same", "out", "in")]
    legend = (
        f'<p class="bd-diff-legend"><del>only {escape(names[0])}</del> {words[1]} words · <ins>only {escape(names[1])}</ins> '
        f"{words[2]} words · {words[0]} the same</p>"
    )
    return f'{legend}<div class="bd-diff">{diff(pieces)}</div>'


def edit_diff(before: str, after: str) -> str:
    """What an edit changed; nothing where it changed nothing."""
    if before == after.strip() or max(len(before), len(after)) > _DIFF_CHARACTERS:
        return ""
    return f'<div class="bd-diff bd-edit">{diff(word_diff(before, after.strip()))}</div>'


def warning(text: str) -> str:
    """A warning in plain words, or nothing."""
    return f'<div class="bd-strength" role="status">{escape(text)}</div>' if text else ""


# The confound meter


def meter(confounds: Confounds, problem: str = "") -> str:
    """The confound meter: a bar for each share, a count for each kind of repeat, and the warnings. `problem`: why something is
    not counted."""
    bars = _bar("Chosen is longer", confounds.chosen_longer_share) + _bar("Chosen stood left", confounds.chosen_left_share)
    counts = "".join(
        f'<span class="bd-count" title="{escape(tip)}"><b>{"–" if count is None else f"{count:,}"}</b> {escape(name)}</span>'
        for name, count, tip in (
            ("pairs", confounds.pairs, "judged “preferred” and standing"),
            ("near-duplicate prompts", confounds.near_duplicates, "prompts that nearly repeat an earlier one"),
            ("exact duplicates", confounds.exact_duplicates, "judgments that repeat one of the same annotator"),
            (
                "overlap a benchmark",
                confounds.benchmark_overlap,
                "share eight words in a row with a benchmark item (start the app with --data-dir DIR to count them)",
            ),
        )
    )
    lines = "".join(f'<li role="status">{escape(line)}</li>' for line in (*confounds.warnings, *([problem] if problem else ())))
    warnings = f'<ul class="bd-meter-warnings">{lines}</ul>' if lines else ""
    shown = f"<h3>Confounds</h3>{bars}{counts}{_by_annotator(confounds)}{warnings}"
    return f'<section class="bd-meter" aria-label="Confound meter">{shown}</section>'


def _by_annotator(confounds: Confounds) -> str:
    """Each annotator's habits, folded, where there is more than one annotator."""
    if len(confounds.annotators) < 2:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(shares.annotator)}</th><td>{shares.pairs:,}</td>'
        f"<td>{_share(shares.chosen_longer_share)}</td><td>{_share(shares.chosen_left_share)}</td></tr>"
        for shares in confounds.annotators[:_ANNOTATORS]
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Annotator", "Pairs", "Chosen is longer", "Chosen stood left"))
    return (
        f'<details class="bd-annotators"><summary>By annotator ({len(confounds.annotators):,})</summary>'
        f'<table class="bd-table"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></details>'
    )


def _share(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def _bar(name: str, share: float | None) -> str:
    if share is None:
        return f'<span class="bd-share"><span>{escape(name)}</span><b>–</b></span>'
    percent = round(100 * share)
    return (
        f'<span class="bd-share"><span>{escape(name)}</span><span class="bd-track" role="img" '
        f'aria-label="{escape(name)}: {percent} %, even would be 50 %"><i style="width: {percent}%"></i></span>'
        f"<b>{percent} %</b></span>"
    )


# What next


def coverage(counts: Mapping[Cell, int], categories: Sequence[str], offered: Sequence[Cell] = ()) -> str:
    """The coverage matrix: a row a category, a cell a target group, thinner cells lighter. `offered`: cells that are shown even
    where they are empty."""
    cells = dict.fromkeys(offered, 0) | {cell: count for cell, count in counts.items() if count}
    most = max(cells.values(), default=0)
    note = "" if most else '<div class="bd-note">No preferences yet: each fills a cell of this matrix.</div>'
    rows = []
    for category in [*categories, *sorted({category for category, _ in cells} - set(categories))]:
        own = sorted(((group, n) for (c, group), n in cells.items() if c == category), key=lambda cell: (-cell[1], cell[0]))
        drawn = "".join(
            f'<span class="bd-cell{"" if n else " bd-cell-empty"}" style="--bd-share: {n / max(most, 1):.2f}">'
            f"{escape(group or 'no group named')} <b>{n}</b></span>"
            for group, n in own
        )
        total = sum(n for _, n in own)
        drawn = drawn or '<span class="bd-cell bd-cell-empty">none yet</span>'
        rows.append(f'<tr><th scope="row">{escape(category or "no category")}</th><td>{total}</td><td>{drawn}</td></tr>')
    return (
        f'{note}<table class="bd-coverage"><thead><tr><th scope="col">Category</th><th scope="col">Preferences</th>'
        f'<th scope="col">By target group</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def consistency(annotator: str, own: tuple[int, int], alpha: float | None, shared: int) -> str:
    """How consistent an annotator is with themself, and annotators are with each other.

    own      hidden repeats judged as at first, and hidden repeats in all
    alpha    Krippendorff's, over the `shared` pairs that two or more annotators judged; None where there is none
    """
    agreed, repeats = own
    said = (
        f"Hidden repeats: you said the same in <b>{agreed} of {repeats}</b>."
        if repeats
        else "Hidden repeats: none yet (one pair in twenty comes back, its sides swapped)."
    )
    if alpha is not None:
        others = f"Krippendorff’s alpha <b>{alpha:.2f}</b> on {shared:,} pairs (1 is perfect, 0 is chance)."
    elif shared:
        others = f"all said the same of the {shared:,} pairs they share, which leaves nothing to tell from chance."
    else:
        others = "to be measured once two have judged the same pairs (choose “Second opinion”)."
    lines = [f"Pseudonym: <b>{escape(annotator)}</b>", said, f"Agreement between annotators: {others}"]
    return f'<div class="bd-consistency">{"".join(f"<p>{line}</p>" for line in lines)}</div>'
