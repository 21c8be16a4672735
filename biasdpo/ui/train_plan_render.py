"""What the New run panel shows before a start, as HTML: the preset, the data, what the run will take. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from biasdpo.run_config import Preset
from biasdpo.runs import Estimate, Mixture
from biasdpo.ui import label_render, render
from biasdpo.ui.train_reading import source_title
from biasdpo.ui.train_render import device, duration, size


def preset(chosen: Preset | None) -> str:
    """What a preset does and costs."""
    if chosen is None:
        return render.note("No preset for this model: the fields below are the defaults. Lower them for a first look.")
    return f'<div class="bd-preset"><p>{escape(chosen.description)}</p></div>'


def mixture(found: Mixture) -> str:
    """How many pairs there are to train on, where from, and what they have in common beside their meaning."""
    counts = [
        ("to train on", found.pairs_train, "different pairs"),
        ("held out", found.pairs_held_out, "pairs whose prompts are kept from training, to measure on"),
        ("rows read", found.rows_read, "in all sources together"),
        ("repeats", found.repeats, "rows that say again what another says: left out"),
        ("contradictions", found.contradictions, "pairs that are judged both ways equally often: left out"),
        ("bridging", found.bridging, "pairs whose prompt is nearly one on either side of the split: left out"),
    ]
    if found.rows_per_epoch != found.pairs_train:
        counts.insert(1, ("rows an epoch", found.rows_per_epoch, "the training pairs, each as often as its source's weight says"))
    shown = "".join(
        f'<span class="bd-count" title="{escape(tip)}"><b>{number:,}</b> {escape(name)}</span>' for name, number, tip in counts
    )
    sources = ""
    if len(found.per_source) > 1:
        sources = "".join(f"<span>{escape(source_title(name))}: <b>{rows:,}</b> rows</span>" for name, rows in found.per_source)
        sources = f'<div class="bd-per-source">{sources}</div>'
    return f'<div class="bd-mixture" role="status">{shown}{sources}</div>{label_render.meter(found.confounds)}'


def measuring(seconds: float) -> str:
    """An estimate is under way."""
    return render.busy(f"Measuring real steps of this run (the model is loaded for it): {seconds:.0f} s so far …")


def estimate(known: Estimate) -> str:
    """Time, memory against what is free, and what was measured; where it can't fit, why."""
    total = max(known.memory_bytes, known.memory_free_bytes, 1)
    used = 100 * known.memory_bytes / total
    free = 100 * known.memory_free_bytes / total
    needs, has = size(known.memory_bytes), size(known.memory_free_bytes)
    bar = f'<i class="{"" if known.fits else "bd-too-much"}" style="width: {used:.1f}%"></i><b style="left: {free:.1f}%"></b>'
    memory = (
        f'<div class="bd-memory"><span>Memory</span><span class="bd-memory-track" role="img" aria-label="{needs} needed, {has} '
        f'free">{bar}</span><span><b>{needs}</b> at the peak, of {has} free</span></div>'
    )
    facts: list[tuple[str, str]] = [
        ("Time", f"<b>{duration(known.seconds_total)}</b>"),
        ("Steps", f"{known.steps:,} of {known.seconds_per_step:.2g} s"),
        ("Pairs", f"{known.pairs_train:,} to train, {known.pairs_held_out:,} held out"),
        ("Tokens an epoch", f"{known.tokens_per_epoch:,}"),
        ("Device", escape(device(known.device))),
    ]
    if known.dropped or known.cut:
        facts.append(("Too long", f"{known.dropped:,} pairs dropped, {known.cut:,} cut"))
    listed = "".join(f"<span><i>{name}</i> {value}</span>" for name, value in facts)
    refusal = "" if known.fits else render.error(known.refusal)
    parts = " · ".join(f"{escape(name)} {duration(seconds)}" for name, seconds in known.parts.items() if seconds >= 0.5)
    measured = f"Measured {escape(known.measured_at[:16].replace('T', ' '))} UTC on real steps of this run, not guessed."
    return (
        f'<div class="bd-estimate" role="status"><div class="bd-facts">{listed}</div>{memory}'
        f'<p class="bd-measured-at">{f"Of the time: {parts}. " if parts else ""}{measured}</p></div>{refusal}'
    )


def field_errors(lines: Iterable[str]) -> str:
    """What is wrong with which fields, so that one that is folded away is found, too."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<div class="bd-error" role="alert"><b>Not started.</b><ul>{items}</ul></div>' if items else ""
