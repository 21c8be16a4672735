"""A visitor on the Train tab."""

from __future__ import annotations

from pathlib import Path

from tests.browser.conftest import Visitor

# Settings of the folded groups, by the end of the group's element id.
GROUPS = {"lora": {"rank", "target_modules"}, "evaluation": {"eval_every", "probe_every", "save_steps"}, "hardware": {"threads"}}


class Trainer:
    def __init__(self, visitor: Visitor) -> None:
        self.visitor = visitor
        self.page = visitor.page

    def open(self) -> Trainer:
        self.visitor.open("Train", adapter="none")
        self.page.wait_for_selector("#train-start, #train-head .bd-run")
        return self

    def open_new(self) -> Trainer:
        """The panel for a new run, filled in."""
        self.open()
        if not self.page.locator("#train-start").is_visible():
            self.page.click("#train-new-button")
        self.page.wait_for_selector("#train-mixture :is(.bd-mixture, .bd-error)")
        return self

    def choose_source(self, row: int, source: str) -> None:
        self.visitor.choose(f"train-source-{row}", source)
        self.page.keyboard.press("Tab")

    def wait_mixture(self, words: str) -> None:
        self.visitor.wait("#train-mixture .bd-mixture", words)

    def choose(self, run_id: str) -> None:
        self.page.click(f"#train-table tr[data-id='{run_id}'] button")
        self.wait_run(run_id)

    def wait_run(self, run_id: str, words: str = "", *, slow: bool = False) -> None:
        """Until the panel shows this run, with these words at its head."""
        self.visitor.wait(f"#train-head section[aria-label='Run {run_id}']", words, slow=slow)

    def wait_state(self, run_id: str, state: str, *, slow: bool = False) -> None:
        """Until the list says so of a run."""
        self.visitor.wait(f"#train-table tr[data-id='{run_id}'] .bd-state-{state}", slow=slow)

    def wait_address(self, part: str, *, there: bool = True) -> None:
        """Until the page's address has (or no longer has) this part."""
        self.page.wait_for_function("([part, there]) => location.search.includes(part) === there", arg=[part, there])

    def new_run(self, model: Path, source: Path, **settings: str) -> str:
        """Fill the panel for a new run; returns its proposed id. Fields are named as settings, e.g. max_steps="2"."""
        self.open_new()
        self.visitor.choose("train-model", str(model))
        self.page.keyboard.press("Tab")
        self.page.wait_for_function(
            "(name) => document.querySelector('#train-run-id :is(input, textarea)').value.startsWith(name)", arg=model.name
        )
        self.choose_source(1, str(source))
        self.wait_mixture(f"{len(source.read_text(encoding='utf-8').splitlines())} rows read")
        for group, names in GROUPS.items():
            folded = sorted(names & settings.keys())
            if folded and not self.visitor.field(f"train-{folded[0].replace('_', '-')}").is_visible():
                self.visitor.unfold(f"train-group-{group}")
        for name, value in settings.items():
            element = f"train-{name.replace('_', '-')}"
            self.visitor.wait_value(element)  # every setting has a default
            self.visitor.set(element, value)
        for name, value in settings.items():
            self.visitor.wait_value(f"train-{name.replace('_', '-')}", value)
        return self.visitor.value("train-run-id")

    def start(self, run_id: str) -> None:
        """Press Start, and wait for the run's panel."""
        self.page.click("#train-start")
        self.wait_run(run_id)

    def pick_runs(self, *run_ids: str) -> None:
        """Exactly these, in the comparison."""
        while (crosses := self.page.locator("#train-picked .token-remove")).count():
            before = crosses.count()
            crosses.first.click()
            self.page.wait_for_function(
                "(before) => document.querySelectorAll('#train-picked .token-remove').length < before", arg=before
            )
        for run_id in run_ids:
            self.page.click("#train-picked input")
            self.page.locator("#train-picked").get_by_role("option", name=f"{run_id} ·").click()
