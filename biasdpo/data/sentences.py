"""Where sentences end: a completion that its token limit cut off is cut back to its last complete sentence."""

from __future__ import annotations

import re

_END = re.compile(r"""(?:[.!?…]+|[。！？]+)["'”’»)\]*_]*(?=\s|$)|[。！？]+[”’」』）]*""")
_ABBREVIATION = re.compile(
    r"m(r|rs|s|x|t)|dr|prof|rev|hon|st|[sj]r|sen|rep|gov|gen|col|lt|sgt|capt|vs|approx|dept|est|fig|nos|vol|pp|eds?|inc|ltd|co"
    r"|corp|e\.g|i\.e|cf|viz|al|jan|feb|mar|apr|ju[nl]|aug|sept?|oct|nov|dec|u\.[skn]|d\.c|ph\.d|[mb]\.[ad]|[ap]\.m",
    re.IGNORECASE,
)
_PAIRS = (("(", ")"), ("[", "]"), ("“", "”"), ("«", "»"), ("「", "」"))
_EVEN = ('"', "**", "```")


def complete_sentences(text: str) -> str:
    """The text up to the end of its last complete sentence; "" if no sentence ends in it.

    A period ends no sentence after an abbreviation, an initial, a list number ("2.") or a number at the very end (which may go
    on), nor where a lowercase word follows. Text that would leave a quotation, a bracket or bold type open is cut earlier.
    """
    text = text.rstrip()
    for match in reversed(list(_END.finditer(text))):
        if _ends_sentence(text, match) and _is_closed(kept := text[: match.end()]):
            return kept
    return ""


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    rest = text[match.end() :].lstrip()
    if rest[:1].islower():  # "e.g. this", "wait... what"
        return False
    if not match.group().startswith(".") or match.group().startswith(".."):
        return True
    line = text[: match.start()].rpartition("\n")[2]
    word = line.split()[-1].lstrip("\"'“‘«([*_") if line.split() else ""
    if word.isdigit() and (not rest or line.strip(" -*_#>") == word):  # "2." of a list; "3." that may become "3.5"
        return False
    if word.casefold() == "no" and rest[:1].isdigit():  # "No. 5"
        return False
    is_initial = len(word) == 1 and word.isalpha() and word != "I"
    return bool(word) and not is_initial and not _ABBREVIATION.fullmatch(word)


def _is_closed(text: str) -> bool:
    return all(text.count(opening) <= text.count(closing) for opening, closing in _PAIRS) and all(
        text.count(mark) % 2 == 0 for mark in _EVEN
    )
