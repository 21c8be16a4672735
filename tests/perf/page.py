"""What an open page costs the browser: CPU of the renderer process, its memory, and the first paint.

    python -m tests.perf.page [--seconds 60] [--memory-minutes 0] [--url URL]

Per tab, idle, over a workspace with a dataset, a finished run and an evaluation: CPU time of Chromium's renderer in
percent of one core; then of the Train tab while it watches a run that makes a step a second (--watch: this only). First paint:
median of 5 against a Gradio hello-world, alternating. Memory: the renderer's resident set over --memory-minutes of watching.
Held, before and after watching, after a garbage collection: nodes (also those in no document), listeners, MiB of the heap.
With --url: of an app that runs already, whose workspace stays as it is. Prints one JSON object. Needs Linux (reads /proc) and a
quiet machine.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from playwright.sync_api import Browser, CDPSession, Page, sync_playwright

from biasdpo.data.journal import append_all
from biasdpo.jobs.job import JobFolder
from biasdpo.workspace import Workspace
from tests.app_process import free_port, start_app, wait_for_page
from tests.browser.conftest import FLAGS, chromium_path
from tests.evaluation_results import result, write_result
from tests.perf.dataset import judgments
from tests.perf.measuring import options, rounded
from tests.perf.startup import HELLO, ROOT
from tests.run_folders import metrics, write_run

TABS = ("compare", "label", "dataset", "train", "measure", "export")
REPETITIONS = 5
SETTLE_SECONDS = 15  # a model is loaded, charts are drawn


def renderer(browser_pid: int) -> psutil.Process:
    """The renderer process of the only page: the one with the most memory."""
    processes = [p for p in psutil.Process(browser_pid).children(recursive=True) if "--type=renderer" in " ".join(p.cmdline())]
    return max(processes, key=lambda p: p.memory_info().rss)


def cpu_percent(process: psutil.Process, seconds: float) -> float:
    """CPU time of a process in percent of one core."""
    before = process.cpu_times()
    time.sleep(seconds)
    after = process.cpu_times()
    return 100 * (after.user + after.system - before.user - before.system) / seconds


def first_paint(browser: Browser, url: str) -> float:
    """Seconds from the navigation's start to the first contentful paint, with an empty cache."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.goto(url)
    page.wait_for_function("() => performance.getEntriesByName('first-contentful-paint').length")
    paint: float = page.evaluate("() => performance.getEntriesByName('first-contentful-paint')[0].startTime")
    context.close()
    return paint / 1000


def fill(root: Path) -> None:
    """300 judgments, a finished run, an evaluation."""
    append_all(Workspace(root), judgments(300, seed=0))
    write_run(root, "finished")
    write_result(root, "measured", result(200))


def train(root: Path, ended: threading.Event) -> None:
    """Play a training run that makes a step a second."""
    me = {"pid": os.getpid(), "pid_created": psutil.Process().create_time(), "phase": "training"}
    folder: JobFolder = write_run(root, "running", "running", total=10_000, status=me)
    rows = metrics(10_000, 10_000, 1e-4)
    for step in itertools.count(41):
        with folder.metrics.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows if row["step"] == step)
        folder.write_status(replace(folder.read_status(), step=step))
        if ended.wait(1.0):
            return


def held(devtools: CDPSession) -> dict[str, float]:
    """What the page keeps: counts don't depend on what else the machine does."""
    devtools.send("HeapProfiler.collectGarbage")
    found = {one["name"]: one["value"] for one in devtools.send("Performance.getMetrics")["metrics"]}
    return {
        "nodes": found["Nodes"],
        "listeners": found["JSEventListeners"],
        "heap_mib": round(found["JSHeapUsedSize"] / 2**20, 1),
    }


def open_tab(page: Page, url: str, tab: str) -> None:
    page.goto(f"{url}?tab={tab}")
    page.wait_for_selector(f"[role=tab][data-tab-id={tab}][aria-selected=true]")
    time.sleep(SETTLE_SECONDS)


def main() -> None:
    args = options(__doc__, seconds=60.0, memory_minutes=0.0, url="", watch=False)
    answer: dict[str, Any] = {"seconds": args.seconds}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        app = None
        url = args.url
        if not url:
            port = free_port()
            url = f"http://127.0.0.1:{port}/"
            fill(Path(folder))
            app = start_app(Path(folder), port, "--model", "smollm2")
            wait_for_page(url, app, Path(folder) / "app.log", 180)
        ended = threading.Event()
        hello_port = free_port()
        hello = subprocess.Popen(
            [sys.executable, "-c", HELLO.replace("PORT", str(hello_port))],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        hello_url = f"http://127.0.0.1:{hello_port}/"
        wait_for_page(hello_url, hello, Path(folder) / "hello.log", 60)
        known = {p.pid for p in psutil.process_iter()}
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=FLAGS)
        chromium = next(
            p
            for p in psutil.process_iter()
            if p.pid not in known and "chrom" in p.name() and "--type=" not in " ".join(p.cmdline())
        )
        try:
            paints: dict[str, list[float]] = {"hello": [], "app": []}
            for _ in range(REPETITIONS):
                paints["hello"].append(first_paint(browser, hello_url))
                paints["app"].append(first_paint(browser, url))
            medians = {name: statistics.median(values) for name, values in paints.items()}
            answer["first_paint_seconds"] = rounded(medians)
            answer["first_paint_ratio"] = round(medians["app"] / medians["hello"], 2)
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            percent: dict[str, float] = {}
            page.goto(hello_url)
            time.sleep(SETTLE_SECONDS)
            percent["hello"] = cpu_percent(renderer(chromium.pid), args.seconds)
            for tab in () if args.watch else TABS:
                open_tab(page, url, tab)
                percent[tab] = cpu_percent(renderer(chromium.pid), args.seconds)
            if app is not None:
                threading.Thread(target=train, args=(Path(folder), ended), daemon=True).start()
                time.sleep(1)
            open_tab(page, url, "train")
            devtools = page.context.new_cdp_session(page)
            devtools.send("Performance.enable")
            answer["held_before"] = held(devtools)
            percent["watching"] = cpu_percent(renderer(chromium.pid), args.seconds)
            answer["cpu_percent"] = rounded(percent, 2)
            if args.memory_minutes:
                process = renderer(chromium.pid)
                megabytes = []
                for _ in range(max(2, round(args.memory_minutes) + 1)):
                    megabytes.append(process.memory_info().rss / 2**20)
                    time.sleep(60)
                answer["memory_mib"] = [round(value) for value in megabytes]
            answer["held_after"] = held(devtools)
        finally:
            ended.set()
            browser.close()
            hello.terminate()
            if app is not None:
                app.terminate()
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
