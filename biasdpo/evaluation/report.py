"""A result to keep: Markdown, CSV, and a section of the adapter's card. Nothing in them names a folder of this machine."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from biasdpo import models
from biasdpo.errors import EvaluationError
from biasdpo.evaluation.results import PRICE, Ci, TableRow, compare, group_table, metrics, points, table
from biasdpo.jobs.job import shown_command
from biasdpo.models import ModelSpec
from biasdpo.workspace import Workspace, refuse_on_public_space, replacing

# --- plots: Figures, as PNG files


# Okabe and Ito's colours, told apart whatever one's colour vision.
TRAIN, HELD_OUT, BASELINE = "#0072B2", "#D55E00", "#777777"

_PANELS = (
    ("loss", "Loss", "eval_loss"),
    ("rewards/accuracies", "Reward accuracy", "eval_rewards/accuracies"),
    ("rewards/margins", "Reward margin (nats)", "eval_rewards/margins"),
)


def training_curves(metrics: Sequence[Mapping[str, Any]], path: Path, *, longer_baseline: float | None, kept_step: int) -> None:
    """Loss, reward accuracy and reward margin by step, of the training batches and the held-out pairs.

    metrics          the lines of metrics.jsonl
    longer_baseline  accuracy of picking the longer completion of the held-out pairs; None draws no line
    kept_step        the step whose adapter was kept
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (key, title, eval_key) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for name, colour, style, label in ((key, TRAIN, "-", "training batches"), (eval_key, HELD_OUT, "o-", "held-out pairs")):
            points = [(row["step"], row[name]) for row in metrics if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=colour, label=label, linewidth=1.4, markersize=4)
        if key == "rewards/accuracies":
            axes.set_ylim(-0.03, 1.03)
            if longer_baseline is not None:
                axes.axhline(longer_baseline, color=BASELINE, linestyle="--", label="picking the longer (held out)")
        axes.axvline(kept_step, color=BASELINE, linestyle=":", label="kept")
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    axes_with_all = figure.axes[1]
    handles, labels = axes_with_all.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, format="png", metadata={"Software": None})


# --- run card: A run's card: README.md of its adapter, in the Hub's model-card format, with a picture of its c


CARD, CURVES = "README.md", "curves.png"
_HUB = "hub:"
_LICENCES = {"Apache-2.0": "apache-2.0", "MIT": "mit"}


def write(folder: Path, spec: ModelSpec, provenance: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> None:
    """Write README.md and curves.png into an adapter's folder. `metrics`: the lines of metrics.jsonl."""
    training_curves(
        metrics, folder / CURVES, longer_baseline=provenance.get("held_out_longer_baseline"), kept_step=provenance["kept"]["step"]
    )
    (folder / CARD).write_text(build(spec, provenance), encoding="utf-8")


def build(spec: ModelSpec, provenance: Mapping[str, Any]) -> str:
    """The card's text."""
    return "\n".join([*_front_matter(spec, provenance), *_body(spec, provenance)])


def _front_matter(spec: ModelSpec, provenance: Mapping[str, Any]) -> Iterable[str]:
    yield "---"
    if spec.hub_id:
        yield f"base_model: {json.dumps(spec.hub_id)}"
        yield "base_model_relation: adapter"
    yield f"license: {_LICENCES.get(spec.license, 'other')}"
    yield from ("library_name: peft", "pipeline_tag: text-generation")
    hub = [name.removeprefix(_HUB) for name in provenance["dataset_files"] if name.startswith(_HUB)]
    if hub:
        yield "datasets:"
        yield from (f"  - {json.dumps(name)}" for name in hub)
    yield "tags:"
    yield from (f"  - {tag}" for tag in ("biasdpo", "dpo", "lora", "trl", "bias"))
    yield from ("---", "")


def _body(spec: ModelSpec, provenance: Mapping[str, Any]) -> Iterable[str]:
    config = provenance["config"] | {"model": spec.hub_id or spec.title}  # of one's own model the folder is nobody's business
    yield from (f"# {provenance['run_id']}", "")
    yield f"A LoRA adapter (rank {config['rank']}) for {plain(spec.title)}, trained with Direct Preference Optimization on"
    yield "pairs of a less biased (`chosen`) and a more biased (`rejected`) completion, as in [BiasDPO](https://arxiv.org/abs/2407.13928)."
    yield from ("", "**Content warning.** The `rejected` completions it was trained away from state stereotypes.", "")
    yield from _held_out(provenance)
    yield f"The adapter is that of {provenance['kept']['reason']}."
    yield from ("", "![Loss, reward accuracy and reward margin by step](curves.png)", "", "## Data", "")
    yield from _data(provenance)
    yield from ("", "## How it was made", "")
    if provenance["command"]:
        yield from ("```", provenance["command"], "```", "")
    yield f"Code {provenance['code_version']}, started {provenance['started_at']}. Base: {plain(spec.title)}, SHA-256 of its"
    yield from (f"weights `{provenance['base_sha256']}`.", "", "| Setting | Value |", "|---|---|")
    yield from (f"| `{name}` | {plain(_shown(value))} |" for name, value in config.items())
    yield from ("", "## Limits", "")
    yield "- Nothing here says that the model is less biased on anything but pairs like these: measure it on benchmarks"
    yield "  that it was not trained toward before you use it."
    yield "- Reward accuracy counts only which completion of a pair gained more; picking the longer one is what it must beat."
    if provenance["kept"]["step"] != provenance["kept"]["of"]:
        yield "- The step was chosen on the held-out pairs, so that their figures are a little optimistic."
    yield "- It was made to lessen bias in wording about people. It is no safety filter, and checks no facts."
    yield from ("", "## Use", "", "```python", "from peft import PeftModel", "from transformers import AutoModelForCausalLM", "")
    name = json.dumps(spec.hub_id or "PATH/OF/THE/BASE/MODEL")
    yield f"base = AutoModelForCausalLM.from_pretrained({name})"
    yield from ('model = PeftModel.from_pretrained(base, "PATH/OF/THIS/FOLDER")', "```", "")
    yield f"Prompts must be rendered as the base model wants them: `{json.dumps(spec.template.text)}`."
    model, adapter = plain(_model_name(spec)), provenance["run_id"]
    yield f"In BiasDPO: `python -m biasdpo compare --model {model} --adapter {adapter} --prompt TEXT`."
    yield ""


def _held_out(provenance: Mapping[str, Any]) -> Iterable[str]:
    scores = provenance["metrics"].get("held_out")
    if not scores:
        yield from ("Nothing was scored at the end: no pairs were held out, or the run could not score them.", "")
        return
    yield from ("| Held out | Base | Tuned |", "|---|---:|---:|")
    yield f"| Reward accuracy ({scores['pairs']} pairs) | | {scores['reward_accuracy']:.3f} |"
    yield f"| Picking the longer completion, same pairs | | {scores['reward_accuracy_of_picking_the_longer']:.3f} |"
    base, tuned = scores["length_normalised_accuracy_base"], scores["length_normalised_accuracy_tuned"]
    yield f"| Length-normalised accuracy | {base:.3f} | {tuned:.3f} |"
    yield f"| Reward margin, nats | | {scores['reward_margin_nats']:.3f} |"
    yield f"| KL(base, tuned), nats a token of the chosen | | {scores['kl_base_to_tuned_nats_per_token']:.3f} |"
    yield ""


def _data(provenance: Mapping[str, Any]) -> Iterable[str]:
    counts, confounds = provenance["dataset_rows"], provenance.get("confounds")
    sources = provenance["dataset_files"]
    weights = provenance["config"].get("dataset_weights") or [1] * len(sources)
    named = ", ".join(
        f"`{plain(name)}`" + (f" (weight {w:g})" if w != 1 else "") for name, w in zip(sources, weights, strict=True)
    )
    rows = provenance["rows"]
    seen = f" ({rows['seen']:,} of them seen)" if rows["seen"] < rows["train"] else ""
    yield f"{counts['read']:,} rows of {named}: {counts['pairs']:,} different pairs ({counts['repeats']:,} repeats,"
    yield f"{counts['contradictions']:,} contradictions). {provenance['rows']['train']:,} rows an epoch to train on{seen},"
    yield f"{provenance['rows']['held_out']:,} held out, by prompt: no held-out prompt nearly repeats one that was trained on."
    yield f"SHA-256 of the snapshot: `{provenance['dataset_sha256']}`."
    if confounds is None:  # a run that an earlier version started
        return
    yield from ("", "What a model can learn from the training rows instead of being less biased:", "")
    if confounds["chosen_longer_share"] is not None:
        yield f"- The chosen completion is the longer one in {confounds['chosen_longer_share']:.1%} (50 % would say nothing)."
    yield f"- {confounds['near_duplicates']:,} prompts nearly repeat an earlier one."
    yield from (f"- {plain(warning)}" for warning in confounds["warnings"])


def _model_name(spec: ModelSpec) -> str:
    return spec.id if "/" not in spec.id or spec.hub_id else "PATH/OF/THE/BASE/MODEL"


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def plain(text: str) -> str:
    """Somebody's words inside Markdown: no markup, no line break, no end of a cell."""
    escaped = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return escaped.replace("|", "\\|").replace("`", "'")


# --- report: A result to keep: Markdown, CSV, and a section of the adapter's card


Labelled = tuple[str, Mapping[str, Any]]
"""What an evaluation is called, and its result."""

BEGIN, END = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"
_INTERVALS = ("base_ci", "tuned_ci", "ci")
_PRICE = ("utility", "utility_generation")


# Markdown


def markdown(result: Mapping[str, Any] | Sequence[Labelled], command: Sequence[str] = ()) -> str:
    """One result as a report, or several side by side. `command`: that reproduces it (of one result), as
    `EvaluationConfig.command` gives it."""
    if isinstance(result, Mapping):
        return _lines([f"# Evaluation of {_who(result)}", "", *_report(result, command)])
    return _lines(["# Evaluations side by side", "", *_side_by_side(result)])


def _report(result: Mapping[str, Any], command: Sequence[str]) -> Iterator[str]:
    provenance = result["provenance"]
    yield from _what(provenance)
    if provenance.get("interrupted"):
        yield from ("**Interrupted: what was scored until then. Not comparable.**", "")
    rows = table(result)
    of_bias, of_price = ([row for row in rows if (row.benchmark in _PRICE) is price] for price in (False, True))
    for title, some in (("Benchmarks", of_bias), ("Price", of_price)):
        if some:
            yield from (f"## {title}", "", *_table(some), "")
    yield from _notes(result)
    for name in result["benchmarks"]:
        groups = group_table(result, name)
        if groups:
            yield from (f"<details><summary>{plain(name)} by group</summary>", "", *_table(groups), "", "</details>", "")
    yield from _curves(result)
    if command:
        yield from ("## Reproduce", "", "```", shown_command(list(command)[3:]), "```", "")
    yield "Each line: base → tuned on the same items, 95 % bootstrap intervals, p of a paired randomization test, corrected by"
    yield "Holm over the table. Good news must survive the correction; a clear change for the worse need not."


def _what(provenance: Mapping[str, Any]) -> Iterator[str]:
    strengths = provenance.get("strengths") or [provenance.get("strength", 1.0)]
    limit = provenance.get("limit")
    facts = {
        "Model": f"{plain(Path(provenance['model']).name)} (SHA-256 `{provenance.get('model_sha256', '')[:16]}`)",
        "Adapter": "none: the base model alone",
        "Strength": ", ".join(f"{strength:g}" for strength in strengths),
        "Backend": plain(provenance.get("backend", "")),
        "Items": f"at most {limit:,} of each benchmark, drawn by the seed" if limit else "all",
        "Seed": str(provenance.get("seed", "")),
        "Code": f"BiasDPO {provenance.get('code_version', '')}",
        "Report": datetime.now(UTC).date().isoformat(),
    }
    if provenance.get("adapter"):
        facts["Adapter"] = f"{plain(provenance['adapter'])} (SHA-256 `{provenance.get('adapter_sha256', '')[:16]}`)"
    yield from (f"- {name}: {value}" for name, value in facts.items())
    yield ""


def _table(rows: Sequence[TableRow]) -> Iterator[str]:
    grouped = any(row.group for row in rows)
    first = "Group | Metric" if grouped else "Benchmark | Metric"
    yield f"| {first} | n | Base | Tuned | Difference | p (Holm) | Verdict |"
    yield "|---|---|---:|---:|---:|---:|---:|---|"
    for row in rows:
        better = f" ({row.better} is better)" if row.better else ""
        mark = "" if row.comparable else " *"
        cells = (
            plain(row.group if grouped else row.benchmark),
            f"{plain(row.metric)}{better}",
            f"{row.n:,}{mark}",
            _number(row.base, row.base_ci),
            _number(row.tuned, row.tuned_ci),
            _number(row.difference, row.ci),
            "" if row.p_holm is None else _p(row.p_holm),
            row.verdict,
        )
        yield f"| {' | '.join(cells)} |"


def _notes(result: Mapping[str, Any]) -> Iterator[str]:
    """What a reader must know of the benchmarks beside their figures."""
    notes = []
    for name, found in result["benchmarks"].items():
        if found.get("not_comparable"):
            notes.append(f"\\* {name}: not comparable with other evaluations: {found['not_comparable']}.")
        if found.get("not_as_published"):
            notes.append(f"{name}: not comparable with published figures: {plain(found['not_as_published'])}.")
        if found["n_failed"]:
            reason = found["failures"][0]["reason"] if found.get("failures") else "no reason is known"
            notes.append(f"{name}: {found['n_failed']:,} items could not be scored, and are not; the first: {plain(reason)}")
        baseline = found.get("pick_the_longer_baseline")
        if baseline is not None:
            notes.append(f"{name}: picking the longer completion is right in {baseline:.3f} of the pairs.")
        if found.get("data_sha256"):
            notes.append(f"{name}: SHA-256 of the data `{found['data_sha256'][:16]}`.")
    if notes:
        yield from (*(f"- {note}" for note in notes), "")


def _curves(result: Mapping[str, Any]) -> Iterator[str]:
    if not result.get("curve"):
        return
    lines = {(name, metric): points(result, name, metric) for name, metric in [*metrics(result), PRICE]}
    lines = {key: line for key, line in lines.items() if line}
    strengths = sorted({point.strength for line in lines.values() for point in line})
    yield from ("## By strength", "", f"| Benchmark | Metric | {' | '.join(f'{s:g}' for s in strengths)} |")
    yield f"|---|---|{'---:|' * len(strengths)}"
    for (name, metric), line in lines.items():
        at = {point.strength: _number(point.value, point.value_ci) for point in line}
        yield f"| {plain(name)} | {plain(metric)} | {' | '.join(at.get(strength, '') for strength in strengths)} |"
    yield ""


def _side_by_side(labelled: Sequence[Labelled]) -> Iterator[str]:
    for label, result in labelled:
        yield from (f"## {plain(label)}: {_who(result)}", "", *_what(result["provenance"]))
    yield from ("## Tuned", "", "Without an adapter: base. \\* may not be compared, for the reason below.", "")
    yield f"| Benchmark | Metric | {' | '.join(plain(label) for label, _ in labelled)} |"
    yield f"|---|---|{'---:|' * len(labelled)}"
    rows = compare(labelled)
    for row in rows:
        better = f" ({row.better} is better)" if row.better else ""
        cells = [_cell(cell) for cell in row.cells]
        yield f"| {plain(row.benchmark)} | {plain(row.metric)}{better}{'' if row.comparable else ' *'} | {' | '.join(cells)} |"
    whys = {row.benchmark: row.why_not for row in rows if not row.comparable}
    if whys:
        yield from ("", *(f"- \\* {plain(name)}: {why}" for name, why in whys.items()))


def _cell(row: TableRow | None) -> str:
    if row is None:
        return ""
    if row.tuned is not None:
        value = _number(row.tuned, row.tuned_ci)
    else:
        value = _number(row.base, row.base_ci) if row.base is not None else _number(row.difference, row.ci)
    return f"{value}<br>{row.verdict}" if row.verdict else value


def _who(result: Mapping[str, Any]) -> str:
    provenance = result["provenance"]
    model = Path(provenance["model"]).name
    return plain(f"{provenance['adapter']} on {model}" if provenance.get("adapter") else model)


def _number(value: float | None, ci: Ci | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if ci is None else f"{value:.4g} [{ci[0]:.4g}, {ci[1]:.4g}]"


def _p(p_value: float) -> str:
    return f"{p_value:.2g}" if p_value >= 0.0001 else "< 0.0001"


def _lines(lines: Sequence[str]) -> str:
    return "\n".join(lines).rstrip("\n") + "\n"


# CSV


def csv_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a metric, overall and by group. The columns are those of `TableRow`, an interval in two (`base_ci_low`,
    `base_ci_high`), then model and adapter."""
    provenance = result["provenance"]
    rows = [*table(result), *(row for name in result["benchmarks"] for row in group_table(result, name))]
    return [{**_flat(row), "model": provenance["model"], "adapter": provenance.get("adapter", "")} for row in rows]


def write_csv(result: Mapping[str, Any], path: Path) -> Path:
    """Write `csv_rows` as a CSV file, UTF-8; returns its path."""
    rows = csv_rows(result)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _columns())
        writer.writeheader()
        writer.writerows(rows)
    return path


def _columns() -> list[str]:
    names = [field.name for field in fields(TableRow)]
    columns = [part for name in names for part in ([f"{name}_low", f"{name}_high"] if name in _INTERVALS else [name])]
    return [*columns, "model", "adapter"]


def _flat(row: TableRow) -> dict[str, Any]:
    values = asdict(row)
    for name in _INTERVALS:
        low, high = values.pop(name) or (None, None)
        values |= {f"{name}_low": low, f"{name}_high": high}
    return values


# The adapter's card


def add_to_card(result: Mapping[str, Any], workspace: Workspace, command: Sequence[str] = ()) -> Path:
    """Put the report into the card (README.md) of the adapter that was evaluated, in place of an earlier one; returns the card.

    Only of a run of this workspace, and of the very adapter that is there now. Raises EvaluationError where it is another's,
    or not whole, RefusedError on a public Space.
    """
    refuse_on_public_space("Writing into an adapter's card")
    provenance = result["provenance"]
    name = provenance.get("adapter", "")
    adapter = next((one for one in models.adapters(workspace) if one.id == name), None)
    if adapter is None or adapter.folder.parent.parent != workspace.runs:
        raise EvaluationError(
            f"{name or 'The base model'} is no run's adapter in this workspace, so it has no card to write into"
        )
    if models.adapter_sha256(adapter) != provenance.get("adapter_sha256"):
        raise EvaluationError(f"Run {name!r} has another adapter now than the one that was evaluated: evaluate it again")
    if provenance.get("interrupted"):
        raise EvaluationError("What was interrupted is no result for a card: resume the evaluation, then add it")
    card = adapter.folder / CARD
    section = _lines([BEGIN, "## Evaluation", "", *_deeper(_report(result, command)), "", END])
    before = card.read_text(encoding="utf-8") if card.is_file() else f"# {plain(name)}\n"
    with replacing(card) as temporary:
        temporary.write_text(_with_section(before, section), encoding="utf-8")
    return card


def _deeper(lines: Iterator[str]) -> Iterator[str]:
    """Headings one level below the section's own."""
    return (f"#{line}" if line.startswith("## ") else line for line in lines)


def _with_section(card: str, section: str) -> str:
    """The card with this section in place of the one it has, else at its end."""
    begin, end = card.find(BEGIN), card.find(END)
    if 0 <= begin < end:
        return card[:begin] + section + card[end + len(END) :].removeprefix("\n")
    return card.rstrip("\n") + "\n\n" + section
