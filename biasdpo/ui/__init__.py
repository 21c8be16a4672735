"""The page: `build_ui` makes it, `launch_options` dresses it. Gradio is imported here and in app.py only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gradio as gr

from biasdpo.engines import EnginePool
from biasdpo.ui import components
from biasdpo.ui.compare import CompareTab, Startup
from biasdpo.ui.components import Store
from biasdpo.ui.dataset import DatasetTab
from biasdpo.ui.evaluate import EvaluateTab
from biasdpo.ui.export import ExportTab
from biasdpo.ui.label import LabelSessions, LabelTab
from biasdpo.ui.security import GuardedApp, allowed_hosts
from biasdpo.ui.train import TrainTab
from biasdpo.workspace import ASSETS, is_public_space

# Fonts of the visitor's own system: a web font would ask another host.
_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
_MONO_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")

_HEADER = """
<header class="bd-header"><h1>BiasDPO</h1>
<p>One prompt, two completions: a language model before and after Direct Preference Optimization against bias.</p></header>
"""
_WARNING = """
<div class="bd-warning" id="content-warning" role="note"><p><b>Content warning.</b> This page shows what language models write
about gender, race and religion. The base model's text, and sometimes the tuned one's, can be prejudiced, false or hurtful.
It is shown to be measured and mended, and is nobody's opinion.</p>
<button type="button" id="dismiss-warning">I understand</button></div>
"""
_SPACE = """
<div class="bd-space" id="space-banner" role="note"><b>Public Space.</b> Training, export, import and deletion are switched off
here, and models come from the catalog. Duplicate the Space, or run BiasDPO on your own machine, for the whole workbench.</div>
"""

_QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
_CACHE_SECONDS = (3600, 86400)  # how often uploads and exports in Gradio's cache are looked through, and how old they may get

# What assets/style.css can't say, since Gradio puts its own scope before every selector there.
_STYLE = "html.bd-warned .block:has(#content-warning) { display: none !important; }"


def build_ui(pool: EnginePool, startup: Startup, benchmarks: Path | None = None) -> gr.Blocks:
    """The whole page over these engines. Nothing is loaded here: `startup.resolve` does that once the page is served.

    `benchmarks`: the folder of --data-dir, if any.
    """
    demo = gr.Blocks(title="BiasDPO", analytics_enabled=False, fill_width=True, delete_cache=_CACHE_SECONDS)
    with demo:
        gr.HTML(_HEADER, js_on_load=None)
        if is_public_space():
            gr.HTML(_SPACE, js_on_load=None)
        gr.HTML(_WARNING, js_on_load=None)
        store = Store(pool.workspace, benchmarks)
        sessions = LabelSessions(pool, store)
        who = components.browser_state()
        compare = CompareTab(pool, startup, sessions, store, who)
        with gr.Tabs() as tabs:
            with gr.Tab("Compare", id="compare") as tab:
                compare.build(demo, tabs)
                tab.select(compare.refresh_adapters, compare.engine_inputs[:2], compare.adapter, **_QUICK)
            with gr.Tab("Label", id="label") as tab:
                LabelTab(sessions, store, who, compare.key, compare.engine_inputs).build(demo, tab)
            with gr.Tab("Data set", id="dataset") as tab:
                DatasetTab(store, sessions, who).build(tab)
            with gr.Tab("Train", id="train") as train_tab:
                train = TrainTab(store, pool, compare.pick_adapter, compare.engine_outputs)
                train.build(demo, tabs, train_tab)
            with gr.Tab("Evaluate", id="evaluate") as evaluate_tab:
                evaluate = EvaluateTab(
                    store, pool, sessions, benchmarks, compare.pick_adapter, compare.engine_outputs, compare.prompt
                )
                evaluate.build(demo, tabs, evaluate_tab)
            with gr.Tab("Export", id="export") as tab:
                export = ExportTab(store, compare.pick_adapter, compare.engine_outputs)
                export.build(tabs, tab)
        train.export_button.click(
            export.open_run, [train.chosen, *export.plan_inputs], [tabs, *export.all_outputs], **_QUICK, preprocess=False
        )
        train.evaluate_button.click(
            evaluate.open_run, [train.chosen, *evaluate.new_inputs], [tabs, *evaluate.all_outputs], **_QUICK, preprocess=False
        )
        for tab in tabs.children:  # the address names the run or evaluation that its tab shows, and none on the others
            shows = f"window.bdTrainTab({_js(tab is train_tab)}); window.bdEvaluateTab({_js(tab is evaluate_tab)})"
            tab.select(None, None, None, js=f"() => {{ {shows}; }}", api_visibility="private")
    return demo


def _js(value: bool) -> str:
    return "true" if value else "false"


def launch_options(host: str, names: Iterable[str] = ()) -> dict[str, Any]:
    """Arguments of `Blocks.launch` for this page, except the port.

    host    the address to serve on
    names   further hosts that the app answers to (--allowed-host)
    """
    theme = gr.themes.Default(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        font=_FONTS,
        font_mono=_MONO_FONTS,
    ).set(  # the hues that give text its contrast (WCAG AA), in light and dark
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        slider_color="*primary_600",
        slider_color_dark="*primary_400",
    )
    script = "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in ("page.js", "charts.js", "evaluate.js"))
    return {
        "_app": GuardedApp(allowed_hosts(host, names)),
        "server_name": host,
        "theme": theme,
        "css_paths": [ASSETS / "style.css", ASSETS / "train.css", ASSETS / "export.css", ASSETS / "evaluate.css"],
        "head": f"<style>{_STYLE}</style><script>{script}</script>",
        "footer_links": [],
        "run_history": False,
        "ssr_mode": False,
        "pwa": False,
        "share": False,
        "quiet": True,
        "max_threads": 256,  # each visitor who waits or reads holds one
    }
