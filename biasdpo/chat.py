"""Prompt templates: everything that turns a prompt into the text a model is given.

Generation, training and evaluation all render prompts here. A rendered prompt is a tuple of segments; only the template's own
segments can be special tokens, so `<|im_end|>` typed by a user stays plain text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from biasdpo.errors import PromptError

_SYSTEM = "{system}"
_PROMPT = "{prompt}"
_COMPLETION = "{completion}"
_PLACEHOLDER = re.compile(r"(\{system\}|\{prompt\}|\{completion\})")

Turn = tuple[str, str]
"""An earlier prompt of a conversation and its completion."""


@dataclass(frozen=True)
class Segment:
    """Part of a rendered prompt: one special token, or plain text."""

    text: str
    special: bool


@dataclass(frozen=True)
class PromptTemplate:
    """A template with `{prompt}` and, if the model supports system prompts, `{system}`.

    turn               what follows the rendered prompt in a conversation: `{completion}` and the next `{prompt}`; "" if there
                       is no such form
    special_tokens     special tokens that occur in `text` and `turn`
    default_system     used when the system prompt is empty
    completion_prefix  separates the rendered prompt from a completion (Phi-2: one space). It is part of the trained completion
                       and hidden from users
    stop               strings that end a completion, besides the end-of-text token; one that begins with a line break also
                       matches its remainder at the start of a completion
    """

    text: str
    turn: str = ""
    special_tokens: tuple[str, ...] = ()
    default_system: str = ""
    completion_prefix: str = ""
    stop: tuple[str, ...] = ()

    @property
    def has_system(self) -> bool:
        return _SYSTEM in self.text

    def render(self, prompt: str, system: str = "", history: Sequence[Turn] = ()) -> tuple[Segment, ...]:
        """Render a prompt, after the earlier turns of its conversation, as segments: the template's special tokens, and plain
        text between them. PromptError if the template has no form for a conversation."""
        if history and not self.turn:
            raise PromptError("This model's template has no form for a conversation: ask the follow-up as a new prompt")
        prompts = [*(earlier for earlier, _ in history), prompt]
        pieces = list(self._filled(self.text, {_SYSTEM: system or self.default_system, _PROMPT: prompts[0]}))
        for (_, completion), following in zip(history, prompts[1:], strict=True):
            pieces += self._filled(self.turn, {_COMPLETION: completion, _PROMPT: following})
        segments: list[Segment] = []
        for piece in pieces:
            if segments and not piece.special and not segments[-1].special:  # tokenized together, as by `apply_chat_template`
                segments[-1] = Segment(segments[-1].text + piece.text, special=False)
            elif piece.text:
                segments.append(piece)
        return tuple(segments)

    def _filled(self, text: str, values: Mapping[str, str]) -> Iterator[Segment]:
        pieces = [text]
        if self.special_tokens:
            pieces = re.split("(" + "|".join(map(re.escape, self.special_tokens)) + ")", text)
        for piece in pieces:
            if piece in self.special_tokens:
                yield Segment(piece, special=True)
            else:
                # One pass over all placeholders: a user's text that contains "{prompt}" is not substituted again.
                yield Segment("".join(values.get(part, part) for part in _PLACEHOLDER.split(piece)), special=False)

    def render_text(self, prompt: str, system: str = "", history: Sequence[Turn] = ()) -> str:
        """The rendered prompt as one string, for display."""
        return "".join(segment.text for segment in self.render(prompt, system, history))

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
_ANSWER_MARK, _NEXT_MARK = "\u0001completion\u0001", "\u0001next\u0001"


def template_from_chat(chat_template: str, special_tokens: list[str]) -> PromptTemplate:
    """Convert a Jinja chat template to a PromptTemplate for a system message and a conversation; ValueError if it fails.

    The template is rendered once, sandboxed, with marks in place of the messages; again with a second turn, which is left out
    where a template rewrites what came before. An empty template gives `BARE`.
    """
    if not chat_template:
        return BARE
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse

    def rendered(*contents: tuple[str, str]) -> str:
        messages = [{"role": role, "content": content} for role, content in contents]
        return environment.from_string(chat_template).render(
            messages=messages, add_generation_prompt=True, bos_token="", eos_token=""
        )

    system, user = ("system", _SYSTEM_MARK), ("user", _PROMPT_MARK)
    failure: Exception | None = None
    for messages in ([system, user], [user]):
        try:
            text = rendered(*messages)
        except Exception as exc:  # a template may raise anything; one without a system role raises on purpose
            failure = exc
            continue
        if text.count(_PROMPT_MARK) == 1:
            try:
                longer = rendered(*messages, ("assistant", _ANSWER_MARK), ("user", _NEXT_MARK))
            except Exception:  # one prompt only
                longer = ""
            turn = longer.removeprefix(text)
            if turn == longer or turn.count(_ANSWER_MARK) != 1 or turn.count(_NEXT_MARK) != 1:
                turn = ""
            used = tuple(sorted((t for t in special_tokens if t and t in text + turn), key=len, reverse=True))
            default = re.search(r"You are [^<>'\"\\]+", chat_template)
            return PromptTemplate(
                text.replace(_SYSTEM_MARK, _SYSTEM).replace(_PROMPT_MARK, _PROMPT),
                turn.replace(_ANSWER_MARK, _COMPLETION).replace(_NEXT_MARK, _PROMPT),
                special_tokens=used,
                default_system=default.group(0) if default and _SYSTEM_MARK in text else "",
            )
    raise ValueError(failure or "it does not contain the user's message exactly once")
