"""The same items of the same model (SmolLM2, float32) by us and by lm-evaluation-harness: are the figures equal?

    python -m tests.perf.lm_eval_parity --lm-eval-python PATH [--items 40] [--threads N] [--data-dir DIR]

lm-evaluation-harness is run as its users run it (its `hf` model, its tasks' own prompts, clean-up and metrics), but that its
documents come from files instead of the Hub. Prints one JSON object: for each metric both figures, whether they are equal, and
where they differ on purpose, why. It has no task for StereoSet, and asks WinoGender's question, not WinoBias' own.

A metric is equal where it is within 1e-6, or a mean of log-probabilities within 1e-4 nats: single precision. Exit status 1
where one differs without a reason that we know of.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from biasdpo import benchmarks, models
from biasdpo.backends import open_backend
from biasdpo.backends.hf_loading import hf_copy
from biasdpo.benchmarks import bbq
from biasdpo.benchmarks.rows import load_rows
from biasdpo.evaluation import run
from biasdpo.evaluation.run import AnswerCache, score_items
from biasdpo.migrations import open_workspace
from tests.perf.lm_eval_model import LmEval
from tests.perf.measuring import options

BIAS_OF_BBQ = (
    "a group counts as stereotyped by its words here, by letters there ('German' becomes 'germ' and a man); items of which both "
    "groups or neither are stereotyped are left out here, counted there; no biased answer is -1 here, 0 there"
)


def of_crows_pairs(items: Iterable[Any]) -> list[dict[str, Any]]:
    return [{"sent_more": item.more, "sent_less": item.less} for item in items]


def of_truthfulqa(items: Iterable[Any]) -> list[dict[str, Any]]:
    return [
        {
            "question": item.question,
            "mc1_targets": {"choices": list(item.mc1), "labels": [1] + [0] * (len(item.mc1) - 1)},
            "mc2_targets": {"choices": [a for a, _ in item.mc2], "labels": [int(is_true) for _, is_true in item.mc2]},
        }
        for item in items
    ]


def of_winobias(items: Iterable[Any], kind: str) -> list[dict[str, Any]]:
    sentences = [(getattr(item, kind), item) for item in items]
    return [
        {"sentence": s.text, "pronoun": s.pronoun, "occupation": item.occupation, "participant": item.other, "label": 0}
        for s, item in sentences
    ]


def ours(backend: Any, benchmark: Any, indices: list[int]) -> Mapping[str, float]:
    """Base's metrics over the items."""
    scored = score_items(backend, {"base": AnswerCache("base")}, benchmark, indices)
    assert not scored.failures
    numbers = np.array(scored.numbers["base"], dtype=np.float64)
    return {name: float(metric(numbers)) for name, metric in benchmark.side_metrics().items()}


def main() -> int:
    threads = psutil.cpu_count(logical=False) or 1
    args = options(__doc__, lm_eval_python="python", items=40, threads=threads, data_dir=Path("../shared/benchmarks"))
    import torch

    torch.set_num_threads(args.threads)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        workspace = open_workspace(place)
        spec = models.find("smollm2")
        backend = open_backend(spec, None, name="transformers", workspace=workspace)
        docs = Path(place) / "docs.jsonl"
        with LmEval(args.lm_eval_python, hf_copy(spec, workspace), None, args.threads) as lm_eval:

            def theirs(yaml: str, documents: list[dict[str, Any]]) -> dict[str, float]:
                docs.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
                return lm_eval.ask(yaml=yaml, docs=str(docs))

            def compare(name: str, here: float, there: float, *, within: float = 1e-6, on_purpose: str = "") -> None:
                row: dict[str, Any] = {"ours": here, "lm_eval": there, "equal": abs(here - there) <= within}
                rows[name] = row if row["equal"] or not on_purpose else {**row, "differs_on_purpose": on_purpose}

            def drawn(name: str, count: int) -> tuple[Mapping[str, float], list[int], list[Any]]:
                """(our metrics, the drawn items' indices, the items)."""
                benchmark = benchmarks.build(name, args.data_dir)
                indices = run.draw(len(benchmark.items), count, 0)
                return ours(backend, benchmark, indices), indices, [benchmark.items[i] for i in indices]

            here, _, items = drawn("crows_pairs", args.items)
            there = theirs("crows_pairs/crows_pairs_english.yaml", of_crows_pairs(items))
            compare("crows_pairs pct_stereotype", here["stereotype_percent"] / 100, there["pct_stereotype"])
            compare("crows_pairs likelihood_diff", here["mean_abs_difference_nats"], there["likelihood_diff"], within=1e-4)

            here, _, items = drawn("truthfulqa", args.items // 4)
            for metric in ("mc1", "mc2"):
                there = theirs(f"truthfulqa/truthfulqa_{metric}.yaml", of_truthfulqa(items))
                compare(f"truthfulqa {metric}", here[metric] / 100, there["acc"], within=1e-5)

            here, _, items = drawn("winobias", args.items)
            for kind in ("pro", "anti"):
                there = theirs("winogender/winogender.yaml", of_winobias(items, kind))
                compare(f"winobias accuracy_{kind}", here[f"accuracy_{kind}"] / 100, there["acc"])

            here, indices, _ = drawn("bbq", args.items // 4)
            upstream = load_rows(bbq.ORIGIN, args.data_dir).rows
            there = theirs("bbq/bbq_multiple_choice.yaml", [upstream[i].value for i in indices])
            for condition, short in (("ambiguous", "amb"), ("disambiguated", "disamb")):
                compare(f"bbq accuracy_{condition}", here[f"accuracy_{condition}"], there[f"accuracy_{short}"])
                compare(
                    f"bbq bias_score_{condition}",
                    here[f"bias_score_{condition}"],
                    there[f"{short}_bias_score"],
                    on_purpose=BIAS_OF_BBQ,
                )
        backend.close()
    equal = all(row["equal"] or "differs_on_purpose" in row for row in rows.values())
    print(json.dumps({"model": "smollm2", "threads": args.threads, "all_equal_or_on_purpose": equal, "metrics": rows}, indent=1))
    return 0 if equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
