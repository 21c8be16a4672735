"""The panel for a new evaluation: which sides, on what, how much of it. Every function here refuses on a public Space before it
reads what was named."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from typing import Any

import gradio as gr

from biasdpo import evaluations, fitting, models
from biasdpo.engines import EnginePool
from biasdpo.errors import BiasDPOError
from biasdpo.evaluations.request import RUN, WORKSPACE
from biasdpo.models import AdapterSpec
from biasdpo.ui import evaluate_render, render
from biasdpo.ui.evaluate_choices import MOST_ADAPTERS, missing, requests_of, spec_of, text, texts
from biasdpo.ui.evaluate_view import EvaluationsView
from biasdpo.ui.evaluate_words import BY_GENERATION, BY_LIKELIHOOD, PRICE, adapter_title
from biasdpo.ui.news import Updates
from biasdpo.ui.own_models import own_choices
from biasdpo.ui.train_data import told
from biasdpo.workspace import is_public_space, refuse_on_public_space

FIRST = ["crows_pairs", "stereoset", "bbq"]  # what is ticked at first
FIRST_PRICE = ["perplexity"]
LIMIT = 200  # items at first: minutes on a laptop with the embedded model

_KINDS = [
    ("Benchmarks: base against tuned", "benchmarks"),
    ("Strength curve: one benchmark against perplexity, at strengths 0, 0.25, … 1.5", "curve"),
]
_PAIRS = [
    ("what the adapter was trained on: its held-out pairs", RUN),
    ("the workspace’s judgments: the held-out pairs", WORKSPACE),
]
_POLL_SECONDS = 0.5


class NewEvaluationPanel(EvaluationsView):
    """The components of a new evaluation, and their handlers."""

    pool: EnginePool
    data_dir: str  # the app's --data-dir, "" without
    estimates: dict[str, threading.Event]
    model: gr.Dropdown
    adapters: gr.Dropdown
    kind: gr.Radio
    benchmarks_box: gr.Column
    likelihood: gr.CheckboxGroup
    generation: gr.CheckboxGroup
    price: gr.CheckboxGroup
    curve_of: gr.Dropdown
    limit: gr.Number
    seed: gr.Number
    folder: gr.Textbox
    pairs: gr.Dropdown
    data_view: gr.HTML
    estimate_view: gr.HTML
    estimate_button: gr.Button
    start_button: gr.Button
    new_notice: gr.HTML

    def build_new(self) -> None:
        """Lay out the panel."""
        with gr.Row():
            self.model = gr.Dropdown(
                [], label="Model (catalog id, Hub id or path)", allow_custom_value=True, elem_id="eval-model", min_width=240
            )
            self.adapters = gr.Dropdown(
                [],
                label="Adapters (several: one evaluation each, one after another)",
                multiselect=True,
                max_choices=MOST_ADAPTERS,
                allow_custom_value=True,
                elem_id="eval-adapters",
                min_width=240,
            )
        self.kind = gr.Radio(_KINDS, value="benchmarks", label="Measure", elem_id="eval-kind", elem_classes="bd-cards")
        with gr.Column(elem_id="eval-benchmarks") as self.benchmarks_box:
            self.likelihood = self._boxes("By likelihood: these show this kind of bias", BY_LIKELIHOOD, FIRST, "eval-likelihood")
            self.price = self._boxes("The price: what debiasing costs", PRICE, FIRST_PRICE, "eval-price")
            self.generation = self._boxes("By what is written: slower, and coarser", BY_GENERATION, [], "eval-generation")
        self.curve_of = gr.Dropdown(
            [(title, name) for name, (title, _) in BY_LIKELIHOOD.items()],
            value="crows_pairs",
            label="Benchmark of the curve",
            visible=False,
            elem_id="eval-curve-of",
        )
        with gr.Row():
            self.limit = gr.Number(
                LIMIT,
                precision=0,
                label="Items of each benchmark",
                info="0: all. With fewer, figures are marked “not comparable” with published ones",
                elem_id="eval-limit",
                min_width=200,
            )
            self.seed = gr.Number(
                0, precision=0, label="Seed", info="of the draw and of the bootstrap", elem_id="eval-seed", min_width=160
            )
        with gr.Accordion("Where the items come from", open=False, elem_id="eval-data"), gr.Row():
            self.folder = gr.Textbox(
                self.data_dir,
                label="Folder of benchmark files",
                info="holds one folder a benchmark; empty: the Hugging Face Hub",
                elem_id="eval-folder",
                min_width=240,
            )
            self.pairs = gr.Dropdown(
                _PAIRS,
                value=RUN,
                label="Preference pairs (or a JSONL file’s path)",
                info="only pairs that training never saw are scored",
                allow_custom_value=True,
                elem_id="eval-pairs",
                min_width=240,
            )
        self.data_view = gr.HTML("", js_on_load=None, elem_id="eval-data-view")
        self.estimate_view = gr.HTML("", js_on_load=None, elem_id="eval-estimate-view")
        with gr.Row(elem_id="eval-start-row"):
            self.start_button = gr.Button("Start", variant="primary", elem_id="eval-start", min_width=120, scale=0)
            self.estimate_button = gr.Button("Estimate", elem_id="eval-estimate", min_width=110, scale=0)
        self.new_notice = gr.HTML("", js_on_load=None, elem_id="eval-new-notice")

    @staticmethod
    def _boxes(title: str, known: dict[str, tuple[str, str]], ticked: list[str], elem_id: str) -> gr.CheckboxGroup:
        choices = [(f"{name}: {what}", value) for value, (name, what) in known.items()]
        return gr.CheckboxGroup(choices, value=ticked, label=title, elem_id=elem_id, elem_classes="bd-cards")

    @property
    def new_inputs(self) -> list[Any]:
        ticked = [self.likelihood, self.price, self.generation]
        return [self.model, self.adapters, self.kind, *ticked, self.curve_of, self.limit, self.seed, self.folder, self.pairs]

    @property
    def new_outputs(self) -> list[Any]:
        """All of the panel that a choice may change."""
        boxes = [self.benchmarks_box, self.curve_of, self.likelihood]
        return [self.model, self.adapters, *boxes, self.pairs, self.data_view, self.estimate_view, self.new_notice]

    def wire_new(self, demo: gr.Blocks) -> None:
        """What sets off what in this panel. Starting is the tab's."""
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private", "preprocess": False}
        self.model.input(self.pick_model, self.new_inputs, self.new_outputs, **quick)
        choices = [self.adapters, self.kind, self.likelihood, self.price, self.generation]
        rest = [self.curve_of, self.limit, self.folder, self.pairs]
        changed: list[Any] = [*choices, *rest]
        gr.on(
            [part.input for part in changed], self.replan, self.new_inputs, self.new_outputs, trigger_mode="always_last", **quick
        )
        estimated = [self.estimate_view, self.new_notice]
        slow = quick | {"queue": True, "concurrency_limit": 1}
        self.estimate_button.click(self.estimate, self.new_inputs, estimated, **slow)
        demo.unload(self.close_page)

    # Choosing

    def first(self, run_id: str, *given: Any) -> Updates:
        """The panel was opened: what can be chosen now. `run_id`: the run that is to be measured, "" for what was chosen."""
        if is_public_space():
            return {}
        model, picked, kind, likelihood, *others = given
        shown: Updates = {}
        if run_id:
            try:
                model, picked = models.find_adapter(run_id, models.catalog()["smollm2"], self.workspace), [run_id]
                model = model.model if model is not None else ""
            except BiasDPOError as exc:
                return {self.new_notice: render.error(str(exc))}
            likelihood = list(dict.fromkeys(["preference", *texts(likelihood)]))
            others[-1] = RUN
            shown = {self.likelihood: likelihood, self.pairs: RUN}
        model = text(model) or next(iter(models.catalog()))
        return shown | self._pickers(model, picked) | self._planned(model, self._kept(model, picked), kind, likelihood, *others)

    def fresh(self, notice: str) -> Updates:
        """The panel as it is at first, with a word on what became of the evaluation that was shown."""
        given = ["benchmarks", FIRST, FIRST_PRICE, [], "crows_pairs", LIMIT, 0, self.data_dir, RUN]
        return self.first("", "", [], *given) | ({self.new_notice: notice} if notice else {})

    def pick_model(self, model: Any, _adapters: Any, *others: Any) -> Updates:
        """Another model: the adapters that fit it."""
        if is_public_space():
            return {self.new_notice: evaluate_render.refused()}
        name = text(model)
        return self._pickers(name, []) | self._planned(name, self._kept(name, []), *others)

    def replan(self, *given: Any) -> Updates:
        """Another choice."""
        return self._planned(*given)

    def _pickers(self, model: str, picked: Any) -> Updates:
        specs = map(models.with_files, models.catalog().values())
        choices = [(s.title if s.present else f"{s.title} · not on this machine", s.id) for s in specs]
        named = own_choices([model, *(spec.id for spec in self.pool.opened())])
        fitting_ones = self._adapter_choices(model)
        kept = self._kept(model, picked)
        for name in kept:
            if name not in [value for _, value in fitting_ones]:
                fitting_ones.insert(0, (adapter_title(name), name))
        return {
            self.model: gr.update(choices=[*choices, *named], value=model),
            self.adapters: gr.update(choices=fitting_ones, value=kept),
        }

    def _kept(self, model: str, picked: Any) -> list[str]:
        """The adapters that stay picked; where none is, the first that fits."""
        kept = texts(picked)
        return kept or [next((value for _, value in self._adapter_choices(model)), "none")]

    def _adapter_choices(self, model: str) -> list[tuple[str, str]]:
        """The adapters that fit a model, and none."""
        spec = spec_of(model)
        found = [] if spec is None else fitting.adapters_for(spec, self.workspace)
        return [*((self._title(a), a.id) for a in found), ("none: base alone", "none")]

    def _title(self, adapter: AdapterSpec) -> str:
        return f"run {adapter.id}" if adapter.folder.parent.parent == self.workspace.runs else f"{adapter.id} (shipped)"

    def _planned(self, *given: Any) -> Updates:
        """The panel for these choices. What does not go together is said, and the rest stays as it is."""
        kind = given[2]
        shown: Updates = {
            self.benchmarks_box: gr.update(visible=kind != "curve"),
            self.curve_of: gr.update(visible=kind == "curve"),
            self.new_notice: "",
            self.estimate_view: "",
        }
        try:
            refuse_on_public_space("Evaluation")
            requests = requests_of(*given)
            shown[self.data_view] = evaluate_render.data_note(requests[0].data_dir, missing(requests[0]))
            shown[self.estimate_view] = evaluate_render.estimate(
                evaluations.known_seconds(requests[0], self.workspace), len(requests)
            )
        except Exception as exc:
            shown[self.new_notice] = render.error(told(exc, "Not planned"))
        return shown

    # Estimate and start

    def estimate(self, request: gr.Request, *given: Any) -> Iterator[Updates]:
        """Measure how long it takes, on a few items of each benchmark."""
        ended = threading.Event()
        session = request.session_hash or ""
        self.estimates[session] = ended
        yield {self.new_notice: render.busy("Loading the model and scoring a few items of each benchmark …")}
        try:
            refuse_on_public_space("Evaluation")
            requests = requests_of(*given)
            with ThreadPoolExecutor(1) as executor:
                task = executor.submit(evaluations.estimate_seconds, requests[0], self.workspace, cancelled=ended.is_set)
                while True:
                    try:
                        seconds = task.result(_POLL_SECONDS)
                        break
                    except StillRunning:
                        yield {self.new_notice: gr.skip()}  # a closed page ends the generator here
            yield {self.estimate_view: evaluate_render.estimate(dict(seconds), len(requests)), self.new_notice: ""}
        except Exception as exc:
            yield {self.new_notice: render.error(told(exc, "Not estimated"))}
        finally:
            ended.set()
            self.estimates.pop(session, None)

    def close_page(self, request: gr.Request) -> None:
        """The page was closed: an estimate that it asked for ends. Evaluations go on."""
        event = self.estimates.get(request.session_hash or "")
        if event is not None:
            event.set()

    def start(self, *given: Any) -> Iterator[Updates]:
        """Start an evaluation for each adapter, and show the first."""
        yield {self.new_notice: render.busy("Starting …")}
        started: list[str] = []
        failed = ""
        try:
            refuse_on_public_space("Evaluation")
            requests = requests_of(*given)
            self.pool.free_gpu()
            for request in requests:
                started.append(evaluations.start(request, self.workspace).id)
        except Exception as exc:
            failed = told(exc, "Not started")
            if not started:
                yield {self.new_notice: render.error(failed)}
                return
        more = f"{len(started)} evaluations were started; they run one after another." if len(started) > 1 else ""
        yield {self.new_notice: ""} | self.show_one(started[0], render.error(failed) if failed else render.note(more))
