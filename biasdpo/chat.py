"""The prompt template: the one place that turns a prompt into what the model sees.

Generation, training and evaluation all come here. A rendered prompt is a tuple of segments; special tokens are parsed in
the template's own segments only, so `<|im_end|>` typed by a user stays text."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SYSTEM = "{system}"
_PROMPT = "{prompt}"


@dataclass(frozen=True)
class Segment:
    """A stretch of a rendered prompt: one special token of the template, or plain text."""

    text: str
    special: bool


@dataclass(frozen=True)
class PromptTemplate:
    """A template with `{prompt}` and, where the model knows system prompts, `{system}`.

    special_tokens     the special tokens that occur in `text`
    default_system     stands for an empty system prompt
    completion_prefix  what separates the rendered prompt from a completion; it belongs to the completion
                       (Phi-2: one space), is trained on, and is not shown
    stop               strings that end a completion, beside the model's end-of-text token; one that begins with a line
                       break also ends a completion that begins with the rest of it
    """

    text: str
    special_tokens: tuple[str, ...] = ()
    default_system: str = ""
    completion_prefix: str = ""
    stop: tuple[str, ...] = ()

    @property
    def has_system(self) -> bool:
        return _SYSTEM in self.text

    def render(self, prompt: str, system: str = "") -> tuple[Segment, ...]:
        """The segments that the model sees. Special tokens come from the template alone, plain text lies between them."""
        pieces = [self.text]
        if self.special_tokens:
            pieces = re.split("(" + "|".join(map(re.escape, self.special_tokens)) + ")", self.text)
        segments = []
        for piece in pieces:
            if piece in self.special_tokens:
                segments.append(Segment(piece, special=True))
            elif piece:
                # One pass over both placeholders: a user's text that holds "{prompt}" is not substituted again.
                filled = re.split(r"(\{system\}|\{prompt\})", piece)
                values = {_SYSTEM: system or self.default_system, _PROMPT: prompt}
                text = "".join(values.get(part, part) for part in filled)
                if text:
                    segments.append(Segment(text, special=False))
        return tuple(segments)

    def render_text(self, prompt: str, system: str = "") -> str:
        """The rendered prompt as one string, to show to people ("what the model really sees")."""
        return "".join(segment.text for segment in self.render(prompt, system))

    def completed(self, completion: str) -> str:
        """What follows the rendered prompt where the completion is this: the prefix once, however often the completion itself
        begins with it. An empty completion has none, as a model that has nothing to say writes none."""
        bare = self.bare(completion)
        return self.completion_prefix + bare if bare else ""

    def bare(self, written: str) -> str:
        """The completion in what was written after a rendered prompt: no prefix is left at its beginning. Undoes `completed`."""
        while self.completion_prefix and written.startswith(self.completion_prefix):
            written = written.removeprefix(self.completion_prefix)
        return written


BARE = PromptTemplate(_PROMPT)
"""No template at all: the prompt is a text that is continued as it stands."""
