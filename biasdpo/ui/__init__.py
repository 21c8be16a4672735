"""The page: `build_ui` makes it, `launch_options` configures how it is served. Gradio is imported here and in app.py only."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.routes import templates
from gradio.utils import get_upload_folder
from jinja2 import ChoiceLoader, DictLoader

from biasdpo import access
from biasdpo.access import is_owner
from biasdpo.accounts import Accounts
from biasdpo.config import ServeConfig
from biasdpo.data.reader import DatasetReader
from biasdpo.engines import EnginePool, Startup
from biasdpo.errors import BiasDPOError, ConfigError, plural
from biasdpo.jobs import store
from biasdpo.jobs.job import Kind
from biasdpo.ui.compare import build_compare
from biasdpo.ui.components import QUICK, TABS, Studio, Updates, build_identity
from biasdpo.ui.connections import limit_connections
from biasdpo.ui.dataset import build_dataset
from biasdpo.ui.export import build_export
from biasdpo.ui.label import build_label
from biasdpo.ui.limits import Limits, signing_in_from
from biasdpo.ui.measure import build_measure
from biasdpo.ui.security import Callers, GuardedApp, Page, allowed_hosts
from biasdpo.ui.train import build_train
from biasdpo.workspace import ASSETS

# Fonts of the visitor's own system: a web font would ask another host.
_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
_MONO_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")

_TITLE = """# BiasDPO
See a language model's bias, label it, train it away with Direct Preference Optimization, and measure what changed."""
# HTML, because Gradio has no dismissible banner; assets/page.js remembers that it was dismissed.
_WARNING = """<div id="content-warning" role="note"><span><b>Content warning.</b> This page shows prejudiced and false statements
that language models write about people.</span>
<button type="button" id="dismiss-warning">I understand</button></div>"""
_VISITOR = """**You can compare and judge here.** Training, measuring, import, export and deletion are for this app's owner. To
use everything, run BiasDPO on your own machine (a Space: duplicate it)."""

_STEPS_SECONDS = 15.0  # how often the steps look for changes made elsewhere
_CACHE_SECONDS = (3600, 86400)  # how often Gradio's cache of uploads and downloads is cleaned, and the age to remove


def build_ui(pool: EnginePool, startup: Startup, benchmarks: Path | None = None) -> Page:
    """The whole page. Nothing is loaded here: `startup.resolve` does that once the page is served.

    `benchmarks`: the folder of --data-dir, if any.
    """
    demo = Page(title="BiasDPO", analytics_enabled=False, fill_width=True, delete_cache=_CACHE_SECONDS)
    builders = (build_compare, build_label, build_dataset, build_train, build_measure, build_export)
    with demo:
        gr.Markdown(_TITLE, elem_id="title")
        banner = gr.Markdown(visible=False, elem_id="visitor-banner")  # assets/style.css hides what is the owner's beside it
        if os.environ.get("OAUTH_CLIENT_ID"):  # a Space with hf_oauth
            gr.LoginButton("Sign in as the owner", size="sm", min_width=120, elem_id="sign-in")
        gr.HTML(_WARNING, elem_id="content-warning-box")
        signals = gr.Column(elem_id="signals")
        tabs = gr.Tabs(elem_id="steps", overflow_behavior="wrap", render=False)
        studio = Studio(pool, startup, DatasetReader(pool.workspace, benchmarks), benchmarks, tabs, build_identity(), signals)
        demo.left = studio.left
        studio.requests = {name: gr.State({}) for name in TABS}
        tabs.render()  # type: ignore[no-untyped-call]
        steps: dict[str, gr.Tab] = {}
        with tabs:  # holds tabs only: Gradio numbers them by their place among its children
            for name, build in zip(TABS, builders, strict=True):
                with gr.Tab(_step(name), id=name) as steps[name]:
                    build(studio, steps[name])
        states = studio.signal("states")
        with signals:
            timer = gr.Timer(_STEPS_SECONDS)
        looks = [demo.load, timer.tick, tabs.select, *studio.changes]
        gr.on(looks, lambda: json.dumps(step_states(studio)), None, states, **QUICK)

        def relabel(now: str) -> list[gr.Tab]:
            return [gr.Tab(label=_step(name, state)) for name, state in json.loads(now).items()]

        states.change(relabel, states, list(steps.values()), **QUICK)
        for name, tab in steps.items():
            tab.select(None, None, None, js=f"() => window.bdAddress('{name}')", api_visibility="private")

        def follow_address(request: gr.Request) -> Updates:
            """Show what the page's address names: `?tab=train&job=run-3`, or a link of the Compare tab."""
            query = {name: str(value) for name, value in request.query_params.items()}
            name = query.pop("tab", "compare")
            if name in TABS and name != "compare":
                return studio.open(name, **{key: query[key] for key in ("job",) if key in query})
            # Not `tabs`: the visitor may have chosen another step while the page was loading.
            return {request: value for request, value in studio.open("compare", link=query).items() if request is not tabs}

        demo.load(lambda: gr.Markdown(_VISITOR, visible=not is_owner()), None, banner, **QUICK)
        demo.load(follow_address, None, [tabs, *studio.requests.values()], **QUICK)
        # At each message of an event Gradio 6.31 tells every component that was an output before how far it is. Not None, which
        # would mean the outputs.
        for function in demo.fns.values():
            if function.show_progress == "hidden":
                function.show_progress_on = []
    _describe_once(demo)
    demo.queue(api_open=False)  # whatever is asked waits in the queue, which is limited
    return demo


def _describe_once(demo: Page) -> None:
    """Keep what Gradio finds out about component classes. It would inspect them again for each session and each update, though
    the answers never change: a new session takes less than half the time."""
    for kind in {type(block) for block in demo.blocks.values()}:
        kind.__init__.__signature__ = inspect.signature(kind.__init__)  # type: ignore[attr-defined]
    for model in {block.data_model for block in demo.blocks.values() if isinstance(block, gr.components.Component)}:
        if model is not None:
            model.model_json_schema = cache(model.model_json_schema)  # type: ignore[assignment, method-assign]


def launch_options(config: ServeConfig, root: Path) -> dict[str, Any]:
    """Arguments of `Blocks.launch` for this page, except the port.

    root   the workspace's folder
    Also tells `biasdpo.access` who is calling. ConfigError for a file of --auth that has no owner.
    """
    accounts = Accounts(Path(config.auth)) if config.auth else None
    if accounts is not None and not any(user["role"] == "owner" for user in accounts.read().values()):
        raise ConfigError(
            f"--auth {config.auth} has no owner, so nobody could train: add one with "
            f"`python -m biasdpo users add NAME --role owner --file {config.auth}`"
        )
    access.set_caller_source(Callers(accounts, config.public))
    access.set_folders(root, get_upload_folder())

    async def sign_in(name: str, password: str) -> bool:
        if accounts is None:
            return False
        address = signing_in_from.get()
        await asyncio.sleep(accounts.delay(name, address))
        is_right = await asyncio.to_thread(accounts.sign_in, name, password, address)
        access.audit(root, "sign in" if is_right else "sign in refused", by=name[:64])
        return is_right

    theme = gr.themes.Default(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        font=_FONTS,
        font_mono=_MONO_FONTS,
    ).set(  # contrast of text (WCAG AA), in light and dark
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_secondary_shadow="inset 0 0 0 1px *neutral_400",  # or it looks like a disabled one
        button_secondary_shadow_dark="inset 0 0 0 1px *neutral_400",
        slider_color="*primary_600",
        slider_color_dark="*primary_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )
    limits = Limits(config)
    access.set_storage_check(limits.check_stored)
    limit_connections(config)
    _add_to_page((ASSETS / "page.js").read_text(encoding="utf-8"))
    return {
        "_app": GuardedApp(allowed_hosts(config.address, config.allowed_hosts), limits),
        "server_name": config.address,
        "auth": sign_in if accounts else None,
        "theme": theme,
        "css_paths": [ASSETS / "style.css"],
        "footer_links": [],
        "run_history": False,
        "max_file_size": config.max_upload_mb * 2**20,
        "state_session_capacity": config.max_sessions,
        "ssr_mode": False,
        "pwa": False,
        "share": False,
        "quiet": True,
        "max_threads": 256,  # each visitor who waits or reads holds one
    }


def _add_to_page(script: str) -> None:
    """Put a script before Gradio's own. `launch(head=)` adds it after those have loaded, too late for what page.js repairs."""
    environment = templates.env
    name = "frontend/index.html"
    assert environment.loader is not None
    source, _, _ = environment.loader.get_source(environment, name)
    if script not in source:
        page = source.replace("<head>", f"<head><script>{{% raw %}}{script}{{% endraw %}}</script>", 1)
        environment.loader = ChoiceLoader([DictLoader({name: page}), environment.loader])


# The steps of the loop


def step_states(studio: Studio) -> dict[str, str]:
    """Where the loop stands, by tab: "12 verdicts", "run-3 finished"."""

    def newest(kind: Kind) -> str:
        jobs = store.list_jobs(studio.workspace, kind)
        job = next((job for job in jobs if job.is_active), jobs[0] if jobs else None)
        return "" if job is None else f"{job.id}: {job.state}"

    judgments, results = "", ""
    pairs = 0
    try:
        standing = studio.dataset.standing()
        own = sum(row["source"] in ("label", "compare") for row in standing)
        pairs = sum(row["verdict"] == "preferred" and not row["repeat_of"] for row in standing)
        judgments = plural(own, "verdict")
    except BiasDPOError:
        judgments = "can't be read"
    evaluations = store.list_jobs(studio.workspace, "evaluate")
    if any(job.is_active for job in evaluations):
        results = newest("evaluate")
    elif evaluations:
        results = plural(len(evaluations), "evaluation")
    return {
        "compare": "base and tuned",
        "label": judgments,
        "dataset": plural(pairs, "pair"),
        "train": newest("train") or "no run yet",
        "measure": results or "nothing measured yet",
        "export": newest("export") or "nothing exported yet",
    }


def _step(name: str, state: str = "") -> str:
    """A step's label: its number and title, and under them its state (assets/style.css shows the line break)."""
    return f"{list(TABS).index(name) + 1} {TABS[name]}\n{state}"
