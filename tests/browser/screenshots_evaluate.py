"""Pictures of the Evaluate tab, to be looked at: python -m tests.browser.screenshots_evaluate --out DIR

Its results are of drawn numbers, its one evaluation under way of the embedded model.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from tests.app_process import running_app
from tests.browser.conftest import FLAGS, chromium_path
from tests.browser.screenshots import shoot
from tests.evaluation_results import result, with_curve, write_result

LOOKS = (("light", 1280), ("dark", 1280), ("light", 400), ("dark", 400))


def main() -> None:
    parser = argparse.ArgumentParser(description="Take pictures of the Evaluate tab.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data-dir", metavar="DIR", help="benchmark files, for one evaluation under way")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = ["--data-dir", args.data_dir] if args.data_dir else []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=FLAGS)
        with running_app(Path(folder), "--model", "smollm2", *data) as url:
            take_work(browser, url, args.out, with_data=bool(data))
            write_result(Path(folder), "strong", result(120, n_failed=3))
            write_result(Path(folder), "gentle", result(120, shift=-0.4, adapter="gentle"))
            write_result(Path(folder), "curve", with_curve(80))
            for scheme, width in LOOKS:
                take_results(browser, url, args.out, scheme, width)
        browser.close()


def take_work(browser: Browser, url: str, out: Path, *, with_data: bool) -> None:
    """Nothing yet; what fails; with data one under way and cancelled."""
    page = open_tab(browser, url)
    page.wait_for_selector("#eval-start")
    page.wait_for_timeout(1500)
    shoot(page, out / "evaluate-empty.png")
    page.click("#eval-start")
    if with_data:
        page.wait_for_selector("#eval-head .bd-state-running")
        page.wait_for_timeout(15_000)
        shoot(page, out / "evaluate-working.png")
        page.click("#eval-cancel")
    page.wait_for_selector("#eval-head :is(.bd-state-cancelled, .bd-state-failed)", timeout=300_000)
    shoot(page, out / f"evaluate-{'cancelled' if with_data else 'failed'}.png")


def take_results(browser: Browser, url: str, out: Path, scheme: str, width: int) -> None:
    """A result, the plane, several."""
    name = f"{scheme}-{width}.png"
    page = open_tab(browser, url, scheme, width, "strong")
    page.wait_for_selector("#eval-forest .bd-forest")
    shoot(page, out / f"evaluate-result-{name}")
    page = open_tab(browser, url, scheme, width, "curve")
    page.wait_for_selector("#eval-plane svg")
    shoot(page, out / f"evaluate-curve-{name}")
    page.click("#eval-several")
    page.wait_for_selector("#eval-comparison .bd-forest")
    shoot(page, out / f"evaluate-several-{name}")


def open_tab(browser: Browser, url: str, scheme: str = "light", width: int = 1280, evaluation: str = "") -> Page:
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()  # type: ignore[arg-type]
    page.set_default_timeout(60_000)
    page.goto(f"{url}?adapter=none" + (f"&evaluation={evaluation}" if evaluation else ""))
    page.wait_for_selector("#generate", state="attached")
    page.click("#dismiss-warning")
    if not evaluation:
        page.get_by_role("tab", name="Evaluate").click()
    return page


if __name__ == "__main__":
    main()
