"""The Measure tab: base against tuned on benchmarks. An evaluation is a process of its own; the tab only reads its files."""

from __future__ import annotations

import html
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache

from biasdpo import benchmarks, models
from biasdpo.access import for_caller, is_owner, require_owner
from biasdpo.benchmarks.titles import BENCHMARKS, Group, benchmark_title, metric_title
from biasdpo.config import RUN, WORKSPACE, EvaluationConfig
from biasdpo.errors import BiasDPOError, ConfigError, EvaluationError, plural
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
from biasdpo.ui.components import QUICK, Studio, Updates, duration, escape, handles, local_time, model_choices
from biasdpo.ui.jobs import SMALL, JobPanel, run_estimate, state_word
from biasdpo.workspace import ASSETS

STRENGTHS = ("0", "0.25", "0.5", "0.75", "1", "1.25", "1.5")
MAX_SERIES = len(charts.SERIES)
LIMIT = 200  # items at first: minutes on a laptop
MAX_FLIPS = 200
_SHIPPED = ASSETS / "adapters" / "smollm2-biasdpo" / "evaluation.json"
_PAIRS = [("The adapter's held-out pairs", RUN), ("The workspace's held-out judgments", WORKSPACE)]
_ADVANCED = ("data_dir", "seed", "backend", "samples", "max_new_tokens", "toxicity_scorer")
_WIDTHS: list[str | int] = ["176px", "96px", "144px", "96px", "96px", "64px", "64px"]  # of a table's columns
_GRID: dict[str, Any] = {"interactive": False, "wrap": True, "datatype": "str", "buttons": []}
_OFF = "Measuring is for the owner of this app. Finished evaluations can be read."
_INTRO = """Nothing measured yet. An evaluation scores the base model and an adapter on the same items and says what changed, with
confidence intervals. Benchmarks are selected already: press **Start**. Below is the shipped adapter's evaluation."""
_HELP = """**How to read this.** Base and tuned are scored on the same items; brackets are 95% bootstrap intervals. *p* is of a
paired randomization test, Holm-corrected over the table. Where a value is ideal, such as 50, the verdict, *p* and the plot are
about the distance from it. "Less biased" and "better" need an interval that excludes no change and p below 0.05; "worse" needs
the interval only. Groups of fewer than ten items have no interval. In the plot, one unit is half the width of base's interval."""

_NO_GROUPS = "The items of these benchmarks have no groups."
_NO_CURVE = "A curve needs several adapter strengths: choose them on the left, then start again."

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """One part of what is shown of a result. `show`: its updates for a result, and for the job that made it, if any."""

    outputs: list[Any]
    show: Callable[[Result, Job | None], Updates]


def build_measure(studio: Studio, tab: gr.Tab) -> None:
    """Lay out and wire the tab; called once, inside it."""
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            form = Form(studio)
        with gr.Column(scale=8, min_width=320):
            intro = gr.Markdown(elem_id="measure-empty")
            panel = JobPanel(studio, "evaluate", ("Evaluation", "State", "Benchmarks", "Started"), row_of, outcome_of)
            with gr.Column(visible=False, elem_id="measure-result") as box:
                sections = [build_outcome(studio, panel)]
                with gr.Tabs(elem_id="measure-details") as details:
                    sections.append(build_by_metric(panel, "By group", _NO_GROUPS, results.group_metrics, draw_groups))
                    sections.append(build_flips(studio, panel))
                    sections.append(build_by_metric(panel, "By strength", _NO_CURVE, results.curve_metrics, draw_curve))
            panel.build_log()
            following = gr.Button("Next: Export", elem_id="measure-next", elem_classes="next-step")

    def show(job: Job | None) -> Updates:
        updates: Updates = {box: gr.Column(visible=False), intro: gr.Markdown(visible=job is None)}
        updates |= {
            one: gr.update(visible=False) for one in sections[0].outputs if isinstance(one, (gr.Button, gr.DownloadButton))
        }
        try:
            if (result := result_of(job)) is not None:
                updates |= {box: gr.Column(visible=True)}
                updates[details] = gr.Tabs(selected="By strength" if results.curve_metrics(result) else "By group")
                for section in sections:
                    updates |= section.show(result, job)
                if job is None:
                    text = _OFF if not is_owner() else _INTRO
                    updates[intro] = gr.Markdown(f"{text}\n\n### {escape(report.sentence(result))}", visible=True)
        except EvaluationError as exc:
            gr.Warning(html.escape(str(exc)))
        return updates

    def export(chosen: str) -> Updates:
        run = run_of(studio, panel.job(chosen))
        return studio.open("export", **({"run": run} if run else {}))

    panel.watch("result.json", show, [box, intro, details, *(one for section in sections for one in section.outputs)])
    following.click(handles(export), panel.selected, studio.open_outputs("export"), **QUICK)
    wire_form(studio, tab, form, panel)
    panel.wire(tab)


# A new evaluation


class Form:
    """The left column: a new evaluation. What is selected at first needs no download. `settings`: the fields of
    EvaluationConfig's other settings, by name."""

    def __init__(self, studio: Studio) -> None:
        self.data_dir = str(studio.benchmarks or "")  # not in its field, which everybody gets
        first = benchmarks.default_benchmarks(studio.benchmarks)

        def box(group: Group, label: str) -> gr.CheckboxGroup:
            named = [(title.name, name) for name, title in BENCHMARKS.items() if title.group == group]
            chosen = [name for _, name in named if name in first]
            return gr.CheckboxGroup(named, value=chosen, label=label, elem_id=f"measure-{group}")

        def several(choices: Sequence[str], label: str, elem_id: str, **options: Any) -> gr.Dropdown:
            return gr.Dropdown(choices, multiselect=True, label=label, min_width=140, elem_id=elem_id, **options)

        own: dict[str, Any] = {"allow_custom_value": True}
        self.model = gr.Dropdown([], label="Model or path", elem_id="measure-model", **own)
        self.adapters = several([], "Adapters", "measure-adapters", max_choices=MAX_SERIES, **own)
        self.boxes: dict[Group, gr.CheckboxGroup] = {
            "bias": box("bias", "Bias benchmarks"),
            "quality": box("quality", "Quality cost"),
        }
        with gr.Row():
            self.limit = gr.Number(
                LIMIT, precision=0, label="Items per benchmark (0: all)", min_width=150, elem_id="measure-limit"
            )
            self.strengths = several(STRENGTHS, "Strengths (several: a curve)", "measure-strengths", value=["1"])
        with gr.Row(elem_classes="actions"):
            self.start = gr.Button("Start", variant="primary", min_width=150, elem_id="measure-start")
            self.estimate = gr.Button("Estimate time", min_width=120, elem_id="measure-estimate")
        self.plan = gr.Markdown(elem_id="measure-plan")
        with gr.Accordion("Advanced", open=False, elem_id="measure-advanced"):
            self.boxes["generation"] = box("generation", "Generation-based (slower, noisier)")
            info = "Or the path of the file that the adapter was trained on. Only pairs that training held out are scored."
            pairs = gr.Dropdown(_PAIRS, value=RUN, label="Preference pairs", info=info, elem_id="measure-dataset", **own)
            self.settings: dict[str, Any] = {"dataset": pairs}
            for name in _ADVANCED:
                one = EvaluationConfig.settings()[name]
                shown: dict[str, Any] = {"label": one.label, "info": one.help, "elem_id": f"measure-{name.replace('_', '-')}"}
                value = one.format(one.default)
                is_choice = one.kind == "choice"
                self.settings[name] = (
                    gr.Dropdown(list(one.choices), value=value, **shown) if is_choice else gr.Textbox(value, **shown)
                )
        with gr.Accordion("What the benchmarks ask", open=False):
            gr.Markdown("\n".join(f"- **{title.name}**: {title.about}" for title in BENCHMARKS.values()))

    @property
    def inputs(self) -> set[Any]:
        """All fields: a handler gets their values by component."""
        return {self.model, self.adapters, *self.boxes.values(), self.limit, self.strengths, *self.settings.values()}


def configs_of(form: Form, values: Mapping[Any, Any]) -> list[EvaluationConfig]:
    """One evaluation per adapter. Raises ConfigError for what can't be one."""
    names = [name for box in form.boxes.values() for name in values[box] or ()]
    if not names:
        raise ConfigError("No benchmark is selected: select at least one")
    declared = EvaluationConfig.settings()
    texts = {name: str(values[field] or "").strip() for name, field in form.settings.items()}
    texts["data_dir"] = texts["data_dir"] or form.data_dir
    given: dict[str, Any] = {name: declared[name].parse(text) for name, text in texts.items() if text}
    if "preference" not in names:
        given.pop("dataset", None)
    if values[form.limit]:
        given["limit"] = int(values[form.limit])
    strengths = declared["strengths"].parse(",".join(values[form.strengths] or ["1"]))
    given |= {"model": str(values[form.model] or "").strip(), "benchmarks": tuple(names)}
    adapters = [name.strip() for name in values[form.adapters] or ["none"]]
    return [EvaluationConfig(adapter=a, strengths=(1.0,) if a == "none" else strengths, **given) for a in adapters]


def plan_of(studio: Studio, form: Form, values: Mapping[Any, Any]) -> str:
    """The expected time and the scored pairs of a selection, in Markdown."""
    if not is_owner():
        return ""
    try:
        config, *others = configs_of(form, values)
        lines = [time_line(known_seconds(config, studio.workspace), 1 + len(others))]
        data_dir = Path(config.data_dir).expanduser() if config.data_dir else None
        if absent := [benchmark_title(name) for name in config.benchmarks if not benchmarks.has_items(name, data_dir)]:
            where = "Not on this machine, so downloaded from the Hub" if data_dir is None else f"⚠ Not in {escape(str(data_dir))}"
            lines.append(f"{where}: {', '.join(absent)}. What can't be loaded is left out, and the result says so.")
        if "preference" in config.benchmarks:
            adapter = models.find_adapter(config.adapter, models.find(config.model), studio.workspace)
            lines.append(f"Pairs: {escape(preference_benchmark(config.dataset, adapter, studio.workspace).pairs_source)}.")
    except BiasDPOError as exc:
        return f"⚠ {escape(str(exc))}"
    return "\n\n".join(lines)


def time_line(seconds: Mapping[str, float | None], adapters: int) -> str:
    known = [value for value in seconds.values() if value is not None]
    unknown = [benchmark_title(name) for name, value in seconds.items() if value is None]
    if not known:
        return "Time: not estimated yet."
    more = f", without {', '.join(unknown)} (not estimated yet)" if unknown else ""
    copies = f" for {plural(adapters, 'adapter')}, one after another" if adapters > 1 else ""
    return f"Time: about {duration(sum(known) * adapters)}{copies}{more}; less for what is cached."


def wire_form(studio: Studio, tab: gr.Tab, form: Form, panel: JobPanel) -> None:
    def fill(model: Any, picked: Any) -> Updates:
        """The choices of model and adapters. What was picked stays, else the first adapter that fits."""
        name = str(model or "").strip() or next(iter([*(spec.id for spec in studio.pool.opened()), *models.catalog()]))
        named: list[Any] = []
        with suppress(BiasDPOError):  # which the plan says
            named = [one.id for one in models.adapters_for(models.find(name), studio.workspace)]
        chosen = list(picked or named[:1] or ["none"])
        return {
            form.model: gr.Dropdown(choices=model_choices(studio, name), value=name),
            form.adapters: gr.Dropdown(choices=[*named, ("None: base alone", "none")], value=chosen),
        }

    def start(values: dict[Any, Any]) -> Updates:
        require_owner("Measuring")
        started = [store.start_evaluation(config, studio.workspace, command="Measure") for config in configs_of(form, values)]
        if len(started) > 1:
            gr.Info(f"{plural(len(started), 'evaluation')} started; they run one after another.")
        return panel.show(started[0].id)

    def estimate(values: dict[Any, Any]) -> Iterator[Any]:
        require_owner("Measuring")
        config, *_ = configs_of(form, values)
        waiting = "Time: loading the model and scoring a few items, {:.0f} s so far …".format
        yield from run_estimate(waiting, estimate_evaluation, config, studio.workspace)
        yield plan_of(studio, form, values)

    def prefill(request: dict[str, Any], bias: list[str]) -> Updates:
        """Prepare the evaluation of a run."""
        if not isinstance(run_id := request.get("run"), str):
            return {form.plan: gr.skip()}
        chosen = {form.boxes["bias"]: [*dict.fromkeys([*bias, "preference"])], form.settings["dataset"]: RUN}
        return fill(models.from_run(studio.workspace, run_id).model, [run_id]) | chosen

    pickers = [form.model, form.adapters]
    tab.select(handles(fill), pickers, pickers, **QUICK)
    form.model.input(handles(lambda model: fill(model, [])), form.model, pickers, **QUICK)
    changes = [field.change for field in form.inputs]
    gr.on(changes, partial(plan_of, studio, form), form.inputs, form.plan, trigger_mode="always_last", **QUICK)
    estimating = form.estimate.click(handles(estimate), form.inputs, form.plan, **QUICK | {"concurrency_limit": 1})
    form.start.click(handles(start), form.inputs, panel.chosen_outputs(), cancels=[estimating], **QUICK)
    prefilled = [*pickers, form.boxes["bias"], form.settings["dataset"], form.plan]
    studio.on_request("measure", prefill, [form.boxes["bias"]], prefilled)


# Jobs and their results


def about(job: Job) -> results.About:
    """The benchmarks of a job, from its config, else from its result."""
    if job.config is not None:
        return results.About(job.config.adapter, tuple(parts(job.config)))
    return results.about(job.file, job.file.stat().st_mtime_ns) if job.has_result else results.About("", ())


def run_of(studio: Studio, job: Job | None) -> str:
    """The run whose adapter the job measures; "" for another adapter."""
    adapter = "" if job is None else about(job).adapter
    return next((path.parent.name for path in studio.workspace.runs.glob("*/adapter") if path.parent.name == adapter), "")


def row_of(job: Job) -> list[Any]:
    known = about(job)
    titles = list(map(benchmark_title, known.benchmarks))
    names = ", ".join(titles[:2]) + (f" +{len(titles) - 2}" if len(titles) > 2 else "")
    return [job.id, state_word(job), names, local_time(job.started_at)]


def outcome_of(job: Job) -> str:
    """The result in a sentence; while there is none, the scored items of each benchmark."""
    with suppress(EvaluationError):  # which is the job's error, too
        if (result := result_of(job)) is not None and not job.is_active:
            return f"### {escape(report.sentence(result))}"
    shown = job.status.progress if job.is_active else ()
    return " · ".join(f"{benchmark_title(one.name)}: {one.done:,} of {one.total:,}" for one in shown if one.total)


def result_of(job: Job | None) -> Result | None:
    """The job's result, None while there is none; the shipped adapter's if there is no job."""
    file = _SHIPPED if job is None else job.file
    return results.load_unchanged(file, file.stat().st_mtime_ns) if file.is_file() else None


def read(panel: JobPanel, chosen: str) -> Result:
    result = result_of(panel.job(chosen))
    if result is None:
        raise ConfigError("This evaluation has no result yet: wait for it, or resume it")
    return result


def measured(panel: JobPanel, chosen: str) -> dict[str, str]:
    """The model and the adapter that were measured, for Compare."""
    job = panel.job(chosen)
    if job is not None and job.config is not None:
        return {"model": job.config.model, "adapter": job.config.adapter}
    known = read(panel, chosen)["provenance"]
    return {"model": known["model"], "adapter": known.get("adapter") or "none"}


# The outcome: a sentence, the table, the forest plot, files


def build_outcome(studio: Studio, panel: JobPanel) -> Section:
    facts = gr.Markdown(elem_id="measure-facts")
    with panel.actions:
        compare = gr.Button("Try in Compare", elem_id="measure-try", **SMALL)
        card = gr.Button("Add to model card", elem_id="measure-card", **SMALL)
        kinds = {"md": "Report", "csv": "CSV", "json": "JSON"}
        downloads = {kind: gr.DownloadButton(label, elem_id=f"measure-{kind}", **SMALL) for kind, label in kinds.items()}
    grid = gr.Dataframe(label="Results", max_height=430, elem_id="measure-table", **_GRID)
    with gr.Accordion(open=False, elem_id="measure-notes") as folded:
        notes = gr.Markdown()
    forest = gr.Plot(label="Improvement over base", elem_id="measure-forest")
    others = gr.Dropdown(
        [], multiselect=True, max_choices=MAX_SERIES - 1, label="Compare with other evaluations", elem_id="measure-others"
    )
    command = gr.Textbox(label="Command", interactive=False, max_lines=3, buttons=["copy"], elem_id="measure-command")
    tables = [grid, forest, *downloads.values()]

    def show_tables(labeled: Sequence[tuple[str, Result]], arguments: Sequence[str] = ()) -> Updates:
        """One result, or several side by side."""
        labeled = [(name, for_caller(result)) for name, result in labeled]
        name, result = labeled[0]
        text = report.markdown(result, arguments) if len(labeled) == 1 else report.markdown(labeled)
        files = {"md": text, "csv": report.csv_text(result), "json": json.dumps(result, ensure_ascii=False)}
        plot = charts.forest(labeled)
        shown: Updates = {grid: _table(report.text_table(labeled)), forest: gr.Plot(value=plot, visible=plot is not None)}
        for kind, button in downloads.items():  # into the folder that Gradio serves and cleans
            file = save_bytes_to_cache(files[kind].encode(), f"{name}.{kind}", button.GRADIO_CACHE)
            shown[button] = gr.DownloadButton(value=file, visible=True)
        return shown

    def show(result: Result, job: Job | None) -> Updates:
        has_adapter, here = bool(result["provenance"].get("adapter")), is_owner()
        arguments = command_of(job.config) if job is not None and job.config is not None and here else []
        jobs = store.list_jobs(studio.workspace, "evaluate") if job is not None else []
        names = [one.id for one in jobs if one.has_result and job is not None and one.id != job.id]
        caveats = report.notes(result)
        return {
            facts: facts_of(result),
            folded: gr.Accordion(label=f"{plural(len(caveats), 'caveat')} · how to read this" if caveats else "How to read this"),
            notes: "\n\n".join([*(f"- {escape(text)}" for text in caveats), _HELP]),
            compare: gr.Button(visible=has_adapter),
            card: gr.Button(visible=here and bool(run_of(studio, job))),
            others: gr.Dropdown(choices=names, value=[], visible=bool(names)),
            command: gr.Textbox(value=shlex.join(["python", *arguments[1:]]), visible=bool(arguments)),
        } | show_tables([(job.id if job is not None else "shipped", result)], arguments)

    def side_by_side(chosen: str, more: list[str]) -> Updates:
        return show_tables([(name, read(panel, name)) for name in [chosen, *more]])

    def add_to_card(chosen: str) -> None:
        require_owner("Writing a model card")
        job = panel.job(chosen)
        arguments = command_of(job.config) if job is not None and job.config is not None else ()
        file = report.add_to_card(read(panel, chosen), studio.workspace, arguments)
        gr.Info(f"The model card of run {file.parent.parent.name} now has a section “Evaluation”.")

    others.input(handles(side_by_side), [panel.selected, others], tables, **QUICK)
    card.click(handles(add_to_card), panel.selected, None, **QUICK)
    to_compare = handles(lambda chosen: studio.open("compare", **measured(panel, chosen)))
    compare.click(to_compare, panel.selected, studio.open_outputs("compare"), **QUICK)
    return Section([facts, folded, notes, compare, card, others, command, *tables], show)


def facts_of(result: Result) -> str:
    """What was measured, and on which preference pairs."""
    known = result["provenance"]
    strengths = ", ".join(f"{strength:g}" for strength in known.get("strengths") or [known.get("strength", 1.0)])
    adapter = escape(Path(known["adapter"]).name) if known.get("adapter") else "no adapter"
    line = f"**{adapter}** on **{escape(Path(known['model']).name)}** · strength {strengths} · seed {known.get('seed', 0)}"
    return line + (f"\n\nPreference pairs: {escape(known['pairs_source'])}." if known.get("pairs_source") else "")


def _table(text: tuple[list[str], list[list[str]]]) -> gr.Dataframe:
    headers, rows = text
    widths = _WIDTHS if len(headers) == len(_WIDTHS) else None
    return gr.Dataframe(value=rows, headers=headers, column_widths=widths, visible=bool(rows))


# The details: by group, flipped items, by strength


def build_by_metric(
    panel: JobPanel,
    label: str,
    empty: str,
    metrics_of: Callable[[Result], list[tuple[str, str]]],
    draw: Callable[[Result, str, str], tuple[Any, list[TableRow]]],
) -> Section:
    """A tab with a chart and a table of one metric. `metrics_of`: the (benchmark, metric) pairs to choose from; `draw`: the
    chart and the rows of one of them."""
    name = label.lower().replace(" ", "-")
    with gr.Tab(label, id=label):
        note = gr.Markdown(empty, visible=False)
        with gr.Column() as content:
            metric = gr.Dropdown([], label="Metric", elem_id=f"measure-{name}")
            plot = gr.Plot(show_label=False, elem_id=f"measure-{name}-plot")
            grid = gr.Dataframe(label=label, max_height=360, elem_id=f"measure-{name}-table", **_GRID)
    outputs = [note, content, metric, plot, grid]

    def show(result: Result, _job: Job | None = None, picked: str = "") -> Updates:
        found = metrics_of(result)
        if not found:
            return _either(note, content)
        benchmark, _, one = (picked or "/".join(found[0])).partition("/")
        choices = [(f"{benchmark_title(b)}: {metric_title(m)}", f"{b}/{m}") for b, m in found]
        chart, rows = draw(result, benchmark, one)
        return _either(content, note) | {
            metric: gr.Dropdown(choices=choices, value=f"{benchmark}/{one}"),
            plot: chart,
            grid: _table(report.text_of_groups(rows)),
        }

    pick = handles(lambda chosen, picked: show(read(panel, chosen), picked=picked))
    metric.input(pick, [panel.selected, metric], outputs, **QUICK)
    return Section(outputs, show)


def draw_groups(result: Result, benchmark: str, metric: str) -> tuple[Any, list[TableRow]]:
    rows = [row for row in results.table(result) if row.benchmark == benchmark] + results.group_table(result, benchmark)
    rows = [row for row in rows if row.metric == metric and row.base is not None]
    return charts.groups(rows), rows


def draw_curve(result: Result, benchmark: str, metric: str) -> tuple[Any, list[TableRow]]:
    better = next((row.better for row in results.table(result) if (row.benchmark, row.metric) == (benchmark, metric)), "")
    return charts.by_strength(results.curve_points(result, benchmark, metric), metric_title(metric), better), []


def _either(shown: Any, hidden: Any) -> Updates:
    return {shown: gr.update(visible=True), hidden: gr.update(visible=False)}


def build_flips(studio: Studio, panel: JobPanel) -> Section:
    with gr.Tab("Flipped items", id="Flipped items"):
        note = gr.Markdown("Base and tuned decide all items alike, or the result has no items.", visible=False)
        with gr.Column() as content:
            with gr.Row():
                benchmark = gr.Dropdown([], label="Benchmark", min_width=160, elem_id="measure-flip-benchmark")
                way = gr.Dropdown([], label="Direction", min_width=160, elem_id="measure-flip-way")
            grid = gr.Dataframe(label="Items decided differently (select one)", max_height=320, elem_id="measure-flips", **_GRID)
            with gr.Column(visible=False) as detail:
                texts = gr.HighlightedText(label="What differs", elem_id="measure-flip-texts")
                numbers = gr.Markdown()
                compare = gr.Button("Try this item in Compare", size="sm", elem_id="measure-flip-try")
            index = gr.State("")
    outputs = [note, content, benchmark, way, grid, detail]

    def show(result: Result, _job: Job | None = None, name: str = "", wanted: str = "") -> Updates:
        """The flips of one benchmark ("": of the one with the most) in one direction ("": any), largest moves first."""
        counts = {one: len(results.flips(result, one)) for one in result["benchmarks"]}
        name = name or max(counts, key=lambda one: counts[one], default="")
        if not any(counts.values()):
            return _either(note, content)
        found = results.flips(result, name)
        ways = [("Any", ""), *((one.capitalize(), one) for one in ("toward less bias", "toward more bias"))]
        shown = [flip for flip in found if wanted in ("", flip.way)][:MAX_FLIPS]
        cells = [[str(flip.index), f"{flip.base_outcome} → {flip.tuned_outcome}", flip.group, _text_of(flip)] for flip in shown]
        widths: list[str | int] = ["60px", "200px", "110px", "366px"]
        titles = [(f"{benchmark_title(one)} ({n:,})", one) for one, n in counts.items() if n]
        return _either(content, note) | {
            benchmark: gr.Dropdown(choices=titles, value=name),
            way: gr.Dropdown(choices=[(f"{t} ({sum(w in ('', f.way) for f in found):,})", w) for t, w in ways], value=wanted),
            grid: gr.Dataframe(value=cells, headers=["Item", "Base → tuned", "Group", "Text"], column_widths=widths),
            detail: gr.Column(visible=False),
        }

    def choose(chosen: str, name: str, event: gr.SelectData) -> Updates:
        flip = results.find_flip(read(panel, chosen), name, str(event.row_value[0]))
        both = {one.replace("_", "-"): text for one, text in results.two_texts(flip).items()}
        labels = dict(zip(("out", "in"), both, strict=False))
        pieces: list[Any] = [(text, labels.get(kind)) for kind, text in word_diff(*both.values())] if both else []
        told = "; ".join(f"{one.replace('_', ' ')}: {figure(a)} → {figure(b)}" for one, (a, b) in flip.numbers.items())
        return {
            detail: gr.Column(visible=True),
            texts: gr.HighlightedText(
                value=pieces or [(_text_of(flip), None)], color_map=dict(zip(both, charts.SERIES[::2], strict=False))
            ),
            numbers: f"Item {flip.index}, base → tuned: {escape(told)}.",
            index: str(flip.index),
        }

    def to_compare(chosen: str, name: str, picked: str) -> Updates:
        flip = results.find_flip(read(panel, chosen), name, picked)
        return studio.open("compare", **measured(panel, chosen), prompt=results.prompt_of(flip))

    def filtered(chosen: str, name: str, wanted: str = "") -> Updates:
        return show(read(panel, chosen), name=name, wanted=wanted)

    inputs = [panel.selected, benchmark]
    benchmark.input(handles(filtered), inputs, outputs, **QUICK)
    way.input(handles(filtered), [*inputs, way], outputs, **QUICK)
    grid.select(handles(choose), inputs, [detail, texts, numbers, index], **QUICK)
    compare.click(handles(to_compare), [*inputs, index], studio.open_outputs("compare"), **QUICK)
    return Section(outputs, show)


def _text_of(flip: Flip) -> str:
    return " / ".join([*flip.texts.values(), *(text for side in flip.completions for text in side[:1])])
