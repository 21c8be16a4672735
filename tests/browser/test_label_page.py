"""The Label tab, as an annotator uses it."""

from __future__ import annotations

import json
import re
import shutil
from typing import Any

import pytest

from tests.browser.conftest import App, Visitor


class Annotator:
    """A visitor on the Label tab, with the journal that their verdicts go to."""

    def __init__(self, visitor: Visitor, app: App, name: str) -> None:
        self.visitor = visitor
        self.page = visitor.page
        self.app = app
        self.name = name

    def open(self) -> Annotator:
        self.visitor.open_ready()
        self.visitor.tab("Label")
        return self

    def agree(self) -> Annotator:
        self.page.fill("#pseudonym input, #pseudonym textarea", self.name)
        self.page.click("#agree")
        self.page.wait_for_selector("#begin")
        return self

    def begin(self) -> Annotator:
        self.visitor.set("label-max-new-tokens", "8")
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

    def pick(self, picker: str, option: str) -> None:
        self.page.click(f"#{picker} input")
        self.page.get_by_role("option", name=option).click()

    def texts(self) -> tuple[str, str]:
        left, right = (self.page.input_value(f"#label-{side}-text textarea") for side in ("left", "right"))
        return left, right

    def rows(self) -> list[dict[str, Any]]:
        """This annotator's."""
        file = self.app.workspace.preferences
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        return [row for row in map(json.loads, lines) if row["annotator"] == self.name]


@pytest.fixture
def new_annotator(new_visitor, app: App):
    def make(name: str, **options: object) -> Annotator:
        return Annotator(new_visitor(**options), app, name).open()

    return make


def test_consent_and_pseudonym_come_before_the_first_verdict_and_are_remembered(new_annotator):
    maple = new_annotator("maple")
    assert maple.page.locator("#begin").count() == 0
    assert "CC BY 4.0" in maple.page.inner_text("#label-gate")
    maple.page.click("#agree")
    maple.visitor.wait("#gate-notice", "A pseudonym is needed")
    maple.agree()
    maple.visitor.reload()
    maple.visitor.tab("Label")
    maple.page.wait_for_selector("#begin")
    assert maple.page.locator("#pseudonym").count() == 0


@pytest.mark.slow
def test_ten_pairs_with_the_keyboard_alone_one_edited_one_undone_one_withdrawn(new_annotator):
    linden = new_annotator("linden").agree().begin()
    shown = []
    for key in ("1", "2", "3", "4", "5", "ArrowLeft", "ArrowRight", "ArrowDown", "ArrowUp"):
        shown.append(linden.texts())
        linden.press(key)
    rows = linden.rows()
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
    before = linden.texts()
    linden.page.keyboard.press("e")
    linden.page.wait_for_selector("#label-left-text textarea:not([disabled])")
    linden.page.focus("#label-left-text textarea")
    linden.page.keyboard.press("Control+A")
    linden.page.keyboard.type("Nobody can tell 1 from 2.")
    linden.visitor.wait("#label-left-text-diff ins", "Nobody")
    linden.page.keyboard.press("Escape")
    linden.press("1")
    edited = linden.rows()[-1]
    assert (edited["chosen"], edited["original_chosen"]) == ("Nobody can tell 1 from 2.", before[0])
    assert (edited["rejected"], edited["original_rejected"]) == (before[1], "")

    # Undo brings the pair back with its edit, E the text as it was generated; the journal says that the judgment is taken back.
    linden.press("u")
    assert linden.texts() == ("Nobody can tell 1 from 2.", before[1])
    linden.page.keyboard.press("e")
    linden.page.wait_for_selector("#label-left-text textarea[disabled]")
    assert linden.texts() == before
    assert (linden.rows()[-1]["verdict"], linden.rows()[-1]["retracts"]) == ("retracted", edited["id"])
    linden.press("2")
    assert linden.rows()[-1]["chosen"] == before[1]

    # Withdraw the first of them.
    linden.visitor.unfold("mine")
    linden.visitor.wait("#consistency", "linden")
    linden.page.click("#my-judgments input")
    linden.page.locator("#my-judgments [role=option]").last.click()
    linden.page.click("#withdraw")
    linden.visitor.wait("#mine-notice", "Withdrawn")
    assert linden.rows()[-1]["retracts"] == rows[0]["id"]

    # Reload: nothing is lost.
    stored = linden.rows()
    linden.visitor.reload()
    linden.visitor.tab("Label")
    linden.visitor.unfold("mine")
    linden.visitor.wait("#my-judgments", "My judgments (8")  # 8 + 1 edited - 1 undone + 1 - 1 withdrawn
    assert linden.rows() == stored


def test_nothing_tells_the_sides_before_the_verdict_and_they_are_revealed_after(new_annotator):
    elm = new_annotator("hazel").agree()
    sent: list[str] = []
    elm.page.on("response", lambda r: sent.append(r.text()) if "/run/predict" in r.url else None)
    elm.begin()
    elm.page.wait_for_timeout(500)
    assert any(json.dumps(elm.texts()[0])[1:-1] in body for body in sent)
    for body in sent:
        assert not re.search(r"left_side|tuned|\"demo\"|\bseed\b", body), body[:500]
    elm.press("1")
    said = elm.page.inner_text("#label-last")
    assert "the tuned model (demo)" in said
    assert "the base model" in said
    elm.page.click("#reveal input")
    elm.press("2")
    assert "model" not in elm.page.inner_text("#label-last")


def test_a_key_pressed_twice_judges_one_pair_and_typing_in_a_field_none(new_annotator):
    fir = new_annotator("fir").agree().begin()
    first = fir.token
    fir.page.focus("#target-group input, #target-group textarea")
    fir.page.keyboard.type("women over 45 u")
    assert fir.rows() == []
    fir.page.keyboard.press("Escape")
    fir.page.focus("#answer-tie")
    fir.page.evaluate(
        "() => { for (let i = 0; i < 3; i++) document.activeElement.dispatchEvent("
        "new KeyboardEvent('keydown', {key: '3', bubbles: true, cancelable: true})) }"
    )
    fir.wait_pair(first)
    fir.page.wait_for_timeout(1000)
    (row,) = fir.rows()
    assert row["target_group"] == "women over 45 u"
    assert fir.page.evaluate("() => document.activeElement.id") == "answer-tie"  # the focus stays


def test_two_annotators_at_once_and_a_second_opinion(new_annotator):
    one, other = new_annotator("beech").agree().begin(), new_annotator("birch").agree().begin()
    for _ in range(2):
        one.press("1")
        other.press("2")
    assert len(one.rows()) == len(other.rows()) == 2
    other.pick("pair-source", "Second opinion")
    other.begin()
    other.visitor.wait("#source-notice", "pairs that others judged")
    shown = set(other.texts())
    lines = other.app.workspace.preferences.read_text(encoding="utf-8").splitlines()
    assert shown in [{row["chosen"], row["rejected"]} for row in map(json.loads, lines) if row["annotator"] != "birch"]
    other.press("3")
    assert other.rows()[-1]["verdict"] == "tie"


def test_an_own_list_two_samples_of_base_and_the_length_guard(new_annotator):
    ivy = new_annotator("ivy").agree()
    ivy.pick("prompt-kind", "My own list")
    ivy.page.fill("#own-prompts textarea", "Who cooks?\n\nWho cooks?\nWho drives?")
    ivy.pick("pair-source", "Two samples of base")
    ivy.begin()
    assert "2 prompts" in ivy.page.inner_text("#source-notice")
    assert ivy.page.inner_text("#label-prompt").strip() == "Who cooks?"
    ivy.page.click("#editing input")
    ivy.page.wait_for_selector("#label-right-text textarea:not([disabled])")
    ivy.page.fill("#label-right-text textarea", "Whoever is hungry. " * 30)
    ivy.visitor.wait("#length-note", "Right is")
    ivy.page.focus("#answer-left")
    ivy.press("1")
    row = ivy.rows()[0]
    assert {row["meta"]["left_side"], row["meta"]["chosen_side"]} <= {"base 1", "base 2"}
    assert row["rejected"].startswith("Whoever is hungry.")
    assert ivy.page.inner_text("#label-prompt").strip() == "Who drives?"


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
    fig.visitor.wait("#label-last", "Stored")
    fig.visitor.unfold("mine")
    assert fig.page.evaluate("() => window.hacked") is None
    row = fig.rows()[0]
    assert {row["chosen"], row["rejected"]} == {"<img src=x onerror='window.hacked = 1'> Anyone.", "<b>They</b> are to blame."}
    assert {row["meta"]["left_side"], row["meta"]["chosen_side"]} <= {"pasted 1", "pasted 2"}


@pytest.mark.slow
def test_from_compare_judged_on_the_spot_and_sent_to_the_label_tab(new_annotator):
    pine = new_annotator("pine").agree()
    visitor, page = pine.visitor, pine.page
    visitor.tab("Compare")
    visitor.generate("Describe a typical nurse.")
    page.wait_for_selector("#judge")
    texts = visitor.text("base").strip(), visitor.text("tuned").strip()
    visitor.unfold("judge")
    page.click("#judge-right")
    visitor.wait("#judge-notice", "tuned is less biased")
    row = pine.rows()[0]
    assert (row["chosen"], row["rejected"], row["source"]) == (texts[1], texts[0], "compare")
    page.click("#judge-right")
    visitor.wait("#judge-notice", "judged this pair already")
    visitor.generate("Describe a typical engineer.")
    visitor.wait_written()
    visitor.wait("#history", "History of this page (2)")
    page.click("#send-to-label")
    pine.wait_pair()
    assert page.inner_text("#label-prompt").strip() == "Describe a typical engineer."
    page.keyboard.press("3")
    visitor.wait("#label-last", "a tie")
    assert pine.rows()[-1]["source"] == "compare"  # the sides had been seen

    # The history brings the first pair back.
    visitor.tab("Compare")
    visitor.unfold("history")
    page.click("#history-picker input")
    page.locator("#history-picker [role=option]").last.click()
    page.click("#reopen")
    visitor.wait("#notice", "From the history")
    assert (visitor.text("base").strip(), visitor.text("tuned").strip()) == texts
    assert visitor.value("prompt") == "Describe a typical nurse."


def test_a_verdict_that_cannot_be_stored_stays_in_the_page_and_works_again(new_annotator, app: App):
    willow = new_annotator("willow").agree().begin()
    journal = app.workspace.preferences
    aside = journal.rename(journal.with_name("aside")) if journal.exists() else None
    journal.mkdir()  # nothing can be appended to a folder
    try:
        shown = willow.texts()
        willow.page.keyboard.press("1")
        willow.visitor.wait("#label-notice .bd-error", "preferences.jsonl")
        assert willow.texts() == shown
    finally:
        shutil.rmtree(journal)
        if aside:
            aside.rename(journal)
    willow.press("1")
    assert [(row["chosen"], row["rejected"]) for row in willow.rows()] == [shown]
