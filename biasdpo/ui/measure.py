"""The Measure tab."""

from __future__ import annotations

import gradio as gr

from biasdpo.ui.components import Studio


def build_measure(studio: Studio, tab: gr.Tab) -> None:
    """Lay out and wire the tab; called once, inside it."""
    gr.Markdown("Under construction")
