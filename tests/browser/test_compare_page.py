"""The Compare tab, as a visitor uses it."""

from __future__ import annotations

import re
import time

import pytest

LONG = {"max_new_tokens": "1500", "repetition_penalty": "1.3"}  # long enough to be stopped


def test_both_sides_are_written_with_what_proves_them(visitor):
    visitor.open_ready()
    line = visitor.page.inner_text("#proof")
    for part in ("SmolLM2-135M-Instruct", "run demo", "3fa9c1d23fa9", "llama.cpp", "CPU", "base equals the bare model"):
        assert part in line
    assert re.search(r"tuned differs by KL \d[\d.e-]* nats", line)
    visitor.generate("Describe a typical nurse.")
    visitor.wait_written()
    assert visitor.text("base").strip()
    assert visitor.text("tuned").strip()
    assert visitor.text("base") != visitor.text("tuned")
    for side in ("base", "tuned"):
        assert re.search(r"16 tokens .* tokens/s .*first token after [\d.]+ s .*stopped: token limit", visitor.status(side))


def test_a_late_answer_about_the_list_leaves_the_adapter_that_the_link_names(visitor):
    def hold(route):  # what the page asks before anything is picked, answered last
        if route.request.post_data_json["data"] == ["smollm2", ""]:
            held.append(route)
        else:
            route.continue_()

    held: list = []
    visitor.page.route("**/gradio_api/run/predict*", hold)
    visitor.open_ready()
    assert held  # Gradio reports the tab that a page opens with as chosen
    for route in held:
        with visitor.page.expect_response(route.request.url):
            route.continue_()
    visitor.generate("Describe a typical nurse.")
    visitor.wait_written()
    assert visitor.value("adapter").startswith("demo")
    assert "run demo" in visitor.page.inner_text("#proof")


def test_stop_keeps_what_was_written(visitor):
    visitor.open_ready(**LONG)
    visitor.generate("Tell me about engineers.")
    visitor.wait_writing()
    visitor.wait("#tuned-status", "writing")
    assert "writing" in visitor.status("base")  # both at the same time
    started = time.monotonic()
    visitor.page.keyboard.press("Escape")
    visitor.wait_written()
    assert time.monotonic() - started < 5
    for side in ("base", "tuned"):
        assert "cancelled" in visitor.status(side)
    text = visitor.text("base")
    assert text.strip()
    visitor.page.wait_for_timeout(300)
    assert visitor.text("base") == text


def test_strength_is_applied_live_and_zero_is_the_base_model(visitor):
    visitor.open_ready()
    visitor.generate("Who is a good leader?")
    visitor.wait_written()
    base, at_one = visitor.text("base"), visitor.text("tuned")
    visitor.set("strength", "0")
    visitor.wait("#strength-note", "both sides are the base model")
    visitor.page.click("#regenerate")
    visitor.wait("#notice", "both sides are the base model")
    assert visitor.text("tuned") == visitor.text("base") == base
    visitor.set("strength", "1")
    visitor.page.click("#regenerate")
    visitor.page.wait_for_function("(was) => document.querySelector('#tuned-text textarea').value === was", arg=at_one)
    visitor.wait_written()


@pytest.mark.slow
def test_visitors_are_served_in_turn_and_not_mixed(new_visitor):
    alone = new_visitor().open_ready()
    alone.generate("What is a family?")
    alone.wait_written()
    first, second, third = new_visitor().open_ready(**LONG), new_visitor().open_ready(), alone
    first.generate("Tell me about engineers.")
    first.wait_writing()
    second.generate("What is a family?")
    second.wait("#notice", "1 visitor is ahead of you")
    assert second.text("base") == ""
    expected = alone.text("base"), alone.text("tuned")
    third.generate("Hello")
    third.wait("#notice", "ahead of you")
    third.page.click("#stop")  # works while waiting
    third.page.wait_for_function("() => !document.querySelector('.bd-busy')")
    assert "cancelled" in third.status("base")
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
    assert visitor.text("base") == ""
    assert not visitor.page.locator("#content-warning").is_visible()  # dismissed once
    visitor.open_ready()
    visitor.generate("What is a family?")
    visitor.wait_written()
    assert "16 tokens" in visitor.status("base")


def test_a_link_reopens_prompt_and_settings(visitor):
    visitor.open_ready(temperature="0.35", seed="0", strength="1.25", system="Be brief.", top_k="7")
    visitor.page.fill("#prompt textarea", "Is 1 < 2 & ‘true’?\nSecond line")
    visitor.page.click("#copy-link")
    visitor.page.wait_for_function("() => document.querySelector('#link textarea, #link input')?.value.startsWith('http')")
    visitor.page.goto(visitor.value("link"))
    visitor.wait_proof()
    visitor.unfold("sampling")
    assert visitor.value("prompt") == "Is 1 < 2 & ‘true’?\nSecond line"
    for element, value in (("strength", "1.25"), ("temperature", "0.35"), ("seed", "0")):
        assert visitor.page.locator(f"#{element} input[type=number]").input_value() == value
    assert visitor.value("system") == "Be brief."
    assert "demo" in visitor.value("adapter")
    visitor.open(temperature="99")
    visitor.wait("text=temperature must be a number from 0.0 to 2.0: got 99.0")


def test_keyboard_alone(visitor):
    visitor.open_ready()
    focused = "() => document.activeElement.id || document.activeElement.closest('[id]')?.id"
    order = []
    for _ in range(30):
        visitor.page.keyboard.press("Tab")
        order.append(visitor.page.evaluate(focused))
        style = visitor.page.evaluate(
            "() => (({outlineStyle, boxShadow}) => [outlineStyle, boxShadow])(getComputedStyle(document.activeElement))"
        )
        assert style != ["none", "none"], f"no visible focus on {order[-1]}"
        if order[-1] == "prompt":
            visitor.page.keyboard.type("Hello there")
        if order[-1] == "generate":
            break
    assert order.index("prompt") < order.index("generate")
    visitor.page.keyboard.press("Enter")
    visitor.wait_written()
    assert visitor.page.evaluate(focused) == "generate"
    visitor.page.focus("#prompt textarea")
    visitor.page.keyboard.press("Control+Enter")
    visitor.page.wait_for_function("() => document.querySelector('.bd-busy')")
    visitor.wait_written()


def test_the_copy_button_copies_the_completion(new_visitor):
    visitor = new_visitor(permissions=["clipboard-read", "clipboard-write"]).open_ready()
    visitor.generate("Describe a typical nurse.")
    visitor.wait_written()
    visitor.page.get_by_role("button", name="Copy the completion: DPO-tuned").click()
    visitor.wait("text=Copied")
    assert visitor.page.evaluate("() => navigator.clipboard.readText()") == visitor.text("tuned")


def test_a_prompt_is_text_never_markup_and_shown_as_the_model_gets_it(visitor):
    visitor.open_ready(max_new_tokens="8")
    visitor.generate("<img src=x onerror=alert(1)> {{value}} ${1+1} **bold**")
    visitor.wait_written()
    visitor.unfold("seen")
    visitor.page.wait_for_function("() => document.querySelector('#seen-text textarea')?.value.includes('onerror')")
    expected = "<|im_start|>user\n<img src=x onerror=alert(1)> {{value}} ${1+1} **bold**<|im_end|>\n<|im_start|>assistant\n"
    assert visitor.value("seen-text").endswith(expected)


def test_what_can_not_be_generated_is_one_line_and_the_page_stays_usable(visitor):
    visitor.open_ready()
    visitor.page.click("#generate")
    visitor.wait("#notice", "The prompt is empty")
    visitor.page.locator("#prompt textarea").evaluate(
        "(box) => { box.value = 'word '.repeat(40000); box.dispatchEvent(new Event('input', {bubbles: true})); }"
    )
    visitor.page.click("#generate")
    visitor.wait("#notice .bd-error", re.compile("4,?096"))  # the context, beside the prompt's own number
    visitor.unfold("sampling")
    visitor.set("seed", "-5")
    visitor.generate("Hello")
    visitor.wait("#notice", "seed must be a whole number from 0 to")
    visitor.set("seed", "5")
    visitor.generate("Hello")
    visitor.wait_written()
    assert visitor.page.locator(".bd-error").count() == 0


def test_a_model_or_adapter_that_is_not_there_is_one_line_and_another_can_be_picked(visitor):
    visitor.open(model="phi-2", adapter="")
    visitor.wait("#proof .bd-error", "hf download microsoft/phi-2")
    visitor.open(adapter="/no/such/folder")
    visitor.wait("#proof .bd-error", "/no/such/folder")
    visitor.generate("Hello")
    visitor.wait("#notice .bd-error", "/no/such/folder")
    visitor.choose("adapter", "demo")
    visitor.page.keyboard.press("Tab")
    visitor.wait_proof()
    visitor.generate("Hello")
    visitor.wait_written()


def test_base_only_is_a_named_state_with_the_command_that_trains(visitor):
    visitor.open_ready(adapter="none")
    panel = visitor.page.inner_text("#base-only")
    assert "Base only" in panel
    assert "python -m biasdpo train --model smollm2 --dataset" in panel
    assert visitor.page.locator("#tuned-text").count() == 0
    visitor.generate("Hello")
    visitor.wait_written()
    assert visitor.text("base").strip()


@pytest.mark.slow
def test_no_tab_scrolls_sideways_at_400_px(new_visitor, tiny_run):
    """Gradio hides overflow, so that the document's scrollWidth would show nothing."""
    visitor = new_visitor(viewport={"width": 400, "height": 800}, color_scheme="dark").open_ready(max_new_tokens="8")
    visitor.generate("Hello")
    visitor.wait_written()
    visitor.unfold("sampling")
    background = visitor.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", background)[:3])) < 150
    for tab, ready in (
        ("Compare", "#generate"),
        ("Label", "#agree"),
        ("Data set", "#dataset-meter"),
        ("Train", f"#train-table tr[data-id={tiny_run}]"),
    ):  # the other tabs are in Gradio's overflow menu at this width
        visitor.tab(tab)
        visitor.wait(ready)
        wide = visitor.page.evaluate(
            "() => [...document.querySelectorAll('[role=tabpanel] :is(button, textarea, input, section, figure, .block)')]"
            ".filter(e => e.offsetParent && !e.closest('.bd-rows-box') && e.getBoundingClientRect().right > 400)"
            ".map(e => e.id + '.' + e.className)"
        )
        assert wide == [], tab
