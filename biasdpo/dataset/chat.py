"""Chat messages, as TRL (role, content) and LLaMA-Factory (from, value) write them, to one prompt and one completion.

What a message list holds that a prompt can't is a ValueError with the reason, never dropped: more than one user turn, tool calls,
pictures, roles other than system, user and assistant.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_KEYS = (("role", "content"), ("from", "value"))


@dataclass(frozen=True)
class Message:
    """One turn; `role` is system, user or assistant."""

    role: str
    content: str


def is_chat(value: Any) -> bool:
    """Whether a column's value is a message, a list of messages, or JSON text of such a list (as CSV files hold them)."""
    if isinstance(value, str):
        return _from_json(value) is not None
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, dict) and _keys(item) is not None for item in items)


def messages_of(value: Any, column: str) -> list[Message]:
    """The messages of a value for which `is_chat` holds; what can't be understood is a ValueError that names the column."""
    if isinstance(value, str):
        value = _from_json(value)
    return [_message(item, column) for item in (value if isinstance(value, list) else [value])]


def split_completion(messages: Sequence[Message], column: str) -> tuple[list[Message], str]:
    """The turns before the completion, and the completion: the last turn, which must be the assistant's."""
    if messages[-1].role != "assistant":
        raise ValueError(f"{column} ends with a turn of the {messages[-1].role}, not of the assistant")
    return list(messages[:-1]), messages[-1].content


def split_system(messages: Sequence[Message], column: str) -> tuple[str, str]:
    """The system text ("" for none) and the one user turn. Longer conversations are refused: training renders one user turn,
    and to flatten them would put the model's own words into the user's mouth."""
    system, turns = ("", messages) if messages[0].role != "system" else (messages[0].content, messages[1:])
    if len(turns) != 1:
        raise ValueError(f"{column} has {len(turns)} turns before the completion; only one user turn can be trained on")
    if turns[0].role != "user":
        raise ValueError(f"{column} ends with a turn of the {turns[0].role}, not of the user")
    return system, turns[0].content


def _keys(item: dict[Any, Any]) -> tuple[str, str] | None:
    return next((keys for keys in _KEYS if keys[0] in item and keys[1] in item), None)


def _from_json(text: str) -> list[Any] | None:
    start = text[:200].lstrip()
    if not start.startswith("[{") or not any(f'"{role}"' in start for role, _ in _KEYS):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if is_chat(value) and isinstance(value, list) else None


def _message(item: dict[str, Any], column: str) -> Message:
    keys = _keys(item)
    assert keys is not None  # is_chat holds
    role, content = item[keys[0]], item[keys[1]]
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{column} has a turn of role {str(role)[:40]!r}; understood are {', '.join(ROLES)}")
    if item.get("tool_calls"):
        raise ValueError(f"{column} has tool calls, which can't be trained on here")
    if isinstance(content, list):  # parts, as models that see pictures take them
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{column} has a turn with parts that are no text")
        content = "".join(map(str, parts))
    if not isinstance(content, str):
        raise ValueError(f"{column} has a turn whose {keys[1]} must be a string, got {type(content).__name__}")
    return Message(ROLES[role], content)
