"""The Label tab, as an annotator uses it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from biasdpo.migrations import open_workspace
from tests.app_process import running_app
from tests.browser.conftest import SIZE, App, Visitor
from tests.hub import running_hub
from tests.judging import say, store

TOKEN = "document.querySelector('#pair-token :is(input, textarea)')?.value"
ENDS = re.compile(r"[.!?…][\"'”’)*_]*$")


class Annotator:
    """A visitor on the Label tab, with the journal that their verdicts go to."""

    def __init__(self, visitor: Visitor, app: App, name: str) -> None:
        self.visitor, self.page, self.app, self.name = visitor, visitor.page, app, name

    def open(self) -> Annotator:
        self.page.goto(self.visitor.url + "?tab=label")
        self.page.wait_for_selector("#guidelines")
        return self

    def start(self, button: str = "begin", tokens: int = 48, **choices: str) -> Annotator:
        """Choose settings, give the nickname if it is asked for, and wait for the first pair."""
        if not self.page.locator("#label-max-new-tokens").is_visible():
            self.visitor.unfold("label-settings")
        self.visitor.set("label-max-new-tokens", str(tokens))
        for picker, option in choices.items():
            self.page.click(f"#{picker.replace('_', '-')} input")
            self.page.get_by_role("option", name=option).click()
        if self.page.locator("#nickname").is_visible():
            self.page.fill("#nickname :is(input, textarea)", self.name)
        before = self.token
        self.page.click(f"#{button}")
        return self.wait_pair(before)

    def wait_pair(self, before: str = "") -> Annotator:
        """Until a pair is shown, another one than `before`."""
        self.page.wait_for_function(f"(was) => {{ const now = {TOKEN}; return now && now !== was }}", arg=before, timeout=240_000)
        return self

    @property
    def token(self) -> str:
        return self.page.evaluate(f"() => {TOKEN}") or ""

    def press(self, key: str) -> None:
        """A key that judges, skips or undoes, until the next pair is there."""
        before = self.token
        self.page.keyboard.press(key)
        self.wait_pair(before)

    def texts(self) -> tuple[str, str]:
        """The pair's texts. Gradio writes them into the page a moment after its token."""
        boxes = "[...document.querySelectorAll('#label-left-text textarea, #label-right-text textarea')]"
        for _ in range(300):
            values = self.page.evaluate(f"() => {boxes}.map((box) => box.value)")
            if len(values) == 2 and all(values):
                return values[0], values[1]
            self.page.wait_for_timeout(200)
        raise AssertionError((values, self.token, self.page.inner_text("#label-progress")))

    def rows(self) -> list[dict[str, Any]]:
        """This annotator's, in order."""
        file = self.app.workspace.preferences
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        return [row for row in map(json.loads, lines) if row["annotator"] == self.name]

    def withdraw_oldest(self) -> None:
        """Under “My verdicts”."""
        self.visitor.unfold("mine")
        self.page.locator("#my-judgments [role=gridcell][data-col='1']").last.click()
        self.page.click("#withdraw:not([disabled])")
        self.visitor.wait("#mine-notice", "Withdrawn")


@pytest.fixture
def new_annotator(new_visitor, app: App):
    def make(name: str, **options: object) -> Annotator:
        return Annotator(new_visitor(**options), app, name).open()

    return make


def test_nickname_and_consent_are_asked_inline_once_and_can_be_taken_back(new_annotator):
    maple = new_annotator("maple")
    assert "CC BY 4.0" in maple.page.inner_text("#consent")
    maple.page.click("#begin")
    maple.visitor.wait(".toast-body", "Enter a nickname")
    maple.start()
    maple.visitor.wait_gone(".toast-body.error")  # it is no longer true
    maple.press("s")
    assert maple.rows() == []
    maple.page.reload()
    maple.visitor.wait("#begin", "Start labeling")
    assert not maple.page.locator("#nickname").is_visible()
    maple.visitor.unfold("mine")
    maple.page.click("#change-nickname")
    maple.page.wait_for_selector("#nickname")


@pytest.mark.slow
def test_ten_pairs_with_the_keyboard_alone_one_edited_one_undone_and_withdrawn_after_restarts(new_annotator, app: App):
    linden = new_annotator("linden").start()
    shown = []
    for key in ("1", "2", "3", "4", "5", "s", "ArrowLeft", "ArrowRight", "ArrowDown", "ArrowUp"):
        shown.append(linden.texts())
        linden.press(key)
    linden.visitor.wait("#label-progress", "9 of 24")
    rows = linden.rows()
    preferred = ["preferred", "preferred", "tie", "both_biased"]
    assert [row["verdict"] for row in rows] == [*preferred, "both_unusable", *preferred]
    judged = [texts for i, texts in enumerate(shown) if i != 5]
    for row, (left, right) in zip(rows, judged, strict=True):
        meta = row["meta"]
        assert {row["chosen"], row["rejected"]} == {left, right}
        assert (meta["model"], {meta["left_side"]} <= {"base", "tuned"}, len(meta["browser"])) == ("smollm2", True, 16)
        assert meta["seconds"] > 0
        for text, reason in ((left, meta["left_finish"]), (right, meta["right_finish"])):
            assert reason == "end_of_text" or (reason == "limit" and ENDS.search(text)), text
    assert (rows[0]["chosen"], rows[1]["chosen"]) == (judged[0][0], judged[1][1])
    assert rows[0]["meta"]["chosen_side"] == rows[0]["meta"]["left_side"]

    # The tenth is edited: E, type, Escape, 1. Undo brings the pair back with its edit, E the text as it was generated.
    before = linden.texts()
    linden.page.keyboard.press("e")
    linden.page.wait_for_selector("#label-left-text textarea:not([disabled])")
    linden.page.focus("#label-left-text textarea")
    linden.page.keyboard.press("Control+A")
    linden.page.keyboard.type("Nobody can tell 1 from 2.")
    linden.visitor.wait("#label-edits", "Nobody")
    linden.page.keyboard.press("Escape")
    linden.press("1")
    edited = linden.rows()[-1]
    assert (edited["chosen"], edited["original_chosen"]) == ("Nobody can tell 1 from 2.", before[0])
    assert (edited["rejected"], edited["original_rejected"]) == (before[1], "")
    linden.press("u")
    linden.page.wait_for_selector("#label-left-text textarea:not([disabled])")
    assert linden.texts() == ("Nobody can tell 1 from 2.", before[1])
    assert (linden.rows()[-1]["verdict"], linden.rows()[-1]["retracts"]) == ("retracted", edited["id"])
    linden.page.keyboard.press("e")
    linden.page.wait_for_selector("#label-left-text textarea[disabled]")
    assert linden.texts() == before
    linden.press("2")
    assert linden.rows()[-1]["chosen"] == before[1]

    # Another app, another browser with this one's storage: the judgments are still one's own, and can be withdrawn.
    state = linden.page.context.storage_state()
    linden.page.goto("about:blank")
    app.kill()
    app.start()
    later = new_annotator("linden", storage_state=state)
    later.withdraw_oldest()
    later.visitor.wait("#consistency", "9 verdicts")  # 9 + 1 edited - 1 undone + 1 - 1 withdrawn
    assert later.rows()[-1]["retracts"] == rows[0]["id"]
    stranger = new_annotator("linden", viewport=SIZE)  # the same nickname in another browser
    stranger.visitor.unfold("mine")
    stranger.visitor.wait("#consistency", "0 verdicts")


# Keeps what the server sends through streams, which are open as long as something is under way.
KEEP_STREAMS = """
window.sent_ = "";
const fetch_ = window.fetch;
window.fetch = async (...given) => {
  const answer = await fetch_(...given);
  if (String(given[0].url ?? given[0]).includes("/queue/data")) {
    const reader = answer.clone().body.pipeThrough(new TextDecoderStream()).getReader();
    (async () => { for (let read; !(read = await reader.read()).done;) window.sent_ += read.value; })().catch(() => {});
  }
  return answer;
};
"""


# The steps' labels change by what is done on the page alone, not by looking every 15 s.
NO_LOOKS = """
const setInterval_ = window.setInterval;
window.setInterval = (call, ms, ...more) => (ms === 15000 ? 0 : setInterval_(call, ms, ...more));
"""


def test_nothing_tells_the_sides_before_the_verdict_and_they_are_revealed_after(new_annotator):
    hazel = new_annotator("hazel")
    hazel.page.add_init_script(KEEP_STREAMS + NO_LOOKS)
    hazel.open().start()
    sent = hazel.page.evaluate("() => window.sent_")
    assert json.dumps(hazel.texts()[0], ensure_ascii=False)[1:-1] in sent
    assert not re.search(r"left_side|_finish|the tuned model|the base model|\bseed\b", sent)
    hazel.page.set_viewport_size({"width": 1280, "height": 800})
    step = hazel.page.locator("#steps [role=tab]").nth(1).inner_text()
    hazel.page.keyboard.press("1")
    hazel.visitor.wait("#label-last", "Stored")
    bottom = hazel.page.evaluate("() => document.querySelector('#label-last').getBoundingClientRect().bottom")
    assert bottom <= 800  # without scrolling
    hazel.page.wait_for_function("(was) => document.querySelectorAll('#steps [role=tab]')[1].innerText !== was", arg=step)
    hazel.wait_pair()
    said = hazel.page.inner_text("#label-last")
    assert "the tuned model (smollm2-biasdpo)" in said
    assert "the base model" in said
    hazel.page.click("#reveal input")
    hazel.press("2")
    assert "model" not in hazel.page.inner_text("#label-last")


def test_a_key_pressed_twice_judges_one_pair_and_typing_in_a_field_none(new_annotator):
    fir = new_annotator("fir").start()
    first = fir.token
    fir.page.focus("#target-group :is(input, textarea)")
    fir.page.keyboard.type("women over 45 use")
    fir.page.keyboard.press("ArrowLeft")
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
    assert row["target_group"] == "women over 45 use"
    assert fir.page.evaluate("() => document.activeElement.id") == "answer-tie"  # the focus stays


@pytest.mark.slow
def test_two_annotators_at_once_and_a_second_opinion(new_annotator):
    one, other = new_annotator("beech").start(), new_annotator("birch").start()
    for _ in range(2):
        one.press("1")
        other.press("2")
    assert len(one.rows()) == len(other.rows()) == 2
    other.start("restart", pair_source="Second opinion")
    other.visitor.wait("#label-last", "that others have judged")
    shown = set(other.texts())
    lines = other.app.workspace.preferences.read_text(encoding="utf-8").splitlines()
    assert shown in [{row["chosen"], row["rejected"]} for row in map(json.loads, lines) if row["annotator"] != "birch"]
    other.press("3")
    assert other.rows()[-1]["verdict"] == "tie"


def test_an_own_list_without_an_adapter_gives_two_samples_of_base_and_the_length_is_watched_on_a_narrow_page(new_annotator):
    ivy = new_annotator("ivy", viewport={"width": 400, "height": 800})
    ivy.visitor.unfold("label-settings")
    ivy.page.click("#prompt-kind input")
    ivy.page.get_by_role("option", name="My own list").click()
    ivy.page.fill("#own-prompts textarea", "Who cooks?\n\nWho cooks?\nWho drives?")
    ivy.start(label_adapter="None")
    told = ivy.page.inner_text("#label-last")
    assert "2 prompts" in told
    assert "both answers are samples of the base model" in told
    assert ivy.visitor.value("label-prompt") == "Who cooks?"
    assert ivy.page.evaluate("() => document.documentElement.scrollWidth") <= 400
    assert ivy.page.evaluate("() => document.querySelector('#answer-left').getBoundingClientRect().bottom") <= 800
    ivy.page.keyboard.press("e")
    ivy.page.fill("#label-right-text textarea:not([disabled])", "Whoever is hungry. " * 40)
    ivy.visitor.wait("#length-note", "Right is")
    ivy.page.focus("#answer-left")
    ivy.press("1")
    (row,) = ivy.rows()
    assert {row["meta"]["left_side"], row["meta"]["chosen_side"]} <= {"base 1", "base 2"}
    assert row["rejected"].startswith("Whoever is hungry.")
    assert ivy.visitor.value("label-prompt") == "Who drives?"


def test_a_pasted_pair_is_text_never_markup(new_annotator):
    fig = new_annotator("fig<img src=x onerror='window.hacked=1'>").start()
    fig.visitor.unfold("paste")
    fig.page.fill("#paste-prompt textarea", "<script>window.hacked = 1</script> Who?")
    fig.page.fill("#paste-one textarea", "<img src=x onerror='window.hacked = 1'> Anyone.")
    fig.page.fill("#paste-other textarea", "<b>They</b> are to blame.")
    before = fig.token
    fig.page.click("#paste-button")
    fig.wait_pair(before)
    assert "<script>" in fig.visitor.value("label-prompt")
    fig.visitor.unfold("label-diff")
    fig.visitor.wait("#label-diff", "onerror")
    fig.page.focus("#answer-right")
    fig.press("2")
    fig.withdraw_oldest()
    fig.visitor.wait("#mine-notice", "Withdrawn")
    assert fig.page.evaluate("() => window.hacked") is None
    row = fig.rows()[0]
    assert {row["chosen"], row["rejected"]} == {"<img src=x onerror='window.hacked = 1'> Anyone.", "<b>They</b> are to blame."}
    assert {row["meta"]["left_side"], row["meta"]["chosen_side"]} <= {"pasted 1", "pasted 2"}


def test_a_verdict_that_cannot_be_stored_works_again_and_data_health_speaks_only_if_something_is_wrong(new_annotator, app: App):
    willow = new_annotator("willow").start()
    file = app.workspace.preferences
    aside = file.rename(file.with_name("aside")) if file.exists() else None
    file.mkdir()  # nothing can be appended to a folder
    try:
        shown = willow.texts()
        willow.page.keyboard.press("1")
        willow.visitor.wait(".toast-body", "preferences.jsonl")
        assert willow.texts() == shown
        shutil.rmtree(file)
        willow.press("1")
        assert [(row["chosen"], row["rejected"]) for row in willow.rows()] == [shown]
        willow.page.wait_for_function("() => !document.querySelector('#label-health .prose')?.innerText.trim()")
        store(app.workspace, [say(f"Question {i}?") for i in range(30)])
        willow.press("1")
        willow.visitor.wait("#label-health", "Chosen answers are longer in")
    finally:
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
        if aside:
            aside.rename(file)


def test_a_verdict_is_saved_here_then_on_the_hub_and_the_owner_reads_why_not(new_visitor, tmp_path: Path):
    workspace = open_workspace(tmp_path / "workspace")
    with running_hub(tmp_path / "hub") as hub:
        hub.fault("refuse", "POST", "/commit/", status=403, times=1_000)
        flags = ("--model", "smollm2", "--sync", "dataset:ana/labels")
        with running_app(workspace.root, *flags, **hub.environment()) as url:
            kim = Annotator(new_visitor(url), App(workspace, flags, 0), "kim").open().start()
            kim.press("1")
            kim.visitor.wait("#label-synced", "Saved here; 1 verdict not saved to the Hub yet")
            while hub.faults[0].times > 998:  # until an upload was refused, and another is tried
                kim.page.wait_for_timeout(100)
            kim.visitor.tab("Dataset")
            why = re.compile("1 row not saved to dataset:ana/labels yet, the oldest for .*: the token may not do this")
            kim.visitor.wait("#dataset-health", why)
            hub.faults.clear()
            kim.visitor.tab("Label")
            kim.visitor.wait("#label-synced", "Saved here and to the Hub")
            kim.visitor.tab("Dataset")
            kim.page.wait_for_selector("#dataset-health", state="hidden")
            kim.page.close()
