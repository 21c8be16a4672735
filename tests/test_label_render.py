"""What the Label tab shows of pairs, judgments and data health."""

from __future__ import annotations

from dataclasses import replace

from biasdpo import labeling, prompts
from biasdpo.data.health import AnnotatorShares, Confounds
from biasdpo.prompts import Prompt
from biasdpo.ui import components
from tests.test_labeling import OAK, SHOWN


def test_the_page_shows_others_text_as_text():
    evil = "<script>alert(1)</script>"
    pair = replace(SHOWN, prompt=Prompt(evil, evil, evil), adapter=evil)
    made = labeling.judgment(pair, "left", replace(OAK, annotator=evil))
    shares = AnnotatorShares(evil, 3, 0.5, None)
    confounds = Confounds(3, 0.5, None, 0, 0, None, (shares, replace(shares, annotator="oak")), (evil,))
    for html in (
        components.prompt(pair.prompt),
        components.saved(made, pair, True, 1),
        components.side_diff(evil, "other", (evil, evil)),
        components.edit_diff("before", evil),
        components.warning(evil),
        components.meter(confounds),
        components.coverage({(evil, evil): 2}, prompts.CATEGORIES),
        components.consistency(evil, (1, 2), 0.5, 2),
    ):
        assert "<script>" not in html
        assert "&lt;script&gt;" in html


def test_the_meter_says_what_is_not_known():
    html = components.meter(Confounds(0, None, None, 0, 0, None, (), ()))
    assert html.count("–") == 3  # two shares, and the overlap without --data-dir
    assert "By annotator" not in html


def test_sides_are_revealed_or_not():
    made = labeling.judgment(SHOWN, "right", OAK)
    told = components.saved(made, SHOWN, True, 4)
    assert "right is less biased" in told
    assert "Left was the base model, right was the tuned model (demo) (seed 7)." in told
    assert "model" not in components.saved(made, SHOWN, False, 4)
