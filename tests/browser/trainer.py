"""A visitor on the Train tab."""

from __future__ import annotations

from pathlib import Path

from tests.browser.conftest import SLOW_MS, TIMEOUT_MS, Visitor

# Settings of the folded groups, by the group.
GROUPS = {"lora": {"rank", "target_modules"}, "evaluation": {"eval_every", "probe_every", "save_steps"}, "hardware": {"threads"}}


class Trainer:
    def __init__(self, visitor: Visitor) -> None:
        self.visitor = visitor
        self.page = visitor.page
        self.line = "#train-data-line"

    def open(self, run_id: str = "") -> Trainer:
        self.page.goto(f"{self.visitor.url}?tab=train" + (f"&job={run_id}" if run_id else ""))
        self.visitor.wait(self.line, "to train on")
        return self

    def choose(self, run_id: str) -> None:
        table = self.page.locator("#train-jobs")
        cell = table.locator("[role=gridcell]:visible").get_by_text(run_id, exact=True)
        while not cell.count():  # rows that are out of sight are not there
            table.hover()
            self.page.mouse.wheel(0, 60)
            self.page.wait_for_timeout(100)
        cell.first.click()
        self.wait_head(run_id)

    def wait_head(self, run_id: str, words: str = "", *, slow: bool = False) -> None:
        """Until the chosen run is this one, with these words at its head."""
        self.visitor.wait(f"#train-head:has(h3:text-is({run_id!r}))", words, slow=slow)

    def wait_listed(self, run_id: str, state: str, *, slow: bool = False) -> None:
        """Until the list says so of a run."""
        self.page.wait_for_function(
            "(row) => document.querySelector('#train-jobs')?.innerText.replace(/\\s+/g, ' ').includes(row)",
            arg=f"{run_id} {state}",
            timeout=SLOW_MS if slow else TIMEOUT_MS,
        )

    def choose_data(self, *sources: str | Path) -> None:
        """Exactly these."""
        while (crosses := self.page.locator("#train-data .token-remove:not(.remove-all)")).count():
            crosses.first.click()
        for source in sources:
            self.page.fill("#train-data input", str(source))
            self.page.keyboard.press("Enter")
        self.page.keyboard.press("Tab")

    def choose_model(self, model: Path) -> None:
        """A model for which there are presets: its first one is filled in."""
        self.page.locator("#train-preset label").nth(1).click()
        self.visitor.choose("train-model", str(model))
        self.page.wait_for_function("() => document.querySelector('#train-preset input').checked")

    def set(self, **settings: str) -> None:
        """Unfold what is necessary and fill fields in, named as settings."""
        if not self.page.locator("#train-run-id input, #train-run-id textarea").first.is_visible():
            self.visitor.unfold("train-advanced")
        for group, names in GROUPS.items():
            folded = sorted(names & settings.keys())
            if folded and not self.visitor.field(f"train-{folded[0].replace('_', '-')}").is_visible():
                self.visitor.unfold(f"train-group-{group}")
        for name, value in settings.items():
            element = f"train-{name.replace('_', '-')}"
            if name != "run_id":
                self.visitor.wait_value(element)  # every setting has a default
            self.visitor.set(element, value)
        for name, value in settings.items():
            self.visitor.wait_value(f"train-{name.replace('_', '-')}", value)

    def new_run(self, run_id: str, model: Path, source: Path, pairs: str, **settings: str) -> None:
        """Fill the form in and press Start."""
        self.choose_data(source)
        self.visitor.wait(self.line, pairs)
        self.choose_model(model)
        self.set(run_id=run_id, **settings)
        self.page.click("#train-start")
        self.wait_head(run_id)
