"""Prompt templates: everything that turns a prompt into the text a model is given.

Generation, training and evaluation all render prompts here. A rendered prompt is a tuple of segments; only the template's own
segments can be special tokens, so `<|im_end|>` typed by a user stays plain text."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SYSTEM = "{system}"
_PROMPT = "{prompt}"


@dataclass(frozen=True)
class Segment:
    """Part of a rendered prompt: one special token, or plain text."""

    text: str
    special: bool


@dataclass(frozen=True)
class PromptTemplate:
    """A template with `{prompt}` and, if the model supports system prompts, `{system}`.

    special_tokens     special tokens that occur in `text`
    default_system     used when the system prompt is empty
    completion_prefix  separates the rendered prompt from a completion (Phi-2: one space). It is part of the trained completion
                       and hidden from users
    stop               strings that end a completion, besides the end-of-text token; one that begins with a line break also
                       matches its remainder at the start of a completion
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
        """Render a prompt as segments: the template's special tokens, and plain text between them."""
        pieces = [self.text]
        if self.special_tokens:
            pieces = re.split("(" + "|".join(map(re.escape, self.special_tokens)) + ")", self.text)
        values = {_SYSTEM: system or self.default_system, _PROMPT: prompt}
        segments = []
        for piece in pieces:
            if piece in self.special_tokens:
                segments.append(Segment(piece, special=True))
                continue
            # One pass over both placeholders: a user's text that contains "{prompt}" is not substituted again.
            text = "".join(values.get(part, part) for part in re.split(r"(\{system\}|\{prompt\})", piece))
            if text:
                segments.append(Segment(text, special=False))
        return tuple(segments)

    def render_text(self, prompt: str, system: str = "") -> str:
        """The rendered prompt as one string, for display."""
        return "".join(segment.text for segment in self.render(prompt, system))

    def completed(self, completion: str) -> str:
        """The text that follows the rendered prompt for this completion: exactly one prefix, none if it is empty."""
        bare = self.bare(completion)
        return self.completion_prefix + bare if bare else ""

    def bare(self, written: str) -> str:
        """Generated text without its leading prefixes. Inverse of `completed`."""
        while self.completion_prefix and written.startswith(self.completion_prefix):
            written = written.removeprefix(self.completion_prefix)
        return written


BARE = PromptTemplate(_PROMPT)
"""No template: the prompt is continued as plain text."""


# Chat templates of other people's models

_SYSTEM_MARK, _PROMPT_MARK = "\u0001system\u0001", "\u0001prompt\u0001"


def template_from_chat(chat_template: str, special_tokens: list[str]) -> PromptTemplate:
    """Convert a Jinja chat template to a PromptTemplate for one system and one user message; ValueError if it can't be rendered.

    The template is rendered once, sandboxed, with marks in place of the two messages. An empty template gives `BARE`.
    """
    if not chat_template:
        return BARE
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    system, user = {"role": "system", "content": _SYSTEM_MARK}, {"role": "user", "content": _PROMPT_MARK}
    failure: Exception | None = None
    for messages in ([system, user], [user]):
        try:
            text = environment.from_string(chat_template).render(
                messages=messages, add_generation_prompt=True, bos_token="", eos_token=""
            )
        except Exception as exc:  # a template may raise anything; one without a system role raises on purpose
            failure = exc
            continue
        if text.count(_PROMPT_MARK) == 1:
            used = tuple(sorted((t for t in special_tokens if t and t in text), key=len, reverse=True))
            default = re.search(r"You are [^<>'\"\\]+", chat_template)
            return PromptTemplate(
                text.replace(_SYSTEM_MARK, _SYSTEM).replace(_PROMPT_MARK, _PROMPT),
                special_tokens=used,
                default_system=default.group(0) if default and _SYSTEM_MARK in text else "",
            )
    raise ValueError(failure or "it does not contain the user's message exactly once")
