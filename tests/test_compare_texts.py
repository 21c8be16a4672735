"""What others wrote in a model's name, a run or an adapter's record is shown as text: it is escaped in Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from biasdpo.compare import load_example_pairs
from biasdpo.engines import EngineKey
from biasdpo.models import AdapterSpec, catalog
from biasdpo.records import PairTurn, Proof
from biasdpo.ui import compare

EVIL = "<script>alert(1)</script>\"'`&![x](javascript:y)\n# head"


def adapter(folder: Path) -> AdapterSpec:
    return AdapterSpec(EVIL, folder, EVIL, run_id=f"run {EVIL}", dataset_sha256=EVIL)


def details(folder: Path) -> str:
    metrics = {"reward_accuracy": 0.97, "pairs": 200, EVIL: 3, "odd": EVIL, "worse": {"deep": 1}}
    (folder / "provenance.json").write_text(json.dumps({"metrics": {"held_out": metrics}}))
    backend = SimpleNamespace(name=EVIL, device=EVIL, proof=Proof(0.0, 0.0, 1.0, 0.5))
    engine: Any = SimpleNamespace(spec=replace(catalog()["phi-2"], title=EVIL), adapter=adapter(folder), backend=backend)
    return compare._details(engine, EVIL)


def caption(_folder: Path) -> str:
    pair = replace(load_example_pairs()[0], prompt=EVIL, model=EVIL, adapter=EVIL, history=(PairTurn(EVIL, EVIL, EVIL),))
    return compare._caption(compare.Entry(pair, EngineKey(EVIL, EVIL), "Example"))


VIEWS: dict[str, Callable[[Path], str]] = {
    "details": details,
    "caption": caption,
    "base only": lambda folder: compare._base_only(replace(catalog()["phi-2"], title=EVIL), [adapter(folder)]),
    "no adapter": lambda _folder: compare._base_only(replace(catalog()["phi-2"], title=EVIL), []),
}


@pytest.mark.parametrize("view", VIEWS)
def test_what_others_wrote_is_text(view, tmp_path):
    from markdown_it import MarkdownIt

    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(VIEWS[view](tmp_path))
    assert "<script" not in html
    assert "javascript:y" not in html or "href" not in html
    assert "<img" not in html
    assert "<h1" not in html


def test_a_record_is_one_sentence_and_a_damaged_one_is_left_out(tmp_path):
    assert compare._measured(adapter(tmp_path)) == ""
    assert "Reward accuracy 0.97 [0.94, 0.99] on 200 held-out pairs" in details(tmp_path)
    accuracy = '{"reward_accuracy": 97, "pairs": 200}'
    for damaged in ("{", "[]", '{"metrics": 5}', '{"metrics": {"held_out": [1]}}', f'{{"metrics": {{"held_out": {accuracy}}}}}'):
        (tmp_path / "provenance.json").write_text(damaged)
        assert compare._measured(adapter(tmp_path)) == ""
