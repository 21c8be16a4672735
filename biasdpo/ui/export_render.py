"""What the Export tab shows, as HTML: pure functions of records. Everything that is not ours is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from biasdpo.export_proof import MAX_DROP, MAX_KL_NATS, ExportProof
from biasdpo.exports import Export, ExportRecord, serving
from biasdpo.exports.record import modelfile_file
from biasdpo.ui import render
from biasdpo.ui.train_reading import model_title
from biasdpo.ui.train_render import chip, duration, size, when

FORMATS = {"lora": "LoRA", "merged": "merged"}
_WORDS = {"failed": "nothing is left under its name", "interrupted": "its process is gone", "finished": ""}
_HEADS = ("Export", "State", "Model", "Adapter", "Kind", "Size", "Proof", "When (UTC)")


def refused() -> str:
    """What stands first on a public Space."""
    return (
        '<div class="bd-space" role="note"><b>Export is off on this public Space.</b> Duplicate the Space, or run BiasDPO on '
        "your own machine, to make files for llama.cpp and Ollama.</div>"
    )


def no_exports() -> str:
    """The empty state."""
    return (
        '<div class="bd-empty" role="note"><h2>No exports yet</h2><p>An export is one GGUF file for llama.cpp, Ollama and their '
        "like: an adapter alone, or a whole model with it merged in. Each is compared with the original before it gets its name. "
        "Below, an adapter is chosen already: press <b>Export</b>.</p></div>"
    )


# The list


def table(exports: Sequence[tuple[str, Export]], chosen: str) -> str:
    """All exports by id, the newest first; the chosen one is marked."""
    at = next((i for i, (name, _) in enumerate(exports) if name == chosen), 0)
    rows = "".join(_row(name, export, name == chosen, i == at) for i, (name, export) in enumerate(exports))
    head = "".join(f'<th scope="col">{name}</th>' for name in _HEADS)
    listed = f'<table class="bd-rows bd-exports"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<div class="bd-rows-box">{listed}</div>'


def _row(name: str, export: Export, chosen: bool, tabbed: bool) -> str:
    cells = (
        chip(export.state),
        escape(model_of(export)),
        escape(adapter_of(export)),
        escape(kind_of(export)),
        size(export.out.stat().st_size) if export.out.is_file() else "–",
        escape(verdict(export)),
        escape(when(export.started_at)),
    )
    current = ' aria-current="true"' if chosen else ""
    button = (
        f'<button type="button" tabindex="{0 if tabbed else -1}" data-focus="{escape(name)}">{escape(export.out.name)}</button>'
    )
    return f'<tr data-id="{escape(name)}"{current}><td>{button}</td>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _asked(export: Export, name: str) -> str:
    return str(export.status.request.get(name) or "") if export.status is not None else ""


def model_of(export: Export) -> str:
    """The base model's title."""
    if export.record is not None:
        return export.record.model_title
    return model_title(_asked(export, "model")) or "–"


def adapter_of(export: Export) -> str:
    """The adapter's id; never a folder of this machine."""
    if export.record is not None:
        return export.record.adapter
    name = _asked(export, "run") or _asked(export, "adapter")
    return Path(name).name or "–"


def kind_of(export: Export) -> str:
    """LoRA, or the quantization of a merged file."""
    if export.record is not None:
        return export.record.quantization or FORMATS.get(export.record.format, export.record.format)
    return _asked(export, "quantization") or FORMATS.get(_asked(export, "format"), "–")


def proof_of(export: Export) -> ExportProof | None:
    """The proof of a finished export, or of one that failed it; None where there is none, or none that can be read."""
    row = export.record.proof if export.record is not None else export.status.proof if export.status is not None else {}
    try:
        return ExportProof.from_json(row) if row else None
    except (TypeError, ValueError):
        return None


def verdict(export: Export) -> str:
    """The proof in two words."""
    proof = proof_of(export)
    if proof is None:
        return "–"
    if proof.passed is False:
        return "failed"
    if proof.skipped:
        return "not compared"
    return "equal" if proof.passed else "measured, warning" if proof.warnings else "measured"


# One export


def head(export: Export) -> str:
    """Name, state, progress, numbers, what went wrong."""
    status = export.status
    words = status.phase if status is not None and export.is_active else _WORDS[export.state]
    parts = [
        f'<div class="bd-run-head"><h2>{escape(export.out.name)}</h2>{chip(export.state)}'
        f'<span class="bd-run-words" role="status">{escape(words)}</span></div>'
    ]
    if status is not None and export.is_active:
        parts.append(_progress(status.share))
    parts.append(_numbers(export))
    if status is not None and status.error:
        parts.append(render.error(status.error))
    if export.state == "finished" and export.record is None:
        parts.append(render.note("It has no record of its export: what it was made from, and whether it was proven, is unknown."))
    return f'<section class="bd-run" aria-label="Export {escape(export.out.name)}">{"".join(parts)}</section>'


def _progress(share: float) -> str:
    percent = 100 * share
    return (
        '<div class="bd-progress bd-is-running"><div class="bd-progress-track" role="progressbar" aria-label="Progress" '
        f'aria-valuenow="{percent:.0f}" aria-valuemin="0" aria-valuemax="100"><i style="width: {percent:.1f}%"></i></div>'
        f"<div><span>{percent:.0f} %</span></div></div>"
    )


def _numbers(export: Export) -> str:
    record = export.record
    facts = [("model", escape(model_of(export))), ("adapter", escape(adapter_of(export))), ("kind", escape(kind_of(export)))]
    if record is not None:
        facts.append(("size", size(record.bytes)))
        facts.append(("SHA-256", f'<code title="{escape(record.sha256)}">{escape(record.sha256[:12])}</code>'))
        if record.seconds:
            facts.append(("took", f"{duration(sum(record.seconds.values()))}, proof {duration(record.seconds.get('proof', 0))}"))
    if export.started_at:
        facts.append(("written" if record is not None else "started", f"{escape(when(export.started_at))} UTC"))
    return f'<div class="bd-facts bd-run-facts">{"".join(f"<span><i>{name}</i> {value}</span>" for name, value in facts)}</div>'


def proof_panel(export: Export) -> str:
    """What the proof found: its verdict, its figures beside what is asked of them, warnings; "" where there is no proof."""
    proof = proof_of(export)
    if proof is None:
        return ""
    mark, word = _verdict(proof, is_lora=export.record is not None and export.record.format == "lora")
    warnings = "".join(f"<li>{escape(line)}</li>" for line in proof.warnings)
    parts = [f'<p class="bd-proof-verdict bd-proof-{mark}">{word}</p>']
    if warnings:
        parts.append(f'<ul class="bd-meter-warnings">{warnings}</ul>')
    parts += [render.error(line) for line in proof.failures]
    if proof.skipped:
        parts.append(render.note(proof.skipped))
    rows = "".join(f'<tr><th scope="row">{what}</th><td>{found}</td><td>{ask}</td></tr>' for what, found, ask in figures(proof))
    if rows:
        heads = "".join(f'<th scope="col">{name}</th>' for name in ("Measured", "Found", "Asked"))
        parts.append(
            f'<div class="bd-scroll"><table class="bd-table bd-proof-table"><thead><tr>{heads}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
    parts.append(
        '<p class="bd-measured-at">transformers in F32 against llama.cpp on this file, both on the CPU: F32 KV cache, no flash '
        "attention. KL from the original to the file, in nats a position.</p>"
    )
    return f'<section class="bd-proof-panel" aria-label="Proof"><h3>Proof of equality</h3>{"".join(parts)}</section>'


def _verdict(proof: ExportProof, *, is_lora: bool) -> tuple[str, str]:
    if proof.failures:
        return "bad", "Not equal: the file was thrown away."
    if proof.skipped:
        return "open", "Not compared with the original."
    if proof.passed:
        return "good", '<span aria-hidden="true">✓</span> Equal to the original, to rounding.'
    word = f"Its base GGUF, in {escape(proof.quantization)}," if is_lora else escape(proof.quantization)
    if proof.warnings:
        return "open", f"{word} can't be equal to the original. What it changes was measured: see the warning."
    return "good", f'<span aria-hidden="true">✓</span> {word} can\'t be equal to the original. What it changes was measured.'


def figures(proof: ExportProof) -> list[tuple[str, str, str]]:
    """(what, found, asked) of each measurement, as HTML."""
    rows = []
    if (tokens := proof.tokenizer) is not None:
        found = "all alike" if not tokens.different else f"<b>{tokens.different:,}</b> differ"
        rows.append((f"Tokenizer, {tokens.strings:,} texts", found, "all alike"))
    if (equality := proof.equality) is not None:
        asked = f"at most {MAX_KL_NATS:g}" if proof.lossless else "–"
        rows.append((f"Mean KL, {equality.positions:,} positions", f"{equality.mean_kl:.2g}", asked))
        rows.append(("Largest KL", f"{equality.max_kl:.2g}", "–"))
        rows.append(("Same likeliest token", f"{equality.agreement:.2%}", "–"))
        clear = f"{equality.clear_agreement:.2%} of {equality.clear_positions:,}"
        rows.append(("Same where the two likeliest are clearly apart", clear, "100%" if proof.lossless else "–"))
        if equality.adapter_kl is not None:
            rows.append(("For comparison: mean KL if the adapter were left out", f"{equality.adapter_kl:.2g}", "–"))
    if (survival := proof.survival) is not None:
        change = f"{survival.before:.1%} → <b>{survival.after:.1%}</b>"
        rows.append(
            (f"Reward accuracy, {survival.pairs:,} held-out pairs", change, f"falls by at most {100 * MAX_DROP:g} points")
        )
    return rows


def fallbacks(record: ExportRecord | None) -> str:
    """The tensors that could not have the quantization's type; "" where all have it."""
    fallen = record.written.get("fallbacks") or [] if record is not None else []
    if not fallen:
        return ""
    pairs: dict[tuple[str, str], int] = {}
    for one in fallen:
        key = str(one.get("wanted")), str(one.get("got"))
        pairs[key] = pairs.get(key, 0) + 1
    told = "; ".join(f"{count:,} as {escape(got)} in place of {escape(wanted)}" for (wanted, got), count in pairs.items())
    return (
        f'<div class="bd-note">Widths that the quantization\'s blocks do not divide: {told}. The file is larger than the '
        "quantization's name suggests.</div>"
    )


def elsewhere(record: ExportRecord) -> str:
    """The file's place, and the commands that serve it, to be copied."""
    modelfile = modelfile_file(record.out)
    lines = [
        ("The file:", str(record.out)),
        ("llama.cpp:", serving.llama_server(record)),
        ("Ask it:", serving.request(record)),
        ("Ollama:", serving.ollama(record, modelfile)),
    ]
    if record.command:
        lines.append(("Made by:", record.command))
    return f'<div class="bd-commands">{"".join(map(_command, lines))}</div>'


def _command(line: tuple[str, str]) -> str:
    name, command = line
    return (
        f'<div class="bd-command"><span>{name}</span><code>{escape(command)}</code><button type="button" class="bd-copy" '
        f'data-text="{escape(command)}" aria-label="Copy: {escape(name.rstrip(":"))}">Copy</button></div>'
    )


def modelfile(record: ExportRecord) -> str:
    """Ollama's Modelfile as it lies beside the file."""
    text = serving.modelfile(record)
    return (
        f'<div class="bd-modelfile"><button type="button" class="bd-copy" data-text="{escape(text)}" '
        'aria-label="Copy the Modelfile">Copy</button>'
        f'<pre class="bd-log" tabindex="0" aria-label="Modelfile">{escape(text)}</pre></div>'
    )


def deleting(export: Export) -> str:
    """What is lost when an export is deleted."""
    lost = f"the file ({size(export.out.stat().st_size)}), its record and its Modelfile" if export.out.is_file() else "its log"
    return (
        f'<div class="bd-error" role="alert"><b>Delete {escape(export.out.name)}?</b> Lost are {lost}. The adapter stays, so '
        "it can be exported again.</div>"
    )


# A new export


def plan(about_bytes: int | None, free_bytes: int, needs_bytes: int | None) -> str:
    """What the chosen export takes: disk, and memory for its proof."""
    if about_bytes is None:
        return ""
    text = f"About <b>{size(about_bytes)}</b>; {size(free_bytes)} are free on that disk."
    if needs_bytes is not None:
        text += f" The proof takes about {size(needs_bytes)} of memory, and is left out where there is less."
    return f'<div class="bd-note"><span>{text}</span></div>'
