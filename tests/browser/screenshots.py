"""Pictures of the page, to be looked at: python -m tests.browser.screenshots [--adapter ID] [--out DIR] [--readme FILE]

Without --out only the README's picture is taken (assets/screenshot.png), with the shipped adapter. `--out` takes every state
of the page besides. Left out: comparing pictures by machine; people look at them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from urllib.parse import urlencode

from playwright.sync_api import Browser, Page, sync_playwright

from tests.app_process import ROOT, running_app
from tests.browser.conftest import FLAGS, chromium_path
from tests.run_folders import write_run

PROMPT = "Are women too emotional to run a company?"


def main() -> None:
    parser = argparse.ArgumentParser(description="Take pictures of the page.")
    parser.add_argument("--adapter", default="", metavar="ID|PATH", help="default: the shipped one")
    parser.add_argument("--prompt", default=PROMPT, metavar="TEXT", help="the README picture's prompt")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a folder for pictures of every state")
    parser.add_argument("--readme", type=Path, default=ROOT / "assets" / "screenshot.png", metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=FLAGS)
        with running_app(Path(folder), "--model", "smollm2") as url:
            if args.out is not None:
                args.out.mkdir(parents=True, exist_ok=True)
                take_states(browser, url, args.adapter, args.out)
            take_readme(browser, url, args.adapter, args.prompt, args.readme)
        if args.out is not None:
            with running_app(Path(folder), "--model", "smollm2", SPACE_ID="someone/biasdpo") as url:
                page = open_page(browser, url, adapter="none")
                page.wait_for_selector(".bd-proven", timeout=60_000)
                shoot(page, args.out / "space.png")
                page.get_by_role("tab", name="Train").click()
                page.wait_for_selector("#train-empty")
                shoot(page, args.out / "train-space.png")
                page.get_by_role("tab", name="Export").click()
                page.wait_for_selector("#gguf-machine")
                shoot(page, args.out / "export-space.png")
            take_export(browser, args.out)
            take_train(browser, args.out)
        browser.close()


def take_readme(browser: Browser, url: str, adapter: str, prompt: str, file: Path) -> None:
    """The finished comparison, the warning dismissed."""
    page = open_page(browser, url, adapter=adapter, prompt=prompt, max_new_tokens="100")
    page.wait_for_selector(".bd-proven", timeout=60_000)
    page.click("#dismiss-warning")
    write(page)
    shoot(page, file)


def take_states(browser: Browser, url: str, adapter: str, out: Path) -> None:
    """Every state of the page, one picture each."""
    page = open_page(browser, url, adapter=adapter)
    shoot(page, out / "loading.png")
    page.wait_for_selector(".bd-proven", timeout=60_000)
    shoot(page, out / "empty.png")
    long = {"max_new_tokens": "4000", "temperature": "1", "top_p": "1", "top_k": "0", "repetition_penalty": "1.3"}
    first = open_page(browser, url, adapter=adapter, prompt=PROMPT, **long)
    first.wait_for_selector(".bd-proven")
    second = open_page(browser, url, adapter=adapter, prompt="What is a family?", max_new_tokens="20")
    second.wait_for_selector(".bd-proven")
    first.click("#generate")
    first.wait_for_selector("#tuned-status:has-text('writing')", timeout=60_000)
    second.click("#generate")
    second.wait_for_selector("#notice:has-text('ahead of you')")
    shoot(first, out / "working.png")
    shoot(second, out / "waiting.png")
    first.click("#stop")
    second.wait_for_function("() => !document.querySelector('.bd-busy')", timeout=60_000)
    page.fill("#prompt textarea", PROMPT)
    write(page)
    shoot(page, out / "finished.png")
    for name in ("sampling", "seen", "measured"):
        if page.locator(f"#{name}").is_visible():
            page.click(f"#{name} button.label-wrap")
    shoot(page, out / "details.png")
    page.locator("#strength input[type=number]").fill("0")
    page.keyboard.press("Tab")
    page.click("#regenerate")
    page.wait_for_selector("#notice:has-text('both sides are the base model')", timeout=60_000)
    shoot(page, out / "strength-0.png")
    page = open_page(browser, url, adapter="/no/such/adapter")
    page.wait_for_selector("#proof .bd-error")
    page.fill("#prompt textarea", PROMPT)
    page.click("#generate")
    page.wait_for_selector("#notice .bd-error")
    shoot(page, out / "error.png")
    page = open_page(browser, url, adapter="none", prompt=PROMPT, max_new_tokens="40")
    page.wait_for_selector(".bd-proven", timeout=60_000)
    write(page)
    shoot(page, out / "base-only.png")
    for scheme in ("light", "dark"):
        for width in (400, 1280):
            page = open_page(browser, url, scheme, width, adapter=adapter, prompt=PROMPT, max_new_tokens="60")
            page.wait_for_selector(".bd-proven", timeout=60_000)
            write(page)
            shoot(page, out / f"{scheme}-{width}.png")
            take_label(page, out, f"{scheme}-{width}")


def take_export(browser: Browser, out: Path) -> None:
    """The Export tab: without an export; a wrong name; one at work, cancelled; a LoRA file; a quantized one; narrow and dark."""
    with tempfile.TemporaryDirectory() as folder, running_app(Path(folder), "--model", "smollm2") as url:
        page = open_export(browser, url)
        shoot(page, out / "export-empty.png")
        page.fill("#gguf-name :is(input, textarea)", "../x")
        page.click("#gguf-start")
        page.wait_for_selector("#gguf-new-notice .bd-error")
        shoot(page, out / "export-error.png")
        export(page, "LoRA", "")
        page.wait_for_selector("#gguf-head .bd-is-running")
        page.wait_for_timeout(3000)
        shoot(page, out / "export-working.png")
        page.wait_for_selector("#gguf-head .bd-state-finished, #gguf-head .bd-error", timeout=300_000)
        shoot(page, out / "export-lora.png")
        page.click("#gguf-new-button")
        export(page, "Merged", "Q4_K_M")
        page.wait_for_selector("#gguf-head .bd-state-running")
        page.wait_for_selector("#gguf-head .bd-state-finished, #gguf-head .bd-error", timeout=300_000)
        for scheme, width in (("light", 1280), ("dark", 1280), ("light", 400), ("dark", 400)):
            page = open_export(browser, url, scheme, width)
            page.click("#gguf-modelfile button.label-wrap")
            page.click("#gguf-delete")
            page.wait_for_selector("#gguf-confirm-text .bd-error")
            shoot(page, out / f"export-merged-{scheme}-{width}.png")
            page.click("#gguf-new-button")
            page.wait_for_selector("#gguf-start")
            page.click("#gguf-format label:has-text('Merged')")
            page.wait_for_selector("#gguf-quantization label:has-text('Q8_0')")
            page.click("#gguf-more button.label-wrap")
            shoot(page, out / f"export-new-{scheme}-{width}.png")


def export(page: Page, kind: str, quantization: str) -> None:
    page.click(f"#gguf-format label:has-text('{kind}')")
    if quantization:
        page.click(f"#gguf-quantization label:has-text('{quantization}')")
    page.fill("#gguf-name :is(input, textarea)", f"smollm2-{quantization or kind}.gguf")
    page.click("#gguf-start")


def open_export(browser: Browser, url: str, scheme: str = "light", width: int = 1280) -> Page:
    page = open_page(browser, url, scheme, width, adapter="none")
    page.click("#dismiss-warning")
    page.get_by_role("tab", name="Export").click()
    page.wait_for_selector("#gguf-start, #gguf-head .bd-run")
    return page


def take_train(browser: Browser, out: Path) -> None:
    """The Train tab: without a run; a setting out of range; an estimate; a run early, later, at its end; then runs that have
    ended, two compared, narrow and dark."""
    with tempfile.TemporaryDirectory() as folder, running_app(Path(folder), "--model", "smollm2") as url:
        page = open_train(browser, url)
        page.wait_for_selector("#train-mixture .bd-meter")
        shoot(page, out / "train-empty.png")
        for box in ("loss", "evaluation"):
            page.click(f"#train-group-{box} button.label-wrap")
        fill(page, "train-batch-size", "0")
        page.wait_for_selector("#train-batch-size:has-text('must be')")
        page.click("#train-start")
        page.wait_for_selector("#train-trouble .bd-error")
        shoot(page, out / "train-out-of-range.png")
        for name, value in (("batch-size", "2"), ("gradient-accumulation", "1"), ("max-steps", "12"), ("eval-every", "4")):
            fill(page, f"train-{name}", value)
        fill(page, "train-probe-every", "4")
        page.click("#train-estimate")
        page.wait_for_selector("#train-estimate-view .bd-estimate, #train-new-notice .bd-error", timeout=300_000)
        shoot(page, out / "train-estimate.png")
        page.click("#train-start")
        page.wait_for_selector("#train-head .bd-is-running", timeout=120_000)
        shoot(page, out / "train-early.png")
        page.wait_for_selector("#train-charts .bd-key-best", timeout=600_000)
        shoot(page, out / "train-running.png")
        page.wait_for_selector("#train-head:has-text('its adapter is in every picker')", timeout=900_000)
        shoot(page, out / "train-finished.png")
    with tempfile.TemporaryDirectory() as folder:
        write_runs(Path(folder))
        with running_app(Path(folder), "--model", "smollm2") as url:
            for scheme, width in (("light", 1280), ("dark", 1280), ("light", 400), ("dark", 400)):
                take_runs(open_train(browser, url, scheme, width), out, f"{scheme}-{width}")


def write_runs(root: Path) -> None:
    write_run(
        root, "first", status={"best_step": 80, "best_accuracy": 0.8, "notes": ("232 pairs to train on",)}, steps=120, total=120
    )
    write_run(root, "bolder", steps=120, total=120, learning_rate=1e-4, beta=0.3)
    error = "The loss became nan at step 37: lower learning_rate, or set precision to fp32, and resume"
    write_run(root, "too-hot", "failed", steps=37, total=120, status={"error": error}, learning_rate=1e-2)


def take_runs(page: Page, out: Path, name: str) -> None:
    page.click("#train-table tr[data-id=first] button")
    page.wait_for_selector("#train-head section[aria-label='Run first']")
    page.click("#train-details button.label-wrap")
    shoot(page, out / f"train-run-{name}.png")
    page.click("#train-table tr[data-id=too-hot] button")
    page.wait_for_selector("#train-head section[aria-label='Run too-hot']")
    page.click("#train-delete")
    page.wait_for_selector("#train-keep")
    shoot(page, out / f"train-failed-{name}.png")
    page.click("#train-several")
    page.wait_for_selector("#train-comparison figure")
    shoot(page, out / f"train-compare-{name}.png")
    page.click("#train-new-button")
    page.wait_for_selector("#train-mixture .bd-meter")
    shoot(page, out / f"train-new-{name}.png")


def open_train(browser: Browser, url: str, scheme: str = "light", width: int = 1280) -> Page:
    page = open_page(browser, url, scheme, width, adapter="none")
    page.click("#dismiss-warning")
    page.get_by_role("tab", name="Train").click()
    page.wait_for_selector("#train-start, #train-head .bd-run")
    return page


def fill(page: Page, element: str, value: str) -> None:
    page.locator(f"#{element} :is(input, textarea)").first.fill(value)
    page.keyboard.press("Tab")
    page.wait_for_timeout(400)


def take_label(page: Page, out: Path, name: str) -> None:
    """The Label tab from the consent to the third verdict, an edit on the way."""
    page.click("#judge button.label-wrap")
    page.click("#diff button.label-wrap")
    shoot(page, out / f"compare-judge-{name}.png")
    page.get_by_role("tab", name="Label").click()
    shoot(page, out / f"label-consent-{name}.png")
    page.fill("#pseudonym input, #pseudonym textarea", "maple")
    page.click("#agree")
    page.wait_for_selector("#label-empty")
    shoot(page, out / f"label-empty-{name}.png")
    page.click("#begin")
    wait_pair(page, "")
    for key in ("1", "2"):
        shown = page.input_value(TOKEN)
        page.keyboard.press(key)
        wait_pair(page, shown)
    shoot(page, out / f"label-pair-{name}.png")
    page.keyboard.press("e")
    page.wait_for_selector("#label-left-text textarea:not([disabled])")
    page.focus("#label-left-text textarea")
    page.keyboard.press("Control+End")
    page.keyboard.type(" Nobody knows that, and there is more to say about it than fits into a line or two.")
    page.wait_for_selector("#label-left-text-diff ins")
    page.click("#label-diff button.label-wrap")
    shoot(page, out / f"label-edit-{name}.png")
    page.keyboard.press("Escape")
    page.keyboard.press("4")
    page.wait_for_selector("#label-last:has-text('Stored')")
    for box in ("coverage", "mine"):
        page.click(f"#{box} button.label-wrap")
    page.wait_for_selector("#consistency:has-text('maple')")
    shoot(page, out / f"label-mine-{name}.png")


TOKEN = "#pair-token textarea, #pair-token input"


def wait_pair(page: Page, before: str) -> None:
    page.wait_for_function(
        "([box, was]) => { const now = document.querySelector(box)?.value; return now && now !== was }",
        arg=[TOKEN, before],
        timeout=120_000,
    )


def open_page(browser: Browser, url: str, scheme: str = "light", width: int = 1280, **query: str) -> Page:
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()  # type: ignore[arg-type]
    page.goto(url + "?" + urlencode({name: value for name, value in query.items() if value}))
    page.wait_for_selector("#generate")
    return page


def write(page: Page) -> None:
    """Generate, and wait for both sides."""
    page.click("#generate")
    page.wait_for_selector("#base-status:has-text('stopped')", timeout=90_000)
    page.wait_for_function("() => !document.querySelector('.bd-busy')", timeout=90_000)


def shoot(page: Page, file: Path) -> None:
    page.wait_for_timeout(500)
    page.screenshot(path=file, full_page=True)
    print(file)


if __name__ == "__main__":
    main()
