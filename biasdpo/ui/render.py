"""What the page shows, as HTML: pure functions of records. Everything that is not ours is escaped."""

from __future__ import annotations

import re
import shlex
from html import escape
from pathlib import PurePath

from biasdpo.compare import Waiting
from biasdpo.engines import Engine, Loading
from biasdpo.models import ModelSpec
from biasdpo.records import Completion, GenerationPair, Sampling
from biasdpo.workspace import ASSETS

BACKEND_TITLES = {"llamacpp": "llama.cpp", "transformers": "transformers"}
STOPPED = {"end_of_text": "end of text", "limit": "token limit", "cancelled": "cancelled"}


def status(completion: Completion) -> str:
    """The line under a pane: tokens, speed, time to first token, why it stopped."""
    if completion.tokens == 0:
        if completion.finish_reason is None:
            return _status("reading the prompt …")
        return _status(f"<b>{STOPPED[completion.finish_reason]}</b> before the first token")
    parts = [f"<b>{completion.tokens}</b> token{'' if completion.tokens == 1 else 's'}"]
    if completion.tokens_per_second is not None:
        parts.append(f"<b>{completion.tokens_per_second:.1f}</b> tokens/s")
    if completion.seconds_to_first_token is not None:
        parts.append(f"first token after <b>{completion.seconds_to_first_token:.2f}</b> s")
    if completion.finish_reason is None:
        parts.append("writing …")
    else:
        parts.append(f"stopped: <b>{STOPPED[completion.finish_reason]}</b>")
    return _status(*parts)


def _status(*parts: str) -> str:
    return '<div class="bd-status">' + "".join(f"<span>{part}</span>" for part in parts) + "</div>"


def no_status() -> str:
    """The line under a pane where nothing was generated yet."""
    return _status("&nbsp;")


def pane_head(title: str, detail: str, copies: str) -> str:
    """A pane's heading; `copies` is the element id of the text that its button copies."""
    return (
        f'<div class="bd-pane-head"><h2>{escape(title)}</h2><span class="bd-detail">{escape(detail)}</span>'
        f'<button type="button" class="bd-copy" data-copies="{copies}" aria-label="Copy the completion: {escape(title)}">'
        "Copy</button></div>"
    )


def tuned_detail(adapter: str, strength: float) -> str:
    """What stands beside the tuned pane's heading: the adapter's name (of a path its last part) and strength."""
    name = PurePath(adapter).name or "default adapter"
    words = {0.0: "strength 0: adapter off", 1.0: "strength 1, as trained"}.get(strength, f"strength {strength:g}")
    return f"{name} · {words}"


def strength_note(strength: float) -> str:
    """The line under the pickers while the strength is 0; nothing else."""
    if strength != 0:
        return ""
    return '<div class="bd-strength" role="status">Strength 0: the adapter is off, both sides are the base model.</div>'


def waiting(event: Waiting) -> str:
    """The place in the queue."""
    visitors = "1 visitor is" if event.ahead == 1 else f"{event.ahead} visitors are"
    return busy(f"{visitors} ahead of you: it is your turn after {'that one' if event.ahead == 1 else 'them'}.")


def loading_first(state: Loading) -> str:
    """Generate was pressed before the model was there."""
    return busy(f"The model is being loaded ({round(100 * state.share)} %): writing starts after that.")


def busy(text: str) -> str:
    """A note while something goes on (the page's Stop button lights up beside it)."""
    return f'<div class="bd-note bd-busy" role="status"><span class="bd-spinner" aria-hidden="true"></span>{escape(text)}</div>'


def note(text: str) -> str:
    """A quiet note."""
    return f'<div class="bd-note" role="status">{escape(text)}</div>' if text else ""


def finished(pair: GenerationPair) -> str:
    """The note over two finished panes."""
    if pair.right is None:
        return note("")
    if pair.strength == 0:
        return note("Strength 0: the adapter is off, both sides are the base model.")
    if pair.left.text == pair.right.text and pair.left.finish_reason != "cancelled":
        return note("Both sides wrote the same this time.")
    return note("")


def error(text: str) -> str:
    """An error in the page: one line that says what, what was got, and the remedy. Commands in backticks stand out."""
    return f'<div class="bd-error" role="alert">{_with_commands(text)}</div>'


def no_comparison(text: str) -> str:
    """The proof line of an engine that failed: nothing is compared, and why."""
    return f'<div class="bd-error" role="alert"><b>No comparison.</b> {_with_commands(text)}</div>'


def _with_commands(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def loading(title: str, state: Loading) -> str:
    """The proof line while a model is being loaded."""
    percent = round(100 * min(max(state.share, 0.0), 1.0))
    return (
        f'<div class="bd-proof bd-loading" role="status"><span class="bd-facts">Loading <b>{escape(title)}</b>: '
        f'{escape(state.what)}</span><progress max="100" value="{percent}" aria-label="Loading progress">{percent} %</progress>'
        f'<span class="bd-percent">{percent} %</span></div>'
    )


def choosing() -> str:
    """The proof line while "auto" is being settled."""
    return (
        '<div class="bd-proof bd-loading" role="status"><span class="bd-facts">Choosing a model for this machine (a first '
        'download can take minutes) …</span><progress aria-label="Choosing a model"></progress></div>'
    )


def not_loaded(title: str) -> str:
    """The proof line of a model that had to make room for another."""
    text = f"{escape(title)} is not loaded: Generate loads it."
    return f'<div class="bd-proof" role="status"><span class="bd-facts">{text}</span></div>'


def proof(engine: Engine, reason: str = "") -> str:
    """The proof line: what is compared, on what, and that the comparison is honest."""
    backend = engine.backend
    facts = [("model", escape(engine.spec.title))]
    if engine.adapter is None:
        facts.append(("adapter", "none (base only)"))
    else:
        parents = [f"run {escape(engine.adapter.run_id)}"] if engine.adapter.run_id else []
        if engine.adapter.dataset_sha256:
            digest = escape(engine.adapter.dataset_sha256)
            parents.append(f'data <code title="SHA-256 of the training data: {digest}">{digest[:12]}</code>')
        named = f" ({', '.join(parents)})" if parents else " (no record of its training)"
        facts.append(("adapter", escape(engine.adapter.id) + named))
    facts.append(("backend", escape(BACKEND_TITLES.get(backend.name, backend.name))))
    facts.append(("device", escape(backend.device)))
    listed = "".join(f"<span><i>{name}</i> {value}</span>" for name, value in facts)
    kl = backend.proof.kl_nats
    verdict = "base equals the bare model"
    verdict += "" if kl is None else f"; tuned differs by KL <b>{kl:.3g}</b> nats"
    tip = f"Checked on a canary text when the model was loaded, at strength 1. Largest logit difference, base to bare model: \
{backend.proof.base_max_difference:.3g}; between two runs of base: {backend.proof.noise:.3g}"
    if backend.proof.tuned_max_difference is not None:
        tip += f"; tuned to base: {backend.proof.tuned_max_difference:.3g}"
    why = f'<div class="bd-reason">{_with_commands(reason)}</div>' if reason else ""
    return (
        f'<div class="bd-proof bd-proven" role="status"><div class="bd-facts">{listed}</div>'
        f'<div class="bd-verdict" title="{escape(tip)}"><span aria-hidden="true">✓</span> {verdict}</div>{why}</div>'
    )


def base_only(spec: ModelSpec, adapters: int) -> str:
    """What stands in the tuned pane's place where there is no adapter: why, and the command that trains one."""
    if adapters or spec.default_adapter:
        why = "No adapter is chosen, so there is nothing to compare with. Choose one under Adapter, or train another:"
    else:
        why = f"No adapter is shipped for {spec.title}: nobody has trained one with this project yet. This command trains one:"
    return (
        '<div class="bd-base-only" role="note"><h2>Base only</h2>'
        f'<p>{escape(why)}</p><pre tabindex="0"><code>{escape(train_command(spec))}</code></pre>'
        "<p>Or start it on the Train tab. When the run has finished, it is listed under Adapter at once.</p></div>"
    )


def train_command(spec: ModelSpec) -> str:
    """The command that trains an adapter for this model, with its shipped config where there is one."""
    shipped = f"training/configs/{spec.id}-standard.toml"
    config = f" --config {shipped}" if (ASSETS.parent / shipped).is_file() else ""
    name = shlex.quote(spec.id)
    return f"python -m biasdpo train --model {name} --dataset hub:ahmedallam/BiasDPO{config} --run-id my-first-run"


def settings_used(sampling: Sampling) -> str:
    """One line that says how a pair was drawn."""
    if sampling.temperature == 0:
        return f"greedy (temperature 0), at most {sampling.max_new_tokens} tokens"
    return f"seed {sampling.seed}, temperature {sampling.temperature:g}, at most {sampling.max_new_tokens} tokens"
