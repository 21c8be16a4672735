"""Text that a chat template was applied to before: recognized by its markers, and unwrapped to the turns that it holds.

A prompt is rendered with the model's own template, so markers that it brings along would be trained as text.
"""

from __future__ import annotations

import re
from os.path import commonprefix

from biasdpo.errors import plural

Message = tuple[str, str]
"""Role (system, user or assistant) and content."""

_ROLES = {
    **dict.fromkeys(("system", "<<sys>>"), "system"),
    **dict.fromkeys(("user", "human", "instruction", "input", "[inst]", "<</sys>>"), "user"),
    **dict.fromkeys(("assistant", "model", "gpt", "response", "[/inst]"), "assistant"),
}
_TURN = (  # ChatML, Llama 3 and 4, Gemma, Zephyr and Phi-3, DeepSeek, Llama 2 and Mistral
    r"<\|im_start\|> ?(\w+)\n?|<\|(?:start_header_id|header_start)\|>(\w+)<\|(?:end_header_id|header_end)\|>\n*"
    r"|<start_of_turn>(\w+)\n?|<\|(system|user|assistant)\|>\n?|<｜(User|Assistant)｜>|(\[/?INST\])|(<</?SYS>>)"
)
_LABEL = (  # Alpaca, Guanaco, HH-RLHF at the beginning of a line; Vicuna also within one
    r"(?:^|\n)[ \t]*(?:#{2,3} ?)?(System|Human|User|Instruction|Input|Assistant|Response):|(?<=\s)(USER|ASSISTANT):"
)
_END = (
    r"<\|(?:im_end|eot_id|eot|end|endoftext|end_of_text|begin_of_text)\|>|<end_of_turn>|<｜(?:begin|end)▁of▁sentence｜>"
    r"|^\s*<(?:s|bos)>|</s>(?=\s*$)|<eos>(?=\s*$)"
)
_TURNS, _TURNS_OR_LABELS, _ENDS = re.compile(_TURN), re.compile(f"{_TURN}|{_LABEL}"), re.compile(_END)
_MARKER = re.compile(f"{_TURN}|{_END}")
_ASKS = re.compile(r"(?:^|[\s#])(?:Human|User|USER|Instruction):")


def marker_in(*texts: str) -> str:
    """The first marker of a chat template in the texts, "" if there is none. Labels such as "Human:" count only where one for
    the assistant ends the text."""
    for text in texts:
        if found := _MARKER.search(text) if "<" in text or "[" in text or "｜" in text else None:
            return found[0].strip()
        last = text[-40:].split()[-1:]
        if last and last[0].lstrip("#") in ("Assistant:", "ASSISTANT:", "Response:") and _ASKS.search(text):
            return last[0]
    return ""


def answer_start(chosen: str, rejected: str) -> int:
    """Where the assistant's last turn begins in two whole dialogues with the same turns before it; -1 where there is none.
    Raises ValueError where the turns before it differ."""
    same = commonprefix([chosen, rejected])  # noqa: RUF071 (character by character, as it should be)
    asked = max((end for role, end in _roles(same) if role == "user"), default=0)
    start = min((end for role, end in _roles(same) if role == "assistant" and end > asked), default=-1)
    after = ({role for role, end in _roles(text) if end > start} for text in (chosen, rejected))
    if any("user" in roles if start >= 0 else "assistant" in roles for roles in after):
        raise ValueError("the dialogues of the two completions begin with different turns")
    return start


def _roles(text: str) -> list[tuple[str, int]]:
    """The roles that markers or labels name, and where their turns begin."""
    return [(_role(found), found.end()) for found in _TURNS_OR_LABELS.finditer(text)]


def turns_of(text: str, column: str, *, labels: bool = True) -> list[Message]:
    """The turns of a templated text that are not blank, without markers; what precedes the first turn of a prompt is a system
    text. Raises ValueError, with the column, for a role that is none."""
    turns: list[Message] = []
    role, start = "system" if labels else "assistant", 0
    marks = _TURNS_OR_LABELS if labels and not _TURNS.search(text) else _TURNS  # beside markers, "User:" is what somebody wrote
    for found in [*marks.finditer(text), None]:
        content = _ENDS.sub("", text[start : found.start() if found else None]).strip()
        if content and turns and turns[-1][0] == role:
            turns[-1] = (role, f"{turns[-1][1]}\n{content}")
        elif content:
            turns.append((role, content))
        if found:
            role, start = _role(found), found.end()
            if not role:
                raise ValueError(f"{column} has a turn of an unknown role ({found[0].strip()[:40]})")
    return turns


def completion_of(text: str, column: str) -> str:
    """The one turn of a templated completion. Raises ValueError if it has several."""
    turns = turns_of(text, column, labels=False)
    if len(turns) > 1 or (turns and turns[0][0] != "assistant"):
        raise ValueError(f"{column} has {plural(len(turns), 'turn')}; only the assistant's last one can be trained on")
    return turns[0][1] if turns else ""


def _role(found: re.Match[str]) -> str:
    return _ROLES.get(next(filter(None, found.groups()), "").lower(), "")
