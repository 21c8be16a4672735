"""The Label tab, as an annotator uses it. Every test also fails on a console error or a request to another host."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.app_process import running_app
from tests.browser.conftest import Visitor
from tests.lora_factory import write_lora


class Annotator:
    """A visitor on the Label tab, with the journal that their verdicts go to."""

    def __init__(self, visitor: Visitor, workspace: Path, name: str) -> None:
        self.visitor = visitor
        self.page = visitor.page
        self.workspace = workspace
        self.name = name

    def open(self) -> Annotator:
        self.visitor.open(adapter="demo", max_new_tokens="16")
        self.page.wait_for_selector(".bd-proven", timeout=60_000)
        self.page.get_by_role("tab", name="Label").click()
        return self

    def agree(self) -> Annotator:
        self.page.fill("#pseudonym input, #pseudonym textarea", self.name)
        self.page.click("#agree")
        self.page.wait_for_selector("#begin")
        return self

    def begin(self) -> Annotator:
        self.visitor.set_number("label-max-new-tokens", "16")
        before = self.token
        self.page.click("#begin")
        self.wait_pair(before)
        return self

    def wait_pair(self, before: str = "") -> None:
        """Until a pair is shown, another one than `before`."""
        self.page.wait_for_function(
            "(was) => { const box = document.querySelector('#pair-token textarea, #pair-token input');"
            " return box && box.value && box.value !== was }",
            arg=before,
            timeout=60_000,
        )

    @property
    def token(self) -> str:
        box = self.page.locator("#pair-token textarea, #pair-token input")
        return box.input_value() if box.count() else ""

    def press(self, key: str) -> None:
        """A key that judges: until it is stored and the next pair is there."""
        before = self.token
        self.page.keyboard.press(key)
        self.wait_pair(before)

    def texts(self) -> tuple[str, str]:
        left, right = (self.page.input_value(f"#label-{side}-text textarea") for side in ("left", "right"))
        return left, right

    def rows(self) -> list[dict[str, Any]]:
        file = self.workspace / "preferences.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        return [row for row in map(json.loads, lines) if row["annotator"] == self.name]


@pytest.fixture
def new_annotator(new_visitor, workspace):
    def make(name: str, **options: object) -> Annotator:
        return Annotator(new_visitor(**options), workspace, name).open()

    return make


def test_consent_and_pseudonym_come_before_the_first_verdict_and_are_remembered(new_annotator):
    maple = new_annotator("maple")
    assert maple.page.locator("#begin").count() == 0
    assert "CC BY 4.0" in maple.page.inner_text("#label-gate")
    maple.page.click("#agree")
    maple.page.wait_for_selector("#gate-notice:has-text('A pseudonym is needed')")
    maple.agree()
    maple.visitor.reload()
    maple.page.get_by_role("tab", name="Label").click()
    maple.page.wait_for_selector("#begin")
    assert maple.page.locator("#pseudonym").count() == 0
    assert "Nothing to judge yet" in maple.page.inner_text("#label-empty")


def test_ten_pairs_with_the_keyboard_alone_one_edited_one_undone_one_withdrawn(new_annotator):
    oak = new_annotator("oak").agree().begin()
    shown = []
    for key in ("1", "2", "3", "4", "5", "ArrowLeft", "ArrowRight", "ArrowDown", "ArrowUp"):
        shown.append(oak.texts())
        oak.press(key)
    rows = oak.rows()
    kinds = ["preferred", "preferred", "tie", "both_biased", "preferred", "preferred", "tie", "both_biased"]  # 5 skips
    assert [row["verdict"] for row in rows] == kinds
    judged = [texts for i, texts in enumerate(shown) if i != 4]
    for row, (left, right) in zip(rows, judged, strict=True):
        assert {row["chosen"], row["rejected"]} == {left, right}
        assert row["meta"]["left_side"] in ("base", "tuned")
        assert row["meta"]["model"] == "smollm2"
        assert row["meta"]["seconds"] > 0
    assert (rows[0]["chosen"], rows[1]["chosen"]) == (judged[0][0], judged[1][1])
    assert rows[0]["meta"]["chosen_side"] == rows[0]["meta"]["left_side"]

    # The tenth is edited, by keys alone: E, Tab to the left completion, type, Escape, 1.
    before = oak.texts()
    oak.page.keyboard.press("e")
    oak.page.wait_for_selector("#label-left-text textarea:not([disabled])")
    oak.page.focus("#label-left-text textarea")
    oak.page.keyboard.press("Control+A")
    oak.page.keyboard.type("Nobody can tell 1 from 2.")
    oak.page.wait_for_selector("#label-left-text-diff ins:has-text('Nobody')")
    oak.page.keyboard.press("Escape")
    oak.press("1")
    edited = oak.rows()[-1]
    assert (edited["chosen"], edited["original_chosen"]) == ("Nobody can tell 1 from 2.", before[0])
    assert (edited["rejected"], edited["original_rejected"]) == (before[1], "")

    # Undo brings the pair back with its edit, E the text as it was generated; the journal says that the judgment is taken back.
    oak.press("u")
    assert oak.texts() == ("Nobody can tell 1 from 2.", before[1])
    oak.page.keyboard.press("e")
    oak.page.wait_for_selector("#label-left-text textarea[disabled]")
    assert oak.texts() == before
    assert (oak.rows()[-1]["verdict"], oak.rows()[-1]["retracts"]) == ("retracted", edited["id"])
    oak.press("2")
    assert oak.rows()[-1]["chosen"] == before[1]

    # Withdraw the first of them.
    oak.visitor.unfold("mine")
    oak.page.wait_for_selector("#consistency:has-text('oak')")
    oak.page.click("#my-judgments input")
    oak.page.locator("#my-judgments [role=option]").last.click()
    oak.page.click("#withdraw")
    oak.page.wait_for_selector("#mine-notice:has-text('Withdrawn')")
    assert oak.rows()[-1]["retracts"] == rows[0]["id"]

    # Reload: nothing is lost.
    stored = oak.rows()
    oak.visitor.reload()
    oak.page.get_by_role("tab", name="Label").click()
    oak.visitor.unfold("mine")
    oak.page.wait_for_selector("#my-judgments:has-text('My judgments (8')")  # 8 + 1 edited - 1 undone + 1 - 1 withdrawn
    assert oak.rows() == stored


def test_nothing_tells_the_sides_before_the_verdict_and_they_are_revealed_after(new_annotator):
    elm = new_annotator("elm").agree()
    sent: list[str] = []
    elm.page.on("response", lambda r: sent.append(r.text()) if "/run/predict" in r.url else None)
    elm.begin()
    elm.page.wait_for_timeout(500)
    assert any(json.dumps(elm.texts()[0])[1:-1] in body for body in sent)
    for body in sent:
        assert not re.search(r"left_side|tuned|\"demo\"|\bseed\b", body), body[:500]
    elm.press("1")
    told = elm.page.inner_text("#label-last")
    assert "the tuned model (demo)" in told
    assert "the base model" in told
    elm.page.click("#reveal input")
    elm.press("2")
    assert "model" not in elm.page.inner_text("#label-last")


def test_sides_come_left_and_right_about_equally_often(new_annotator):
    ash = new_annotator("ash").agree().begin()
    for _ in range(12):
        ash.press("1")
    assert {row["meta"]["left_side"] for row in ash.rows()} == {"base", "tuned"}  # all on one side: 2 in 4,096


def test_a_key_pressed_twice_judges_one_pair(new_annotator):
    fir = new_annotator("fir").agree().begin()
    first = fir.token
    fir.page.evaluate(
        "() => { for (let i = 0; i < 3; i++) document.body.dispatchEvent("
        "new KeyboardEvent('keydown', {key: '1', bubbles: true, cancelable: true})) }"
    )
    fir.page.wait_for_function(
        "(was) => document.querySelector('#pair-token textarea, #pair-token input')?.value !== was", arg=first
    )
    fir.page.wait_for_timeout(1000)
    assert len(fir.rows()) == 1


def test_typing_in_a_field_judges_nothing_and_focus_stays(new_annotator):
    yew = new_annotator("yew").agree().begin()
    yew.page.focus("#target-group input, #target-group textarea")
    yew.page.keyboard.type("women over 45 u")
    assert yew.rows() == []
    yew.page.keyboard.press("Escape")
    yew.page.focus("#answer-tie")
    yew.press("3")
    assert yew.rows()[0]["target_group"] == "women over 45 u"
    assert yew.page.evaluate("() => document.activeElement.id") == "answer-tie"


def test_two_annotators_at_once_and_a_second_opinion(new_annotator):
    one, other = new_annotator("beech").agree().begin(), new_annotator("birch").agree().begin()
    for _ in range(3):
        one.press("1")
        other.press("2")
    assert len(one.rows()) == len(other.rows()) == 3
    other.page.click("#pair-source input")
    other.page.get_by_role("option", name="Second opinion").click()
    other.begin()
    other.page.wait_for_selector("#source-notice:has-text('pairs that others judged')")
    shown = set(other.texts())
    lines = (other.workspace / "preferences.jsonl").read_text(encoding="utf-8").splitlines()
    assert shown in [{row["chosen"], row["rejected"]} for row in map(json.loads, lines) if row["annotator"] != "birch"]
    other.press("3")
    assert other.rows()[-1]["verdict"] == "tie"


def test_an_own_list_two_samples_of_base_and_the_length_guard(new_annotator):
    ivy = new_annotator("ivy").agree()
    ivy.page.click("#prompt-kind input")
    ivy.page.get_by_role("option", name="My own list").click()
    ivy.page.fill("#own-prompts textarea", "Who cooks?\n\nWho cooks?\nWho drives?")
    ivy.page.click("#pair-source input")
    ivy.page.get_by_role("option", name="Two samples of base").click()
    ivy.begin()
    assert "2 prompts" in ivy.page.inner_text("#source-notice")
    assert ivy.page.inner_text("#label-prompt").strip() == "Who cooks?"
    ivy.page.click("#editing input")
    ivy.page.wait_for_selector("#label-right-text textarea:not([disabled])")
    ivy.page.fill("#label-right-text textarea", "Whoever is hungry. " * 30)
    ivy.page.wait_for_selector("#length-note:has-text('Right is')")
    ivy.page.focus("#answer-left")
    ivy.press("1")
    row = ivy.rows()[0]
    assert {row["meta"]["left_side"], row["meta"]["chosen_side"]} <= {"base 1", "base 2"}
    assert row["rejected"].startswith("Whoever is hungry.")
    assert ivy.page.inner_text("#label-prompt").strip() == "Who drives?"


def test_templates_times_groups(new_annotator):
    bay = new_annotator("bay").agree()
    bay.page.click("#prompt-kind input")
    bay.page.get_by_role("option", name="Template × groups").click()
    bay.page.wait_for_selector("#template-box")
    bay.begin()
    groups = len(bay.page.input_value("#template-box textarea >> nth=1").splitlines())
    assert groups >= 5
    assert re.search(r"\d+ prompts", bay.page.inner_text("#source-notice"))
    assert "gender" in bay.page.inner_text("#label-prompt")
    bay.press("3")
    assert bay.rows()[0]["target_group"]


def test_a_pasted_pair_is_text_never_markup(new_annotator):
    fig = new_annotator("fig").agree()
    fig.visitor.unfold("paste")
    fig.page.fill("#paste-prompt textarea", "<script>window.hacked = 1</script> Who?")
    fig.page.fill("#paste-one textarea", "<img src=x onerror='window.hacked = 1'> Anyone.")
    fig.page.fill("#paste-other textarea", "<b>They</b> are to blame.")
    fig.page.click("#paste-button")
    fig.wait_pair()
    assert "<script>" in fig.page.inner_text("#label-prompt")
    fig.visitor.unfold("label-diff")
    fig.page.keyboard.press("2")
    fig.page.wait_for_selector("#label-last:has-text('Stored')")
    fig.visitor.unfold("mine")
    fig.page.wait_for_timeout(300)
    assert fig.page.evaluate("() => window.hacked") is None
    row = fig.rows()[0]
    assert {row["chosen"], row["rejected"]} == {"<img src=x onerror='window.hacked = 1'> Anyone.", "<b>They</b> are to blame."}
    assert {row["meta"]["left_side"], row["meta"]["chosen_side"]} <= {"pasted 1", "pasted 2"}


def test_from_compare_judged_on_the_spot_and_sent_to_the_label_tab(new_annotator):
    pine = new_annotator("pine").agree()
    pine.page.get_by_role("tab", name="Compare").click()
    pine.visitor.generate("Describe a typical nurse.")
    pine.page.wait_for_selector("#judge", timeout=60_000)
    texts = pine.visitor.text("base").strip(), pine.visitor.text("tuned").strip()
    pine.visitor.unfold("diff")
    pine.page.wait_for_selector("#diff .bd-diff ins")
    pine.visitor.unfold("judge")
    pine.page.click("#judge-right")
    pine.page.wait_for_selector("#judge-notice:has-text('tuned is less biased')")
    row = pine.rows()[0]
    assert (row["chosen"], row["rejected"], row["source"]) == (texts[1], texts[0], "compare")
    pine.page.click("#judge-right")
    pine.page.wait_for_selector("#judge-notice:has-text('judged this pair already')")
    pine.visitor.generate("Describe a typical engineer.")
    pine.visitor.wait_written()
    pine.page.wait_for_selector("#history:has-text('History of this page (2)')")
    pine.page.click("#send-to-label")
    pine.wait_pair()
    assert pine.page.inner_text("#label-prompt").strip() == "Describe a typical engineer."
    pine.page.keyboard.press("3")
    pine.page.wait_for_selector("#label-last:has-text('a tie')")
    assert pine.rows()[-1]["source"] == "compare"  # the sides had been seen

    # The history brings the first pair back.
    pine.page.get_by_role("tab", name="Compare").click()
    pine.visitor.unfold("history")
    pine.page.click("#history-picker input")
    pine.page.locator("#history-picker [role=option]").last.click()
    pine.page.click("#reopen")
    pine.page.wait_for_selector("#notice:has-text('From the history')")
    assert (pine.visitor.text("base").strip(), pine.visitor.text("tuned").strip()) == texts
    assert pine.page.input_value("#prompt textarea") == "Describe a typical nurse."


def test_a_verdict_that_cannot_be_stored_stays_in_the_page_and_works_again(new_visitor, tmp_path):
    folder = write_lora(tmp_path / "runs" / "demo" / "adapter", base_model="smollm2", size=0.05)
    (folder / "provenance.json").write_text(json.dumps({"model": "smollm2", "run_id": "demo"}))
    journal = tmp_path / "preferences.jsonl"
    with running_app(tmp_path, "--model", "smollm2") as url:
        sad = Annotator(new_visitor(url), tmp_path, "willow").open().agree().begin()
        journal.mkdir()  # nothing can be appended to a folder
        shown = sad.texts()
        sad.page.keyboard.press("1")
        sad.page.wait_for_selector("#label-notice .bd-error:has-text('preferences.jsonl')")
        assert sad.texts() == shown
        shutil.rmtree(journal)
        sad.press("1")
        assert [(row["chosen"], row["rejected"]) for row in sad.rows()] == [shown]
        sad.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_400_px_has_no_sideways_scrolling(new_annotator, scheme):
    sage = new_annotator(f"sage {scheme}", viewport={"width": 400, "height": 800}, color_scheme=scheme).agree().begin()
    for box in ("paste", "coverage", "mine"):
        sage.visitor.unfold(box)
    sage.page.wait_for_selector("#consistency:has-text('sage')")
    wide = sage.page.evaluate(
        "() => [...document.querySelectorAll('#label-work :is(button, textarea, input, .bd-pane, .block), .bd-meter')]"
        ".filter(e => e.offsetParent && e.getBoundingClientRect().right > 400).map(e => e.id + '.' + e.className)"
    )
    assert wide == []
