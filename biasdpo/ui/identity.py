"""Who judges: a pseudonym and a consent, kept in the visitor's own browser."""

from __future__ import annotations

from typing import Any

import gradio as gr

CONSENT = "2026-11"  # changes with the text below, so that whoever agreed to another text is asked again

TEXT = """
<div class="bd-consent"><p><b>Before the first verdict.</b> The pairs on this page can be prejudiced, false or hurtful: some state
stereotypes of gender, race or religion. Leave whenever you like.</p>
<p><b>What is stored:</b> the pair, your verdict, your edits, category and note, the time you took, and your pseudonym, in this
workspace's <code>preferences.jsonl</code>, to train models and to be shared under
<a href="https://creativecommons.org/licenses/by/4.0/" target="_blank" rel="noopener">CC BY 4.0</a>. No name, no address. You can
undo a verdict, and withdraw any of yours.</p></div>
"""


def browser_state() -> gr.BrowserState:
    """The state that both tabs read. The secret is no secret: it keeps the value readable after a restart."""
    return gr.BrowserState({"annotator": "", "consent": ""}, storage_key="biasdpo-annotator", secret="biasdpo")


def annotator_of(identity: Any) -> str:
    """The pseudonym of somebody who agreed; "" otherwise. What a browser sends is checked like anything else."""
    if not isinstance(identity, dict) or identity.get("consent") != CONSENT:
        return ""
    annotator = identity.get("annotator")
    return annotator.strip()[:80] if isinstance(annotator, str) else ""


def agreed(annotator: str) -> dict[str, str]:
    """What the browser is to keep."""
    return {"annotator": annotator.strip()[:80], "consent": CONSENT}
