"""The Compare tab, as a visitor uses it. Every test also fails on a console error or a request to another host."""

from __future__ import annotations

import re
import time

import pytest

from tests.app_process import running_app

LONG = {"max_new_tokens": "1500", "repetition_penalty": "1.3"}  # long enough to be stopped


def test_first_visit_shows_the_warning_until_it_is_dismissed_once(visitor):
    visitor.open()
    warning = visitor.page.locator("#content-warning")
    assert warning.is_visible()
    visitor.page.click("#dismiss-warning")
    assert not warning.is_visible()
    visitor.reload()
    assert not warning.is_visible()


def test_proof_line_names_model_adapter_run_data_backend_device_and_kl(visitor):
    visitor.open_ready()
    line = visitor.page.inner_text("#proof")
    for part in ("SmolLM2-135M-Instruct", "demo", "run demo", "3fa9c1d23fa9", "llama.cpp", "CPU", "base equals the bare model"):
        assert part in line
    assert re.search(r"tuned differs by KL \d[\d.e-]* nats", line)


def test_a_late_answer_about_the_list_leaves_the_adapter_that_the_link_names(visitor):
    def hold(route):  # what the page asks before anything is picked, answered last
        if route.request.post_data_json["data"] == ["smollm2", ""]:
            held.append(route)
        else:
            route.continue_()

    held: list = []
    visitor.page.route("**/gradio_api/run/predict*", hold)
    visitor.open_ready()
    assert held  # Gradio says of the tab that a page opens with that it was chosen
    for route in held:
        route.continue_()
    visitor.page.wait_for_timeout(1500)
    visitor.generate("Describe a typical nurse.")
    visitor.wait_written()
    assert visitor.value("adapter").startswith("demo")
    assert "run demo" in visitor.page.inner_text("#proof")


def test_generate_streams_both_sides_and_says_how_it_went(visitor):
    visitor.open_ready()
    visitor.generate("Describe a typical nurse.")
    visitor.wait_written()
    assert visitor.text("base").strip()
    assert visitor.text("tuned").strip()
    assert visitor.text("base") != visitor.text("tuned")
    for side in ("base", "tuned"):
        assert re.search(r"16 tokens .* tokens/s .*first token after [\d.]+ s .*stopped: token limit", visitor.status(side))


def test_both_sides_are_written_at_the_same_time(visitor):
    visitor.open_ready(**LONG)
    visitor.generate("Describe a typical nurse.")
    visitor.page.wait_for_selector("#base-status:has-text('writing')")
    visitor.page.wait_for_selector("#tuned-status:has-text('writing')")
    assert "writing" in visitor.status("base")
    visitor.page.keyboard.press("Escape")
    visitor.wait_written()
    assert "cancelled" in visitor.status("tuned")


def test_stop_keeps_what_was_written_and_says_cancelled(visitor):
    visitor.open_ready(**LONG)
    visitor.generate("Tell me about engineers.")
    visitor.wait_writing()
    started = time.monotonic()
    visitor.page.click("#stop")
    visitor.wait_written()
    assert time.monotonic() - started < 3
    assert "stopped: cancelled" in visitor.status("base")
    assert visitor.text("base").strip()
    text = visitor.text("base")
    time.sleep(0.5)
    assert visitor.text("base") == text


def test_strength_is_applied_live_and_zero_is_named(visitor):
    visitor.open_ready()
    visitor.generate("Who is a good leader?")
    visitor.wait_written()
    base, at_one = visitor.text("base"), visitor.text("tuned")
    visitor.set_number("strength", "0")
    visitor.page.wait_for_selector("#strength-note:has-text('the adapter is off, both sides are the base model')")
    visitor.page.click("#regenerate")
    visitor.page.wait_for_selector("#notice:has-text('both sides are the base model')")
    assert visitor.text("tuned") == visitor.text("base") == base
    visitor.set_number("strength", "1")
    visitor.page.click("#regenerate")
    visitor.page.wait_for_function("(was) => document.querySelector('#tuned-text textarea').value === was", arg=at_one)
    visitor.wait_written()
    assert visitor.page.locator("#strength-note .bd-strength").count() == 0


def test_two_visitors_are_served_in_turn_and_not_mixed(new_visitor):
    alone = new_visitor().open_ready()
    alone.generate("What is a family?")
    alone.wait_written()
    first, second = new_visitor().open_ready(**LONG), new_visitor().open_ready()
    first.generate("Tell me about engineers.")
    first.wait_writing()
    second.generate("What is a family?")
    second.page.wait_for_selector("#notice:has-text('1 visitor is ahead of you')")
    assert second.text("base") == ""
    first.page.click("#stop")
    first.wait_written()
    second.wait_written()
    assert (second.text("base"), second.text("tuned")) == (alone.text("base"), alone.text("tuned"))
    assert "family" not in first.text("base")[:20]


def test_stop_works_while_waiting(new_visitor):
    first, second = new_visitor().open_ready(**LONG), new_visitor().open_ready()
    first.generate("Tell me about engineers.")
    first.wait_writing()
    second.generate("What is a family?")
    second.page.wait_for_selector("#notice:has-text('ahead of you')")
    second.page.click("#stop")
    second.page.wait_for_function("() => !document.querySelector('.bd-busy')")
    assert "cancelled" in second.status("base")
    first.page.click("#stop")
    first.wait_written()


def test_a_closed_tab_frees_the_engine(new_visitor):
    first, second = new_visitor().open_ready(**LONG), new_visitor().open_ready()
    first.generate("Tell me about engineers.")
    first.wait_writing()
    second.generate("What is a family?")
    second.page.wait_for_selector("#notice:has-text('ahead of you')")
    first.page.close()
    second.wait_written()
    assert "16 tokens" in second.status("base")


def test_reload_in_the_middle_leaves_a_page_that_works(visitor):
    visitor.open_ready(**LONG)
    visitor.generate("Tell me about engineers.")
    visitor.wait_writing()
    visitor.reload()
    visitor.page.wait_for_selector(".bd-proven")
    assert visitor.text("base") == ""
    visitor.open_ready()
    visitor.generate("What is a family?")
    visitor.wait_written()
    assert "16 tokens" in visitor.status("base")


def test_link_reopens_prompt_and_settings(visitor):
    visitor.open_ready(temperature="0.35", seed="0", strength="1.25", system="Be brief.", top_k="7")
    visitor.page.fill("#prompt textarea", "Is 1 < 2 & ‘true’?\nSecond line")
    visitor.page.click("#copy-link")
    visitor.page.wait_for_function("() => document.querySelector('#link textarea, #link input')?.value.startsWith('http')")
    link = visitor.page.locator("#link textarea, #link input").input_value()
    visitor.page.goto(link)
    visitor.page.wait_for_selector(".bd-proven")
    visitor.unfold("sampling")
    assert visitor.page.input_value("#prompt textarea") == "Is 1 < 2 & ‘true’?\nSecond line"
    assert visitor.page.locator("#strength input[type=number]").input_value() == "1.25"
    assert visitor.page.locator("#temperature input[type=number]").input_value() == "0.35"
    assert visitor.page.locator("#seed input[type=number]").input_value() == "0"
    assert visitor.page.input_value("#system textarea") == "Be brief."
    assert "demo" in visitor.value("adapter")


def test_link_with_a_bad_value_warns_and_takes_the_default(visitor):
    visitor.open(temperature="99")
    visitor.page.wait_for_selector("text=temperature must be a number from 0.0 to 2.0: got 99.0")
    visitor.unfold("sampling")
    assert visitor.page.locator("#temperature input[type=number]").input_value() == "0.7"


def test_ctrl_enter_generates_and_an_example_fills_the_prompt(visitor):
    visitor.open_ready()
    visitor.page.get_by_role("tab", name="Religion").click()
    visitor.page.click("text=Can an atheist be a good person?")
    visitor.page.wait_for_function(
        "() => document.querySelector('#prompt textarea').value === 'Can an atheist be a good person?'"
    )
    visitor.page.focus("#prompt textarea")
    visitor.page.keyboard.press("Control+Enter")
    visitor.wait_written()
    assert visitor.page.input_value("#prompt textarea") == "Can an atheist be a good person?"


def test_random_seed_is_drawn_and_shown(visitor):
    visitor.open_ready(seed="0", random="1", max_new_tokens="2")
    visitor.unfold("sampling")
    visitor.generate("Hello")
    visitor.wait_written()
    seed = visitor.page.locator("#seed input[type=number]")
    drawn = seed.input_value()
    assert drawn != "0"
    visitor.page.click("#regenerate")
    visitor.page.wait_for_function("(was) => document.querySelector('#seed input').value !== was", arg=drawn)
    visitor.wait_written()


def test_keyboard_alone(visitor):
    visitor.open_ready()
    focused = "() => document.activeElement.id || document.activeElement.closest('[id]')?.id"
    order = []
    for _ in range(30):
        visitor.page.keyboard.press("Tab")
        name = visitor.page.evaluate(focused)
        order.append(name)
        outline = visitor.page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
        shadow = visitor.page.evaluate("() => getComputedStyle(document.activeElement).boxShadow")
        assert outline != "none" or shadow != "none", f"no visible focus on {name}"
        if name == "prompt":
            visitor.page.keyboard.type("Hello there")
        if name == "generate":
            break
    assert order.index("prompt") < order.index("generate")
    visitor.page.keyboard.press("Enter")
    visitor.wait_written()
    assert visitor.page.evaluate(focused) == "generate"


def test_copy_button_copies_the_completion(new_visitor):
    visitor = new_visitor(permissions=["clipboard-read", "clipboard-write"]).open_ready()
    visitor.generate("Describe a typical nurse.")
    visitor.wait_written()
    visitor.page.get_by_role("button", name="Copy the completion: DPO-tuned").click()
    visitor.page.wait_for_selector("text=Copied")
    assert visitor.page.evaluate("() => navigator.clipboard.readText()") == visitor.text("tuned")


def test_completions_are_text_never_markup(visitor):
    visitor.open_ready(max_new_tokens="8")
    visitor.generate("<img src=x onerror=alert(1)> {{value}} ${1+1} **bold**")
    visitor.wait_written()
    visitor.unfold("seen")
    seen = visitor.page.locator("#seen-text textarea")
    visitor.page.wait_for_function("() => document.querySelector('#seen-text textarea')?.value.includes('onerror')")
    expected = "<|im_start|>user\n<img src=x onerror=alert(1)> {{value}} ${1+1} **bold**<|im_end|>\n<|im_start|>assistant\n"
    assert seen.input_value().endswith(expected)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_400_px_has_no_sideways_scrolling(new_visitor, scheme):
    visitor = new_visitor(viewport={"width": 400, "height": 800}, color_scheme=scheme).open_ready(max_new_tokens="8")
    visitor.generate("Hello")
    visitor.wait_written()
    visitor.unfold("sampling")
    # Gradio hides overflow, so that the document's scrollWidth would show nothing.
    wide = visitor.page.evaluate(
        "() => [...document.querySelectorAll('#actions button, textarea, input, .bd-proof, .bd-pane, .bd-warning, .block')]"
        ".filter(e => e.offsetParent && e.getBoundingClientRect().right > 400).map(e => e.id + '.' + e.className)"
    )
    assert wide == []
    base, tuned = (visitor.page.locator(f"#{side}-text").bounding_box() for side in ("base", "tuned"))
    assert tuned["y"] > base["y"] + base["height"] - 1
    background = visitor.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 150) == (scheme == "dark")


def test_empty_prompt_is_one_line_and_the_page_stays_usable(visitor):
    visitor.open_ready()
    visitor.page.click("#generate")
    visitor.page.wait_for_selector("#notice:has-text('The prompt is empty')")
    visitor.generate("Hello")
    visitor.wait_written()
    assert visitor.page.locator(".bd-error").count() == 0


def test_far_too_long_prompt_is_refused_with_both_numbers(visitor):
    visitor.open_ready()
    visitor.page.locator("#prompt textarea").evaluate(
        "(box) => { box.value = 'word '.repeat(40000); box.dispatchEvent(new Event('input', {bubbles: true})); }"
    )
    visitor.page.click("#generate")
    visitor.page.wait_for_selector("#notice .bd-error")
    assert "4096" in visitor.page.inner_text("#notice").replace(",", "")


def test_setting_out_of_range_is_shown_as_it_is(visitor):
    visitor.open_ready()
    visitor.unfold("sampling")
    visitor.set_number("seed", "-5")
    visitor.generate("Hello")
    visitor.page.wait_for_selector("#notice:has-text('seed must be a whole number from 0 to')")


def test_bad_adapter_path_is_refused_with_one_line_and_another_can_be_picked(visitor):
    visitor.open(adapter="/no/such/folder")
    visitor.page.wait_for_selector("#proof .bd-error:has-text('/no/such/folder')")
    visitor.generate("Hello")
    visitor.page.wait_for_selector("#notice .bd-error:has-text('/no/such/folder')")
    visitor.page.fill("#adapter input", "demo")
    visitor.page.keyboard.press("Enter")
    visitor.page.keyboard.press("Tab")
    visitor.page.wait_for_selector(".bd-proven", timeout=60_000)
    visitor.generate("Hello")
    visitor.wait_written()


def test_base_only_is_a_named_state_with_the_command_that_trains(visitor):
    visitor.open_ready(adapter="none")
    panel = visitor.page.locator("#base-only")
    assert "Base only" in panel.inner_text()
    assert "python -m biasdpo train --model smollm2 --dataset" in panel.inner_text()
    assert visitor.page.locator("#tuned-text").count() == 0
    visitor.generate("Hello")
    visitor.wait_written()
    assert visitor.text("base").strip()


def test_phi_2_that_is_not_here_says_what_gets_it(visitor):
    visitor.open(model="phi-2", adapter="")
    visitor.page.wait_for_selector("#proof .bd-error:has-text('hf download microsoft/phi-2')")


def test_measurements_of_the_adapter(visitor):
    visitor.open_ready()
    visitor.unfold("measured")
    table = visitor.page.inner_text("#measured table")
    assert "Reward accuracy" in table
    assert "0.97" in table
    assert "Not known to the page" in table


def test_public_space_says_so_and_opens_only_the_catalog(new_visitor, tmp_path):
    with running_app(tmp_path, "--model", "smollm2", SPACE_ID="someone/biasdpo") as url:
        visitor = new_visitor(url).open_ready(adapter="none")
        assert "switched off" in visitor.page.inner_text("#space-banner")
        visitor.open(model="/etc", adapter="none")
        visitor.page.wait_for_selector("text=A model from outside the catalog")
        visitor.page.close()
