"""Shared parts of the tabs: the studio they work on, navigation between them, errors, who annotates, formatting."""

from __future__ import annotations

import functools
import hashlib
import html
import inspect
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import gradio as gr

from biasdpo import models
from biasdpo.access import is_owner
from biasdpo.data.exporting import ANNOTATIONS_LICENSE
from biasdpo.data.reader import DatasetReader
from biasdpo.engines import EnginePool, Startup
from biasdpo.errors import BiasDPOError, ConfigError
from biasdpo.labeling import word_diff
from biasdpo.workspace import Workspace

Updates = dict[Any, Any]
"""New values by component, as Gradio's handlers return them."""

QUICK: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
"""For handlers that answer at once: they wait for no other visitor. Through Gradio's queue, which carries `gr.Error`."""

TABS = {"compare": "Compare", "label": "Label", "dataset": "Dataset", "train": "Train", "measure": "Measure", "export": "Export"}
"""The loop's steps in their order: tab id and title."""


# The studio


@dataclass
class Studio:
    """The context that all tabs share; one per page. Its components are built before the tabs."""

    pool: EnginePool
    startup: Startup
    dataset: DatasetReader
    benchmarks: Path | None  # folder of --data-dir
    tabs: gr.Tabs
    identity: gr.BrowserState
    signals: gr.Column
    requests: dict[str, gr.State] = field(default_factory=dict)  # by tab id: what the tab is asked to show
    changes: list[Any] = field(default_factory=list)  # events after which the steps' labels are looked at
    left: list[Callable[[str], None]] = field(default_factory=list)  # called with a session whose requests Gradio has dropped

    @property
    def workspace(self) -> Workspace:
        return self.pool.workspace

    def signal(self, name: str, **options: Any) -> gr.Textbox:
        """A text that only the page's events read. At each output of an event Gradio's page searches its components from the top,
        and for a gr.State it prepares all of them anew: what changes while nobody clicks is a text above the tabs."""
        with self.signals:
            return gr.Textbox("", label=name, visible="hidden", **options)

    def open_outputs(self, tab: str) -> list[Any]:
        """The outputs of a handler that returns `self.open(tab, ...)`."""
        return [self.tabs, self.requests[tab]]

    def open(self, tab: str, **request: Any) -> Updates:
        """Open a tab and ask it to show something: `on_request` of that tab gets the request."""
        return {self.tabs: gr.Tabs(selected=tab), self.requests[tab]: request | {"nonce": secrets.token_hex(4)}}

    def on_request(self, tab: str, handler: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
        """Call `handler(request, *inputs)` whenever another tab (or the page's address) asks this tab to show something."""
        request = self.requests[tab]
        request.change(handles(handler), [request, *inputs], outputs, **QUICK)

    def next_step(self, tab: str, label: str, variant: Any = "secondary") -> gr.Button:
        """A button that opens another tab."""
        button = gr.Button(label, variant=variant, elem_id=f"next-{tab}-{secrets.token_hex(2)}", elem_classes="next-step")
        button.click(lambda: gr.Tabs(selected=tab), None, self.tabs, **QUICK)
        return button


# Errors


def handles(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a BiasDPOError of a handler into Gradio's error message. Its text is text, whatever the user put into it."""

    def shown(exc: BiasDPOError) -> gr.Error:
        return gr.Error(html.escape(str(exc)), duration=None, print_exception=False)

    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
            try:
                yield from handler(*args, **kwargs)
            except BiasDPOError as exc:
                raise shown(exc) from exc

        return stream

    @functools.wraps(handler)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except BiasDPOError as exc:
            raise shown(exc) from exc

    return call


# Who annotates

CONSENT = "2026-11"
"""Version of the text that annotators agree to."""
CONSENT_TEXT = f"""These texts can be prejudiced, false or hurtful. **What is stored with a verdict:** the pair, your edits,
category and note, the time you took, your nickname, and a random browser ID, which lets you withdraw your verdicts
later. They are used to train models and may be published under
[{ANNOTATIONS_LICENSE.replace("-", " ").upper()}](https://creativecommons.org/licenses/by/4.0/).
[For how long, and how to have them erased](privacy)"""
_MAX_NICKNAME = 80


@dataclass(frozen=True)
class Annotator:
    """Who judges in this browser. `secret` is drawn once per browser: it finds one's own judgments again after a restart."""

    nickname: str = ""
    secret: str = ""

    @property
    def agreed(self) -> bool:
        return bool(self.nickname)

    @property
    def browser(self) -> str:
        """The hash stored with a judgment. It identifies nobody to readers of the dataset and matches in this browser only."""
        return hashlib.sha256(self.secret.encode()).hexdigest()[:16] if self.secret else ""


def build_identity() -> gr.BrowserState:
    """The browser's memory of its annotator. The fixed encryption key keeps the value readable when the app restarts."""
    return gr.BrowserState({}, storage_key="biasdpo-annotator", secret="biasdpo")


def annotator_of(identity: Any) -> Annotator:
    """The annotator that a browser says it has; nobody where the value is malformed or consent is missing or outdated."""
    if not isinstance(identity, dict):
        return Annotator()
    nickname, secret = identity.get("annotator"), identity.get("secret")
    if identity.get("consent") != CONSENT or not isinstance(nickname, str) or not isinstance(secret, str):
        return Annotator(secret=secret if isinstance(secret, str) else "")
    return Annotator(nickname.strip()[:_MAX_NICKNAME], secret[:64])


def agreed_annotator(identity: Any) -> Annotator:
    """The annotator, who must have agreed."""
    annotator = annotator_of(identity)
    if not annotator.agreed:
        raise ConfigError("Enter a nickname and agree to what is stored before you judge")
    return annotator


def agree(identity: Any, nickname: str) -> dict[str, str]:
    """The browser's new memory after its annotator has agreed. ConfigError without a nickname."""
    if not isinstance(nickname, str) or not nickname.strip():
        raise ConfigError("Enter a nickname first, to keep your verdicts apart from those of others")
    secret = annotator_of(identity).secret or secrets.token_hex(16)
    return {"annotator": nickname.strip()[:_MAX_NICKNAME], "consent": CONSENT, "secret": secret}


# Models


def model_title(name: str) -> str:
    """A catalog model's title, else the last part of a path, or the Hub id."""
    known = models.catalog().get(name)
    return known.title if known is not None else Path(name).name if name.startswith(("/", "~", ".")) else name


# Formatting


def size_text(count: float) -> str:
    """ "120 bytes", "98.4 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float | None) -> str:
    """ "45 s", "12 min", "3 h 05 min"; "" where unknown."""
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def local_time(utc: str) -> str:
    """An ISO 8601 time as "2026-11-30 14:05" on this machine's clock; "" where it can't be read."""
    try:
        return f"{datetime.fromisoformat(utc).astimezone():%Y-%m-%d %H:%M}"
    except ValueError:
        return ""


def short(text: str, characters: int) -> str:
    """A text in one line, cut with "…" where it is longer."""
    line = " ".join(text.split())
    return line if len(line) <= characters else line[:characters] + "…"


def escape(text: str) -> str:
    """Someone else's text inside Markdown: shown as it is, neither markup nor HTML."""
    escaped = "".join(f"\\{c}" if c in "\\`*_{}[]()#+-.!|>~$" else c for c in text)
    return html.escape(escaped, quote=False).replace("&gt;", ">")


_DIFF_CHARACTERS = 4_000  # of each text: two of 16,000 take 16 s


def diff(one: str, other: str, removed: str, added: str) -> list[tuple[str, str | float | None]]:
    """Both texts in one, for gr.HighlightedText, with the labels of what only one of them has."""
    if max(len(one), len(other)) > _DIFF_CHARACTERS:
        return [("These texts are too long to be compared word by word.", None)]
    kinds = {"same": None, "out": removed, "in": added}
    return [(text, kinds[kind]) for kind, text in word_diff(one, other)]


# Models by name


def pasted(name: str | None) -> str:
    """A name or path as typed or pasted: file managers put quotes around it, or file:// before it."""
    name = (name or "").strip().strip("'\"").strip()
    return unquote(urlsplit(name).path) if name.startswith("file://") else name


def own_choices(names: Iterable[str]) -> list[tuple[str, str]]:
    """Models outside the catalog, for a picker: a path by its last two parts, where these tell them apart.

    Not by the whole path: a dropdown takes typed text for the choice that contains it, so a folder's path would choose a file in
    it.
    """
    own = dict.fromkeys(name for name in names if name and name != "auto" and name not in models.catalog())
    titles = [f"{Path(name).name} · in {Path(name).parent.name}" if Path(name).is_absolute() else name for name in own]
    return [(title if titles.count(title) == 1 else name, name) for title, name in zip(titles, own, strict=True)]


def shown_model(studio: Studio, name: str) -> str:
    """A model as a picker's value: the app's own model may be a path, which only the owner sees."""
    return "auto" if name == studio.startup.model and name not in models.catalog() and not is_owner() else name


def catalog_choices(chosen: str = "") -> list[tuple[str, str]]:
    """A model picker's choices while the page is built, which is the same for everybody: the catalog. "auto" may be chosen."""
    choices = [("Automatic", "auto")] if chosen == "auto" else []
    for spec in map(models.with_files, models.catalog().values()):
        choices.append((spec.title if spec.present else f"{spec.title} (not on this machine)", spec.id))
    return choices


def model_choices(studio: Studio, chosen: str = "") -> list[tuple[str, str]]:
    """A model picker's choices: for the owner also own models (the chosen one, the app's, loaded ones)."""
    own = own_choices([chosen, studio.startup.model, *(spec.id for spec in studio.pool.opened())]) if is_owner() else []
    choices = catalog_choices(chosen)
    at = int(chosen == "auto")  # "Automatic" first
    return [*choices[:at], *own, *choices[at:]]
