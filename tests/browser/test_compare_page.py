"""The Compare tab, as a visitor uses it."""

from __future__ import annotations

import json
import re
import time

import pytest

from biasdpo.compare import load_example_pairs
from biasdpo.data.journal import Journal

LONG = {"max_new_tokens": "1500", "repetition_penalty": "1.3"}  # long enough to be stopped


def rows(app, annotator: str) -> list:
    journal = Journal(app.workspace.preferences).refresh()
    return [row for row in journal.standing() if row["annotator"] == annotator]


def test_the_first_screen_is_a_finished_pair_that_can_be_judged_at_once(visitor, app):
    visitor.page.goto(visitor.url)
    pair = load_example_pairs()[0]
    for side, completion in (("base", pair.left), ("tuned", pair.right)):
        visitor.wait_value(f"{side}-text", completion.text)  # these have few words in common
        assert f"cut at {completion.tokens} tokens" in visitor.status(side)
    assert pair.prompt in visitor.page.inner_text("#caption")
    visitor.page.click("#verdict-right")
    visitor.page.fill("#nickname :is(input, textarea)", "first-maple")  # asked here, once
    visitor.page.click("#agree-here")
    visitor.wait("#verdict-note", "tuned is less biased")
    [row] = rows(app, "first-maple")
    assert (row["prompt"], row["source"], row["category"]) == (pair.prompt, "compare", "gender")
    for column, completion in (("chosen", pair.right), ("rejected", pair.left)):  # cut back to the last complete sentence
        assert completion.text.startswith(row[column])
        assert row[column][-1] in ".!?"
    assert row["meta"]["browser"]
    visitor.page.click("#verdict-tie")
    visitor.wait(".toast-body", "judged this pair already")
    visitor.page.click("#undo-verdict")
    visitor.wait("#verdict-note", "Undone")
    assert rows(app, "first-maple") == []
    visitor.page.click("#verdict-both-unusable")
    visitor.wait("#verdict-note", "both unusable")
    assert [row["verdict"] for row in rows(app, "first-maple")] == ["both_unusable"]
    visitor.page.get_by_role("button", name="Next: label").click()
    visitor.page.wait_for_function("() => document.querySelector('[role=tab][aria-selected=true]').innerText.includes('Label')")


def test_both_sides_are_written_with_what_proves_them(visitor):
    visitor.open_ready()
    visitor.unfold("proof")
    proof = visitor.page.inner_text("#proof")
    for part in ("SmolLM2-135M-Instruct", "run demo", "3fa9c1d23fa9", "llamacpp", "CPU", "Base equals the bare model"):
        assert part in proof
    assert re.search(r"differs from base by KL \d[\d.e-]* nats", proof)
    visitor.generate("Describe a typical nurse.")
    visitor.wait_written()
    assert visitor.text("base").strip()
    assert visitor.text("tuned").strip()
    assert visitor.text("base") != visitor.text("tuned")
    for side in ("base", "tuned"):
        assert re.search(r"cut at 16 tokens · \d+ tokens/s · first token after [\d.]+ s", visitor.status(side))
    visitor.page.evaluate(
        "() => new MutationObserver(() => { window.told ||= document.querySelector('#token-note')?.innerText; })"
        ".observe(document.body, {childList: true, subtree: true})"
    )
    visitor.view("Token scores")
    assert "Computing the token scores: 0 of 2 answers" in visitor.page.evaluate("() => window.told")
    visitor.page.locator("#tuned-tokens .token .text").nth(1).click()
    visitor.wait("#token-note", re.compile(r"-\d+\.\d\d nats under base, -\d+\.\d\d nats under tuned"))


def test_an_example_runs_on_click_and_regenerate_samples_anew(visitor):
    visitor.open_ready(adapter="none")
    visitor.page.get_by_role("tab", name="Religion").click()
    visitor.run("#examples-religion button >> nth=0")
    visitor.wait_written()
    assert visitor.page.inner_text("#caption") == f"{visitor.value('prompt')} · greedy"
    greedy = visitor.text("base")
    title = visitor.page.inner_text("#history-box button")
    visitor.run("#generate")
    visitor.wait_written()
    assert visitor.text("base") == greedy
    assert visitor.page.inner_text("#history-box button") == title  # the same pair is no new entry
    seeds = set()
    for _ in range(2):
        visitor.run("#regenerate")
        visitor.wait_written()
        seeds.add(re.search(r"temperature 0.7, seed (\d+)", visitor.page.inner_text("#caption"))[1])
    assert len(seeds) == 2
    sampled = visitor.text("base")
    visitor.page.click("#share")  # of the sample that is shown
    visitor.page.wait_for_function("() => document.querySelector('#link :is(input, textarea)')?.value.startsWith('http')")
    link = visitor.value("link")
    visitor.page.fill("#prompt textarea", "Another prompt")
    visitor.wait_gone("#link")  # it no longer names the settings
    visitor.page.goto(link)
    visitor.wait_proof()
    visitor.run("#generate")
    visitor.wait_written()
    assert visitor.text("base") == sampled


def test_a_conversation_is_continued_by_both_sides_and_is_not_judged(visitor):
    visitor.open_ready()
    visitor.generate("Who is a good leader? <b>Hm</b>")
    visitor.wait_written()
    answers = {side: visitor.text(side) for side in ("base", "tuned")}
    visitor.page.fill("#follow-up :is(input, textarea)", "And <i>why</i>?")
    visitor.run("#ask-both")
    visitor.wait_written()
    for side, answer in answers.items():
        turns = visitor.page.inner_text(f"#{side}-turns")
        assert "Who is a good leader? <b>Hm</b>" in turns  # text, no markup
        assert " ".join(answer.split()) in " ".join(turns.split())
        assert visitor.text(side).strip()
    assert "turn 2" in visitor.page.inner_text("#caption")
    assert not visitor.page.locator("#verdict-tie").is_visible()
    visitor.unfold("history-box")
    visitor.page.click("#history input")
    visitor.page.get_by_role("option").nth(1).click()  # the newest are first
    visitor.wait("#caption", "Who is a good leader?")
    assert visitor.text("tuned") == answers["tuned"]
    assert visitor.page.locator("#verdict-tie").is_visible()


def test_a_second_generate_replaces_the_first_and_stop_keeps_what_was_written(visitor):
    visitor.open_ready(**LONG)
    visitor.generate("Tell me about engineers.")
    visitor.wait_writing()
    visitor.page.fill("#prompt textarea", "What is a family?")
    visitor.page.click("#generate")
    visitor.wait("#caption", re.compile("What is a family.*writing"))
    both = "".join(f":has(#{side}-status:has-text('writing'))" for side in ("base", "tuned"))  # at the same time
    visitor.wait(f"#panes{both}")
    visitor.wait_writing()
    started = time.monotonic()
    visitor.page.keyboard.press("Escape")
    visitor.wait_written()
    assert time.monotonic() - started < 5
    for side in ("base", "tuned"):
        assert "stopped" in visitor.status(side)
    text = visitor.text("base")
    assert text.strip()
    visitor.page.wait_for_timeout(300)
    assert visitor.text("base") == text
    assert "What is a family?" in visitor.page.inner_text("#caption")
    assert not visitor.page.locator("#verdict-tie").is_visible()  # half a completion


def test_strength_is_applied_live_and_zero_is_the_base_model(visitor):
    visitor.open_ready()
    visitor.generate("Who is a good leader?")
    visitor.wait_written()
    base, at_one = visitor.text("base"), visitor.text("tuned")
    visitor.set("strength", "0")
    visitor.run("#generate")
    visitor.wait_written()
    assert "both sides are the base model" in visitor.page.inner_text("#caption")
    assert visitor.text("tuned") == visitor.text("base") == base
    visitor.set("strength", "1")
    visitor.run("#generate")
    visitor.wait_written()
    assert visitor.text("tuned") == at_one


@pytest.mark.slow
def test_visitors_are_served_in_turn_and_not_mixed(new_visitor):
    alone = new_visitor().open_ready()
    alone.generate("What is a family?")
    alone.wait_written()
    first, second, third = new_visitor().open_ready(**LONG), new_visitor().open_ready(), alone
    first.generate("Tell me about engineers.")
    first.wait_writing()
    second.generate("What is a family?")
    second.wait("#caption", "1 visitor ahead of you")
    expected = alone.text("base"), alone.text("tuned")
    third.generate("Hello")
    third.wait("#caption", "ahead of you")
    third.page.click("#stop")  # works while waiting
    third.wait("#caption", "stopped before the first token")
    first.page.close()  # a closed page frees the engine
    second.wait_written()
    assert (second.text("base"), second.text("tuned")) == expected


def test_reload_in_the_middle_leaves_a_page_that_works(visitor):
    visitor.open_ready(**LONG)
    visitor.generate("Tell me about engineers.")
    visitor.wait_writing()
    visitor.page.click("#dismiss-warning")
    visitor.reload()
    visitor.wait_proof()
    assert not visitor.page.locator("#content-warning").is_visible()  # dismissed once
    visitor.open_ready()
    visitor.generate("What is a family?")
    visitor.wait_written()
    assert "16 tokens" in visitor.status("base")


def test_a_link_is_text_and_brings_back_every_setting(visitor):
    hostile = "<img src=x onerror=alert(1)>"
    visitor.page.on("dialog", lambda dialog: visitor.seen.append(f"dialog: {dialog.message}"))
    visitor.open(
        temperature=hostile, seed="-1", top_k="7", system=hostile, adapter="demo", strength="1.25", prompt=f"Hi {hostile}"
    )
    visitor.wait(".toast-body", f"temperature must be a number: got '{hostile}'")
    visitor.wait(".toast-body", "seed must be a whole number from 0 to 2147483647: got -1")
    assert visitor.page.locator(".toast-body").count() == 1
    assert visitor.page.locator("img[src=x]").count() == 0
    visitor.wait("#caption", hostile)
    visitor.wait_proof()
    visitor.page.fill("#prompt textarea", "Is 1 < 2 & ‘true’?\nSecond line")
    visitor.page.click("#share")
    visitor.page.wait_for_function("() => document.querySelector('#link :is(input, textarea)')?.value.startsWith('http')")
    visitor.page.goto(visitor.value("link"))
    visitor.wait_proof()
    visitor.unfold("settings")
    assert visitor.value("prompt") == "Is 1 < 2 & ‘true’?\nSecond line"
    for element, value in (("strength", "1.25"), ("temperature", "0"), ("top-k", "7"), ("seed", "0")):
        assert visitor.page.locator(f"#{element} input[type=number]").input_value() == value
    assert visitor.value("system") == hostile
    assert "demo" in visitor.value("adapter")
    visitor.wait_value(
        "seen",
        f"<|im_start|>system\n{hostile}<|im_end|>\n<|im_start|>user\nIs 1 < 2 & ‘true’?\nSecond line<|im_end|>\n\
<|im_start|>assistant\n",
    )


def test_keyboard_alone(visitor):
    visitor.open()
    visitor.wait_proof()
    focused = "() => document.activeElement.id || document.activeElement.closest('[id]')?.id"
    order: list[str] = []
    while len(order) < 20 and (not order or order[-1] != "generate"):
        visitor.page.keyboard.press("Tab")
        order.append(visitor.page.evaluate(focused))
        style = "() => (({outlineStyle, boxShadow}) => [outlineStyle, boxShadow])(getComputedStyle(document.activeElement))"
        assert visitor.page.evaluate(style) != ["none", "none"], f"no visible focus on {order[-1]}"
        if order[-1] == "prompt":
            visitor.page.keyboard.press("Control+A")
            visitor.page.keyboard.type("Hello there")
    assert order.index("prompt") < order.index("generate")
    visitor.page.focus("#prompt textarea")
    visitor.run("#settings button")  # starts nothing: only looks out for the next
    visitor.page.focus("#prompt textarea")
    visitor.page.keyboard.press("Control+Enter")
    visitor.wait_written()
    assert "Hello there" in visitor.page.inner_text("#caption")


def test_what_can_not_be_generated_is_one_line_and_the_page_stays_usable(visitor):
    visitor.open_ready()
    visitor.page.fill("#prompt textarea", "")
    visitor.page.click("#generate")
    visitor.wait(".toast-body", "The prompt is empty")
    visitor.page.locator("#prompt textarea").evaluate(
        "(box) => { box.value = 'word '.repeat(40000); box.dispatchEvent(new Event('input', {bubbles: true})); }"
    )
    visitor.page.click("#generate")
    visitor.wait(".toast-body", re.compile("4,?096"))  # the context, beside the prompt's own number
    visitor.unfold("settings")
    visitor.set("seed", "-5")
    visitor.page.fill("#prompt textarea", "Hello")
    visitor.page.click("#generate")
    visitor.wait(".toast-body", "seed must be a whole number from 0 to")
    visitor.set("seed", "5")
    visitor.generate("Hello")
    visitor.wait_written()
    assert "16 tokens" in visitor.status("base")


def test_a_model_or_adapter_that_is_not_there_is_one_line_and_another_can_be_picked(visitor):
    visitor.open(model="phi-2", adapter="")
    visitor.wait("#proof", "hf download microsoft/phi-2")
    visitor.open(adapter="/no/such/folder")
    visitor.wait("#proof", "/no/such/folder")
    visitor.choose("adapter", "demo")
    visitor.page.keyboard.press("Tab")
    visitor.wait_proof()
    visitor.generate("Hello")
    visitor.wait_written()


def test_a_late_answer_about_the_list_leaves_the_adapter_that_the_link_names(visitor):
    def hold(route):  # what the page asks before anything is picked
        data = json.loads(route.request.post_data)["data"]
        if data[-2:] == ["smollm2", ""]:
            held.append(data)
            time.sleep(1)
        route.continue_()

    held: list = []
    visitor.page.route("**/gradio_api/queue/join*", hold)
    visitor.open_ready()
    assert held  # Gradio reports the tab that a page opens with as chosen
    visitor.page.wait_for_timeout(1500)
    assert visitor.value("adapter").startswith("demo")


def test_base_only_is_a_named_state_with_the_command_that_trains(visitor):
    visitor.open_ready(adapter="none")
    panel = visitor.page.inner_text("#base-only")
    assert "Base only" in panel
    assert "python -m biasdpo train --model smollm2 --dataset" in panel
    two_sided = "#tuned-text, #tuned-words, #base-words, #view, #strength, #judge"
    visitor.generate("Hello")
    visitor.wait_written()
    assert visitor.text("base").strip()
    assert visitor.page.locator(two_sided).count() == 0
    visitor.page.goto(visitor.url)  # the example has two sides
    visitor.wait_proof()
    assert visitor.page.locator("#judge").is_visible()
    for adapter, panes in (("none", 0), ("demo", 1)):
        visitor.choose("adapter", adapter)
        visitor.page.keyboard.press("Tab")
        visitor.wait_proof("base only" if adapter == "none" else adapter)
        assert [visitor.page.locator(part).count() for part in ("#tuned-text", "#view", "#strength")] == [panes] * 3
        assert visitor.page.locator("#judge, #base-words").count() == 0


def test_a_pair_is_sent_to_label_and_judged_blind_there(visitor, app):
    visitor.page.goto(visitor.url)
    pair = load_example_pairs()[0]
    visitor.page.click("#send-to-label")
    visitor.wait_value("paste-prompt", pair.prompt)  # nobody has agreed yet
    visitor.page.fill("#nickname :is(input, textarea)", "sent-maple")
    visitor.page.click("#begin")
    visitor.wait("#label-work")
    visitor.tab("Compare")
    visitor.page.click("#send-to-label")
    visitor.wait_value("label-prompt", pair.prompt)
    assert not visitor.page.locator("#pair-token").is_visible()  # after the tab was left and opened again
    visitor.page.click("#answer-tie")
    visitor.wait("#label-last", "Left was the")
    [row] = rows(app, "sent-maple")
    assert (row["verdict"], row["prompt"], row["category"]) == ("tie", pair.prompt, "gender")


def test_nothing_scrolls_sideways_at_400_px(new_visitor):
    """Gradio hides overflow, so that the document's scrollWidth would show nothing."""
    visitor = new_visitor(viewport={"width": 400, "height": 800}, color_scheme="dark").open_ready(max_new_tokens="8")
    visitor.generate("Hello")
    visitor.wait_written()
    visitor.unfold("settings")
    background = visitor.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", background)[:3])) < 150
    for name in ("Word differences", "Token scores", "Side by side"):
        visitor.view(name)
        wide = visitor.page.evaluate(
            "() => [...document.querySelectorAll('[role=tabpanel] :is(button, textarea, input, section, figure, .block)')]"
            ".filter(e => e.offsetParent && e.getBoundingClientRect().right > 400).map(e => e.id + '.' + e.className)"
        )
        assert wide == [], name
