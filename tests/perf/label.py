"""How long an annotator waits: from a verdict to the next pair shown, in a real browser on the embedded model.

    python -m tests.perf.label [--pairs 12] [--tokens 256] [--think 1.5]

Judges pairs with the keyboard, each after `think` times the seconds that the first pair took to be written (the case that the
queue is made for: judging takes longer than generating). Prints one JSON object: the first pair's seconds (with loading the
model), and the median and largest wait after it. The clock runs in the page, from the key to the frame that shows the next pair.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from tests.app_process import running_app
from tests.browser.conftest import FLAGS, chromium_path
from tests.perf.measuring import options, rounded

# Resolves with the milliseconds until the pair's token is another one than `was`.
WATCH = """(was) => new Promise((done) => {
  const started = performance.now();
  const look = () => {
    const now = document.querySelector("#pair-token :is(input, textarea)")?.value;
    if (now && now !== was) done(performance.now() - started); else requestAnimationFrame(look);
  };
  look();
})"""
# The same, after a verdict's key.
JUDGE = f"""(was) => {{
  document.body.dispatchEvent(new KeyboardEvent("keydown", {{key: "1", bubbles: true, cancelable: true}}));
  return ({WATCH})(was);
}}"""


def main() -> None:
    args = options(__doc__, pairs=12, tokens=256, think=1.5)  # think: times the first pair's seconds
    with (
        tempfile.TemporaryDirectory() as folder,
        sync_playwright() as playwright,
        running_app(Path(folder), "--model", "smollm2") as url,
    ):
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=FLAGS)
        page = browser.new_page()
        page.set_default_timeout(300_000)
        page.goto(url + "?tab=label")
        page.wait_for_selector("#begin")
        page.click("#label-settings button.label-wrap")
        field = page.locator("#label-max-new-tokens input[type=number]")
        field.fill(str(args.tokens))
        field.press("Tab")
        page.fill("#nickname :is(input, textarea)", "perf")
        page.click("#begin")
        first: float = page.evaluate(WATCH, "") / 1000
        waits = []
        for _ in range(args.pairs):
            page.wait_for_timeout(1000 * args.think * first)
            waits.append(page.evaluate(JUDGE, token_of(page)) / 1000)
        stored = len((Path(folder) / "preferences.jsonl").read_text(encoding="utf-8").splitlines())
        browser.close()
    assert stored == args.pairs, f"{stored} of {args.pairs} verdicts were stored: the waits are of something else"
    result = {
        "first_pair_seconds": first,
        "next_pair_seconds_median": statistics.median(waits),
        "next_pair_seconds_max": max(waits),
    }
    result["median_to_first_ratio"] = statistics.median(waits) / first
    print(json.dumps({"pairs": args.pairs, "stored": stored, "tokens_a_side": args.tokens, **rounded(result, 4)}))


def token_of(page: Page) -> str:
    return page.locator("#pair-token :is(input, textarea)").input_value()


if __name__ == "__main__":
    main()
