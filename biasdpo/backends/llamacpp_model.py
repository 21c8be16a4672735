"""A GGUF in memory, as llama.cpp has it: its weights, shared by every context, and its vocabulary."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp

from biasdpo.errors import AdapterError, ModelError, PromptError
from biasdpo.modelfile import check_gguf_complete
from biasdpo.template import Segment


class Model:
    """One llama_model. ModelError where llama.cpp can't load the file.

    on_progress   called with (share of the loading 0–1, what is being done)
    """

    def __init__(self, gguf: Path, on_progress: Callable[[float, str], None]) -> None:
        check_gguf_complete(gguf)
        self.pointer = _load(gguf, on_progress)
        self._vocabulary = llama_cpp.llama_model_get_vocab(self.pointer)
        self.vocabulary_size: int = llama_cpp.llama_vocab_n_tokens(self._vocabulary)
        self.context_length: int = llama_cpp.llama_model_n_ctx_train(self.pointer)  # tokens, as trained
        self.end_of_text: int = llama_cpp.llama_vocab_eos(self._vocabulary)
        self.adapter: Any = None

    def load_adapter(self, lora: Path) -> None:
        """Load a LoRA GGUF made for this model, for contexts to use. AdapterError where llama.cpp refuses it."""
        adapter = llama_cpp.llama_adapter_lora_init(self.pointer, str(lora).encode())
        if not adapter:  # a failed init gives a null pointer object: falsy, yet not None
            raise AdapterError(
                f"llama.cpp refused the adapter {lora}: it is damaged or made for another base model; build it again"
            )
        self.adapter = adapter

    def close(self) -> None:
        """Free the weights and the adapter. Every context must have been closed before."""
        if self.pointer:
            llama_cpp.llama_model_free(self.pointer)  # frees its adapters too
            self.pointer = self.adapter = None

    def tokenize(self, segments: Sequence[Segment], *, begin: bool = True) -> list[int]:
        """Token ids of a rendered prompt. Special tokens are parsed in special segments alone."""
        tokens: list[int] = []
        if begin and llama_cpp.llama_vocab_get_add_bos(self._vocabulary):
            tokens.append(llama_cpp.llama_vocab_bos(self._vocabulary))
        for segment in segments:
            text = segment.text.encode("utf-8", "replace")
            room = len(text) + 8
            buffer = (llama_cpp.llama_token * room)()
            count = llama_cpp.llama_tokenize(self._vocabulary, text, len(text), buffer, room, False, segment.special)
            if count < 0:
                raise PromptError(f"llama.cpp could not tokenize {segment.text[:40]!r}…: remove unusual characters")
            tokens += buffer[:count]
        return tokens

    def tokenize_continuation(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of (what is given, what is scored) of a bare text (see `records.ContinuationRequest`)."""
        given = self.tokenize((Segment(context, special=False),))
        tokens = self.tokenize((Segment(context + continuation, special=False),))
        if not given:  # an empty context, and a model whose texts begin with no token of their own
            begin = llama_cpp.llama_vocab_bos(self._vocabulary)
            given = [self.end_of_text if begin < 0 else begin]
            tokens = given + tokens
        return tokens[: len(given)], tokens[len(given) :]

    def piece(self, token: int) -> bytes:
        """The UTF-8 bytes of a token, maybe a part of a character; none for special tokens."""
        buffer = ctypes.create_string_buffer(256)
        length = llama_cpp.llama_token_to_piece(self._vocabulary, token, buffer, len(buffer), 0, False)
        return buffer.raw[: max(length, 0)]

    def ends_text(self, token: int) -> bool:
        """Whether the model says with this token that its text is at its end."""
        return bool(llama_cpp.llama_vocab_is_eog(self._vocabulary, token))


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _log(_level: int, _text: bytes, _data: Any) -> None:
    """llama.cpp's own log is not for our users: every failure is raised with a line of ours."""


def _load(gguf: Path, on_progress: Callable[[float, str], None]) -> Any:
    llama_cpp.llama_log_set(_log, None)
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
    # One copy of the weights: llama.cpp would repack some quantizations (Q4_K, Q4_0, …) into memory of its own beside the mapped
    # file. The repacked weights also lead to its AMX kernels, which crash where GCC older than 12.4 or 13.3 built them:
    # `_tile_loadconfig` loses all but eight bytes of its argument (GCC bug 114098).
    params.use_extra_bufts = False

    @llama_cpp.llama_progress_callback  # type: ignore[untyped-decorator]
    def report(share: float, _data: Any) -> bool:
        on_progress(0.75 * share, "reading the weights")
        return True

    params.progress_callback = report
    model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), params)
    if not model:
        raise ModelError(f"llama.cpp can't load {gguf}: the file is damaged or of a newer format; fetch or export it again")
    return model
