"""One side's llama_context: batches, their logits, and what may be reused of the KV cache.

What makes a side's text equal a bare context's, whatever came before:
- The KV cache is reused only where the same computation would be done again: the very same prompt (with its stored
  logits), or a common beginning of whole physical batches. Anything else would split the prompt differently, and the
  float sums with it.
- Strength belongs to the key of that reuse: cached states of another strength are dropped.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from biasdpo.backends.base import Cancellation
from biasdpo.backends.llamacpp_model import Model
from biasdpo.backends.prefixes import Path, common_length, shared_lengths
from biasdpo.errors import BackendError
from biasdpo.records import check_strength

BATCH_TOKENS = 512  # physical batch, llama.cpp's own default: the prompt is split as bare llama.cpp splits it
_OUTPUTS_MAX = 128  # rows of logits a batch may give; keeps the compute buffer at 128 x vocabulary floats
_ABORTED = 2  # llama_decode's status after its abort callback said so
_KV_TYPES = {"f16": 1, "f32": 0}  # ggml_type

# llama.cpp asks a C callback, once a graph node, whether to abort. A Python callback would take the interpreter's lock a
# thousand times a token. strlen of the cancellation's buffer is a native function of the right shape: 0 (go on) or 1.
_ABORT_IF_SET = ctypes.cast(ctypes.CDLL(None).strlen, llama_cpp.ggml_abort_callback)
_NEVER_ABORT = llama_cpp.ggml_abort_callback()  # a null pointer


# llama.cpp computes a batch of one token by other kernels, whose numbers differ (SmolLM2, Q4_1: by 0.4 nats for a short answer).
# However else a text is divided into batches, its logits stay the same to the last bit.
_LEAST_BATCH = 2


class AbortedError(Exception):
    """The cancellation was set while a batch was computed."""


class Context:
    """A llama_context of `length` tokens, and what its KV cache holds: the `prompt` tokens, computed at `strength`.

    kv_cache   "f16" (llama.cpp's default) or "f32" (for equality proofs)
    threads    asked before each batch
    """

    def __init__(self, model: Model, length: int, kv_cache: str, threads: Callable[[], int]) -> None:
        self.lock = threading.Lock()  # one stream at a time
        self.strength = 0.0
        self.prompt: list[int] = []
        self.prompt_logits: NDArray[np.float32] | None = None  # (V,) after the last prompt token
        self._walked: tuple[int, ...] = ()  # the path that the cache holds instead, where `walk` was the last to compute
        self._model = model
        self._threads_wanted = threads
        self._threads = threads()
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = length
        params.n_batch = params.n_ubatch = min(BATCH_TOKENS, length)
        params.n_outputs_max = min(_OUTPUTS_MAX, length)
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = _KV_TYPES[kv_cache]
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # as bare llama-cpp-python
        params.no_perf = True
        self.pointer = llama_cpp.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise BackendError(f"No memory for a context of {length:,} tokens: close other programs or choose a smaller model")
        self._memory = llama_cpp.llama_get_memory(self.pointer)

    def close(self) -> None:
        """Free the context; its lock must be held."""
        llama_cpp.llama_free(self.pointer)

    def forget(self) -> None:
        """Empty the KV cache."""
        llama_cpp.llama_memory_clear(self._memory, True)
        self.prompt, self.prompt_logits, self._walked = [], None, ()

    def cut(self, length: int) -> None:
        """Drop the KV cache's states from position `length` on."""
        llama_cpp.llama_memory_seq_rm(self._memory, 0, length, -1)

    def set_strength(self, strength: float) -> None:
        """Set the scale of the model's adapter. A change drops the cache, which holds states of the old strength."""
        check_strength(strength)
        if self.strength == strength:
            return
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self._model.adapter)
        scales = (ctypes.c_float * 1)(strength)
        count = 0 if strength == 0.0 else 1
        if llama_cpp.llama_set_adapters_lora(self.pointer, adapters, count, scales) != 0:
            raise BackendError("llama.cpp could not set the adapter's strength: reload the model")
        self.forget()
        self.strength = strength

    def watch(self, cancellation: Cancellation | None) -> None:
        """Abort computations once `cancellation` is set; it must outlive them. None: never."""
        if cancellation is None:
            llama_cpp.llama_set_abort_callback(self.pointer, _NEVER_ABORT, None)
        else:
            llama_cpp.llama_set_abort_callback(self.pointer, _ABORT_IF_SET, ctypes.addressof(cancellation.buffer))

    def prefill(self, tokens: list[int]) -> NDArray[np.float32]:
        """Logits (V,) after the prompt `tokens`; reuses what the cache holds of it."""
        if self.prompt == tokens and self.prompt_logits is not None:
            self.cut(len(tokens))
            return self.prompt_logits
        common = next(
            (i for i, (a, b) in enumerate(zip(self.prompt, tokens, strict=False)) if a != b), min(len(self.prompt), len(tokens))
        )
        start = min(common, len(tokens) - 1) // BATCH_TOKENS * BATCH_TOKENS
        self.prompt, self.prompt_logits, self._walked = [], None, ()
        self.cut(start)
        for begin in range(start, len(tokens), BATCH_TOKENS):
            self.decode(tokens[begin : begin + BATCH_TOKENS], begin)
        self.prompt, self.prompt_logits = tokens, self.row(-1)
        return self.prompt_logits

    def logits(self, given: list[int], scored: list[int]) -> NDArray[np.float32]:
        """Logits (len(scored), V) that predict `scored` after `given`, from an empty cache."""
        self.forget()
        return np.concatenate([rows for _, rows in self._compute(given + scored[:-1], 0, len(given) - 1)])

    def walk(self, paths: Sequence[Path]) -> Iterator[tuple[Path, float]]:
        """For each of the sorted paths the log-probability of its scored tokens, summed, nats. What neighbours begin with, and
        the last path of the walk before, is computed once; the numbers are the same as if each were computed alone."""
        if not self._walked:
            self.forget()  # a stream's states came of other batches
        known: dict[int, NDArray[np.float32]] = {}  # position: logits (V,) that the next path needs, too
        for path, kept in zip(paths, [*shared_lengths(paths)[1:], 0], strict=True):
            shared = common_length(self._walked, path.tokens)
            start = next((i for i in range(path.first, shared) if i not in known), shared)
            start = min(start, max(len(path.tokens) - _LEAST_BATCH, 0))
            first = max(path.first, start)
            logps = [logps_of(known[i][None], path.scored[i - path.first :][:1]) for i in range(path.first, first)]
            self.cut(start)
            self._walked = path.tokens[:start]
            for position, rows in self._compute(list(path.tokens[start:]), start, first):
                logps.append(logps_of(rows, path.scored[position - path.first :][: len(rows)]))
                known |= {position + i: rows[i] for i in range(min(len(rows), kept - position))}
            self._walked = path.tokens
            known = {position: row for position, row in known.items() if position < kept}
            yield path, float(np.concatenate(logps).sum())

    def _compute(self, tokens: list[int], start: int, first_output: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Compute tokens that begin at position `start`; give the logits (n, V) from position `first_output` on, batch by batch:
        the position of the first, and the rows."""
        for begin, end in _batches(start, start + len(tokens), first_output):
            first = max(first_output, begin)
            self.decode(tokens[begin - start : end - start], begin, first_output=min(first, end - 1) - begin)
            if first < end:
                yield first, np.stack([self.row(i - begin) for i in range(first, end)])

    def decode(self, tokens: list[int], position: int, *, first_output: int | None = None) -> None:
        """Compute a batch at `position`; `row` then gives its logits.

        first_output   index of the first token whose logits are wanted; default: the last token alone
        """
        threads = self._threads_wanted()
        if threads != self._threads:
            llama_cpp.llama_set_n_threads(self.pointer, threads, threads)
            self._threads = threads
        count = len(tokens)
        batch = llama_cpp.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            outputs_from = count - 1 if first_output is None else first_output
            for i, token in enumerate(tokens):
                batch.token[i] = token
                batch.pos[i] = position + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = i >= outputs_from
            status = llama_cpp.llama_decode(self.pointer, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        if status == _ABORTED:
            raise AbortedError
        if status != 0:
            self.forget()
            raise BackendError(f"llama.cpp failed to compute a batch of {count} tokens (status {status}): reload the model")

    def row(self, index: int) -> NDArray[np.float32]:
        """A copy of the logits (V,) of the last batch's token `index`; -1: the last one that has any."""
        pointer = llama_cpp.llama_get_logits_ith(self.pointer, index)
        row: NDArray[np.float32] = np.ctypeslib.as_array(pointer, shape=(self._model.vocabulary_size,))
        return row.copy()


def logps_of(logits: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float64]:
    """Log-probabilities (T,), nats, of tokens (T), from the logits (T, V) that predict them."""
    largest = logits.max(axis=-1)
    # In single precision, which is ten times as fast and off by 1e-6.
    logsums = np.log(np.exp(logits - largest[:, None]).sum(axis=-1))
    chosen = logits[np.arange(len(tokens)), tokens]
    result: NDArray[np.float64] = chosen.astype(np.float64) - largest - logsums
    return result


def _batches(start: int, stop: int, first_output: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of the batches for the positions from `start` to `stop`: of as many as may be, never of one alone."""
    while start < stop:
        # A batch that gives logits gives a limited number of them.
        end = min(start + (BATCH_TOKENS if start + BATCH_TOKENS <= first_output else _OUTPUTS_MAX), stop)
        if stop - end == 1 and end - start > _LEAST_BATCH:
            end -= 1
        yield start, end
        start = end
