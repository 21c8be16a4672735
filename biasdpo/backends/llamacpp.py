"""llama.cpp on the CPU: one model, one context a side, the LoRA set on one of them.

Bound at llama.cpp's C interface, since `llama_cpp.Llama` holds one model per object (two sides would be two copies of the
weights) and turns mmap off where a LoRA is given.
"""

from __future__ import annotations

import codecs
import os
import threading
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import psutil
from numpy.typing import NDArray

from biasdpo.backends.base import (
    CANARY_COMPLETION,
    CANARY_PROMPT,
    Cancellation,
    ShownText,
    Turnstile,
    check_prompt_fits,
    check_scorable,
    missing_side,
    prove,
)
from biasdpo.backends.llamacpp_context import BATCH_TOKENS, AbortedError, Context
from biasdpo.backends.llamacpp_model import Model
from biasdpo.backends.llamacpp_sampling import build_chain, sample_from
from biasdpo.backends.prefixes import sort_paths
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
from biasdpo.template import PromptTemplate, Segment


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
        self,
        gguf: Path,
        template: PromptTemplate,
        context_length: int,
        threads: int | None,
        kv_cache: str,
        on_progress: Callable[[float, str], None],
    ) -> None:
        self.template = template
        self.threads = threads or _usable_cores()
        self.device = f"CPU, {self.threads} thread{'s' if self.threads > 1 else ''}"
        self.has_adapter = False
        self.turnstile = Turnstile()
        self._kv_cache = kv_cache
        self._contexts: dict[Side, Context] = {}
        self._streaming = 0  # sides at work
        self._count_lock = threading.Lock()
        self._model = Model(gguf, on_progress)
        self.context_length = min(context_length, self._model.context_length)
        try:
            self._contexts["base"] = self._new_context(self.context_length)
        except BaseException:
            self.close()
            raise

    # Opening and closing

    def _new_context(self, length: int) -> Context:
        return Context(self._model, length, self._kv_cache, self._threads_of_a_side)

    def add_adapter(self, lora: Path) -> None:
        """Load a LoRA GGUF and open the tuned side's context. AdapterError where llama.cpp refuses the file."""
        self._model.load_adapter(lora)
        self._contexts["tuned"] = self._new_context(self.context_length)
        self.has_adapter = True

    def canary_logits_of_bare_model(self) -> NDArray[np.float32]:
        """Canary logits (T, V) from a context that never shares a moment with an adapter: call it before one is loaded."""
        context = self._new_context(BATCH_TOKENS)
        try:
            return context.logits(*self._canary())
        finally:
            context.close()

    def prove(self, bare: NDArray[np.float32]) -> Proof:
        """Compare both sides as they will be served with the bare model (see `backends.base.prove`)."""
        base = self.canary_logits("base")
        tuned = self.canary_logits("tuned") if self.has_adapter else None
        return prove(bare, base, self.canary_logits("base"), tuned)

    def canary_logits(self, side: Side, strength: float = 1.0) -> NDArray[np.float32]:
        """Logits (T, V) of one side on the canary's completion, computed afresh."""
        return self.logits(LikelihoodRequest(CANARY_PROMPT, CANARY_COMPLETION), side, strength=strength)

    def close(self) -> None:
        """Free contexts, adapter and weights, once streams under way have ended."""
        for context in self._contexts.values():
            context.lock.acquire()
        for context in self._contexts.values():
            context.close()
        contexts, self._contexts = self._contexts, {}
        self._model.close()
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
        template: PromptTemplate | None = None,
        cancellation: Cancellation | None = None,
    ) -> Generator[str, None, FinishReason]:
        """See `backends.base.Backend.stream`."""
        cancellation = cancellation or Cancellation()
        template = template or self.template
        context = self._context(side)
        tokens = self.tokenize(template.render(prompt, system))
        check_prompt_fits(tokens, self.context_length)
        with context.lock:
            if context is not self._contexts.get(side):
                raise missing_side(side, closed=True)
            _set_strength(context, side, strength)
            sampler = self._build_sampler(sampling)
            context.watch(cancellation)
            self._count(+1)
            try:
                for token in tokens:
                    llama_cpp.llama_sampler_accept(sampler, token)
                text = ShownText(template)
                return (yield from self._generate(context, tokens, text, sampling.max_new_tokens, sampler, cancellation))
            except AbortedError:
                context.forget()  # the batch was left half done
                return "cancelled"
            finally:
                self._count(-1)
                context.watch(None)
                llama_cpp.llama_sampler_free(sampler)

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
            ended = self._model.ends_text(token)
            last = count == max_new_tokens or position == self.context_length
            piece = decoder.decode(b"" if ended else self._model.piece(token), final=ended or last)
            shown, stopped = text.add(piece, final=ended or last)
            yield shown
            if ended or stopped:
                return "end_of_text"
            if last:
                return "limit"
            context.decode([token], position)
            position += 1
        raise AssertionError("unreachable: the last token returns")

    def _build_sampler(self, sampling: Sampling) -> Any:
        return build_chain(sampling, self._model.vocabulary_size, self.context_length)

    def _next_token(self, sampler: Any, context: Context, stored: NDArray[np.float32] | None) -> int:
        """Draw from the logits (V,) that were stored, else from those of the context's last batch."""
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

    def logits(self, request: Request, side: Side, *, strength: float = 1.0) -> NDArray[np.float32]:
        """Logits (T, V) that predict each of the request's T scored tokens, computed afresh."""
        context = self._context(side)
        with context.lock:
            _set_strength(context, side, strength)
            return context.logits(*self._request_tokens(request))

    def _request_tokens(self, request: Request) -> tuple[list[int], list[int]]:
        """(given tokens, scored tokens) of a request."""
        if isinstance(request, TextRequest):
            tokens = self.tokenize((Segment(request.text, special=False),))
            given, scored = tokens[:1], tokens[1:]
        elif isinstance(request, ContinuationRequest):
            given, scored = self._model.tokenize_continuation(request.context, request.continuation)
        else:
            given = self.tokenize(self.template.render(request.prompt, request.system))
            continuation = Segment(self.template.completed(request.continuation), special=False)
            scored = self.tokenize((continuation,), begin=False)
            if request.end_of_text:
                scored.append(self._model.end_of_text)
        check_scorable(given, scored, self.context_length)
        return given, scored

    def _canary(self) -> tuple[list[int], list[int]]:
        return self._request_tokens(LikelihoodRequest(CANARY_PROMPT, CANARY_COMPLETION))

    def tokenize(self, segments: Sequence[Segment], *, begin: bool = True) -> list[int]:
        """Token ids of a rendered prompt. Special tokens are parsed in special segments alone."""
        return self._model.tokenize(segments, begin=begin)

    @property
    def end_of_text(self) -> int:
        """The token that ends a scored completion."""
        return self._model.end_of_text

    # Sides and threads

    def _context(self, side: Side) -> Context:
        if side not in self._contexts:
            raise missing_side(side, closed=not self._contexts)
        return self._contexts[side]

    def _count(self, change: int) -> None:
        with self._count_lock:
            self._streaming += change

    def _threads_of_a_side(self) -> int:
        """Half the threads for each of two sides at work, all for one alone. Two half teams wait at no common barrier."""
        return max(1, self.threads // 2) if self._streaming > 1 else self.threads


def _set_strength(context: Context, side: Side, strength: float) -> None:
    """The base side has no adapter, whatever the strength."""
    if side == "tuned":
        context.set_strength(strength)
    else:
        check_strength(strength)


def _usable_cores() -> int:
    """Physical cores, less those that the process is kept from (taskset, containers): more threads than that wait in turn."""
    physical = psutil.cpu_count(logical=False) or 1
    return min(physical, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else physical
