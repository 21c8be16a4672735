"""Where the list of jobs, the question before one is deleted, and their handlers stand on a tab of jobs (`jobs_view`)."""

from __future__ import annotations

from typing import Any, ClassVar

import gradio as gr

from biasdpo.ui.jobs_view import J, JobsView
from biasdpo.workspace import is_public_space

QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
RAW: dict[str, Any] = QUICK | {"preprocess": False}


class JobsLayout(JobsView[J]):
    """What such a tab lays out and wires beside its own panels. `prefix`: of the elements' ids."""

    prefix: ClassVar[str]

    new_button: gr.Button
    really_button: gr.Button
    keep_button: gr.Button

    def build_state(self) -> None:
        """What the page remembers of the tab."""
        self.view = gr.State("")
        self.mark = gr.State({})
        self.asked = gr.State("")
        # hidden by the style; kept by the page, whatever becomes of the app
        self.chosen = gr.Textbox("", elem_id=f"{self.prefix}-chosen")

    def build_list(self, *, empty: str) -> None:
        """The list and its head, to which a kind of jobs may add. `empty`: what is said where there is none."""
        self.empty = gr.HTML(empty, js_on_load=None, visible=False, elem_id=f"{self.prefix}-empty")
        with gr.Column(visible=False, elem_id=f"{self.prefix}-list") as self.list_box:
            with gr.Row(elem_id=f"{self.prefix}-list-top"):
                gr.HTML(f"<h2>{self.noun.capitalize()}s</h2>", js_on_load=None)
                self.new_button = gr.Button(
                    f"New {self.noun}",
                    size="sm",
                    elem_id=f"{self.prefix}-new-button",
                    min_width=120,
                    scale=0,
                    visible=not is_public_space(),
                )
                self.build_list_buttons()
            self.table = gr.HTML(
                "", js_on_load="window.bdTable(element, trigger)", apply_default_css=False, elem_id=f"{self.prefix}-table"
            )

    def build_list_buttons(self) -> None:
        """Buttons of this kind of jobs at the head of the list."""

    def action(self, title: str, name: str, variant: Any = "secondary") -> gr.Button:
        """A button of the chosen job, shown where it can be used."""
        return gr.Button(title, size="sm", variant=variant, elem_id=f"{self.prefix}-{name}", min_width=60, visible=False)

    def build_asking(self) -> None:
        """The question before a job is deleted, and the line that says what became of a click."""
        self.confirm_text = gr.HTML("", js_on_load=None, elem_id=f"{self.prefix}-confirm-text")
        with gr.Row(visible=False, elem_id=f"{self.prefix}-confirm") as self.confirm_box:
            self.really_button = gr.Button(
                "Really delete", variant="stop", size="sm", elem_id=f"{self.prefix}-really-delete", min_width=60
            )
            self.keep_button = gr.Button("Keep it", size="sm", elem_id=f"{self.prefix}-keep", min_width=60)
        self.notice = gr.HTML("", js_on_load=None, elem_id=f"{self.prefix}-notice")

    # What sets off what

    def wire_list(self, tab: gr.Tab, new_inputs: list[Any]) -> None:
        """Opening the tab, the clock, the list. `new_inputs`: what `first` is given."""
        here, shown = [self.view, self.chosen, self.mark], self.all_outputs
        tab.select(self.open_tab, [*here, *new_inputs], shown, **RAW)
        self.timer.tick(self.watch, here, self.seen_outputs, **QUICK)
        # Not "always_last": for a click during another one Gradio would send the first one's row again.
        chosen = self.table.click(self.choose_row, None, shown, trigger_mode="multiple", **QUICK)
        chosen.success(None, None, None, js=f"() => window.bdShow('{self.prefix}-one')", api_visibility="private")
        opened = self.new_button.click(self.open_new, new_inputs, shown, **RAW)
        opened.then(None, None, None, js=f"() => window.bdShow('{self.prefix}-new')", api_visibility="private")

    def wire_deleting(self) -> None:
        """Asking, and both answers. The focus goes where the hand goes on."""
        asking = [self.asked, self.confirm_box, self.confirm_text, self.notice]

        def then_focus(event: Any, *selectors: str) -> None:
            names = ", ".join(f"'{selector}'" for selector in selectors)
            event.then(None, None, None, js=f"() => window.bdFocus({names})", api_visibility="private")

        new, at = f"#{self.prefix}-new-button", f"#{self.prefix}"
        then_focus(self.delete_button.click(self.ask_delete, self.chosen, asking, **QUICK), f"{at}-keep")
        then_focus(self.keep_button.click(self.keep, None, asking[:3], **QUICK), f"{at}-delete", new)
        deleted = self.really_button.click(self.delete, self.asked, self.all_outputs, **QUICK)
        then_focus(deleted, f"{at}-table tr[aria-current] button", new, f"{at}-start")
