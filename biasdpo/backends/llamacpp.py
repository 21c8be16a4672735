"""llama.cpp on the CPU: one model, one context a side, the LoRA set on one of them.

Bound at llama.cpp's C interface, since `llama_cpp.Llama` holds one model per object (two sides would be two copies of the
weights) and turns mmap off where a LoRA is given.

What makes a side's text equal a bare context's, whatever came before:
- A context's KV cache is reused only where the same computation would be done again: the very same prompt (with its stored
  logits), or a common beginning of whole physical batches. Anything else would split the prompt differently, and the
  float sums with it.
- Strength belongs to the key of that reuse: cached states of another strength are dropped.
"""

from __future__ import annotations

import codecs
import ctypes
import os
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import psutil
from numpy.typing import NDArray

from biasdpo.backends.base import CANARY_COMPLETION, CANARY_PROMPT, Cancellation, Turnstile, log_softmax, prove, split_at_stop
from biasdpo.errors import AdapterError, BackendError, ModelError, PromptError
from biasdpo.modelfile import check_gguf_complete
from biasdpo.records import FinishReason, Likelihood, LikelihoodRequest, Proof, Sampling, Side, TextRequest, check_strength
from biasdpo.template import PromptTemplate, Segment

_BATCH_TOKENS = 512  # physical batch, llama.cpp's own default: the prompt is split as bare llama.cpp splits it
_OUTPUTS_MAX = 128  # rows of logits a batch may give; keeps the compute buffer at 128 x vocabulary floats
_ABORTED = 2  # llama_decode's status after its abort callback said so

# llama.cpp asks a C callback, once a graph node, whether to abort. A Python callback would take the interpreter's lock a
# thousand times a token. strlen of the cancellation's buffer is a native function of the right shape: 0 (go on) or 1.
_ABORT_IF_SET = ctypes.cast(ctypes.CDLL(None).strlen, llama_cpp.ggml_abort_callback)
_NEVER_ABORT = llama_cpp.ggml_abort_callback()  # a null pointer

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


class _AbortedError(Exception):
    """The cancellation was set while a batch was computed."""


@dataclass
class _Context:
    """One side's llama_context and what its KV cache holds: the `prompt` tokens, computed at `strength`."""

    pointer: Any
    strength: float = 0.0
    prompt: list[int] = field(default_factory=list)
    prompt_logits: NDArray[np.float32] | None = None  # (V,) after the last prompt token
    lock: threading.Lock = field(default_factory=threading.Lock)  # one stream at a time
    threads: int = 0

    @property
    def memory(self) -> Any:
        return llama_cpp.llama_get_memory(self.pointer)

    def forget(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, True)
        self.prompt, self.prompt_logits = [], None


def open_llamacpp(
    gguf: Path,
    template: PromptTemplate,
    lora: Path | None,
    context_length: int,
    *,
    threads: int | None = None,
    kv_cache: str = "f16",
    on_progress: Any = lambda _share, _what: None,
) -> LlamaCppBackend:
    """Load a GGUF and, where given, a LoRA GGUF made for it; prove the two sides (ProofError) and return the engine.

    threads    for both sides together; default: the physical cores that this process may use
    kv_cache   "f16" (llama.cpp's default) or "f32" (for equality proofs)
    """
    backend = LlamaCppBackend(gguf, template, context_length, threads, kv_cache, on_progress)
    try:
        on_progress(0.8, "proving the comparison")
        bare = backend.canary_logits_of_bare_model()
        if lora is not None:
            backend.add_adapter(lora)
        backend.proof = backend.prove(bare)
    except BaseException:
        backend.close()
        raise
    on_progress(1.0, "ready")
    return backend


class LlamaCppBackend:
    """See `backends.base.Backend`. Made by `open_llamacpp`."""

    name = "llamacpp"
    proof: Proof

    def __init__(
        self, gguf: Path, template: PromptTemplate, context_length: int, threads: int | None, kv_cache: str, on_progress: Any
    ) -> None:
        check_gguf_complete(gguf)
        self.template = template
        self.threads = threads or _usable_cores()
        self.device = f"CPU, {self.threads} thread{'s' if self.threads > 1 else ''}"
        self.has_adapter = False
        self.turnstile = Turnstile()
        self._kv_type = {"f16": 1, "f32": 0}[kv_cache]  # ggml_type
        self._adapter: Any = None
        self._contexts: dict[Side, _Context] = {}
        self._streaming = 0  # sides at work; a side alone may use all threads
        self._count_lock = threading.Lock()
        self._model = _load_model(gguf, on_progress)
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocabulary_size = llama_cpp.llama_vocab_n_tokens(self._vocabulary)
        self.context_length = min(context_length, llama_cpp.llama_model_n_ctx_train(self._model))
        try:
            self._contexts["base"] = self._new_context(self.context_length)
        except BaseException:
            self.close()
            raise

    # Opening and closing

    def _new_context(self, length: int) -> _Context:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = length
        params.n_batch = params.n_ubatch = min(_BATCH_TOKENS, length)
        params.n_outputs_max = min(_OUTPUTS_MAX, length)
        params.n_threads = params.n_threads_batch = self.threads
        params.type_k = params.type_v = self._kv_type
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # as bare llama-cpp-python
        params.no_perf = True
        pointer = llama_cpp.llama_init_from_model(self._model, params)
        if not pointer:
            raise BackendError(f"No memory for a context of {length:,} tokens: close other programs or choose a smaller model")
        return _Context(pointer, threads=self.threads)

    def add_adapter(self, lora: Path) -> None:
        """Load a LoRA GGUF and open the tuned side's context. AdapterError where llama.cpp refuses the file."""
        adapter = llama_cpp.llama_adapter_lora_init(self._model, str(lora).encode())
        if not adapter:  # a failed init gives a null pointer object: falsy, yet not None
            raise AdapterError(
                f"llama.cpp refused the adapter {lora}: it is damaged or made for another base model; build it again"
            )
        self._adapter = adapter
        self._contexts["tuned"] = self._new_context(self.context_length)
        self.has_adapter = True

    def canary_logits_of_bare_model(self) -> NDArray[np.float32]:
        """Canary logits (T, V) from a context that never shares a moment with an adapter: call it before one is loaded."""
        context = self._new_context(_BATCH_TOKENS)
        try:
            return self._logits(context, *self._canary())
        finally:
            llama_cpp.llama_free(context.pointer)

    def prove(self, bare: NDArray[np.float32]) -> Proof:
        """Compare both sides as they will be served with the bare model (see `backends.base.prove`)."""
        base = self.canary_logits("base")
        tuned = self.canary_logits("tuned") if self.has_adapter else None
        return prove(bare, base, self.canary_logits("base"), tuned)

    def canary_logits(self, side: Side, strength: float = 1.0) -> NDArray[np.float32]:
        """Logits (T, V) of one side on the canary's completion, computed afresh."""
        context = self._context(side)
        with context.lock:
            self._set_strength(context, side, strength)
            return self._logits(context, *self._canary())

    def close(self) -> None:
        """Free contexts, adapter and weights, once streams under way have ended."""
        for context in self._contexts.values():
            context.lock.acquire()
        for context in self._contexts.values():
            llama_cpp.llama_free(context.pointer)
        contexts, self._contexts = self._contexts, {}
        if self._model:
            llama_cpp.llama_model_free(self._model)  # frees its adapters too
            self._model = self._adapter = None
        for context in contexts.values():
            context.lock.release()

    # Streaming

    def stream(
        self,
        prompt: str,
        sampling: Sampling,
        side: Side,
        *,
        system: str = "",
        strength: float = 1.0,
        cancellation: Cancellation | None = None,
    ) -> Generator[str, None, FinishReason]:
        """See `backends.base.Backend.stream`."""
        cancellation = cancellation or Cancellation()
        context = self._context(side)
        tokens = self.tokenize(self.template.render(prompt, system))
        if len(tokens) >= self.context_length:
            raise PromptError(
                f"The prompt is {len(tokens):,} tokens long with its template, the context holds {self.context_length:,} and "
                "needs one to spare: shorten the prompt"
            )
        with context.lock:
            if context is not self._contexts.get(side):
                raise BackendError("The model was closed: choose it again")
            self._set_strength(context, side, strength)
            sampler = self._build_sampler(sampling)
            # The data pointer must outlive every decode: `cancellation` is held by this frame.
            llama_cpp.llama_set_abort_callback(context.pointer, _ABORT_IF_SET, ctypes.addressof(cancellation.buffer))
            self._count(+1)
            try:
                for token in tokens:
                    llama_cpp.llama_sampler_accept(sampler, token)
                return (yield from self._generate(context, tokens, sampling.max_new_tokens, sampler, cancellation))
            except _AbortedError:
                context.forget()  # the batch was left half done
                return "cancelled"
            finally:
                self._count(-1)
                llama_cpp.llama_set_abort_callback(context.pointer, _NEVER_ABORT, None)
                llama_cpp.llama_sampler_free(sampler)

    def _generate(
        self, context: _Context, tokens: list[int], max_new_tokens: int, sampler: Any, cancellation: Cancellation
    ) -> Generator[str, None, FinishReason]:
        logits = self._prefill(context, tokens)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        held = ""  # the beginning of what may become a stop string
        prefix = self.template.completion_prefix
        position = len(tokens)
        for count in range(1, max_new_tokens + 1):
            if cancellation.is_set():
                return "cancelled"
            token = self._sample(sampler, logits)
            ended = llama_cpp.llama_vocab_is_eog(self._vocabulary, token)
            last = count == max_new_tokens or position == self.context_length
            text = prefix_stripped = held + decoder.decode(b"" if ended else self._piece(token), final=ended or last)
            if prefix and len(text) >= len(prefix):
                prefix_stripped, prefix = text.removeprefix(prefix), ""
            shown, held, stopped = split_at_stop(prefix_stripped, self.template.stop)
            if prefix and not (ended or last):
                shown, held = "", text  # too short yet to know whether it begins with the prefix
            if ended or last:
                shown += held
            yield shown
            if ended or stopped:
                return "end_of_text"
            if last:
                return "limit"
            logits = self._decode(context, [token], position)
            position += 1
        raise AssertionError("unreachable: the last token returns")

    def _prefill(self, context: _Context, tokens: list[int]) -> NDArray[np.float32]:
        """Logits (V,) after the prompt; reuses what the cache holds of it."""
        if context.prompt == tokens and context.prompt_logits is not None:
            llama_cpp.llama_memory_seq_rm(context.memory, 0, len(tokens), -1)
            return context.prompt_logits
        common = next(
            (i for i, (a, b) in enumerate(zip(context.prompt, tokens, strict=False)) if a != b),
            min(len(context.prompt), len(tokens)),
        )
        start = min(common, len(tokens) - 1) // _BATCH_TOKENS * _BATCH_TOKENS
        context.prompt, context.prompt_logits = [], None
        llama_cpp.llama_memory_seq_rm(context.memory, 0, start, -1)
        for begin in range(start, len(tokens), _BATCH_TOKENS):
            logits = self._decode(context, tokens[begin : begin + _BATCH_TOKENS], begin)
        context.prompt, context.prompt_logits = tokens, logits.copy()
        return context.prompt_logits

    def _build_sampler(self, sampling: Sampling) -> Any:
        """llama.cpp's own samplers, in the order that `records.Sampling` states."""
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())

        def add(sampler: Any) -> None:
            llama_cpp.llama_sampler_chain_add(chain, sampler)

        if sampling.repetition_penalty != 1.0:
            add(
                llama_cpp.llama_sampler_init_penalties(
                    self._vocabulary_size, self.context_length, sampling.repetition_penalty, 0.0, 0.0
                )
            )
        if sampling.temperature == 0.0:
            add(llama_cpp.llama_sampler_init_greedy())
            return chain
        add(llama_cpp.llama_sampler_init_temp(sampling.temperature))
        if sampling.top_k > 0:
            add(llama_cpp.llama_sampler_init_top_k(sampling.top_k))
        if sampling.top_p < 1.0:
            add(llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1))
        add(llama_cpp.llama_sampler_init_dist(sampling.seed))
        return chain

    def _sample(self, sampler: Any, logits: NDArray[np.float32]) -> int:
        candidates = np.zeros(self._vocabulary_size, dtype=_CANDIDATE)
        candidates["id"] = np.arange(self._vocabulary_size, dtype=np.int32)
        candidates["logit"] = logits
        array = llama_cpp.llama_token_data_array(
            data=candidates.ctypes.data_as(llama_cpp.llama_token_data_p), size=len(candidates), selected=-1, sorted=False
        )
        llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
        token = int(array.data[array.selected].id)
        llama_cpp.llama_sampler_accept(sampler, token)
        return token

    # Likelihood

    def loglikelihood(
        self, requests: Sequence[LikelihoodRequest | TextRequest], side: Side, *, strength: float = 1.0
    ) -> list[Likelihood]:
        """See `backends.base.Backend.loglikelihood`."""
        context = self._context(side)
        results = []
        with context.lock:
            self._set_strength(context, side, strength)
            for request in requests:
                given, scored = self._request_tokens(request)
                logps = log_softmax(self._logits(context, given, scored))
                results.append(Likelihood(float(logps[np.arange(len(scored)), scored].sum()), len(scored)))
        return results

    def _request_tokens(self, request: LikelihoodRequest | TextRequest) -> tuple[list[int], list[int]]:
        """(given tokens, scored tokens) of a request."""
        if isinstance(request, TextRequest):
            tokens = self.tokenize((Segment(request.text, special=False),))
            given, scored = tokens[:1], tokens[1:]
        else:
            given = self.tokenize(self.template.render(request.prompt, request.system))
            continuation = self.template.completion_prefix + request.continuation
            scored = self.tokenize((Segment(continuation, special=False),), begin=False)
            if request.end_of_text:
                scored.append(llama_cpp.llama_vocab_eos(self._vocabulary))
        if not given or not scored:
            raise PromptError("Nothing to score: a text needs two tokens, a continuation one; leave such items out")
        if len(given) + len(scored) > self.context_length:
            raise PromptError(
                f"A text of {len(given) + len(scored):,} tokens does not fit the context of {self.context_length:,}: shorten it"
            )
        return given, scored

    def _canary(self) -> tuple[list[int], list[int]]:
        return self._request_tokens(LikelihoodRequest(CANARY_PROMPT, CANARY_COMPLETION))

    def _logits(self, context: _Context, given: list[int], scored: list[int]) -> NDArray[np.float32]:
        """Logits (len(scored), V) that predict `scored` after `given`, from an empty cache."""
        context.forget()
        tokens = given + scored[:-1]
        rows = []
        for begin in range(0, len(tokens), _OUTPUTS_MAX):
            batch = tokens[begin : begin + _OUTPUTS_MAX]
            first_output = max(len(given) - 1 - begin, 0)
            self._decode(context, batch, begin, first_output=min(first_output, len(batch) - 1))
            rows += [self._row(context, i) for i in range(first_output, len(batch))]
        return np.stack(rows)

    # llama.cpp, call by call

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

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        length = llama_cpp.llama_token_to_piece(self._vocabulary, token, buffer, len(buffer), 0, False)
        return buffer.raw[: max(length, 0)]

    def _decode(
        self, context: _Context, tokens: list[int], position: int, *, first_output: int | None = None
    ) -> NDArray[np.float32]:
        """Compute a batch at `position`; return a view of the last token's logits (V,), valid until the next decode.

        first_output   index of the first token whose logits are wanted; default: the last token alone
        """
        self._share_threads(context)
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
            status = llama_cpp.llama_decode(context.pointer, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        if status == _ABORTED:
            raise _AbortedError
        if status != 0:
            context.forget()
            raise BackendError(f"llama.cpp failed to compute a batch of {count} tokens (status {status}): reload the model")
        return self._row(context, count - 1, copy=False)

    def _row(self, context: _Context, index: int, *, copy: bool = True) -> NDArray[np.float32]:
        pointer = llama_cpp.llama_get_logits_ith(context.pointer, index)
        row: NDArray[np.float32] = np.ctypeslib.as_array(pointer, shape=(self._vocabulary_size,))
        return row.copy() if copy else row

    def _context(self, side: Side) -> _Context:
        if not self._contexts:
            raise BackendError("The model was closed: choose it again")
        if side not in self._contexts:
            raise BackendError("There is no tuned side: the model was opened without an adapter; choose one")
        return self._contexts[side]

    def _set_strength(self, context: _Context, side: Side, strength: float) -> None:
        """Set the LoRA's scale on the tuned side. A change drops the cache, which holds states of the old strength."""
        check_strength(strength)
        if side == "base" or context.strength == strength:
            return
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self._adapter)
        scales = (ctypes.c_float * 1)(strength)
        count = 0 if strength == 0.0 else 1
        if llama_cpp.llama_set_adapters_lora(context.pointer, adapters, count, scales) != 0:
            raise BackendError("llama.cpp could not set the adapter's strength: reload the model")
        context.forget()
        context.strength = strength

    def _count(self, change: int) -> None:
        with self._count_lock:
            self._streaming += change

    def _share_threads(self, context: _Context) -> None:
        """Half the threads for each of two sides at work, all for one alone. Two half teams wait at no common barrier."""
        threads = max(1, self.threads // 2) if self._streaming > 1 else self.threads
        if context.threads != threads:
            llama_cpp.llama_set_n_threads(context.pointer, threads, threads)
            context.threads = threads


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _log(_level: int, _text: bytes, _data: Any) -> None:
    """llama.cpp's own log is not for our users: every failure is raised with a line of ours."""


def _usable_cores() -> int:
    """Physical cores, less those that the process is kept from (taskset, containers): more threads than that wait in turn."""
    physical = psutil.cpu_count(logical=False) or 1
    return min(physical, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else physical


def _cpu_has_amx() -> bool:
    """Whether llama.cpp would choose its AMX kernels, which crash where GCC older than 12.4 or 13.3 built them.

    There `_tile_loadconfig` loses all but eight bytes of its argument (GCC bug 114098), so `ldtilecfg` faults. pip builds
    llama.cpp with whatever compiler is there (Debian 12: GCC 12.2), so the repacked weights that lead to AMX are left alone.
    """
    try:
        return " amx_tile" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False


def _load_model(gguf: Path, on_progress: Any) -> Any:
    llama_cpp.llama_log_set(_log, None)
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
    if _cpu_has_amx():
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
