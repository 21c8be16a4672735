"""The llama.cpp backend, on the CPU: one model, one context per side, the LoRA set on one of them.

Bound to llama.cpp's C interface: `llama_cpp.Llama` holds one model per object (two sides would be two copies of the weights) and
turns mmap off if a LoRA is given."""

from __future__ import annotations

import codecs
import ctypes
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import psutil
from numpy.typing import NDArray

from biasdpo.backends.base import (
    CANARY,
    SEQUENCES,
    Cancellation,
    ShownText,
    VisitorQueue,
    check_prompt_fits,
    check_scorable,
    cut_to_context,
    missing_side,
    prove,
)
from biasdpo.backends.prefixes import TokenPath, common_length, shared_lengths, sort_paths
from biasdpo.chat import PromptTemplate, Segment, Turn, encode_jointly, quotes_special
from biasdpo.errors import AdapterError, BackendError, ModelError, PromptError
from biasdpo.model_files import read_header, special_tokens
from biasdpo.records import (
    ContinuationRequest,
    FinishReason,
    Likelihood,
    LikelihoodRequest,
    Proof,
    Request,
    Sampling,
    Side,
    TextRequest,
    check_strength,
)

BATCH_TOKENS = 512  # physical batch, llama.cpp's own default: prompts are split as bare llama.cpp splits them
_TOGETHER_TOKENS = 4096  # in the KV cache of completions that are decoded together: 1.3 GB for Phi-2
_OUTPUTS_MAX = 128  # rows of logits per batch; limits the output buffer to 128 x vocabulary floats
# llama.cpp computes a batch of one token with other kernels, whose numbers differ (SmolLM2, Q4_1: 0.4 nats for a short answer).
# Any other division into batches gives the same logits to the last bit.
_LEAST_BATCH = 2
_ABORTED = 2  # llama_decode's status after its abort callback returned true
_KV_TYPES = {"f16": 1, "f32": 0}  # ggml_type

# llama.cpp calls a C callback before every graph node to ask whether to abort. A Python callback would take the interpreter's
# lock a thousand times a token. strlen of the cancellation's buffer is a native function of the right shape: 0 (continue) or 1.
_ABORT_IF_SET = ctypes.cast(ctypes.CDLL(None).strlen, llama_cpp.ggml_abort_callback)
_NEVER_ABORT = llama_cpp.ggml_abort_callback()  # a null pointer


def open_llamacpp(
    gguf: Path,
    template: PromptTemplate,
    lora: Path | None,
    context_length: int,
    *,
    threads: int | None = None,
    kv_cache: str = "f16",
    on_progress: Callable[[float, str], None] = lambda _share, _what: None,
) -> LlamaCppBackend:
    """Load a GGUF and optionally a LoRA GGUF made for it, and prove the two sides (ProofError).

    threads    for both sides together; default: the physical cores available to this process
    kv_cache   "f16" (llama.cpp's default) or "f32" (for equality proofs)
    """
    backend = LlamaCppBackend(Model(gguf, on_progress), template, context_length, threads, kv_cache)
    try:
        backend.open_side("base")
        on_progress(0.8, "proving the comparison")
        bare = backend.canary_logits_of_bare_model()
        if lora is not None:
            backend._model.load_adapter(lora)
            backend.open_side("tuned")
        backend.proof = backend.prove(bare)
    except BaseException:
        backend.close()
        raise
    on_progress(1.0, "ready")
    return backend


class LlamaCppBackend:
    """See `backends.base.Backend`. Created by `open_llamacpp`."""

    name = "llamacpp"
    proof: Proof

    def __init__(
        self, model: Model, template: PromptTemplate, context_length: int, threads: int | None = None, kv_cache: str = "f16"
    ) -> None:
        self.template = template
        self.threads = threads or _usable_cores()
        self.device = f"CPU, {self.threads} thread{'s' if self.threads > 1 else ''}"
        self.context_length = min(context_length, model.context_length)
        self.has_adapter = False
        self.queue = VisitorQueue()
        self.tokenize = model.tokenize
        self.end_of_completion = model.end_of_completion(template)
        self._model = model
        self._kv_cache = kv_cache
        self._contexts: dict[Side, Context] = {}
        self._streaming = 0  # running streams
        self._count_lock = threading.Lock()

    def open_side(self, side: Side) -> None:
        """Open a side's context; the tuned side's after `Model.load_adapter`."""
        self._contexts[side] = self._new_context(self.context_length)
        self.has_adapter = self._model.adapter is not None

    def _new_context(self, length: int) -> Context:
        return Context(self._model, length, self._kv_cache, self._threads_of_a_side)

    def canary_logits_of_bare_model(self) -> NDArray[np.float32]:
        """Canary logits (T, V) from a separate context; call it before an adapter is loaded."""
        context = self._new_context(BATCH_TOKENS)
        try:
            return context.logits(*self._request_tokens(CANARY, cut=True))
        finally:
            context.close()

    def prove(self, bare: NDArray[np.float32]) -> Proof:
        """Compare both sides as they are served with the bare model (see `backends.base.prove`)."""
        base = self.canary_logits("base")
        tuned = self.canary_logits("tuned") if self.has_adapter else None
        return prove(bare, base, self.canary_logits("base"), tuned)

    def canary_logits(self, side: Side, strength: float = 1.0) -> NDArray[np.float32]:
        """Logits (T, V) of one side on the canary's completion, from an empty cache."""
        return self.logits(CANARY, side, strength=strength, cut=True)

    def close(self) -> None:
        """Free contexts, adapter and weights, after running streams."""
        with ExitStack() as locks:
            for context in self._contexts.values():
                locks.enter_context(context.lock)
            for context in self._contexts.values():
                context.close()
            self._contexts = {}
            self._model.close()

    # Streaming

    def stream(
        self,
        prompt: str,
        sampling: Sampling,
        side: Side,
        *,
        system: str = "",
        history: Sequence[Turn] = (),
        strength: float = 1.0,
        template: PromptTemplate | None = None,
        cancellation: Cancellation | None = None,
    ) -> Generator[str, None, FinishReason]:
        """See `backends.base.Backend.stream`."""
        cancellation = cancellation or Cancellation()
        template = template or self.template
        context = self._context(side)
        tokens = self.prompt_tokens(prompt, system, history, template)
        check_prompt_fits(tokens, self.context_length)
        with context.lock:
            if context is not self._contexts.get(side):
                raise missing_side(side, closed=True)
            _set_strength(context, side, strength)
            sampler = build_chain(sampling, self._model.vocabulary_size, self.context_length)
            context.watch(cancellation)
            self._count(+1)
            try:
                for token in tokens:
                    llama_cpp.llama_sampler_accept(sampler, token)
                text = ShownText(template)
                return (yield from self._generate(context, tokens, text, sampling.max_new_tokens, sampler, cancellation))
            except AbortedError:
                context.forget()  # the batch is incomplete
                return "cancelled"
            finally:
                self._count(-1)
                context.watch(None)
                llama_cpp.llama_sampler_free(sampler)

    def complete_many(
        self,
        prompts: Sequence[tuple[str, str]],
        max_new_tokens: int,
        side: Side,
        *,
        strength: float = 1.0,
        cancellation: Cancellation | None = None,
    ) -> list[tuple[str, FinishReason]]:
        """See `backends.base.Backend.complete_many`."""
        cancellation = cancellation or Cancellation()
        with self._context(side).lock:
            if side not in self._contexts:
                raise missing_side(side, closed=True)
            tokens = [self.prompt_tokens(prompt, system) for prompt, system in prompts]
            for one in tokens:
                check_prompt_fits(one, self.context_length)
            done: list[tuple[str, FinishReason]] = []
            while batch := tokens[len(done) :][: self._together(tokens[len(done) :], max_new_tokens)]:
                done += self._complete_together(batch, max_new_tokens, side, strength, cancellation)
            return done

    def _room(self, prompts: Sequence[list[int]], max_new_tokens: int) -> int:
        """Tokens of a sequence that holds any of these prompts with its completion."""
        return min(max(map(len, prompts)) + max_new_tokens, self.context_length)

    def _together(self, prompts: Sequence[list[int]], max_new_tokens: int) -> int:
        """How many of the first prompts fit a context of their own."""
        counts = range(2, min(len(prompts), SEQUENCES) + 1)
        return max((n for n in counts if n * self._room(prompts[:n], max_new_tokens) <= _TOGETHER_TOKENS), default=1)

    def _complete_together(
        self, prompts: list[list[int]], max_new_tokens: int, side: Side, strength: float, cancellation: Cancellation
    ) -> list[tuple[str, FinishReason]]:
        """At most SEQUENCES completions, in a context of their own."""
        room = self._room(prompts, max_new_tokens)
        context = Context(self._model, room * len(prompts), self._kv_cache, self._threads_of_a_side, len(prompts))
        greedy = build_chain(Sampling(temperature=0.0, repetition_penalty=1.0), self._model.vocabulary_size, room)
        rows = [_Row(ShownText(self.template)) for _ in prompts]
        try:
            _set_strength(context, side, strength)
            context.watch(cancellation)
            waiting = [
                (token, position, i, position == len(prompt) - 1)
                for i, prompt in enumerate(prompts)
                for position, token in enumerate(prompt)
            ]
            while waiting:
                now, waiting = waiting[:BATCH_TOKENS], waiting[BATCH_TOKENS:]
                context.decode_rows(now)
                for index, (_token, position, i, output) in enumerate(now):
                    if not output:
                        continue
                    token = int(llama_cpp.llama_sampler_sample(greedy, context.pointer, index))
                    row = rows[i]
                    row.tokens += 1
                    last = row.tokens == max_new_tokens or position + 1 == room
                    ended = token == self.end_of_completion or self._model.ends_text(token)
                    if not row.add(b"" if ended else self._model.piece(token), ended=ended, last=last):
                        waiting.append((token, position + 1, i, True))
        except AbortedError:
            pass
        finally:
            llama_cpp.llama_sampler_free(greedy)
            context.close()
        return [(row.text, row.reason) for row in rows]

    def prompt_tokens(
        self, prompt: str, system: str = "", history: Sequence[Turn] = (), template: PromptTemplate | None = None
    ) -> list[int]:
        """See `backends.base.Backend.prompt_tokens`."""
        template = template or self.template
        return self.tokenize(template.render(prompt, system, history), begin=not template.writes_begin)

    def _generate(
        self, context: Context, tokens: list[int], text: ShownText, max_new_tokens: int, sampler: Any, cancellation: Cancellation
    ) -> Generator[str, None, FinishReason]:
        prompt_logits: NDArray[np.float32] | None = context.prefill(tokens)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        position = len(tokens)
        for count in range(1, max_new_tokens + 1):
            if cancellation.is_set():
                return "cancelled"
            token = self._next_token(sampler, context, prompt_logits)
            prompt_logits = None
            ended = token == self.end_of_completion or self._model.ends_text(token)
            last = count == max_new_tokens or position == self.context_length
            piece = decoder.decode(b"" if ended else self._model.piece(token), final=ended or last)
            shown, stopped = text.add(piece, final=ended or last)
            yield shown
            if ended or stopped:
                return "end_of_text"
            if last:
                break
            context.decode([token], position)
            position += 1
        return "limit"

    def _next_token(self, sampler: Any, context: Context, stored: NDArray[np.float32] | None) -> int:
        """Sample from the stored logits (V,), else from those of the context's last batch."""
        if stored is not None:
            return sample_from(sampler, stored)
        return int(llama_cpp.llama_sampler_sample(sampler, context.pointer, -1))

    # Likelihood

    def loglikelihood(self, requests: Sequence[Request], side: Side, *, strength: float = 1.0) -> list[Likelihood]:
        """See `backends.base.Backend.loglikelihood`."""
        context = self._context(side)
        pairs = [self._request_tokens(request) for request in requests]
        logps = [0.0] * len(pairs)
        with context.lock:
            _set_strength(context, side, strength)
            for path, logp in context.walk(sort_paths(pairs)):
                logps[path.index] = logp
        return [Likelihood(logp, len(scored)) for logp, (_, scored) in zip(logps, pairs, strict=True)]

    def logits(self, request: Request, side: Side, *, strength: float = 1.0, cut: bool = False) -> NDArray[np.float32]:
        """Logits (T, V) that predict each of the request's T scored tokens, from an empty cache."""
        context = self._context(side)
        with context.lock:
            _set_strength(context, side, strength)
            return context.logits(*self._request_tokens(request, cut=cut))

    def token_text(self, token: int) -> str:
        """See `backends.base.Backend.token_text`."""
        return self._model.piece(token).decode("utf-8", "replace")

    def score_tokens(self, request: LikelihoodRequest, side: Side, *, strength: float = 1.0) -> list[tuple[str, float]]:
        """See `backends.base.Backend.score_tokens`."""
        _given, scored = self._request_tokens(request)
        logps = logps_of(self.logits(request, side, strength=strength), scored)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return [(decoder.decode(self._model.piece(token)), float(logp)) for token, logp in zip(scored, logps, strict=True)]

    def _request_tokens(self, request: Request, *, cut: bool = False) -> tuple[list[int], list[int]]:
        """(given, scored) token ids of a request, `cut` to the context or refused if they are too long for it."""
        if isinstance(request, TextRequest):
            tokens = self.tokenize((Segment(request.text, special=False),))
            given, scored = tokens[:1], tokens[1:]
        elif isinstance(request, ContinuationRequest):
            given, scored = self._model.tokenize_continuation(request.context, request.continuation)
        else:
            template = self.template
            given, scored = encode_jointly(
                partial(self.tokenize, begin=not template.writes_begin),
                template.render(request.prompt, request.system, request.history),
                template.completed(request.continuation),
            )
            if request.end_of_text:
                scored = [*scored, self.end_of_completion]
        if cut:
            given, scored = cut_to_context(given, scored, self.context_length)
        check_scorable(given, scored, self.context_length)
        return given, scored

    def _context(self, side: Side) -> Context:
        if side not in self._contexts:
            raise missing_side(side, closed=not self._contexts)
        return self._contexts[side]

    def _count(self, change: int) -> None:
        with self._count_lock:
            self._streaming += change

    def _threads_of_a_side(self) -> int:
        """Half the threads for each of two running sides, all for one alone. Two separate teams share no barrier."""
        return max(1, self.threads // 2) if self._streaming > 1 else self.threads


def _set_strength(context: Context, side: Side, strength: float) -> None:
    """Set the tuned side's strength; the base side has no adapter."""
    if side == "tuned":
        context.set_strength(strength)
    else:
        check_strength(strength)


def _usable_cores() -> int:
    """Physical cores available to this process (taskset, containers), at most OMP_NUM_THREADS, as torch has it: llama.cpp's
    threads wait for each other actively, so that more of them than free cores take many times as long."""
    physical = psutil.cpu_count(logical=False) or 1
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(physical, available, int(asked) if asked.isdecimal() and int(asked) else physical)


class _Row:
    """One completion of several that are decoded together."""

    def __init__(self, shown: ShownText) -> None:
        self.text = ""
        self.tokens = 0
        self.reason: FinishReason = "cancelled"
        self._shown = shown
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, piece: bytes, *, ended: bool, last: bool) -> bool:
        """Add a token's bytes; return whether the completion is finished."""
        text, stopped = self._shown.add(self._decoder.decode(piece, final=ended or last), final=ended or last)
        self.text += text
        if ended or stopped or last:
            self.reason = "end_of_text" if ended or stopped else "limit"
        return ended or stopped or last


# llama.cpp objects


class Model:
    """A llama_model: weights shared by every context, and the vocabulary. ModelError if llama.cpp can't load the file."""

    def __init__(self, gguf: Path, on_progress: Callable[[float, str], None]) -> None:
        header = read_header(gguf)
        self.pointer = _load(gguf, on_progress)
        self._vocabulary = llama_cpp.llama_model_get_vocab(self.pointer)
        self.vocabulary_size: int = llama_cpp.llama_vocab_n_tokens(self._vocabulary)
        self.context_length: int = llama_cpp.llama_model_n_ctx_train(self.pointer)  # tokens, as trained
        self.end_of_text: int = llama_cpp.llama_vocab_eos(self._vocabulary)
        self.special_tokens = special_tokens(header)
        self.adapter: Any = None

    def load_adapter(self, lora: Path) -> None:
        """Load a LoRA GGUF made for this model. AdapterError if llama.cpp refuses it."""
        self.adapter = llama_cpp.llama_adapter_lora_init(self.pointer, str(lora).encode())
        if not self.adapter:  # a null pointer object: falsy, but not None
            raise AdapterError(f"llama.cpp refused the adapter {lora}: it is damaged or made for another model; build it again")

    def close(self) -> None:
        """Free the weights and the adapter. Close every context first."""
        if self.pointer:
            llama_cpp.llama_model_free(self.pointer)  # frees its adapters too
            self.pointer = self.adapter = None

    def tokenize(self, segments: Sequence[Segment], *, begin: bool = True) -> list[int]:
        """Token ids of segments, as of one text (see `hf_loading.encode_segments`). `begin`: with BOS if the model adds it."""
        tokens: list[int] = []
        if begin and llama_cpp.llama_vocab_get_add_bos(self._vocabulary):
            tokens.append(llama_cpp.llama_vocab_bos(self._vocabulary))
        if not quotes_special(segments, self.special_tokens):
            segments = [Segment("".join(segment.text for segment in segments), special=True)]
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
        """(given, scored) token ids of a bare text (see `records.ContinuationRequest`)."""
        given = self.tokenize((Segment(context, special=False),))
        tokens = self.tokenize((Segment(context + continuation, special=False),))
        if not given:  # an empty context, and a model without BOS
            begin = llama_cpp.llama_vocab_bos(self._vocabulary)
            given = [self.end_of_text if begin < 0 else begin]
            tokens = given + tokens
        return tokens[: len(given)], tokens[len(given) :]

    def end_of_completion(self, template: PromptTemplate) -> int:
        """The token that ends a completion: the one that the template writes there, else end-of-text."""
        named = self.tokenize((Segment(template.end, special=True),), begin=False) if template.end else []
        return named[0] if len(named) == 1 else self.end_of_text

    def piece(self, token: int) -> bytes:
        """The UTF-8 bytes of a token, possibly part of a character; empty for special tokens."""
        buffer = ctypes.create_string_buffer(256)
        length = llama_cpp.llama_token_to_piece(self._vocabulary, token, buffer, len(buffer), 0, False)
        return buffer.raw[: max(length, 0)]

    def ends_text(self, token: int) -> bool:
        """Whether this token ends a text."""
        return bool(llama_cpp.llama_vocab_is_eog(self._vocabulary, token))


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _log(_level: int, _text: bytes, _data: Any) -> None:
    """Discard llama.cpp's log: every failure is raised as an error of ours."""


def _load(gguf: Path, on_progress: Callable[[float, str], None]) -> Any:
    llama_cpp.llama_log_set(_log, None)
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
    # One copy of the weights: llama.cpp would repack some quantizations (Q4_K, Q4_0, ...) into memory beside the mapped file.
    # Repacked weights also select its AMX kernels, which crash if built by GCC older than 12.4 or 13.3: `_tile_loadconfig`
    # loses all but eight bytes of its argument (GCC bug 114098).
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


class AbortedError(Exception):
    """The cancellation was set during a batch."""


class Context:
    """One side's llama_context of `length` tokens. Its KV cache holds the `prompt` tokens, computed at `strength`.

    threads   called before each batch for the number of threads
    """

    def __init__(self, model: Model, length: int, kv_cache: str, threads: Callable[[], int], sequences: int = 1) -> None:
        self.lock = threading.Lock()  # one stream at a time
        self.strength = 0.0
        self.prompt: list[int] = []
        self.prompt_logits: NDArray[np.float32] | None = None  # (V,) after the last prompt token
        self._walked: tuple[int, ...] = ()  # the path in the cache instead, if `walk` was the last to compute
        self._model = model
        self._threads_wanted = threads
        self._threads = threads()
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = length
        params.n_seq_max = sequences
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
        """Free the context; hold its lock."""
        llama_cpp.llama_free(self.pointer)

    def forget(self) -> None:
        """Empty the KV cache."""
        llama_cpp.llama_memory_clear(self._memory, True)
        self.prompt, self.prompt_logits, self._walked = [], None, ()

    def cut(self, length: int) -> None:
        """Drop the KV cache from position `length` on."""
        llama_cpp.llama_memory_seq_rm(self._memory, 0, length, -1)

    def set_strength(self, strength: float) -> None:
        """Set the scale of the model's adapter. A change empties the cache, which holds states of the old strength."""
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
        """Abort computations once `cancellation` is set, which must outlive them; None: never."""
        callback, data = (_NEVER_ABORT, None) if cancellation is None else (_ABORT_IF_SET, ctypes.addressof(cancellation.buffer))
        llama_cpp.llama_set_abort_callback(self.pointer, callback, data)

    def prefill(self, tokens: list[int]) -> NDArray[np.float32]:
        """Logits (V,) after the prompt `tokens`; reuses the cached part of it."""
        if self.prompt == tokens and self.prompt_logits is not None:
            self.cut(len(tokens))
            return self.prompt_logits
        start = min(common_length(self.prompt, tokens), len(tokens) - 1) // BATCH_TOKENS * BATCH_TOKENS
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

    def walk(self, paths: Sequence[TokenPath]) -> Iterator[tuple[TokenPath, float]]:
        """Yield each of the sorted paths with the summed log-probability of its scored tokens, nats. Common beginnings, also with
        the previous walk's last path, are computed once; the numbers equal those of each path computed alone."""
        if not self._walked:
            self.forget()  # a stream's states come from other batches
        known: dict[int, NDArray[np.float32]] = {}  # {position: logits (V,)} that the next path needs
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
        """Compute tokens from position `start` on; yield (position of the first row, logits (n, V)) from position `first_output`
        on, batch by batch."""
        for begin, end in _batches(start, start + len(tokens), first_output):
            first = max(first_output, begin)
            self.decode(tokens[begin - start : end - start], begin, first_output=min(first, end - 1) - begin)
            if first < end:
                yield first, np.stack([self.row(i - begin) for i in range(first, end)])

    def decode(self, tokens: list[int], position: int, *, first_output: int | None = None) -> None:
        """Compute a batch at `position`; `row` then returns its logits.

        first_output   index of the first token whose logits are needed; default: the last token
        """
        outputs_from = len(tokens) - 1 if first_output is None else first_output
        self.decode_rows([(token, position + i, 0, i >= outputs_from) for i, token in enumerate(tokens)])

    def decode_rows(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Compute a batch of (token, position, sequence, whether its logits are needed)."""
        threads = self._threads_wanted()
        if threads != self._threads:
            llama_cpp.llama_set_n_threads(self.pointer, threads, threads)
            self._threads = threads
        count = len(rows)
        batch = llama_cpp.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for i, (token, position, sequence, output) in enumerate(rows):
                batch.token[i] = token
                batch.pos[i] = position
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = sequence
                batch.logits[i] = output
            status = llama_cpp.llama_decode(self.pointer, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        if status == _ABORTED:
            raise AbortedError
        if status != 0:
            self.forget()
            raise BackendError(f"llama.cpp failed to compute a batch of {count} tokens (status {status}): reload the model")

    def row(self, index: int) -> NDArray[np.float32]:
        """A copy of the logits (V,) of the last batch's token `index`; -1: the last one with logits."""
        pointer = llama_cpp.llama_get_logits_ith(self.pointer, index)
        row: NDArray[np.float32] = np.ctypeslib.as_array(pointer, shape=(self._model.vocabulary_size,))
        return row.copy()


def logps_of(logits: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float64]:
    """Log-probabilities (T,), nats, of tokens (T), from the logits (T, V) that predict them."""
    largest = logits.max(axis=-1)
    # Single precision is ten times as fast, and off by 1e-6.
    logsums = np.log(np.exp(logits - largest[:, None]).sum(axis=-1))
    chosen = logits[np.arange(len(tokens)), tokens]
    result: NDArray[np.float64] = chosen.astype(np.float64) - largest - logsums
    return result


def _batches(start: int, stop: int, first_output: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of the batches from position `start` to `stop`: as large as possible, never a single token."""
    while start < stop:
        # A batch with outputs is limited in their number.
        end = min(start + (BATCH_TOKENS if start + BATCH_TOKENS <= first_output else _OUTPUTS_MAX), stop)
        if stop - end == 1 and end - start > _LEAST_BATCH:
            end -= 1
        yield start, end
        start = end


# Sampling

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


def build_chain(sampling: Sampling, vocabulary_size: int, context_length: int) -> Any:
    """A llama_sampler for one stream, in the order of `records.Sampling`; the caller frees it. The repetition penalty covers the
    whole context."""
    samplers = []
    if sampling.repetition_penalty != 1.0:
        penalties = (sampling.repetition_penalty, 0.0, 0.0)  # repetition, frequency, presence
        samplers.append(llama_cpp.llama_sampler_init_penalties(vocabulary_size, context_length, *penalties))
    if sampling.temperature == 0.0:
        samplers.append(llama_cpp.llama_sampler_init_greedy())
    else:
        samplers.append(llama_cpp.llama_sampler_init_temp(sampling.temperature))
        if sampling.top_k > 0:
            samplers.append(llama_cpp.llama_sampler_init_top_k(sampling.top_k))
        if sampling.top_p < 1.0:
            samplers.append(llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1))
        samplers.append(llama_cpp.llama_sampler_init_dist(sampling.seed))
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    for sampler in samplers:
        llama_cpp.llama_sampler_chain_add(chain, sampler)
    return chain


def sample_from(chain: Any, logits: NDArray[np.float32]) -> int:
    """Sample from stored logits (V,), as `llama_sampler_sample` does from a context's."""
    candidates = np.zeros(len(logits), dtype=_CANDIDATE)
    candidates["id"] = np.arange(len(logits), dtype=np.int32)
    candidates["logit"] = logits
    array = llama_cpp.llama_token_data_array(
        data=candidates.ctypes.data_as(llama_cpp.llama_token_data_p), size=len(candidates), selected=-1, sorted=False
    )
    llama_cpp.llama_sampler_apply(chain, ctypes.byref(array))
    token = int(array.data[array.selected].id)
    llama_cpp.llama_sampler_accept(chain, token)
    return token
