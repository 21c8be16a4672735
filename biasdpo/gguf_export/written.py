"""What an export wrote, and how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Source = Literal["hf", "gguf"]

Progress = Callable[[float, str], None]
"""Called with the share done (0 to 1) and what is being done."""


@dataclass(frozen=True)
class Fallback:
    """A tensor that could not have the type that its quantization gives it, since the type's block does not divide its width."""

    tensor: str
    wanted: str
    got: str


@dataclass(frozen=True)
class Written:
    """A GGUF that was written.

    source      what the weights were read from: a Hugging Face folder, or the base GGUF
    touched     tensors that the adapter changed
    fallbacks   tensors of another type than the quantization's own
    """

    path: Path
    bytes: int
    architecture: str
    source: Source
    quantization: str
    tensors: int
    touched: int
    fallbacks: tuple[Fallback, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "fallbacks": [asdict(fallback) for fallback in self.fallbacks]}
