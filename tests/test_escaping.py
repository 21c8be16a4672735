"""What others wrote in a journal, a file, a run or a result is shown as text: no function lets it become markup."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from biasdpo import labeling, prompts
from biasdpo.data import journal
from biasdpo.data.health import AnnotatorShares, Confounds
from biasdpo.data.importing import ColumnMapping, ForeignPair, Imported, Preview
from biasdpo.data.journal import BadLine
from biasdpo.data.summary import Counts, Page
from biasdpo.engines import Loading
from biasdpo.evaluation.results import Flip
from biasdpo.jobs import store
from biasdpo.jobs.job import Status
from biasdpo.models import catalog
from biasdpo.prompts import Prompt
from biasdpo.records import JudgmentMeta
from biasdpo.ui import charts, components, dataset, evaluate, train
from biasdpo.ui.charts import Chart, Curve
from biasdpo.workspace import Workspace
from tests.evaluation_results import result
from tests.run_folders import write_run
from tests.test_labeling import OAK, SHOWN

EVIL = "<script>alert(1)</script>\"'`&"


def judgment() -> dict[str, Any]:
    """A row of the journal that is evil in each column."""
    row = asdict(replace(journal.new_judgment(EVIL, f"{EVIL} a", f"{EVIL} b"), original_chosen=f"{EVIL} c"))
    names = ("category", "target_group", "annotator", "note", "source", "created_at", "repeat_of", "id", "pair_id")
    return row | dict.fromkeys(names, EVIL) | {"meta": asdict(JudgmentMeta(EVIL, EVIL, EVIL, EVIL, 1, EVIL, EVIL, 1.0))}


def pair() -> labeling.BlindPair:
    return replace(SHOWN, prompt=Prompt(EVIL, EVIL, EVIL), adapter=EVIL)


def meter() -> str:
    shares = AnnotatorShares(EVIL, 3, 0.5, None)
    return components.meter(Confounds(3, 0.5, None, 0, 0, None, (shares, replace(shares, annotator="oak")), (EVIL,)))


MAPPING = ColumnMapping(EVIL, "good", "bad", input=EVIL)
COUNTED = Counter({EVIL: 1})
VIEWS: dict[str, Callable[[], str]] = {
    "error": lambda: components.error(EVIL),
    "no comparison": lambda: components.no_comparison(EVIL),
    "loading": lambda: components.loading(EVIL, Loading(0.5, EVIL)),
    "not loaded": lambda: components.not_loaded(EVIL),
    "pane": lambda: components.pane_head(EVIL, EVIL, "base-text"),
    "note": lambda: components.note(EVIL),
    "base only": lambda: components.base_only(replace(catalog()["phi-2"], id=EVIL, title=EVIL), 0),
    "prompt": lambda: components.prompt(pair().prompt),
    "saved": lambda: components.saved(labeling.judgment(pair(), "left", replace(OAK, annotator=EVIL)), pair(), True, 1),
    "side diff": lambda: components.side_diff(EVIL, "other", (EVIL, EVIL)),
    "edit diff": lambda: components.edit_diff("before", EVIL),
    "warning": lambda: components.warning(EVIL),
    "meter": meter,
    "coverage": lambda: components.coverage({(EVIL, EVIL): 2}, prompts.CATEGORIES),
    "consistency": lambda: components.consistency(EVIL, (1, 2), 0.5, 2),
    "dataset table": lambda: dataset.table(Page((judgment(),), frozenset(), 60, 1, 3), EVIL),
    "judgment head": lambda: dataset.detail_head(judgment(), None),
    "judgment": lambda: dataset.detail(judgment(), judgment()),
    "dataset charts": lambda: dataset.charts(Counts(1, COUNTED, Counter(preferred=1), COUNTED, Counter(), (1,) * 7)),
    "preview": lambda: dataset.preview(
        Preview((EVIL, "x" + EVIL), MAPPING, (ForeignPair(EVIL, EVIL, EVIL, EVIL, EVIL),), ()), EVIL
    ),
    "bad rows": lambda: dataset.bad_rows([BadLine(1, EVIL)], "Bad rows"),
    "imported": lambda: dataset.imported(Imported(1, 1, (BadLine(1, EVIL),), (EVIL,), MAPPING, f"import:{EVIL}", (EVIL,))),
    "probe": lambda: train.probes_html(
        [{"step": 1, "prompt": EVIL, "category": "", "base": EVIL, "tuned": f"{EVIL} x"}], None, expected=True
    ),
    "chart": lambda: charts.figure(Chart("x", "X", "", (Curve(EVIL, ((0.0, 1.0), (1.0, 2.0))),))),
    "result": lambda: evaluate.facts(
        result(4, benchmarks=("crows_pairs",)) | {"provenance": {"model": EVIL, "adapter": "/home/somebody/<b>mine"}}
    ),
    "flip": lambda: evaluate.card(
        Flip(1, EVIL, {"more": EVIL, "less": "b"}, EVIL, "b", {"logp_more": (-1.0, -2.0)}), "crows_pairs"
    ),
}


@pytest.mark.parametrize("view", VIEWS)
def test_what_others_wrote_is_text(view):
    html = VIEWS[view]()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert not re.search(r'="[^"]*<', html)  # no attribute was broken open


def test_a_runs_error_and_its_texts_are_text(tmp_path: Path):
    write_run(tmp_path, "first", "failed", status={"error": f"The disk is full {EVIL}"})
    seen = train.see(store.find_job("first", Workspace(tmp_path), "train"))
    assert "<script>" not in train.head(seen)
    assert "The disk is full &lt;script&gt;" in train.head(seen)
    assert EVIL not in train.head(replace(seen, status=Status("queued", waits_for=EVIL)))


def test_a_charts_data_come_through_its_attribute_unchanged():
    data = re.search(r'data-curves="([^"]*)"', VIEWS["chart"]())
    assert data is not None
    assert json.loads(unescape(data[1]))[0]["name"] == EVIL


def test_no_folder_of_this_machine_is_shown():
    assert "somebody" not in VIEWS["result"]()
    assert train.source_title("/home/me/secret/pairs.jsonl") == "pairs.jsonl"
    assert train.source_title("/w/runs/first/dataset.jsonl") == "data of run first"
    assert train.source_title("hub:owner/name") == "hub:owner/name"
    assert train.model_title("/home/me/models/tiny") == "tiny"


def test_measurements_of_any_adapter_are_shown_whatever_keys_they_have(tmp_path: Path):
    assert components.table(None) == components.table(tmp_path) == ""
    metrics = {"reward_accuracy": {"before": 0.5, "after": 0.97}, EVIL: 3, "odd": "text", "worse": {"deep": 1}, "flag": True}
    (tmp_path / "provenance.json").write_text(json.dumps({"metrics": metrics}))
    html = components.table(tmp_path)
    assert html.count("<tr>") == 3  # the heading, reward accuracy, the evil one
    assert "0.97" in html
    assert "<script>" not in html.lower()
