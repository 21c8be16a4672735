"""The page as a whole: its steps, its address, its width, its accessibility."""

from __future__ import annotations

import pytest
from axe_playwright_python.sync_playwright import Axe

from biasdpo.jobs.store import delete_job
from tests.judging import say, store
from tests.run_folders import write_run

TABS = ("Compare", "Label", "Dataset", "Train", "Measure", "Export")
DRAWN_MS = 1500  # a tab is built when it is first opened


def open_tab(visitor, name: str) -> None:
    visitor.tab(name)
    visitor.page.wait_for_timeout(DRAWN_MS)


def test_the_content_warning_is_dismissed_once(new_visitor):
    visitor = new_visitor()
    visitor.open()
    visitor.page.click("#dismiss-warning")
    assert not visitor.page.is_visible("#content-warning")
    visitor.reload()
    visitor.page.wait_for_timeout(500)
    assert not visitor.page.is_visible("#content-warning")


def test_the_address_names_the_tab(visitor):
    visitor.open("Measure")
    visitor.page.wait_for_url("**/?tab=measure")
    visitor.reload()
    visitor.page.wait_for_selector("[role=tab][data-tab-id=measure][aria-selected=true]")


def test_the_steps_show_what_is_there(visitor):
    visitor.open()
    runs = visitor.page.get_by_role("tab", name="Train")
    runs.get_by_text(": finished").or_(visitor.page.get_by_role("tab", name=": ")).first.wait_for()
    assert len(visitor.page.locator("#steps > .tab-wrapper [role=tab]").all()) == len(TABS)


@pytest.mark.parametrize("width", [400, 1280, 1920])
def test_the_page_is_centered_and_never_scrolls_sideways(new_visitor, width):
    visitor = new_visitor(viewport={"width": width, "height": 800}).open()
    for name in TABS:
        open_tab(visitor, name)
        step = visitor.page.get_by_role("tab", name=name).bounding_box()
        assert step is not None, name
        assert 0 <= step["x"] <= step["x"] + step["width"] <= width, name
        left, right, scroll = visitor.page.evaluate(
            "() => { const box = document.querySelector('main.contain').getBoundingClientRect();"
            " return [box.left, document.documentElement.clientWidth - box.right, document.documentElement.scrollWidth]; }"
        )
        assert abs(left - right) <= 1, name
        assert scroll <= width, name


# As Gradio shows a chart until it is drawn, which is over too soon to be looked at.
EMPTY_CHART = """() => document.querySelector("#train-loss").insertAdjacentHTML(
  "beforebegin", "<div class='empty' aria-label='Empty value'><div class='icon'></div></div>")"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_violation(new_visitor, app, scheme):
    store(app.workspace, [say(f"Who is seen by axe, {scheme}?", annotator="axe")])  # a table without rows has nothing to find
    write_run(app.workspace.root, "axe")  # a run with charts
    visitor = new_visitor(viewport={"width": 1280, "height": 800}, color_scheme=scheme).open()
    found = []
    for name in TABS:
        open_tab(visitor, name)
        if name == "Train":
            visitor.wait("#train-loss .js-plotly-plot")
            visitor.page.evaluate(EMPTY_CHART)
        if name == "Dataset":
            visitor.wait("#dataset-table .virtual-row", "Who is seen by axe")
        for violation in Axe().run(visitor.page).response["violations"]:
            if violation["impact"] in ("serious", "critical"):
                nodes = [node["html"][:200] for node in violation["nodes"][:3]]
                found.append((name, violation["id"], violation["help"], nodes))
    delete_job("axe", app.workspace, "train")
    assert not found


def test_the_tabs_by_keyboard(visitor):
    visitor.open()
    visitor.page.get_by_role("tab", name="Compare").focus()
    visitor.page.keyboard.press("Tab")
    visitor.page.keyboard.press("Enter")
    visitor.page.wait_for_selector("[role=tab][data-tab-id=label][aria-selected=true]")


def test_an_idle_page_draws_nothing(visitor):
    """Gradio's status trackers would run a callback in every frame; see assets/page.js."""
    visitor.page.add_init_script(
        "window.frames_ = 0; const frame = window.requestAnimationFrame.bind(window);"
        " window.requestAnimationFrame = (callback) => { window.frames_++; return frame(callback); };"
    )
    visitor.open()
    for name in TABS:
        open_tab(visitor, name)
    drawn = []
    for _ in range(15):  # building the tabs draws for a while
        before = visitor.page.evaluate("() => window.frames_")
        visitor.page.wait_for_timeout(2000)
        drawn.append(visitor.page.evaluate("() => window.frames_") - before)
        if drawn[-1] < 20:
            return
    raise AssertionError(f"frames drawn in two seconds each: {drawn}")
