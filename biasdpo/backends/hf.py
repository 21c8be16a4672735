"""transformers: one model, one copy of the weights; the adapter is on only while a tuned step is computed.

On a GPU the two sides of a pair are the two rows of one batch (see `hf_batch`), which costs hardly more than one. On a CPU,
where it costs twice as much, two sides stream at the same time from two threads, each with a KV cache of its own, and take
turns at the model, one forward step at a time (see `hf_model`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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
from biasdpo.backends.hf_copy import begin_ids, encode_completion, encode_continuation, encode_prompt, encode_text, load_tokenizer
from biasdpo.backends.hf_text import CompletionText
from biasdpo.backends.prefixes import sort_paths
from biasdpo.errors import BackendError
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
from biasdpo.template import PromptTemplate

try:
    import torch
    from transformers import DynamicCache

    from biasdpo.backends.hf_batch import Batch, CancelledError, Meeting, Row
    from biasdpo.backends.hf_device import Bits, choose_placement
    from biasdpo.backends.hf_faults import foreign_errors, nothing_kept
    from biasdpo.backends.hf_load import end_tokens
    from biasdpo.backends.hf_model import SharedModel
    from biasdpo.backends.hf_sampling import Draw
    from biasdpo.backends.hf_scoring import Trunk, batches, compute_trunk, logits_of, plan_rows, score_rows, shares_beginnings
except ImportError as exc:
    raise BackendError(f"The transformers backend needs {exc.name}: `pip install -r requirements.txt`") from exc

# Padded tokens in one batch of loglikelihood. A CPU is fastest where a batch's activations stay in its caches: SmolLM2 takes 6 ms
# a token at 64 and at 512 tokens, 5 at 256, 8 at 1024 (one core).
_BATCH_TOKENS = {"cpu": 384, "gpu": 32768}

_CANARY = LikelihoodRequest(CANARY_PROMPT, CANARY_COMPLETION)


def open_transformers(
    folder: Path,
    template: PromptTemplate,
    adapter_folder: Path | None,
    context_length: int,
    *,
    device: str = "auto",
    threads: int | None = None,
    batch_sides: bool | None = None,
    bits: Bits | None = None,
    on_progress: Callable[[float, str], None] | None = None,
) -> TransformersBackend:
    """Load a Hugging Face folder and, where given, a PEFT adapter; prove the two sides (ProofError) and return the engine.

    device        "auto" (the GPU with most free memory, else the CPU), "cpu", "cuda", "cuda:1". Weights are bfloat16 on a GPU
                  that knows it (else float16), float32 on a CPU. A GPU with too little room gets fewer layers, or none
    threads       of the CPU, set for all of torch in this process; default: torch's own choice
    batch_sides   compute both sides of a pair in one batch; default: on a GPU
    bits          quantize the weights by bitsandbytes (a GPU only)
    """
    report = on_progress or (lambda _share, _what: None)
    with nothing_kept(), foreign_errors():
        backend = TransformersBackend(folder, template, context_length, device, threads, batch_sides, bits, report)
        try:
            report(0.7, "proving the comparison")
            bare = [backend.canary_logits("base")]
            if adapter_folder is not None:
                if backend.batches_sides:
                    bare.append(backend.canary_logits_in_one_batch()[0])
                backend.add_adapter(adapter_folder)
            backend.proof = backend.prove(bare)
        except BaseException:
            backend.close()
            raise
    report(1.0, "ready")
    return backend


class TransformersBackend:
    """See `backends.base.Backend`. Made by `open_transformers`."""

    proof: Proof

    def __init__(
        self,
        folder: Path,
        template: PromptTemplate,
        context_length: int,
        device: str,
        threads: int | None,
        batch_sides: bool | None,
        bits: Bits | None,
        report: Callable[[float, str], None],
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.name = "transformers" if bits is None else f"transformers-{bits}bit"
        self.template = template
        self.turnstile = Turnstile()
        self.has_adapter = False
        self._tokenizer_lock = threading.Lock()  # `tokenizers` forbids two threads in one tokenizer where a flag is set
        self._meeting = Meeting()
        report(0.0, "reading the tokenizer")
        self._tokenizer = load_tokenizer(folder)
        self._shared = SharedModel(folder, choose_placement(folder, device, context_length, bits), bits, report)
        self.device = self._shared.placement.describe()
        # LLM.int8() takes the columns that it leaves in 16 bits from all rows of a batch (bitsandbytes, MatMul8bitLt): the
        # tuned row would change the base row.
        self.batches_sides = bits != 8 and (self._shared.device.type == "cuda" if batch_sides is None else batch_sides)
        self.context_length = min(context_length, int(self._shared.model.config.max_position_embeddings))
        self._ends = end_tokens(self._shared.model, self._tokenizer, template)

    def add_adapter(self, folder: Path) -> None:
        """Load a PEFT adapter; AdapterError where it does not fit the model."""
        self._shared.add_adapter(folder, mix_rows=self.batches_sides)
        self.has_adapter = True

    def prove(self, bare: Sequence[NDArray[np.float32]]) -> Proof:
        """Compare both sides as they will be served with the bare model (see `backends.base.prove`): each alone, and, where
        they are, in one batch. The figures are those of the way that pairs go.

        bare    of the model without its adapter: `canary_logits("base")`; the base row of `canary_logits_in_one_batch()`
        """
        base = self.canary_logits("base")
        tuned = self.canary_logits("tuned") if self.has_adapter else None
        proof = prove(bare[0], base, self.canary_logits("base"), tuned)
        if self.has_adapter and self.batches_sides:
            base, tuned = self.canary_logits_in_one_batch()
            proof = prove(bare[1], base, self.canary_logits_in_one_batch()[0], tuned)
        return proof

    def canary_logits(self, side: Side, strength: float = 1.0) -> NDArray[np.float32]:
        """Logits (T, V) of one side on the canary's completion."""
        return self.logits(_CANARY, side, strength=strength)

    def canary_logits_in_one_batch(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits (T, V) of the base row and of the tuned row on the canary's completion, through a KV cache, as a pair's."""
        given, scored = self._request_tokens(_CANARY)
        strengths, cache = (0.0, 1.0), DynamicCache()
        self._shared.forward([given[:-1]] * 2, cache, strengths)
        base, tuned = self._shared.forward([given[-1:] + scored[:-1]] * 2, cache, strengths, positions=len(scored))
        return base.numpy(), tuned.numpy()

    def close(self) -> None:
        """Free the weights. A stream under way gets a BackendError at its next step."""
        self._shared.close()

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
        self._check(side, strength)
        with self._tokenizer_lock:
            tokens = encode_prompt(self._tokenizer, template, prompt, system)
        check_prompt_fits(tokens, self.context_length)
        with nothing_kept():
            try:
                text = CompletionText(self._decode, template)
                return (yield from self._generate(tokens, text, sampling, side, strength, cancellation))
            except CancelledError:
                return "cancelled"

    def _generate(
        self, tokens: list[int], text: CompletionText, sampling: Sampling, side: Side, strength: float, cancellation: Cancellation
    ) -> Generator[str, None, FinishReason]:
        # The last token drawn need not be stored, so it may be one more than the context holds.
        limit = min(sampling.max_new_tokens, self.context_length - len(tokens) + 1)
        row = Row(side, _strength(side, strength), Draw(sampling, tokens), limit, cancellation)
        if self.has_adapter and self.batches_sides:
            batch = self._meeting.batch_of(tokens, row, lambda rows: Batch(tokens, rows, self._step, self._ends))
        else:
            batch = Batch(tokens, [row], self._step, self._ends)
        try:
            for count in range(1, limit + 1):
                token = batch.next_token(row)
                ended, last = token in self._ends, count == limit
                shown, stopped = text.add(None if ended else token, final=ended or last)
                yield shown
                if ended or stopped:
                    return "end_of_text"
            return "limit"
        finally:
            batch.leave(row)

    def _step(self, tokens: Sequence[list[int]], cache: Any, rows: Sequence[Row]) -> Any:
        """Logits (rows, V) after the tokens of each row; see `hf_batch.Step`."""
        return self._shared.forward(tokens, cache, [row.strength for row in rows], [row.cancellation for row in rows])[:, -1]

    def _decode(self, tokens: list[int]) -> str:
        with self._tokenizer_lock:
            text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    # Likelihood

    def loglikelihood(self, requests: Sequence[Request], side: Side, *, strength: float = 1.0) -> list[Likelihood]:
        """See `backends.base.Backend.loglikelihood`."""
        self._check(side, strength)
        pairs = [self._request_tokens(request) for request in requests]
        if not pairs:
            return []
        strength, paths = _strength(side, strength), sort_paths(pairs)
        logps = [0.0] * len(pairs)
        with nothing_kept():
            sharing = self._shared.compute(strength, lambda model, _device: shares_beginnings(model))
            trunk_tokens, rows = plan_rows(paths, sharing=sharing)
            trunk: Trunk | None = None
            if trunk_tokens:
                beginning = paths[0].tokens[:trunk_tokens]
                trunk = self._shared.compute(strength, lambda model, device: compute_trunk(model, device, beginning))
            roomy = self._shared.device.type == "cuda" and self._shared.placement.whole
            # A GPU that is full has little room for more.
            for batch in batches(rows, _BATCH_TOKENS["gpu" if roomy else "cpu"]):
                found = self._shared.compute(strength, partial(score_rows, rows=batch, trunk=trunk))
                for index, logp in found:
                    logps[index] = logp
        return [Likelihood(logp, len(scored)) for logp, (_, scored) in zip(logps, pairs, strict=True)]

    def logits(self, request: Request, side: Side, *, strength: float = 1.0) -> NDArray[np.float32]:
        """Logits (T, V) that predict each of the request's T scored tokens."""
        self._check(side, strength)
        given, scored = self._request_tokens(request)
        with nothing_kept():
            return self._shared.compute(_strength(side, strength), partial(logits_of, given=given, scored=scored))

    def _request_tokens(self, request: Request) -> tuple[list[int], list[int]]:
        """(given tokens, scored tokens) of a request."""
        with self._tokenizer_lock:
            if isinstance(request, TextRequest):
                tokens = begin_ids(self._tokenizer) + encode_text(self._tokenizer, request.text)
                given, scored = tokens[:1], tokens[1:]
            elif isinstance(request, ContinuationRequest):
                given, scored = encode_continuation(self._tokenizer, request.context, request.continuation)
            else:
                given = encode_prompt(self._tokenizer, self.template, request.prompt, request.system)
                scored = encode_completion(self._tokenizer, self.template, request.continuation, request.end_of_text)
        check_scorable(given, scored, self.context_length)
        return given, scored

    def _check(self, side: Side, strength: float) -> None:
        check_strength(strength)
        closed = self._shared.model is None
        if closed or (side == "tuned" and not self.has_adapter):
            raise missing_side(side, closed=closed)


def _strength(side: Side, strength: float) -> float:
    """Of the adapter: 0 on the base side."""
    return strength if side == "tuned" else 0.0
