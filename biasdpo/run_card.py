"""A run's card: README.md of its adapter, in the Hub's model-card format, with a picture of its curves.

All of it comes from the run's provenance; nothing in it names a folder of this machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from biasdpo import plots
from biasdpo.models import ModelSpec

CARD, CURVES = "README.md", "curves.png"
_HUB = "hub:"
_LICENCES = {"Apache-2.0": "apache-2.0", "MIT": "mit"}


def write(folder: Path, spec: ModelSpec, provenance: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> None:
    """Write README.md and curves.png into an adapter's folder. `metrics`: the lines of metrics.jsonl."""
    plots.training_curves(
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
