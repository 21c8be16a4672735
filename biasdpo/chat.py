"""Prompt templates: everything that turns a prompt into the text a model is given.

Generation, training and evaluation all render prompts here. A rendered prompt is a tuple of segments; only the template's own
segments can be special tokens, so `<|im_end|>` typed by a user stays plain text."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count
from typing import Any

from biasdpo.errors import ModelError, PromptError

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

    @property
    def end(self) -> str:
        """The special token that ends a completion; "" for the model's end-of-text token."""
        return _first_special(self.turn.partition(_COMPLETION)[2], self.special_tokens)

    @property
    def writes_begin(self) -> bool:
        """Whether the template itself writes the begin-of-text token, or leaves it out on purpose."""
        return False

    def render(self, prompt: str, system: str = "", history: Sequence[Turn] = ()) -> tuple[Segment, ...]:
        """Render a prompt, after the earlier turns of its conversation, as segments: the template's special tokens, and plain
        text between them. PromptError if the template has no form for a system prompt or a conversation."""
        if system.strip() and not self.has_system:
            raise PromptError("This model's template has no system prompt: leave it empty")
        if history and not self.turn:
            raise PromptError("This model's template has no form for a conversation: ask the follow-up as a new prompt")
        return self._segments(prompt, system, history)

    def _segments(self, prompt: str, system: str, history: Sequence[Turn]) -> tuple[Segment, ...]:
        prompts = [*(earlier for earlier, _ in history), prompt]
        pieces = list(self._filled(self.text, {_SYSTEM: system or self.default_system, _PROMPT: prompts[0]}))
        for (_, completion), following in zip(history, prompts[1:], strict=True):
            pieces += self._filled(self.turn, {_COMPLETION: completion, _PROMPT: following})
        return join_plain(pieces)

    def _filled(self, text: str, values: Mapping[str, str]) -> Iterator[Segment]:
        for piece in split_special(text, self.special_tokens):
            # One pass over all placeholders: a user's text that contains "{prompt}" is not substituted again.
            parts = [piece.text] if piece.special else (values.get(part, part) for part in _PLACEHOLDER.split(piece.text))
            yield Segment("".join(parts), piece.special)

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


def split_special(text: str, special_tokens: Sequence[str]) -> list[Segment]:
    """The text in segments: its special tokens, and what is between them."""
    if not special_tokens:
        return [Segment(text, special=False)]
    pieces = _pattern(tuple(special_tokens)).split(text)
    return [Segment(piece, special=i % 2 == 1) for i, piece in enumerate(pieces) if piece]


def join_plain(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """The segments with neighboring plain ones joined: they are tokenized together."""
    joined: list[Segment] = []
    for segment in segments:
        if joined and not segment.special and not joined[-1].special:
            joined[-1] = Segment(joined[-1].text + segment.text, special=False)
        elif segment.text:
            joined.append(segment)
    return tuple(joined)


def quotes_special(segments: Sequence[Segment], special_tokens: Sequence[str]) -> bool:
    """Whether plain text spells a special token, so that tokenizing the segments as one text would parse it."""
    text = "".join(segment.text for segment in segments)
    return [s.text for s in split_special(text, special_tokens) if s.special] != [s.text for s in segments if s.special]


@lru_cache(maxsize=32)
def _pattern(special_tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("(" + "|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))) + ")")


def _first_special(text: str, special_tokens: Sequence[str]) -> str:
    return next((segment.text for segment in split_special(text, special_tokens) if segment.special), "")


def encode_jointly(
    encode: Callable[[Sequence[Segment]], list[int]], rendered: Sequence[Segment], text: str
) -> tuple[list[int], list[int]]:
    """(token ids of a rendered prompt, those of the text after it) as of one text: SentencePiece begins a text of its own with a
    space. The prompt has the tokens that it has alone, also where its end and the text's beginning would merge."""
    given = encode(rendered)
    if not text:
        return given, []
    joint = encode(join_plain([*rendered, Segment(text, special=False)]))
    if joint[: len(given)] == given:
        return given, joint[len(given) :]
    return given, encode_inner(encode, text)


def encode_inner(encode: Callable[[Sequence[Segment]], list[int]], text: str) -> list[int]:
    """Token ids of a text that follows others, whatever these are: as after a line break, which merges with little."""
    start, joint = encode([Segment("\n", special=False)]), encode([Segment("\n" + text, special=False)])
    return joint[len(start) :] if joint[: len(start)] == start else encode([Segment(text, special=False)])


BARE = PromptTemplate(_PROMPT)
"""No template: the prompt is continued as plain text."""


# Chat templates of other people's models

_MARK = "\U000ffffd"  # a private character that stands for a message where only the template's own text matters
_SECONDS = 5.0  # a template that renders for longer is refused


@dataclass(frozen=True)
class ChatTemplate(PromptTemplate):
    """A Jinja chat template, rendered as transformers' `apply_chat_template` does it.

    source          the template
    variables       (name, text) of the tokenizer's named special tokens: bos_token, eos_token, ...
    special_tokens  all special tokens of the tokenizer
    """

    source: str = ""
    variables: tuple[tuple[str, str], ...] = ()

    @property
    def has_system(self) -> bool:
        return _has_system(self)

    @property
    def end(self) -> str:
        return _first_special(_completion_frame(self)[1], self.special_tokens)

    @property
    def writes_begin(self) -> bool:
        return True

    def render(self, prompt: str, system: str = "", history: Sequence[Turn] = ()) -> tuple[Segment, ...]:
        if system.strip() and not self.has_system:
            raise PromptError("This model's chat template has no system role: leave the system prompt empty")
        return self._segments(prompt, system, history)

    def _segments(self, prompt: str, system: str, history: Sequence[Turn]) -> tuple[Segment, ...]:
        messages = [("system", system)] if system.strip() else []
        for earlier, completion in history:
            messages += [("user", earlier), ("assistant", completion)]
        texts = [content for _, content in messages] + [prompt]
        # A special token that a user typed is rendered as a private character, so that it stays text.
        marks = _unused_characters(texts)
        quoted = {token: next(marks) for token in self.special_tokens if any(token in text for text in texts)}
        unquoted = {mark: token for token, mark in quoted.items()}

        def exchange(text: str, table: Mapping[str, str]) -> str:
            return _pattern(tuple(table)).sub(lambda found: table[found[0]], text) if table else text

        try:
            rendered = self._render([(role, exchange(text, quoted)) for role, text in [*messages, ("user", prompt)]])
        except ValueError as exc:
            what = "this conversation: ask the follow-up as a new prompt" if history else "this prompt: choose another model"
            raise PromptError(f"The model's chat template refuses ({exc}) {what}") from exc
        segments = split_special(rendered, self.special_tokens)
        return join_plain([s if s.special else Segment(exchange(s.text, unquoted), special=False) for s in segments])

    def _render(self, messages: Sequence[tuple[str, str]], *, generation_prompt: bool = True) -> str:
        """The messages, (role, content) each, as text. ValueError if the template fails, ModelError if it takes too long."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with _time_limit(_SECONDS):
                [text], _ = render_jinja_template(
                    [[{"role": role, "content": content} for role, content in messages]],
                    chat_template=self.source,
                    add_generation_prompt=generation_prompt,
                    **dict(self.variables),
                )
        except TimeoutError as exc:
            raise ModelError(f"The model's chat template can't be used: {exc}; use a model with a simpler one") from exc
        except Exception as exc:  # a template may raise anything
            raise ValueError(str(exc).split("\n")[0][:200] or type(exc).__name__) from exc
        return str(text)


def chat_template(source: str, special_tokens: Sequence[str], variables: Mapping[str, str]) -> PromptTemplate:
    """The template of a Jinja source, `BARE` for an empty one; not rendered yet (see `verified`)."""
    if not source:
        return BARE
    special = tuple(sorted({token for token in special_tokens if token}, key=lambda token: (-len(token), token)))
    return ChatTemplate("", special_tokens=special, source=source, variables=tuple(sorted(variables.items())))


def verified(template: PromptTemplate) -> PromptTemplate:
    """The template with its completion prefix, which takes a rendering. ValueError if a chat template can't render a prompt."""
    if not isinstance(template, ChatTemplate):
        return template
    if _MARK not in template._render([("user", _MARK)]):
        raise ValueError("it leaves out the user's message")
    return replace(template, completion_prefix=_completion_frame(template)[0])


def template_from_json(values: Mapping[str, Any]) -> PromptTemplate:
    """The inverse of `dataclasses.asdict`."""
    known: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if "source" not in known:
        return PromptTemplate(**known)
    return ChatTemplate(**known | {"variables": tuple((str(name), str(text)) for name, text in known.get("variables", ()))})


@lru_cache(maxsize=32)
def _has_system(template: ChatTemplate) -> bool:
    try:
        return _MARK in template._render([("system", _MARK), ("user", "a")])
    except ValueError:  # one without a system role raises on purpose
        return False


@lru_cache(maxsize=32)
def _completion_frame(template: ChatTemplate) -> tuple[str, str]:
    """(white space between the rendered prompt and a completion, what the template writes after a completion)."""
    try:
        asked = template._render([("user", "a")])
        answered = template._render([("user", "a"), ("assistant", _MARK)], generation_prompt=False)
    except ValueError:
        return "", ""
    before, _, after = answered.partition(_MARK)
    prefix = before.removeprefix(asked) if before.startswith(asked) else ""
    return ("" if prefix.strip() else prefix), after


def _unused_characters(texts: Sequence[str]) -> Iterator[str]:
    """Private characters that are in none of the texts."""
    used = set().union(*texts)
    return (chr(point) for point in count(0xF0000) if chr(point) not in used)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block's thread once its Python code has run for too long: a template may loop for ever."""
    thread, lock, done = threading.get_ident(), threading.Lock(), False

    def interrupt() -> None:
        with lock:
            if not done:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TimeoutError))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    except TimeoutError:
        raise TimeoutError(f"it took longer than {seconds:g} s") from None
    finally:
        with lock:
            done = True
        timer.cancel()
