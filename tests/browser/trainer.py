"""A visitor on the Train tab, with the words of its labels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.browser.conftest import ON_THE_WAY_OUT, Visitor

# Settings of the folded groups, by the end of the group's element id.
GROUPS = {"lora": {"rank", "target_modules"}, "evaluation": {"eval_every", "probe_every", "save_steps"}, "machine": {"threads"}}
# What the browser says of an answer 422, which is a validator's no; and what Gradio's list of options says where its panel is put
# away within the 10 ms after a scroll.
NO_TROUBLE = ("the server responded with a status of 422", "Cannot read properties of null (reading 'getBoundingClientRect')")


def write_pairs(path: Path, count: int) -> Path:
    """Pairs whose prompts are no near-duplicates; a model of bytes learns them at once."""
    rows = [
        {"prompt": f"Is a{i} more b{i} than c{i}?", "chosen": f"Neither of the {i}.", "rejected": f"They are worse {i}!"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Trainer:
    def __init__(self, visitor: Visitor) -> None:
        self.visitor = visitor
        self.page = visitor.page
        self.page.on("console", lambda _: self._forgive(NO_TROUBLE))
        self.page.on("pageerror", lambda _: self._forgive(NO_TROUBLE))

    def _forgive(self, texts: tuple[str, ...]) -> None:
        self.visitor.trouble[:] = [t for t in self.visitor.trouble if not any(text in t for text in texts)]

    def open(self, **query: str) -> Trainer:
        self.visitor.open(adapter="none", **query)
        if "run" not in query:
            self.page.get_by_role("tab", name="Train").click()
        self.page.wait_for_selector("#train-start, #train-head .bd-run")
        return self

    def reload(self) -> None:
        """Leave the page and open it again: the address names the run that was shown."""
        self.page.reload()
        self.page.wait_for_selector("#train-start, #train-head .bd-run")
        self._forgive(ON_THE_WAY_OUT)

    def leave(self) -> None:
        """Go away from the page."""
        self.page.goto("about:blank")
        self._forgive(ON_THE_WAY_OUT)

    def field(self, element: str):
        return self.page.locator(f"#{element} :is(input, textarea)").first

    def value(self, element: str) -> str:
        return self.field(element).input_value()

    def wait_value(self, element: str, value: str | None = None) -> None:
        """Until a field has this value; None: any. Gradio writes a field's value a moment after it can be seen, over what was
        typed meanwhile."""
        self.page.wait_for_function(
            "([id, value]) => { const is = document.querySelector(`#${id} :is(input, textarea)`)?.value;"
            " return value === null ? Boolean(is) : is === value; }",
            arg=[element, value],
        )

    def set(self, element: str, value: str) -> None:
        """Fill a field and leave it."""
        self.field(element).fill(value)
        self.field(element).press("Tab")

    def choose_source(self, row: int, source: str) -> None:
        self.page.fill(f"#train-source-{row} input", source)
        self.page.keyboard.press("Enter")
        self.page.keyboard.press("Tab")

    def choose_model(self, folder: Path) -> None:
        self.page.fill("#train-model input", str(folder))
        self.page.keyboard.press("Enter")
        self.page.keyboard.press("Tab")
        self.page.wait_for_function(
            "(name) => document.querySelector('#train-run-id :is(input, textarea)').value.startsWith(name)", arg=folder.name
        )

    def wait_mixture(self, words: str) -> None:
        self.page.wait_for_selector(f"#train-mixture .bd-mixture:has-text('{words}')")

    def choose(self, run_id: str) -> None:
        self.page.click(f"#train-table tr[data-id='{run_id}'] button")
        self.wait_run(run_id, "")

    def wait_run(self, run_id: str, words: str, timeout_seconds: float = 20) -> None:
        """Until the panel shows this run, with these words at its head."""
        panel = f"#train-head section[aria-label='Run {run_id}']"
        self.page.wait_for_selector(f"{panel}:has-text('{words}')" if words else panel, timeout=1000 * timeout_seconds)

    def wait_state(self, run_id: str, state: str, timeout_seconds: float = 20) -> None:
        """Until the list says so of a run."""
        row = f"#train-table tr[data-id='{run_id}'] .bd-state-{state}"
        self.page.wait_for_selector(row, timeout=1000 * timeout_seconds)

    def wait_address(self, part: str, *, there: bool = True) -> None:
        """Until the page's address has (or no longer has) this part."""
        self.page.wait_for_function("([part, there]) => location.search.includes(part) === there", arg=[part, there])

    def new_run(self, model: Path | None = None, source: Path | None = None, **settings: str) -> str:
        """Fill the panel for a new run; returns its proposed id. Fields are named as settings, e.g. max_steps="2".

        source   JSON lines; as many as the source that is chosen already has could not be told from it
        """
        if not self.page.locator("#train-start").is_visible():
            self.page.click("#train-new-button")
        self.page.wait_for_selector("#train-mixture :is(.bd-mixture, .bd-error)")
        if model is not None:
            self.choose_model(model)
        if source is not None:
            self.choose_source(1, str(source))
            self.wait_mixture(f"{len(source.read_text(encoding='utf-8').splitlines())} rows read")
        for group, names in GROUPS.items():
            if names & settings.keys() and not self.field(f"train-{sorted(names)[0].replace('_', '-')}").is_visible():
                self.visitor.unfold(f"train-group-{group}")
        for name, value in settings.items():
            element = f"train-{name.replace('_', '-')}"
            self.wait_value(element)  # every setting has a default
            self.set(element, value)
        for name, value in settings.items():
            self.wait_value(f"train-{name.replace('_', '-')}", value)
        return self.value("train-run-id")

    def start(self, run_id: str) -> None:
        """Press Start, and wait for the run's panel."""
        self.page.click("#train-start")
        self.wait_run(run_id, "", timeout_seconds=60)

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

    @contextmanager
    def exported(self, button: str, suffix: str) -> Iterator[Path]:
        """The file that an export button makes: none with this suffix was made before on this page."""
        self.page.click(button)
        self.page.wait_for_selector(f"#train-notice:has-text('Ready'):has-text('{suffix},')", timeout=60_000)
        self.page.wait_for_selector(f"#train-download:has-text('{suffix}')")
        with self.page.expect_download() as download:
            self.page.click("#train-download")
        yield Path(download.value.path())
