"""Tokens of a completion, one by one, to the text that may be shown so far."""

from __future__ import annotations

from collections.abc import Callable

from biasdpo.backends.base import ShownText
from biasdpo.template import PromptTemplate


class CompletionText:
    """Holds back what is not certain yet: half a character, the completion prefix, what may become a stop string.

    `decode` turns tokens into text. It is given windows: from the last token that ended a character to the newest.
    """

    def __init__(self, decode: Callable[[list[int]], str], template: PromptTemplate) -> None:
        self._decode = decode
        self._shown = ShownText(template)
        self._window: list[int] = []
        self._known = 0  # tokens of the window whose text was taken

    def add(self, token: int | None, *, final: bool) -> tuple[str, bool]:
        """Take one more token (None: the end-of-text token, which has no text); see `ShownText.add`."""
        return self._shown.add(self._new_text(token, final), final=final)

    def _new_text(self, token: int | None, final: bool) -> str:
        if token is not None:
            self._window.append(token)
        before = self._decode(self._window[: self._known])
        text = self._decode(self._window)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not final:
            return ""  # the bytes of a character so far
        # The next window begins with the tokens just taken: some tokenizers write a token differently at the beginning.
        self._window, self._known = self._window[self._known :], len(self._window) - self._known
        return text[len(before) :]
