"""transformers: one model, one copy of the weights; the adapter is on only while a tuned step is computed.

Two sides stream at the same time from two threads, each with a KV cache of its own. They take turns at the model, one forward
step at a time under one lock: the adapter's switch and scale are global to the model, so they are set inside that lock, for
that step, and taken back before the lock is released. (PEFT's `disable_adapter()` beside a concurrent call gives wrong output.)
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from biasdpo.backends.base import (
    CANARY_COMPLETION,
    CANARY_PROMPT,
    Cancellation,
    Turnstile,
    check_prompt_fits,
    check_scorable,
    missing_side,
    prove,
)
from biasdpo.backends.hf_copy import begin_ids, encode_completion, encode_prompt, encode_text, load_tokenizer
from biasdpo.backends.hf_text import CompletionText
from biasdpo.errors import BackendError
from biasdpo.records import FinishReason, Likelihood, LikelihoodRequest, Proof, Sampling, Side, TextRequest, check_strength
from biasdpo.template import PromptTemplate

try:
    import torch
    from transformers import DynamicCache

    from biasdpo.backends.hf_adapter import Adapter, load_adapter
    from biasdpo.backends.hf_load import choose_device, device_for_people, end_tokens, foreign_errors, load_model
    from biasdpo.backends.hf_sampling import Draw
except ImportError as exc:
    raise BackendError(f"The transformers backend needs {exc.name}: `pip install -r requirements.txt`") from exc

_PREFILL_TOKENS = 256  # a prompt is computed in chunks of this many, which bounds the memory it takes
_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}  # padded tokens in one batch of loglikelihood

_LOGIT_ROWS = 256  # positions whose logits over the whole vocabulary are held at a time

_Taken = TypeVar("_Taken")


class _CancelledError(Exception):
    """The cancellation was set while a step was computed."""


class _Watch:
    """A hook on every decoder layer, so that a cancel is seen within one layer, however long the prompt's chunk takes."""

    cancellation: Cancellation | None = None

    def __call__(self, _module: Any, _args: Any) -> None:
        if self.cancellation is not None and self.cancellation.is_set():
            raise _CancelledError


def open_transformers(
    folder: Path,
    template: PromptTemplate,
    adapter_folder: Path | None,
    context_length: int,
    *,
    device: str = "auto",
    threads: int | None = None,
    on_progress: Callable[[float, str], None] | None = None,
) -> TransformersBackend:
    """Load a Hugging Face folder and, where given, a PEFT adapter; prove the two sides (ProofError) and return the engine.

    device    "auto" (the GPU if there is one, else the CPU), "cpu", "cuda", "cuda:1". Weights are bfloat16 on a GPU that
              knows it (else float16), float32 on a CPU
    threads   of the CPU, set for all of torch in this process; default: torch's own choice
    """
    report = on_progress or (lambda _share, _what: None)
    with foreign_errors():
        backend = TransformersBackend(folder, template, context_length, device, threads, report)
        try:
            report(0.7, "proving the comparison")
            bare = backend.canary_logits("base")
            if adapter_folder is not None:
                backend.add_adapter(adapter_folder)
            backend.proof = backend.prove(bare)
        except BaseException:
            backend.close()
            raise
    report(1.0, "ready")
    return backend


class TransformersBackend:
    """See `backends.base.Backend`. Made by `open_transformers`."""

    name = "transformers"
    proof: Proof

    def __init__(
        self,
        folder: Path,
        template: PromptTemplate,
        context_length: int,
        device: str,
        threads: int | None,
        report: Callable[[float, str], None],
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.template = template
        self.turnstile = Turnstile()
        self.has_adapter = False
        self._device = choose_device(device)
        self._adapter: Adapter | None = None
        self._lock = threading.Lock()  # around every computation with the model
        self._tokenizer_lock = threading.Lock()  # `tokenizers` forbids two threads in one tokenizer where a flag is set
        self._watch = _Watch()
        report(0.0, "reading the tokenizer")
        self._tokenizer = load_tokenizer(folder)
        report(0.1, "reading the weights")
        self._model: Any = load_model(folder, self._device)
        for layer in self._model.model.layers:
            layer.register_forward_pre_hook(self._watch)
        self.device = device_for_people(self._device)
        self.context_length = min(context_length, int(self._model.config.max_position_embeddings))
        self._ends = end_tokens(self._model, self._tokenizer, template)

    def add_adapter(self, folder: Path) -> None:
        """Load a PEFT adapter; AdapterError where it does not fit the model."""
        with self._lock:
            self._adapter = load_adapter(self._model, folder)
        self.has_adapter = True

    def prove(self, bare: NDArray[np.float32]) -> Proof:
        """Compare both sides as they will be served with the bare model (see `backends.base.prove`)."""
        base = self.canary_logits("base")
        tuned = self.canary_logits("tuned") if self.has_adapter else None
        return prove(bare, base, self.canary_logits("base"), tuned)

    def canary_logits(self, side: Side, strength: float = 1.0) -> NDArray[np.float32]:
        """Logits (T, V) of one side on the canary's completion."""
        request = self._request_tokens(LikelihoodRequest(CANARY_PROMPT, CANARY_COMPLETION))
        return self._score([request], side, strength, _logits)[0]

    def close(self) -> None:
        """Free the weights. A stream under way gets a BackendError at its next step."""
        with self._lock:
            self._model = self._adapter = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

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
        self._check(side, strength)
        with self._tokenizer_lock:
            tokens = encode_prompt(self._tokenizer, self.template, prompt, system)
        check_prompt_fits(tokens, self.context_length)
        try:
            return (yield from self._generate(tokens, sampling, side, strength, cancellation))
        except _CancelledError:
            return "cancelled"

    def _generate(
        self, tokens: list[int], sampling: Sampling, side: Side, strength: float, cancellation: Cancellation
    ) -> Generator[str, None, FinishReason]:
        draw = Draw(sampling, tokens)
        text = CompletionText(self._decode, self.template)
        cache = DynamicCache()
        for begin in range(0, len(tokens), _PREFILL_TOKENS):
            logits = self._step(tokens[begin : begin + _PREFILL_TOKENS], cache, side, strength, cancellation)
        position = len(tokens)
        for count in range(1, sampling.max_new_tokens + 1):
            if cancellation.is_set():
                return "cancelled"
            token = draw(logits)
            ended = token in self._ends
            last = count == sampling.max_new_tokens or position == self.context_length
            shown, stopped = text.add(None if ended else token, final=ended or last)
            yield shown
            if ended or stopped:
                return "end_of_text"
            if last:
                return "limit"
            logits = self._step([token], cache, side, strength, cancellation)
            position += 1
        raise AssertionError("unreachable: the last token returns")

    def _step(self, tokens: list[int], cache: Any, side: Side, strength: float, cancellation: Cancellation) -> Any:
        """Logits (V,), float32 on the CPU, after `tokens`, which join the cache."""
        ids = torch.tensor([tokens], device=self._device)
        with self._computing(side, strength, cancellation) as model:
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
            return logits.float().cpu()

    def _decode(self, tokens: list[int]) -> str:
        with self._tokenizer_lock:
            text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    # Likelihood

    def loglikelihood(
        self, requests: Sequence[LikelihoodRequest | TextRequest], side: Side, *, strength: float = 1.0
    ) -> list[Likelihood]:
        """See `backends.base.Backend.loglikelihood`."""
        self._check(side, strength)
        pairs = [self._request_tokens(request) for request in requests]
        results: list[Likelihood | None] = [None] * len(pairs)
        for indices in _batches([len(given) + len(scored) for given, scored in pairs], _BATCH_TOKENS[self._device.type]):
            logps = self._score([pairs[i] for i in indices], side, strength, _logp)
            for i, logp in zip(indices, logps, strict=True):
                results[i] = Likelihood(logp, len(pairs[i][1]))
        return [result for result in results if result is not None]

    def _request_tokens(self, request: LikelihoodRequest | TextRequest) -> tuple[list[int], list[int]]:
        """(given tokens, scored tokens) of a request."""
        with self._tokenizer_lock:
            if isinstance(request, TextRequest):
                tokens = begin_ids(self._tokenizer) + encode_text(self._tokenizer, request.text)
                given, scored = tokens[:1], tokens[1:]
            else:
                given = encode_prompt(self._tokenizer, self.template, request.prompt, request.system)
                scored = encode_completion(self._tokenizer, self.template, request.continuation, request.end_of_text)
        check_scorable(given, scored, self.context_length)
        return given, scored

    def _score(
        self,
        batch: Sequence[tuple[list[int], list[int]]],
        side: Side,
        strength: float,
        take: Callable[[Any, Any, list[int]], _Taken],
    ) -> list[_Taken]:
        """What `take` makes of each (given, scored): it gets the model's head, the hidden states (len(scored), H) that
        predict the scored tokens, and these."""
        rows = [given + scored[:-1] for given, scored in batch]
        width = max(map(len, rows))
        # Padded on the right, so no mask is needed: in a causal model no position sees what comes after it.
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self._device)
        with self._computing(side, strength, None) as model:
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            head = model.get_output_embeddings()
            return [take(head, hidden[i, len(given) - 1 : len(rows[i])], scored) for i, (given, scored) in enumerate(batch)]

    # The model, one computation at a time

    @contextmanager
    def _computing(self, side: Side, strength: float, cancellation: Cancellation | None) -> Iterator[Any]:
        """The model, for this thread alone, as `side` at `strength`. Nothing of that is left when the block ends."""
        with self._lock, foreign_errors(), torch.inference_mode():
            if self._model is None:
                raise missing_side(side, closed=True)
            self._watch.cancellation = cancellation
            try:
                if self._adapter is None:
                    yield self._model
                else:
                    with self._adapter.active(strength if side == "tuned" else 0.0):
                        yield self._model
            finally:
                self._watch.cancellation = None

    def _check(self, side: Side, strength: float) -> None:
        check_strength(strength)
        if self._model is None or (side == "tuned" and not self.has_adapter):
            raise missing_side(side, closed=self._model is None)


def _logits(head: Any, hidden: Any, _scored: list[int]) -> NDArray[np.float32]:
    """Logits (T, V) of hidden states (T, H)."""
    logits: NDArray[np.float32] = head(hidden).float().cpu().numpy()
    return logits


def _logp(head: Any, hidden: Any, scored: list[int]) -> float:
    """Log-probability of the scored tokens (T), summed, nats, from hidden states (T, H)."""
    total = 0.0
    for begin in range(0, len(scored), _LOGIT_ROWS):
        targets = torch.tensor(scored[begin : begin + _LOGIT_ROWS], device=hidden.device)[:, None]
        logits = head(hidden[begin : begin + _LOGIT_ROWS]).double()
        total += float(logits.log_softmax(-1).gather(1, targets).sum())
    return total


def _batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices in batches of like length, each of at most `tokens` padded tokens (one row at least), longest first."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
