"""Pictures of the page, for people to look at: python -m tests.browser.screenshots [--out DIR] [--readme FILE]

Without --out only the README's picture is taken (assets/screenshot.png). With it, every tab too, wide
and narrow, light and dark, over drawn runs and results.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from urllib.parse import urlencode

from playwright.sync_api import Browser, Page, sync_playwright

from biasdpo.data import journal
from biasdpo.workspace import Workspace
from tests.app_process import ROOT, running_app
from tests.browser.conftest import FLAGS, chromium_path
from tests.evaluation_results import result, with_curve, write_result
from tests.run_folders import write_run

LOOKS = (("light", 1280), ("dark", 1280), ("light", 400), ("dark", 400))
# What each tab shows: its query, and what is clicked before the picture.
STATES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "compare-base-only": ({"adapter": "none"}, ()),
    "label": ({"tab": "label"}, ()),
    "dataset": ({"tab": "dataset"}, ()),
    "train-run": ({"tab": "train", "job": "first"}, ()),
    "train-failed": ({"tab": "train", "job": "too-hot"}, ("#train-delete",)),
    "measure-result": ({"tab": "measure", "job": "strong"}, ()),
    "measure-curve": ({"tab": "measure", "job": "curve"}, ()),
    "export": ({"tab": "export"}, ()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Take pictures of the page.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a folder for pictures of every tab")
    parser.add_argument("--readme", type=Path, default=ROOT / "assets" / "screenshot.png", metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=FLAGS)
        fill(Workspace(Path(folder)))
        with running_app(Path(folder), "--model", "smollm2") as url:
            page = open_page(browser, url)  # the finished pair that every visitor sees first
            page.wait_for_selector("#proof:has-text('Verified')")
            shoot(page, args.readme)
            for scheme, width in LOOKS if args.out else ():
                for name, (query, clicks) in STATES.items():
                    page = open_page(browser, url, scheme, width, **query)
                    for selector in clicks:
                        page.click(selector)
                    shoot(page, args.out / f"{name}-{scheme}-{width}.png")
        browser.close()


def fill(workspace: Workspace) -> None:
    """Runs, evaluations and judgments to show."""
    write_run(workspace.root, "first", status={"best_step": 80, "best_accuracy": 0.8}, steps=120, total=120)
    write_run(workspace.root, "bolder", steps=120, total=120, learning_rate=1e-4, beta=0.3)
    error = "The loss became nan at step 37: lower learning_rate, or set precision to fp32, and resume"
    write_run(workspace.root, "too-hot", "failed", steps=37, total=120, status={"error": error}, learning_rate=1e-2)
    write_result(workspace.root, "strong", result(120, n_failed=3))
    write_result(workspace.root, "curve", with_curve(80))
    rows = [journal.new_judgment(f"Who does job {i}?", f"Anyone may do job {i}.", f"Only men do job {i}!") for i in range(30)]
    journal.append_all(workspace, rows)


def open_page(browser: Browser, url: str, scheme: str = "light", width: int = 1280, **query: str) -> Page:
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()  # type: ignore[arg-type]
    page.set_default_timeout(90_000)
    page.goto(url + "?" + urlencode({name: value for name, value in query.items() if value}))
    page.wait_for_selector("#generate", state="attached")
    page.click("#dismiss-warning")
    return page


def shoot(page: Page, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(1500)
    page.screenshot(path=file, full_page=file.name != "screenshot.png")
    print(file)


if __name__ == "__main__":
    main()
