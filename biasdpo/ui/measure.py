"""The Measure tab: base against tuned on benchmarks. It only starts evaluations and reads their files."""

from __future__ import annotations

import json
import shlex
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache

from biasdpo import benchmarks, models
from biasdpo.benchmarks.titles import BENCHMARKS, Group, benchmark_title, better_title, headline, metric_title
from biasdpo.config import RUN, WORKSPACE, EvaluationConfig, Setting
from biasdpo.errors import BiasDPOError, ConfigError
from biasdpo.evaluation import report, results
from biasdpo.evaluation.report import figure
from biasdpo.evaluation.results import Flip, TableRow
from biasdpo.evaluation.run import preference_benchmark
from biasdpo.jobs import store
from biasdpo.jobs.estimate import estimate_evaluation, known_seconds
from biasdpo.jobs.job import Job
from biasdpo.jobs.resolve import command_of, parts
from biasdpo.labeling import word_diff
from biasdpo.ui import charts
from biasdpo.ui.components import QUICK, Studio, Updates, duration, escape, handles, local_time, plural
from biasdpo.ui.jobs import JobPanel, build_jobs, refuse_if_public, state_word
from biasdpo.workspace import ASSETS, is_public_space

STRENGTHS = ("0", "0.25", "0.5", "0.75", "1", "1.25", "1.5")
MAX_ADAPTERS = MAX_COMPARED = 6  # as many as the charts have colors
LIMIT = 200  # items at first: minutes on a laptop
MAX_FLIPS = 200
_POLL_SECONDS = 0.5
_PAIRS = [("The adapter's held-out pairs", RUN), ("The workspace's held-out judgments", WORKSPACE)]
_SYMBOLS = {"less biased": "▲", "better": "▲", "no clear difference": "○", "worse": "▼"}
_INTRO = """### Nothing measured yet
An evaluation scores the base model and an adapter on the same items and says, with confidence intervals, what changed:
less biased, no clear difference, or worse, and at what quality cost. Choose benchmarks and press **Start**."""
_HELP = """Each row: base and tuned on the same items, with 95 % bootstrap intervals; *change* is tuned − base, paired. *p*: paired
randomization test, Holm-corrected over the table. "Less biased" and "better" need an interval that excludes no change and p below
0.05; "worse" needs the interval only. In the plot, one unit is half the width of base's own interval."""

Result = Mapping[str, Any]


# Layout


@dataclass
class Form:
    """What to measure."""

    model: gr.Dropdown
    adapters: gr.Dropdown
    benchmarks: dict[Group, gr.CheckboxGroup]
    limit: gr.Number
    strengths: gr.Dropdown
    settings: dict[str, Any]  # the other settings of EvaluationConfig, by name
    plan: gr.Markdown
    start: gr.Button
    estimate: gr.Button

    @property
    def inputs(self) -> set[Any]:
        """All fields; a handler gets their values by component."""
        return {self.model, self.adapters, *self.benchmarks.values(), self.limit, self.strengths, *self.settings.values()}


@dataclass
class View:
    """The outcome of the chosen evaluation or, where there is none, of the shipped adapter's."""

    intro: gr.Markdown
    first: gr.Button
    box: gr.Column
    progress: gr.Markdown
    sentence: gr.Markdown
    facts: gr.Markdown
    table: gr.Dataframe
    forest: gr.Plot
    others: gr.Dropdown
    group: gr.Dropdown
    group_table: gr.Dataframe
    group_plot: gr.Plot
    group_tab: gr.Tab
    flip_benchmark: gr.Dropdown
    flip_way: gr.Dropdown
    flips: gr.Dataframe
    flip_texts: gr.HighlightedText
    flip_facts: gr.Markdown
    flip_index: gr.State
    flip_try: gr.Button
    flip_tab: gr.Tab
    curve: gr.Dropdown
    curve_plot: gr.Plot
    curve_tab: gr.Tab
    downloads: dict[str, gr.DownloadButton]
    try_in_compare: gr.Button
    to_card: gr.Button
    command: gr.Textbox

    @property
    def outputs(self) -> list[Any]:
        """All that another result changes."""
        shown = [self.intro, self.first, self.box, self.sentence, self.facts, self.table, self.forest, self.others, self.command]
        by_group = [self.group, self.group_table, self.group_plot, self.group_tab]
        flips = [self.flip_benchmark, self.flip_tab, *self.flip_outputs]
        curve = [self.curve, self.curve_plot, self.curve_tab]
        return [*shown, *by_group, *flips, *curve, *self.downloads.values(), self.try_in_compare, self.to_card]

    @property
    def flip_outputs(self) -> list[Any]:
        return [self.flip_way, self.flips, *self.flip_detail]

    @property
    def flip_detail(self) -> list[Any]:
        return [self.flip_texts, self.flip_facts, self.flip_index, self.flip_try]


def build_measure(studio: Studio, tab: gr.Tab) -> None:
    """Lay out and wire the tab; called once, inside it."""
    with gr.Row(elem_id="measure"):
        with gr.Column(scale=5, min_width=320):
            form = _build_form(studio)
        with gr.Column(scale=8, min_width=320):
            panel = build_jobs(studio, "evaluate", ["Evaluation", "State", "Benchmarks", "Items", "Started"], _row_of)
            view = _build_view()
            with gr.Column(visible=False) as details:
                panel.build_log()
            following = gr.Button("Next: Export", elem_id="measure-next", elem_classes="next-step")
    panel.watch("result.json", partial(_show_result, studio, view), view.outputs)
    panel.watch(
        "status",
        lambda job: {view.progress: _progress(job), details: gr.Column(visible=job is not None)},
        [view.progress, details],
    )
    panel.wire(tab)
    _wire_form(studio, tab, form, panel, view)
    _wire_view(studio, panel, view, following)


def _build_form(studio: Studio) -> Form:
    gr.Markdown("### What to measure")
    with gr.Row():
        model = gr.Dropdown([], label="Base model", allow_custom_value=True, min_width=150, elem_id="measure-model")
        adapters = gr.Dropdown(
            [], label="Adapters", multiselect=True, max_choices=MAX_ADAPTERS, allow_custom_value=True, min_width=150,
            elem_id="measure-adapters",
        )  # fmt: skip
    first = _recommended(studio.benchmarks)
    boxes = {"bias": _choices("bias", "Bias benchmarks", first), "quality": _choices("quality", "Quality cost", first)}
    with gr.Row():
        limit = gr.Number(
            LIMIT, precision=0, minimum=0, label="Items per benchmark (0: all)", min_width=150, elem_id="measure-limit"
        )
        strengths = gr.Dropdown(
            list(STRENGTHS), value=["1"], multiselect=True, label="Adapter strengths (several: a curve)", min_width=150,
            elem_id="measure-strengths",
        )  # fmt: skip
    with gr.Row(elem_classes="actions"):
        start = gr.Button("Start", variant="primary", interactive=not is_public_space(), elem_id="measure-start")
        estimate = gr.Button("Estimate time", interactive=not is_public_space(), elem_id="measure-estimate")
    plan = gr.Markdown(elem_id="measure-plan")
    with gr.Accordion("Advanced", open=False, elem_id="measure-advanced"):
        boxes["generation"] = _choices("generation", "Generation-based (slower, noisier)", [])
        fields = {"dataset": gr.Dropdown(_PAIRS, value=RUN, label="Preference pairs", allow_custom_value=True,
                                         info="Or the path of the file that was trained on. Only its held-out pairs are scored.",
                                         elem_id="measure-dataset")}  # fmt: skip
        for name in ("data_dir", "seed", "backend", "samples", "max_new_tokens", "toxicity_scorer"):
            fields[name] = _field(EvaluationConfig.settings()[name])
        fields["data_dir"].value = "" if studio.benchmarks is None else str(studio.benchmarks)
    with gr.Accordion("What the benchmarks ask", open=False):
        gr.Markdown(
            "\n".join(f"- **{title.name}**: {title.about}" for name, title in BENCHMARKS.items() if name in benchmarks.NAMES)
        )
    return Form(model, adapters, boxes, limit, strengths, fields, plan, start, estimate)


def _choices(group: Group, label: str, first: Sequence[str]) -> gr.CheckboxGroup:
    named = [(title.name, name) for name, title in BENCHMARKS.items() if title.group == group and name in benchmarks.NAMES]
    chosen = [name for _, name in named if name in first]
    return gr.CheckboxGroup(named, value=chosen, label=label, elem_id=f"measure-{group}")


def _field(setting: Setting) -> Any:
    """The form field of a setting."""
    if setting.kind == "choice":
        return gr.Dropdown(list(setting.choices), value=setting.default, label=setting.label, info=setting.help)
    text = setting.format(setting.default)
    return gr.Textbox(text, label=setting.label, info=setting.help, max_lines=1, elem_id=f"measure-{setting.name}")


def _build_view() -> View:
    intro = gr.Markdown(_INTRO, elem_id="measure-intro")
    first = gr.Button("Start the first evaluation", interactive=not is_public_space(), elem_id="measure-first")
    progress = gr.Markdown(elem_id="measure-progress")
    with gr.Column(visible=False, elem_id="measure-result") as box:
        sentence = gr.Markdown(elem_id="measure-sentence")
        facts = gr.Markdown(elem_id="measure-facts")
        with gr.Row(elem_classes="actions"):
            try_in_compare = gr.Button("Try in Compare", size="sm", elem_id="measure-try")
            to_card = gr.Button("Add to model card", size="sm", elem_id="measure-card")
            downloads = {
                kind: gr.DownloadButton(label, size="sm", elem_id=f"measure-{kind}")
                for kind, label in (("md", "Report"), ("csv", "CSV"), ("json", "JSON"))
            }
        table = gr.Dataframe(
            label="Results", interactive=False, wrap=True, datatype="str", max_height=420, elem_id="measure-table"
        )
        forest = gr.Plot(label="Improvement over base", elem_id="measure-forest")
        others = gr.Dropdown(
            [], multiselect=True, max_choices=MAX_COMPARED - 1, label="Compare with other evaluations", elem_id="measure-others"
        )
        with gr.Tabs(elem_id="measure-details"):
            with gr.Tab("By group") as group_tab:
                group = gr.Dropdown([], label="Metric", elem_id="measure-group")
                group_plot = gr.Plot(show_label=False)
                group_table = gr.Dataframe(
                    label="By group", interactive=False, datatype="str", max_height=360, elem_id="measure-groups"
                )
            with gr.Tab("Flipped items") as flip_tab:
                with gr.Row():
                    flip_benchmark = gr.Dropdown([], label="Benchmark", min_width=160, elem_id="measure-flip-benchmark")
                    flip_way = gr.Dropdown([], label="Direction", min_width=160, elem_id="measure-flip-way")
                flips = gr.Dataframe(
                    label="Items that base and tuned decide differently; select one", interactive=False, datatype="str", wrap=True,
                    max_height=320, elem_id="measure-flips",
                )  # fmt: skip
                flip_texts = gr.HighlightedText(
                    label="The two texts (the first is the less biased one)", visible=False, combine_adjacent=True,
                    color_map={"first": charts.TUNED, "second": charts.WARN}, elem_id="measure-flip-texts",
                )  # fmt: skip
                flip_facts = gr.Markdown(visible=False)
                flip_try = gr.Button("Try this item in Compare", size="sm", visible=False, elem_id="measure-flip-try")
                flip_index = gr.State("")
            with gr.Tab("By strength") as curve_tab:
                curve = gr.Dropdown([], label="Metric", elem_id="measure-curve")
                curve_plot = gr.Plot(show_label=False, elem_id="measure-curve-plot")
        with gr.Accordion("How to read this", open=False):
            gr.Markdown(_HELP)
            command = gr.Textbox(
                label="The same on the command line", interactive=False, lines=2, buttons=["copy"], elem_id="measure-command"
            )
    return View(
        intro, first, box, progress, sentence, facts, table, forest, others, group, group_table, group_plot, group_tab,
        flip_benchmark, flip_way, flips, flip_texts, flip_facts, flip_index, flip_try, flip_tab, curve, curve_plot, curve_tab,
        downloads, try_in_compare, to_card, command,
    )  # fmt: skip


# A new evaluation


def _recommended(data_dir: Path | None) -> Sequence[str]:
    """The first selection: what is on this machine."""
    return benchmarks.default_benchmarks(data_dir)


def configs_of(form: Form, values: Mapping[Any, Any]) -> list[EvaluationConfig]:
    """One evaluation per adapter. Raises ConfigError for what can't be one."""
    names = [name for box in form.benchmarks.values() for name in values[box] or ()]
    if not names:
        raise ConfigError("No benchmark is selected: select at least one")
    given: dict[str, Any] = {}
    for name, field in form.settings.items():
        setting, value = EvaluationConfig.settings()[name], values[field]
        if isinstance(value, str) and value.strip():
            given[name] = setting.parse(value.strip())
    if "preference" not in names:
        given.pop("dataset", None)
    if values[form.limit]:
        given["limit"] = int(values[form.limit])
    strengths = EvaluationConfig.settings()["strengths"].parse(",".join(values[form.strengths] or ["1"]))
    adapters = [name.strip() for name in values[form.adapters] or ["none"]]
    return [
        EvaluationConfig(
            model=str(values[form.model] or "").strip(),
            adapter=adapter,
            benchmarks=tuple(names),  # type: ignore[arg-type]
            strengths=(1.0,) if adapter == "none" else strengths,
            **given,
        )
        for adapter in adapters
    ]


def _plan(studio: Studio, form: Form, values: Mapping[Any, Any]) -> str:
    """What the selection will take and score, one line each."""
    if is_public_space():
        return "Measuring is turned off on this public Space. Finished evaluations can be read."
    try:
        configs = configs_of(form, values)
        seconds = known_seconds(configs[0], studio.workspace)
        lines = [_time_line(seconds, len(configs))]
        data_dir = Path(configs[0].data_dir).expanduser() if configs[0].data_dir else None
        absent = [benchmark_title(name) for name in configs[0].benchmarks if not benchmarks.has_items(name, data_dir)]
        if absent and data_dir is None:
            lines.append(f"Downloaded from the Hugging Face Hub: {', '.join(absent)}.")
        elif absent:
            lines.append(f"⚠ Not in {escape(str(data_dir))}: {', '.join(absent)}. The others are scored without.")
        if "preference" in configs[0].benchmarks:
            adapter = models.find_adapter(configs[0].adapter, models.find(configs[0].model), studio.workspace)
            pairs = preference_benchmark(configs[0].dataset, adapter, studio.workspace)
            lines.append(f"Preference pairs: {escape(pairs.pairs_source)}.")
    except BiasDPOError as exc:
        return f"⚠ {escape(str(exc))}"
    return "\n\n".join(lines)


def _time_line(seconds: Mapping[str, float | None], copies: int) -> str:
    known = [value for value in seconds.values() if value is not None]
    several = f" for {plural(copies, 'adapter')}, one after another" if copies > 1 else ""
    if not known:
        return "Time: unknown until it is estimated."
    unknown = [benchmark_title(name) for name, value in seconds.items() if value is None]
    more = f", plus {', '.join(unknown)} (not estimated)" if unknown else ""
    return f"Time: about {duration(sum(known) * copies)}{several}{more}. Cached answers take none."


def _pickers(studio: Studio, form: Form, model: Any, picked: Any) -> Updates:
    """The choices of model and adapters; what was picked stays, else the first adapter that fits."""
    specs = [models.with_files(spec) for spec in models.catalog().values()]
    named = [(spec.title if spec.present else f"{spec.title} (not on this machine)", spec.id) for spec in specs]
    named += [(spec.title, spec.id) for spec in studio.pool.opened() if spec.id not in models.catalog()]
    opened = [spec.id for spec in studio.pool.opened()]
    model = str(model or "").strip() or next(iter([*opened, *models.catalog()]))
    try:
        spec = models.with_files(models.catalog()[model]) if model in models.catalog() else models.find(model)
        fitting = [(_adapter_title(studio, one), one.id) for one in models.adapters_for(spec, studio.workspace)]
    except BiasDPOError:  # said in the plan
        fitting = []
    picked = list(picked or ()) or [next((value for _, value in fitting), "none")]
    return {
        form.model: gr.Dropdown(choices=named, value=model),
        form.adapters: gr.Dropdown(choices=[*fitting, ("None: the base model alone", "none")], value=picked),
    }


def _adapter_title(studio: Studio, adapter: models.AdapterSpec) -> str:
    return f"Run {adapter.id}" if adapter.folder.parent.parent == studio.workspace.runs else f"{adapter.id} (shipped)"


def _wire_form(studio: Studio, tab: gr.Tab, form: Form, panel: JobPanel, view: View) -> None:
    pickers = [form.model, form.adapters]

    def fill(model: Any, picked: Any) -> Updates:
        return _pickers(studio, form, model, picked)

    def plan(values: dict[Any, Any]) -> str:
        return _plan(studio, form, values)

    def start(values: dict[Any, Any]) -> Updates:
        refuse_if_public("Measuring")
        configs = configs_of(form, values)
        started = [store.start_evaluation(config, studio.workspace, command="the page's Measure tab") for config in configs]
        if len(started) > 1:
            gr.Info(f"{plural(len(started), 'evaluation')} started; they run one after another.")
        return panel.show(started[0].id)

    def estimate(values: dict[Any, Any]) -> Iterator[str]:
        refuse_if_public("Measuring")
        configs, ended = configs_of(form, values), threading.Event()
        yield "Time: loading the model and scoring a few items …"
        try:
            with ThreadPoolExecutor(1) as executor:
                task = executor.submit(estimate_evaluation, configs[0], studio.workspace, cancelled=ended.is_set)
                while True:
                    try:
                        task.result(_POLL_SECONDS)
                        break
                    except StillRunning:
                        yield gr.skip()  # a closed page or Start ends the generator here
                    except BaseException:
                        ended.set()
                        raise
            yield plan(values)
        finally:
            ended.set()

    def prefill(request: dict[str, Any], bias: list[str]) -> Updates:
        """Prepare the evaluation of a run."""
        run_id = request.get("run")
        if not isinstance(run_id, str):
            return {form.plan: gr.skip()}
        adapter = models.from_run(studio.workspace, run_id)
        shown = _pickers(studio, form, adapter.model, [run_id])
        return shown | {form.benchmarks["bias"]: [*dict.fromkeys(["preference", *bias])], form.settings["dataset"]: RUN}

    tab.select(fill, pickers, pickers, **QUICK)
    form.model.input(lambda model: fill(model, []), form.model, pickers, **QUICK)
    gr.on([field.change for field in form.inputs], handles(plan), form.inputs, form.plan, trigger_mode="always_last", **QUICK)
    estimating = form.estimate.click(handles(estimate), form.inputs, form.plan, **QUICK | {"concurrency_limit": 1})
    gr.on(
        [form.start.click, view.first.click], handles(start), form.inputs, panel.chosen_outputs(), cancels=[estimating], **QUICK
    )
    studio.on_request(
        "measure", prefill, [form.benchmarks["bias"]], [*pickers, form.benchmarks["bias"], form.settings["dataset"], form.plan]
    )


# The list and the chosen evaluation


def _row_of(job: Job) -> list[Any]:
    about = _about(job)
    names = ", ".join(map(benchmark_title, about.benchmarks))
    return [job.id, state_word(job), names, "all" if about.limit is None else str(about.limit), local_time(job.started_at)]


def _about(job: Job) -> results.About:
    if job.config is not None:
        return results.About(job.config.model, job.config.adapter, tuple(parts(job.config)), job.config.limit)
    return results.about(job.file, job.file.stat().st_mtime_ns) if job.has_result else results.About("", "", (), None)


def _progress(job: Job | None) -> str:
    """Each benchmark's items, while they are scored."""
    if job is None or not job.is_active:
        return ""
    shown = [f"{benchmark_title(one.name)} {one.done:,} of {one.total:,}" for one in job.status.progress if one.total]
    return " · ".join(shown)


def _result_of(job: Job | None) -> Result | None:
    """The job's result; of no job, the shipped adapter's. None while there is none."""
    if job is None:
        return results.load(_shipped())
    if not job.has_result:
        return None
    return results.load_unchanged(job.file, job.file.stat().st_mtime_ns)


def _shipped() -> Path:
    return ASSETS / "adapters" / "smollm2-biasdpo" / "evaluation.json"


def _show_result(studio: Studio, view: View, job: Job | None) -> Updates:
    result = _result_of(job)
    shown: Updates = {view.intro: gr.Markdown(visible=job is None), view.first: gr.Button(visible=job is None)}
    if result is None:
        return shown | {view.box: gr.Column(visible=False)} | {one: gr.skip() for one in view.outputs[3:]}
    name = "shipped" if job is None else job.id
    known = result["provenance"]
    may_write = job is not None and bool(known.get("adapter")) and not is_public_space()
    others = (
        []
        if job is None
        else [one.id for one in store.list_jobs(studio.workspace, "evaluate") if one.has_result and one.id != name]
    )
    command = [] if job is None or job.config is None or is_public_space() else command_of(job.config)
    return (
        shown
        | {
            view.box: gr.Column(visible=True),
            view.sentence: f"### {escape(report.sentence(result))}",
            view.facts: _facts(result, job),
            view.others: gr.Dropdown(choices=others, value=[], visible=bool(others)),
            view.try_in_compare: gr.Button(visible=bool(known.get("adapter"))),
            view.to_card: gr.Button(visible=may_write),
            view.command: gr.Textbox(value=shlex.join(["python", *command[1:]]), visible=bool(command)),
        }
        | _show_table(view, [(name, result)], command)
        | _show_groups(view, result)
        | _show_flip_choices(view, result)
        | _show_curves(view, result)
    )


def _facts(result: Result, job: Job | None) -> str:
    """What was scored, and what a reader must know about it."""
    known = result["provenance"]
    adapter = escape(Path(known.get("adapter") or "none").name)
    strengths = ", ".join(f"{strength:g}" for strength in known.get("strengths") or [known.get("strength", 1.0)])
    facts = [f"{'The shipped adapter' if job is None else 'Adapter'} **{adapter}** on **{escape(Path(known['model']).name)}**"]
    facts += [f"strength {strengths}", f"seed {known.get('seed', 0)}", f"BiasDPO {escape(known.get('code_version', ''))}"]
    lines = [" · ".join(facts)]
    if pairs := known.get("pairs_source"):
        lines.append(f"Preference pairs: {escape(pairs)}.")
    lines += [
        f"⚠ {escape(benchmark_title(name))} was not scored: {escape(why)}" for name, why in result.get("missing", {}).items()
    ]
    for name, found in result["benchmarks"].items():
        title = escape(benchmark_title(name))
        if found["n_failed"]:
            reason = found["failures"][0]["reason"] if found.get("failures") else "the reason is unknown"
            lines.append(f"{title}: {plural(found['n_failed'], 'item')} could not be scored; the first: {escape(reason)}")
        if found.get("not_comparable"):
            lines.append(f"{title} is not comparable with other evaluations: {escape(found['not_comparable'])}.")
    return "\n\n".join(lines)


# Tables and charts of a result


def _show_table(view: View, labeled: Sequence[tuple[str, Result]], command: Sequence[str] = ()) -> Updates:
    """One result, or several side by side."""
    (name, result), *more = labeled
    if more:
        headers = ["Benchmark", "Metric", *(label for label, _ in labeled)]
        rows = [
            [benchmark_title(row.benchmark), _metric(row.metric, row.better), *map(_compared, row.cells)]
            for row in results.compare(labeled)
        ]
        text = report.markdown(labeled)
    else:
        headers = ["Benchmark", "Metric", "Items", "Base", "Tuned", "Change", "p", "Verdict"]
        rows = [[benchmark_title(row.benchmark), _metric(row.metric, row.better), *_cells(row)] for row in results.table(result)]
        text = report.markdown(result, command)
    files = {"md": text, "csv": report.csv_text(result), "json": json.dumps(result, ensure_ascii=False)}
    plot = charts.forest(labeled)
    return {view.table: gr.Dataframe(value=rows, headers=headers), view.forest: gr.Plot(value=plot, visible=plot is not None)} | {
        button: _file(f"{name}.{kind}", files[kind], button) for kind, button in view.downloads.items()
    }


def _file(name: str, text: str, button: gr.DownloadButton) -> str:
    """A file for a download, in the folder that Gradio serves and cleans."""
    return save_bytes_to_cache(text.encode(), name, button.GRADIO_CACHE)


def _metric(name: str, better: str) -> str:
    return f"{metric_title(name)} ({better_title(better)})" if better else metric_title(name)


def _cells(row: TableRow) -> list[str]:
    p = "" if row.p_holm is None else "< 0.001" if row.p_holm < 0.001 else f"{row.p_holm:.3f}"
    change = figure(row.difference, row.ci, signed=row.no_change == 0)
    return [f"{row.n:,}", figure(row.base, row.base_ci), figure(row.tuned, row.tuned_ci), change, p, _verdict(row)]


def _compared(row: TableRow | None) -> str:
    if row is None:
        return ""
    value = figure(row.tuned, row.tuned_ci) or figure(row.base, row.base_ci) or figure(row.difference, row.ci)
    return f"{value} {_verdict(row)}".strip()


def _verdict(row: TableRow) -> str:
    return f"{_SYMBOLS.get(row.verdict, '')} {row.verdict}".strip()


def _show_groups(view: View, result: Result, picked: str = "") -> Updates:
    """One metric by group; `picked`: "benchmark/metric", "" for the first."""
    choices = []
    for name in result["benchmarks"]:
        metrics = list(dict.fromkeys(row.metric for row in results.group_table(result, name) if row.base is not None))
        first = headline(name, metrics)
        metrics.sort(key=lambda metric: metric != first)
        choices += [(f"{benchmark_title(name)}: {metric_title(metric)}", f"{name}/{metric}") for metric in metrics]
    if not choices:
        return {view.group_tab: gr.Tab(visible=False)}
    picked = picked or choices[0][1]
    name, _, metric = picked.partition("/")
    whole = [row for row in results.table(result) if (row.benchmark, row.metric) == (name, metric)]
    rows = whole + [row for row in results.group_table(result, name) if row.metric == metric and row.base is not None]
    return {
        view.group_tab: gr.Tab(visible=True),
        view.group: gr.Dropdown(choices=choices, value=picked),
        view.group_plot: charts.groups(rows),
        view.group_table: gr.Dataframe(
            value=[[row.group or "all items", *_cells(row)] for row in rows],
            headers=["Group", "Items", "Base", "Tuned", "Change", "p", "Verdict"],
        ),
    }


def _show_curves(view: View, result: Result, picked: str = "") -> Updates:
    """One metric by strength; `picked`: "benchmark/metric", "" for the first."""
    found = results.curve_metrics(result) if result.get("curve") else []
    if not found:
        return {view.curve_tab: gr.Tab(visible=False)}
    name, _, metric = (picked or "/".join(found[0])).partition("/")
    better = next((row.better for row in results.table(result) if (row.benchmark, row.metric) == (name, metric)), "")
    title = f"{benchmark_title(name)}: {metric_title(metric)}"
    return {
        view.curve_tab: gr.Tab(visible=True),
        view.curve: gr.Dropdown(
            choices=[(f"{benchmark_title(b)}: {metric_title(m)}", f"{b}/{m}") for b, m in found], value=f"{name}/{metric}"
        ),
        view.curve_plot: charts.by_strength(results.curve_points(result, name, metric), title, better),
    }


def _show_flip_choices(view: View, result: Result) -> Updates:
    decided = [
        name for name, found in result["benchmarks"].items() if any("outcome" in item for item in found.get("items", ())[:1])
    ]
    counts = {name: len(results.flips(result, name)) for name in decided}
    if not any(counts.values()):
        return {view.flip_tab: gr.Tab(visible=False)}
    first = max(counts, key=lambda name: counts[name])
    choices = [
        (f"{benchmark_title(name)} ({count:,} of {result['benchmarks'][name]['n']:,})", name) for name, count in counts.items()
    ]
    chosen = {view.flip_tab: gr.Tab(visible=True), view.flip_benchmark: gr.Dropdown(choices=choices, value=first)}
    return chosen | _show_flips(view, result, first)


def _show_flips(view: View, result: Result, benchmark: str, way: str = "") -> Updates:
    """The items of one benchmark that flipped in one direction, "" for any; those that moved most first."""
    found = results.flips(result, benchmark)
    ways = ["toward less bias", "toward more bias"]
    choices = [(f"Any ({len(found):,})", "")] + [(f"{w.capitalize()} ({sum(f.way == w for f in found):,})", w) for w in ways]
    shown = [flip for flip in found if way in ("", flip.way)][:MAX_FLIPS]
    rows = [[str(f.index), f.way, f"{f.base_outcome} → {f.tuned_outcome}", f.group, _text_of(f)] for f in shown]
    return {
        view.flip_way: gr.Dropdown(choices=choices, value=way),
        view.flips: gr.Dataframe(value=rows, headers=["Item", "Moved", "Decision", "Group", "Text"]),
    } | _show_flip(view, None)


def _show_flip(view: View, flip: Flip | None) -> Updates:
    """One flipped item: its two texts with their difference, and its numbers."""
    if flip is None:
        hidden = {view.flip_texts: gr.HighlightedText(visible=False), view.flip_facts: gr.Markdown(visible=False)}
        return hidden | {view.flip_index: "", view.flip_try: gr.Button(visible=False)}
    both = results.two_texts(flip)
    labels = {"same": None, "out": "first", "in": "second"}
    pieces = [(text, labels[kind]) for kind, text in word_diff(*both)] if both else [(_text_of(flip), None)]
    numbers = [f"{name.replace('_', ' ')}: base {figure(a)}, tuned {figure(b)}" for name, (a, b) in flip.numbers.items()]
    return {
        view.flip_texts: gr.HighlightedText(value=pieces, visible=True),
        view.flip_facts: gr.Markdown(value=f"Item {flip.index}. {escape('; '.join(numbers))}", visible=True),
        view.flip_index: str(flip.index),
        view.flip_try: gr.Button(visible=True),
    }


def _text_of(flip: Flip) -> str:
    return " / ".join(flip.texts.values()) or " / ".join(text for side in flip.completions for text in side[:1])


def _wire_view(studio: Studio, panel: JobPanel, view: View, following: gr.Button) -> None:
    selected = panel.selected

    def result_of(chosen: str) -> Result:
        result = _result_of(panel.job(chosen))
        if result is None:
            raise ConfigError("This evaluation has no result yet: wait for it, or resume it")
        return result

    def compare(chosen: str, others: list[str]) -> Updates:
        labeled = [(name or "shipped", result_of(name)) for name in [chosen, *others]]
        return _show_table(view, labeled)

    def show_flips(chosen: str, benchmark: str, way: str) -> Updates:
        return _show_flips(view, result_of(chosen), benchmark, way)

    def find_flip(chosen: str, benchmark: str, index: str) -> Flip | None:
        return next((flip for flip in results.flips(result_of(chosen), benchmark) if str(flip.index) == index), None)

    def choose_flip(chosen: str, benchmark: str, event: gr.SelectData) -> Updates:
        return _show_flip(view, find_flip(chosen, benchmark, str(event.row_value[0])))

    def measured(chosen: str) -> dict[str, str]:
        job = panel.job(chosen)
        known = result_of(chosen)["provenance"]
        if job is not None and job.config is not None:
            return {"model": job.config.model, "adapter": job.config.adapter}
        return {"model": known["model"], "adapter": known.get("adapter") or "none"}

    def try_flip(chosen: str, benchmark: str, index: str) -> Updates:
        flip = find_flip(chosen, benchmark, index)
        if flip is None:
            raise ConfigError("No item is selected: select one in the table")
        return studio.open("compare", **measured(chosen), prompt=results.prompt_of(flip))

    def add_to_card(chosen: str) -> None:
        refuse_if_public("Writing a model card")
        job = panel.job(chosen)
        command = command_of(job.config) if job is not None and job.config is not None else ()
        card = report.add_to_card(result_of(chosen), studio.workspace, command)
        gr.Info(f"The model card of run {card.parent.parent.name} now has the section “Evaluation”.")

    def export(chosen: str) -> Updates:
        job = panel.job(chosen)
        runs = [path.name for path in studio.workspace.runs.glob("*/adapter")] and [
            p.parent.name for p in studio.workspace.runs.glob("*/adapter")
        ]
        adapter = "" if job is None else _about(job).adapter
        return studio.open("export", **({"run": adapter} if adapter in runs else {}))

    flip_inputs = [selected, view.flip_benchmark]
    view.others.input(handles(compare), [selected, view.others], [view.table, view.forest, *view.downloads.values()], **QUICK)
    by_group = [view.group, view.group_table, view.group_plot, view.group_tab]
    view.group.input(
        handles(lambda chosen, picked: _show_groups(view, result_of(chosen), picked)), [selected, view.group], by_group, **QUICK
    )
    curve = [view.curve, view.curve_plot, view.curve_tab]
    view.curve.input(
        handles(lambda chosen, picked: _show_curves(view, result_of(chosen), picked)), [selected, view.curve], curve, **QUICK
    )
    view.flip_benchmark.input(handles(lambda chosen, name: show_flips(chosen, name, "")), flip_inputs, view.flip_outputs, **QUICK)
    view.flip_way.input(handles(show_flips), [*flip_inputs, view.flip_way], view.flip_outputs, **QUICK)
    view.flips.select(handles(choose_flip), flip_inputs, view.flip_detail, **QUICK)
    away = studio.open_outputs("compare")
    view.flip_try.click(handles(try_flip), [*flip_inputs, view.flip_index], away, **QUICK)
    view.try_in_compare.click(handles(lambda chosen: studio.open("compare", **measured(chosen))), selected, away, **QUICK)
    view.to_card.click(handles(add_to_card), selected, None, **QUICK)
    following.click(handles(export), selected, studio.open_outputs("export"), **QUICK)
