"""The transformers backend: one copy of the weights; the PEFT adapter is on only while a tuned row is computed."""

from __future__ import annotations

import gc
import threading
import warnings
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from biasdpo.errors import AdapterError, BackendError, ConfigError

try:
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import (
        DynamicCache,
        GenerationConfig,
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    from biasdpo.backends import hf_loading
except ImportError as exc:
    raise BackendError(f"The transformers backend needs {exc.name}: `pip install -r requirements.txt`") from exc

from biasdpo.backends.base import (
    CANARY,
    SEQUENCES,
    Cancellation,
    ShownText,
    VisitorQueue,
    check_prompt_fits,
    check_scorable,
    cut_to_context,
    log_softmax,
    missing_side,
    prove,
)
from biasdpo.backends.prefixes import Row, TokenPath, lay_out, sort_paths, split_into_rows, trunk_length
from biasdpo.benchmarks.toxicity import ToxicityScorer, name_of_classifier
from biasdpo.chat import BARE, PromptTemplate, Turn
from biasdpo.model_files import ARCHITECTURES
from biasdpo.models import AdapterSpec, check_fits_file
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

# Padded tokens per batch of loglikelihood. A CPU is fastest if a batch's activations stay in its caches: SmolLM2 takes 6 ms a
# token at 64 and at 512 tokens, 5 at 256, 8 at 1024 (one core).
_BATCH_TOKENS = {"cpu": 384, "gpu": 32768}


_opening = threading.Lock()  # while they build a model, transformers and accelerate change torch for all threads


def open_transformers(
    folder: Path,
    template: PromptTemplate,
    adapter_folder: Path | None,
    context_length: int,
    *,
    device: str = "auto",
    threads: int | None = None,
    batch_sides: bool | None = None,
    bits: hf_loading.Bits | None = None,
    on_progress: Callable[[float, str], None] = lambda _share, _what: None,
) -> TransformersBackend:
    """Load a Hugging Face folder and optionally a PEFT adapter, and prove the two sides (ProofError).

    device        "auto" (the GPU with the most free memory, else the CPU), "cpu", "cuda", "cuda:1". Weights are bfloat16 on a GPU
                  that supports it (else float16), float32 on a CPU. A GPU with too little room gets fewer layers, or none
    threads       CPU threads, for all of torch in this process; default: torch's choice
    batch_sides   compute both sides of a pair in one batch; default: on a GPU
    bits          quantize the weights with bitsandbytes (GPU only)
    """
    if threads is not None:
        torch.set_num_threads(threads)
    with _opening, hf_loading.released_errors(), hf_loading.foreign_errors():
        on_progress(0.0, "reading the tokenizer")
        tokenizer = hf_loading.load_tokenizer(folder)
        shared = SharedModel(folder, hf_loading.choose_placement(folder, device, context_length, bits), bits, on_progress)
        backend = TransformersBackend(shared, tokenizer, template, context_length, batch_sides)
        try:
            on_progress(0.7, "proving the comparison")
            bare = [backend.canary_logits("base")]
            if bits is None:
                backend.check_against_files(folder, bare[0])
            if adapter_folder is not None:
                if backend.batches_sides:
                    bare.append(backend.canary_logits_in_one_batch()[0])
                modules = check_fits_file(AdapterSpec(adapter_folder.name, adapter_folder, ""), folder)
                shared.add_adapter(adapter_folder, modules, mix_rows=backend.batches_sides)
                backend.has_adapter = True
            backend.proof = backend.prove(bare)
        except BaseException:
            backend.close()
            raise
    on_progress(1.0, "ready")
    return backend


class TransformersBackend:
    """See `backends.base.Backend`. Created by `open_transformers`."""

    proof: Proof

    def __init__(
        self, shared: SharedModel, tokenizer: Any, template: PromptTemplate, context_length: int, batch_sides: bool | None
    ) -> None:
        self.name = "transformers" if shared.bits is None else f"transformers-{shared.bits}bit"
        self.device = shared.placement.describe()
        self.template = hf_loading.own_template(template, tokenizer)
        self.context_length = min(context_length, int(shared.model.config.max_position_embeddings))
        self.has_adapter = False
        self.queue = VisitorQueue()
        # LLM.int8() picks the columns it keeps in 16 bits from all rows of a batch (bitsandbytes, MatMul8bitLt): the tuned row
        # would change the base row.
        self.batches_sides = shared.bits != 8 and (shared.device.type == "cuda" if batch_sides is None else batch_sides)
        self._shared = shared
        self._tokenizer = tokenizer
        self._tokenizer_lock = threading.Lock()  # `tokenizers` forbids concurrent use while truncation or padding is set
        self._pairing = Pairing[BatchRow, Batch]()
        self._end = hf_loading.end_of_completion(tokenizer, self.template)
        self._ends = hf_loading.end_tokens(shared.model, tokenizer, self.template)
        shared.model.generation_config = GenerationConfig()  # a model's own may forbid repetitions, which `stream` does not

    def prove(self, bare: Sequence[NDArray[np.float32]]) -> Proof:
        """Compare both sides with the bare model as they are served (see `backends.base.prove`): each alone; then in one batch if
        that is how pairs are computed, whose measurements are returned.

        bare    the bare model's `canary_logits("base")`, then the base row of its `canary_logits_in_one_batch()`
        """
        base = self.canary_logits("base")
        tuned = self.canary_logits("tuned") if self.has_adapter else None
        proof = prove(bare[0], base, self.canary_logits("base"), tuned)
        if self.has_adapter and self.batches_sides:
            base, tuned = self.canary_logits_in_one_batch()
            proof = prove(bare[1], base, self.canary_logits_in_one_batch()[0], tuned)
        return proof

    def check_against_files(self, folder: Path, served: NDArray[np.float32]) -> None:
        """Raise ProofError if the canary logits (T, V) of the model that is served, still without an adapter, are not those of
        the folder's weights, read independently."""
        given, scored = self._request_tokens(CANARY, cut=True)
        device, dtype = self._shared.device, self._shared.model.dtype
        with torch.inference_mode():
            bare = logits_of(hf_loading.independent_model(folder, self._shared.model, device), device, given, scored)
        # A GPU may choose another kernel for a matrix elsewhere in its memory.
        rounding = 0.0 if device.type == "cpu" else 4 * torch.finfo(dtype).eps * float(np.abs(served).max())
        prove(bare, served, served, None, rounding)

    def canary_logits(self, side: Side, strength: float = 1.0) -> NDArray[np.float32]:
        """Logits (T, V) of one side on the canary's completion."""
        return self.logits(CANARY, side, strength=strength, cut=True)

    def canary_logits_in_one_batch(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits (T, V) of a base row and a tuned row on the canary's completion, through one KV cache, as in a pair."""
        given, scored = self._request_tokens(CANARY, cut=True)
        strengths, cache = (0.0, 1.0), DynamicCache()
        self._shared.forward([given[:-1]] * 2, cache, strengths)
        base, tuned = self._shared.forward([given[-1:] + scored[:-1]] * 2, cache, strengths, positions=len(scored))
        return base.numpy(), tuned.numpy()

    def close(self) -> None:
        """Free the weights. A running stream gets a BackendError at its next step."""
        self._shared.close()

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
        self._check(side, strength)
        tokens = self.prompt_tokens(prompt, system, history, template)
        check_prompt_fits(tokens, self.context_length)
        with hf_loading.released_errors():
            try:
                text = CompletionText(self._decode, template)
                return (yield from self._generate(tokens, text, sampling, side, strength, cancellation))
            except CancelledError:
                return "cancelled"

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
        self._check(side, strength)
        tokens = [self.prompt_tokens(prompt, system) for prompt, system in prompts]
        for one in tokens:
            check_prompt_fits(one, self.context_length)
        done: list[tuple[str, FinishReason]] = []
        with hf_loading.released_errors():
            for start in range(0, len(tokens), SEQUENCES):
                batch = tokens[start : start + SEQUENCES]
                limit = min(max_new_tokens, self.context_length - max(map(len, batch)))
                generate = partial(generate_greedily, prompts=batch, limit=limit, ends=self._ends, cancellation=cancellation)
                for written in self._shared.compute(_row_strength(side, strength), generate):
                    done.append(self._finished(written, limit))
        return done

    def _finished(self, tokens: Sequence[int], limit: int) -> tuple[str, FinishReason]:
        """The text of a completion's tokens, and why it ended; one that neither ended nor reached the limit was canceled."""
        text, shown = CompletionText(self._decode, self.template), ""
        for count, token in enumerate(tokens, start=1):
            ended, last = token in self._ends, count == limit
            piece, stopped = text.add(None if ended else token, final=ended or last)
            shown += piece
            if ended or stopped:
                return shown, "end_of_text"
        return shown, "limit" if len(tokens) >= limit else "cancelled"

    def prompt_tokens(
        self, prompt: str, system: str = "", history: Sequence[Turn] = (), template: PromptTemplate | None = None
    ) -> list[int]:
        """See `backends.base.Backend.prompt_tokens`."""
        with self._tokenizer_lock:
            return hf_loading.encode_prompt(self._tokenizer, template or self.template, prompt, system, history)

    def _generate(
        self, tokens: list[int], text: CompletionText, sampling: Sampling, side: Side, strength: float, cancellation: Cancellation
    ) -> Generator[str, None, FinishReason]:
        # The last sampled token is not computed with, so there may be one more than the context holds.
        limit = min(sampling.max_new_tokens, self.context_length - len(tokens) + 1)
        row = BatchRow(side, _row_strength(side, strength), Sampler(sampling, tokens), limit, cancellation)
        if self.has_adapter and self.batches_sides:
            batch = self._pairing.batch_of(tokens, row, lambda rows: Batch(tokens, rows, self._step, self._ends))
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

    def _step(self, tokens: Sequence[list[int]], cache: Any, rows: Sequence[BatchRow]) -> Any:
        """Logits (rows, V) after the tokens of each row; see `Step`."""
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
        strength, paths = _row_strength(side, strength), sort_paths(pairs)
        logps = [0.0] * len(pairs)
        with hf_loading.released_errors():
            sharing = self._shared.compute(strength, shares_beginnings)
            trunk_tokens, rows = plan_rows(paths, sharing=sharing)
            beginning = paths[0].tokens[:trunk_tokens]
            trunk = self._shared.compute(strength, partial(compute_trunk, tokens=beginning)) if beginning else None
            # A full GPU, whose other layers are in CPU memory, has no room for large batches.
            roomy = self._shared.device.type == "cuda" and self._shared.placement.whole
            for batch in batches(rows, _BATCH_TOKENS["gpu" if roomy else "cpu"]):
                for index, logp in self._shared.compute(strength, partial(score_rows, rows=batch, trunk=trunk)):
                    logps[index] = logp
        return [Likelihood(logp, len(scored)) for logp, (_, scored) in zip(logps, pairs, strict=True)]

    def logits(self, request: Request, side: Side, *, strength: float = 1.0, cut: bool = False) -> NDArray[np.float32]:
        """Logits (T, V) that predict each of the request's T scored tokens."""
        self._check(side, strength)
        given, scored = self._request_tokens(request, cut=cut)
        with hf_loading.released_errors():
            return self._shared.compute(_row_strength(side, strength), partial(logits_of, given=given, scored=scored))

    def token_text(self, token: int) -> str:
        """See `backends.base.Backend.token_text`."""
        return self._decode([token])

    def score_tokens(self, request: LikelihoodRequest, side: Side, *, strength: float = 1.0) -> list[tuple[str, float]]:
        """See `backends.base.Backend.score_tokens`."""
        _given, scored = self._request_tokens(request)
        logps = log_softmax(self.logits(request, side, strength=strength))[np.arange(len(scored)), scored]
        shown = CompletionText(self._decode, BARE)
        pieces = [shown.add(token, final=i == len(scored))[0] for i, token in enumerate(scored, start=1)]
        return list(zip(pieces, map(float, logps), strict=True))

    def _request_tokens(self, request: Request, *, cut: bool = False) -> tuple[list[int], list[int]]:
        """(given, scored) token ids of a request, `cut` to the context or refused if they are too long for it."""
        with self._tokenizer_lock:
            if isinstance(request, TextRequest):
                tokens = hf_loading.begin_ids(self._tokenizer) + hf_loading.encode_text(self._tokenizer, request.text)
                given, scored = tokens[:1], tokens[1:]
            elif isinstance(request, ContinuationRequest):
                given, scored = hf_loading.encode_continuation(self._tokenizer, request.context, request.continuation)
            else:
                completion = (request.prompt, request.continuation, request.system, request.history)
                given, scored = hf_loading.encode_completion(self._tokenizer, self.template, *completion)
                if request.end_of_text:
                    scored = [*scored, self._end]
        if cut:
            given, scored = cut_to_context(given, scored, self.context_length)
        check_scorable(given, scored, self.context_length)
        return given, scored

    def _check(self, side: Side, strength: float) -> None:
        check_strength(strength)
        closed = self._shared.model is None
        if closed or (side == "tuned" and not self.has_adapter):
            raise missing_side(side, closed=closed)


def _row_strength(side: Side, strength: float) -> float:
    return strength if side == "tuned" else 0.0


# The model, one computation at a time

_Result = TypeVar("_Result")


class CancelledError(Exception):
    """The cancellation was set."""


class SharedModel:
    """One copy of the weights and at most one adapter, shared by all threads.

    The adapter's switch and scale are global to the model: they are set under the lock, for one computation, and reset before the
    lock is released. (PEFT's `disable_adapter()` beside a concurrent call gives wrong output.)
    """

    def __init__(
        self, folder: Path, placement: hf_loading.Placement, bits: hf_loading.Bits | None, report: Callable[[float, str], None]
    ) -> None:
        self._lock = threading.Lock()  # held during every computation
        self._cancel_hook = _CancelHook()
        self._adapter: Adapter | None = None
        self.bits = bits
        self.model: Any  # None once closed
        self.model, self.placement = hf_loading.load_model(folder, placement, bits, report)
        self.device = self.placement.device
        for layer in self.model.model.layers:
            layer.register_forward_pre_hook(self._cancel_hook)

    def add_adapter(self, folder: Path, modules: Collection[str], *, mix_rows: bool) -> None:
        """Load a PEFT adapter of these modules. mix_rows: a batch's rows may differ in strength."""
        with self._lock, hf_loading.undispatched(self.model, self.placement):
            self._adapter = load_adapter(self.model, folder, modules)
            if mix_rows:
                self._adapter.mix_rows()

    def forward(
        self,
        tokens: Sequence[list[int]],
        cache: Any,
        strengths: Sequence[float],
        cancellations: Sequence[Cancellation] = (),
        positions: int = 1,
    ) -> Any:
        """Logits (rows, positions, V), float32 on the CPU, at the last positions of `tokens` (rows, T), which join the cache.

        strengths   of the adapter, one per row: 0 for base
        Raises CancelledError if all cancellations are set.
        """
        ids = torch.tensor(tokens, device=self.device)
        with self._computing(strengths, cancellations) as model:
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=positions).logits
            return logits.float().cpu()

    def compute(self, strength: float, computation: Callable[[Any, torch.device], _Result]) -> _Result:
        """Call `computation` with the model and its device, the adapter at `strength` for all rows."""
        with self._computing([strength]) as model:
            return computation(model, self.device)

    def close(self) -> None:
        """Free the weights, after the running computation."""
        with self._lock:
            self.model = self._adapter = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def _computing(self, strengths: Sequence[float], cancellations: Sequence[Cancellation] = ()) -> Iterator[Any]:
        """Hold the model, its adapter at these strengths (see `Adapter.active`); everything is reset when the block ends."""
        with self._lock, hf_loading.foreign_errors(), torch.inference_mode():
            if self.model is None:
                raise missing_side("base", closed=True)
            self._cancel_hook.cancellations = cancellations
            try:
                with self._adapter.active(strengths) if self._adapter is not None else nullcontext():
                    yield self.model
            finally:
                self._cancel_hook.cancellations = ()


class _CancelHook:
    """Forward hook of every decoder layer: cancels within one layer, however long the prompt's chunk takes."""

    cancellations: Sequence[Cancellation] = ()  # of all rows in this step

    def __call__(self, _layer: Any, _args: Any) -> None:
        if self.cancellations and all(cancellation.is_set() for cancellation in self.cancellations):
            raise CancelledError


# The adapter

_ADAPTER = "default"
_NO_ADAPTER = "__base__"  # PEFT's name for rows without an adapter


class Adapter:
    """The LoRA layers of a model. They are off, computing exactly the base model, except within `active`."""

    def __init__(self, model: Any) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        self._scales = [float(layer.scaling[_ADAPTER]) for layer in self._layers]
        self._row_hook = _RowHook()
        self._switch(False)

    def mix_rows(self) -> None:
        """Allow `active` to take rows at different strengths."""
        # PEFT's own way, passing `adapter_names` to the model, adds hooks to every layer for each forward pass and leaves them
        # there if that raises (out of memory, cancelled). These hooks stay, and do nothing outside `active`.
        for layer in self._layers:
            layer.register_forward_pre_hook(self._row_hook, with_kwargs=True)

    @contextmanager
    def active(self, strengths: Sequence[float]) -> Iterator[None]:
        """Within the block, row i of a batch computes W + strengths[i] * scale * B @ A, and exactly W if that is 0.

        strengths   one for all rows; or (after `mix_rows`) one per row, each 0 or one common other value
        """
        nonzero = {strength for strength in strengths if strength != 0.0}
        if not nonzero:
            yield
            return
        (strength,) = nonzero  # the scale belongs to the layer, not to the row
        for layer, scale in zip(self._layers, self._scales, strict=True):
            layer.scaling[_ADAPTER] = scale * strength
        try:
            if 0.0 in strengths:
                self._row_hook.adapter_names = [_ADAPTER if row else _NO_ADAPTER for row in strengths]
            self._switch(True)
            yield
        finally:
            self._switch(False)
            self._row_hook.adapter_names = None

    def _switch(self, on: bool) -> None:
        # PEFT's enable_adapters() without its loop over every parameter's requires_grad: milliseconds per token, twice.
        for layer in self._layers:
            layer._disable_adapters = not on


class _RowHook:
    """Forward hook that passes a LoRA layer each row's adapter, while `adapter_names` is set."""

    adapter_names: list[str] | None = None

    def __call__(self, _layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if self.adapter_names is None:
            return None
        return args, {**kwargs, "adapter_names": self.adapter_names}


def load_adapter(model: Any, folder: Path, modules: Collection[str]) -> Adapter:
    """Load the LoRA adapter in `folder`, which adapts `modules` of `model` (see `models.check_fits_file`), turned off."""
    device = next(model.parameters()).device
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 reads a property of transformers 5.23 by its old name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)  # an AdapterError, below
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)  # nothing is merged
            peft_model = PeftModel.from_pretrained(model, str(folder), adapter_name=_ADAPTER, torch_device=str(device))
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as exc:
        reason = " ".join(str(exc).split())
        raise AdapterError(f"PEFT can't load the adapter {folder}: {reason[:300]}; train or fetch it again") from exc
    layers = {name.removeprefix("base_model.model.") for name, m in peft_model.named_modules() if isinstance(m, LoraLayer)}
    if layers != set(modules):
        raise AdapterError(f"PEFT adapts {len(layers)} layers of {folder}, whose file holds {len(modules)}: train it again")
    peft_model.eval()
    return Adapter(peft_model)


# Streaming: the rows of one prompt, one batch over one KV cache

PREFILL_CHUNK = 256  # tokens; bounds the memory of a long prompt
PAIRING_SECONDS = 0.2  # how long a stream waits for the other side of its pair; two threads started together need a few ms

# (tokens of each row, cache, rows) -> logits (rows, V) after each row's last token, float32 on the CPU
Step = Callable[[Sequence[list[int]], Any, Sequence["BatchRow"]], Any]


class BatchRow:
    """One completion in progress."""

    def __init__(self, side: Side, strength: float, sampler: Sampler, limit: int, cancellation: Cancellation) -> None:
        self.side = side
        self.strength = strength  # of the adapter: 0 for the base side
        self.cancellation = cancellation
        self.limit = limit  # tokens left to sample
        self.unread: deque[int] = deque()  # sampled tokens that the reader hasn't taken
        self.done = False  # nothing more is computed
        self.failure = ""  # why the reader gets no more tokens
        self.last = -1  # the token sampled last
        self._sampler = sampler

    def take(self, logits: Any, ends: frozenset[int]) -> None:
        """Sample the next token from logits (V,)."""
        try:
            self.last = self._sampler(logits)
        except BackendError as exc:  # NaN logits do not affect the other row
            self.failure, self.done = str(exc), True
            return
        self.unread.append(self.last)
        self.limit -= 1
        self.done = self.done or self.limit == 0 or self.last in ends


class Batch:
    """The rows of one prompt. Each row's reader calls `next_token` from its own thread; whoever comes first computes for all."""

    def __init__(self, prompt: Sequence[int], rows: Sequence[BatchRow], step: Step, ends: frozenset[int]) -> None:
        self._prompt: list[int] = list(prompt)  # empty once computed
        self._rows = list(rows)  # in the order of the cache
        self._step = step
        self._ends = ends
        self._cache: Any = DynamicCache()
        self._changed = threading.Condition()
        self._computing = False  # by one thread at a time

    def next_token(self, row: BatchRow) -> int:
        """The next token of a row. Raises CancelledError, or BackendError if a step failed."""
        while True:
            if row.cancellation.is_set():
                raise CancelledError
            with self._changed:
                if row.unread:
                    return row.unread.popleft()
                if row.failure:
                    raise BackendError(row.failure)
                if self._computing:
                    self._changed.wait()
                    continue
                self._computing = True
            try:
                self._advance()
            except CancelledError:  # within a step: all of its rows are cancelled
                self._abort("")
            except BaseException as exc:
                self._abort(str(exc) or type(exc).__name__)
                raise
            finally:
                with self._changed:
                    self._computing = False
                    self._changed.notify_all()

    def leave(self, row: BatchRow) -> None:
        """End a row: its reader wants no more."""
        with self._changed:
            row.done = True
            if not self._computing and all(other.done for other in self._rows):
                self._cache = None

    def _advance(self) -> None:
        """Sample one token for every unfinished row."""
        for begin in range(0, len(self._prompt) or 1, PREFILL_CHUNK):
            if not self._drop_finished_rows():
                return
            chunk = self._prompt[begin : begin + PREFILL_CHUNK]
            logits = self._step([chunk or [row.last] for row in self._rows], self._cache, self._rows)
        self._prompt = []
        for row, row_logits in zip(self._rows, logits, strict=True):
            row.take(row_logits, self._ends)

    def _drop_finished_rows(self) -> bool:
        """Remove finished rows from the cache; return whether any row is left."""
        left = [i for i, row in enumerate(self._rows) if not row.done and not row.cancellation.is_set()]
        if len(left) < len(self._rows):
            self._rows = [self._rows[i] for i in left]
            if left:
                self._cache.batch_select_indices(torch.tensor(left))
            else:
                self._cache = None
        return bool(left)

    def _abort(self, failure: str) -> None:
        """End all rows: after an aborted step the cache is useless."""
        for row in self._rows:
            row.done, row.failure = True, failure
        self._rows, self._cache = [], None


class _OfSide(Protocol):
    @property
    def side(self) -> Side: ...


_Row = TypeVar("_Row", bound=_OfSide)
_Shared = TypeVar("_Shared")


class Pairing(Generic[_Row, _Shared]):
    """Puts the two sides of a pair into one batch: the first to arrive waits briefly for the other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[tuple[list[int], _Row, Future[_Shared]]] = []

    def batch_of(self, prompt: list[int], row: _Row, start: Callable[[list[_Row]], _Shared]) -> _Shared:
        """The batch for a row: shared with the other side's row of the same prompt, base first; alone if none arrives in time.
        `start` creates a batch of rows."""
        with self._lock:
            for waiting in self._waiting:
                other_prompt, other, batch = waiting
                if other_prompt == prompt and other.side != row.side:
                    self._waiting.remove(waiting)
                    batch.set_result(start([row, other] if row.side == "base" else [other, row]))
                    return batch.result()
            mine = (prompt, row, Future[_Shared]())
            self._waiting.append(mine)
        with suppress(TimeoutError):
            return mine[2].result(PAIRING_SECONDS)
        with self._lock:
            if mine[2].done():  # the other side has just come
                return mine[2].result()
            self._waiting.remove(mine)
            return start([row])


class Sampler:
    """Samples tokens with transformers' processors, in the order of `records.Sampling`.

    On the CPU whatever the model's device, so that a seed means the same everywhere.
    """

    def __init__(self, sampling: Sampling, prompt: list[int]) -> None:
        self._tokens = list(prompt)
        self._greedy = sampling.temperature == 0.0
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._processors = LogitsProcessorList()
        if sampling.repetition_penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if not self._greedy:
            self._processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k > 0:
                self._processors.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1.0:
                self._processors.append(TopPLogitsWarper(float(sampling.top_p)))

    def __call__(self, logits: Any) -> int:
        """Sample the next token from logits (V,)."""
        if not bool(torch.isfinite(logits).all()):
            raise BackendError("The model gave logits that are not numbers: lower the strength, or choose another adapter")
        scores = self._processors(torch.tensor([self._tokens]), logits[None])
        chosen = scores.argmax(-1) if self._greedy else torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
        token = int(chosen.item())
        self._tokens.append(token)
        return token


class CompletionText:
    """Converts tokens to the text to show; withholds incomplete characters, the completion prefix, and possible stop strings.

    `decode` gets windows of tokens: from the last token that completed a character to the newest.
    """

    def __init__(self, decode: Callable[[list[int]], str], template: PromptTemplate) -> None:
        self._decode = decode
        self._shown = ShownText(template)
        self._window: list[int] = []
        self._known = 0  # tokens of the window whose text was taken

    def add(self, token: int | None, *, final: bool) -> tuple[str, bool]:
        """Add a token (None: end of text, which has no text); see `ShownText.add`."""
        return self._shown.add(self._new_text(token, final), final=final)

    def _new_text(self, token: int | None, final: bool) -> str:
        if token is not None:
            self._window.append(token)
        before = self._decode(self._window[: self._known])
        text = self._decode(self._window)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not final:
            return ""  # an incomplete character
        # The next window starts with the tokens just taken: some tokenizers decode a token differently at the beginning.
        self._window, self._known = self._window[self._known :], len(self._window) - self._known
        return text[len(before) :]


def generate_greedily(
    model: Any,
    device: torch.device,
    *,
    prompts: Sequence[Sequence[int]],
    limit: int,
    ends: frozenset[int],
    cancellation: Cancellation,
) -> list[list[int]]:
    """The tokens written after each prompt, in one batch padded on the left: at most `limit`, up to one of `ends`, fewer if
    canceled."""
    end = min(ends)
    width = max(map(len, prompts))
    ids = _padded(([end] * (width - len(prompt)) + list(prompt) for prompt in prompts), width, device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)

    def stops(ids: Any, _scores: Any, **_: Any) -> Any:
        return torch.full((len(ids),), cancellation.is_set(), dtype=torch.bool, device=ids.device)

    written = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=end,
        stopping_criteria=[stops],
    )[:, width:].tolist()
    first_ends = [next((i for i, token in enumerate(row) if token in ends), len(row)) for row in written]
    return [row[: at + 1] for row, at in zip(written, first_ends, strict=True)]


# Likelihood: rows of tokens that share their beginnings (see `prefixes`)

_MIN_TRUNK = 16  # tokens; a shorter common beginning is not worth a computation of its own
_LOGIT_ROWS = 256  # positions whose logits over the vocabulary are held at a time


class Trunk:
    """Keys and values of the common beginning of all rows, as a read-only cache for the model."""

    def __init__(self, cache: Any) -> None:
        self._layers = [(layer.keys, layer.values) for layer in cache.layers]
        self.tokens: int = cache.get_seq_length()

    def update(self, keys: Any, values: Any, layer: int, *_: Any) -> tuple[Any, Any]:
        """Keys and values (rows, heads, trunk + W, d) that a layer attends to: the trunk's, then the rows'."""
        first_keys, first_values = (tensor.expand(len(keys), -1, -1, -1) for tensor in self._layers[layer])
        return torch.cat((first_keys, keys), dim=2), torch.cat((first_values, values), dim=2)


def shares_beginnings(model: Any, _device: object = None) -> bool:
    """Whether texts in one row can share their beginnings in this model: its attention takes any mask and any positions, and its
    layers mix tokens in no other way. In other models every text gets a row."""
    return type(model).__name__ in ARCHITECTURES and model.config._attn_implementation == "sdpa"


def plan_rows(paths: Sequence[TokenPath], *, sharing: bool) -> tuple[int, list[Row]]:
    """(length of the common beginning to compute first, rows of what follows) for sorted paths."""
    if not sharing:
        return 0, [lay_out([path], 0) for path in paths]
    trunk = trunk_length(paths, _MIN_TRUNK)
    return trunk, [lay_out(part, trunk) for part in split_into_rows(paths, trunk)]


def batches(rows: Sequence[Row], tokens: int) -> Iterator[list[Row]]:
    """Batches of rows of similar length, each of at most `tokens` padded tokens (at least one row), longest first."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        if batch and (len(batch) + 1) * len(batch[0].tokens) > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def compute_trunk(model: Any, device: torch.device, tokens: Sequence[int]) -> Trunk:
    """Compute the common beginning of all rows."""
    cache = DynamicCache()
    model.model(input_ids=torch.tensor([tokens], device=device), past_key_values=cache, use_cache=True)
    return Trunk(cache)


def score_rows(model: Any, device: torch.device, rows: Sequence[Row], trunk: Trunk | None) -> list[tuple[int, float]]:
    """(index, summed log-probability of the scored tokens in nats) of each path in the rows."""
    hidden = _hidden_states(model, device, rows, trunk)
    width = hidden.shape[1]
    # A node that predicts tokens of several paths is projected to the vocabulary once.
    wanted = [
        (place * width + node, token, path.index)
        for place, row in enumerate(rows)
        for path, nodes in zip(row.paths, row.nodes, strict=True)
        for node, token in zip(nodes, path.scored, strict=True)
    ]
    nodes, sources = np.unique(np.array([node for node, _, _ in wanted]), return_inverse=True)
    logps = _logps(model, hidden.flatten(0, 1), nodes, sources, [token for _, token, _ in wanted])
    totals: dict[int, float] = {}
    for (_, _, index), logp in zip(wanted, logps, strict=True):
        totals[index] = totals.get(index, 0.0) + logp
    return list(totals.items())


def logits_of(model: Any, device: torch.device, given: Sequence[int], scored: Sequence[int]) -> NDArray[np.float32]:
    """Logits (T, V) that predict the T scored tokens of one text, computed as a bare model computes them."""
    ids = torch.tensor([[*given, *scored[:-1]]], device=device)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits: NDArray[np.float32] = model.get_output_embeddings()(hidden[0, len(given) - 1 :]).float().cpu().numpy()
    return logits


def _hidden_states(model: Any, device: torch.device, rows: Sequence[Row], trunk: Trunk | None) -> Any:
    """Last hidden states (rows, W, H), padded on the right."""
    width = max(len(row.tokens) for row in rows)
    ids = _padded((row.tokens for row in rows), width, device)
    if trunk is None and all(len(row.paths) == 1 for row in rows):
        # No mask needed: in a causal model no position sees the padding after it.
        return model.model(input_ids=ids, use_cache=False).last_hidden_state
    places = torch.arange(width, device=device)
    ends = torch.maximum(_padded((row.ends for row in rows), width, device), places + 1)  # padding sees itself
    mask = (places <= places[:, None]) & (places[:, None] < ends[:, None, :])
    if trunk is not None:
        mask = torch.cat((mask.new_ones((len(rows), width, trunk.tokens)), mask), dim=-1)
    positions = _padded((row.positions for row in rows), width, device)
    return model.model(
        input_ids=ids, attention_mask=mask[:, None], position_ids=positions, past_key_values=trunk, use_cache=False
    ).last_hidden_state


def _padded(rows: Iterable[list[int]], width: int, device: torch.device) -> Any:
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)


def _logps(model: Any, hidden: Any, nodes: NDArray[np.intp], sources: NDArray[np.intp], tokens: Sequence[int]) -> list[float]:
    """Log-probabilities, nats, of tokens (N), each predicted from nodes[sources[i]] of hidden states (T, H)."""
    head = model.get_output_embeddings()
    logps = np.empty(len(tokens))
    targets = np.asarray(tokens)
    for begin in range(0, len(nodes), _LOGIT_ROWS):
        logits = head(hidden[torch.from_numpy(nodes[begin : begin + _LOGIT_ROWS]).to(hidden.device)]).float()
        here = np.flatnonzero((sources >= begin) & (sources < begin + _LOGIT_ROWS))
        of_logits = torch.from_numpy(sources[here] - begin).to(hidden.device)
        chosen = logits[of_logits, torch.from_numpy(targets[here]).to(hidden.device)]
        logps[here] = (chosen - logits.logsumexp(-1)[of_logits]).double().cpu().numpy()
    return [float(logp) for logp in logps]


# A text classifier from the Hub as toxicity scorer

_TOXIC_LABELS = ("toxic", "toxicity", "hate", "hateful", "offensive")
_MAX_CLASSIFIER_TOKENS = 512  # of a text; the limit of common encoders


def open_classifier(name: str) -> ToxicityScorer:
    """Open the classifier OWNER/NAME or OWNER/NAME#LABEL (a Hub id or a local folder), on the CPU. A text's score is the label's
    probability: a sigmoid for multi-label and single-label classifiers, else a softmax.

    Without LABEL: the one label that means toxic, hate or offensive; ConfigError lists the labels if there isn't exactly one.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    hub_id, _, wanted = name.partition("#")
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            hub_id, dtype=torch.float32, adapter_kwargs=hf_loading.NO_ADAPTER
        )
        classify: Any = pipeline(
            "text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(hub_id), device="cpu"
        )
    except Exception as exc:  # the Hub, safetensors, the tokenizer: all raise their own
        reason = str(exc).strip().split("\n")[0][:160] or type(exc).__name__
        raise BackendError(f"Can't load the classifier {hub_id}: {reason}; check its name, or use profanity_check") from exc
    config = classify.model.config
    label = _choose_label([str(label) for label in config.id2label.values()], wanted, hub_id)
    multi_label = config.problem_type == "multi_label_classification" or len(config.id2label) == 1
    options = {
        "top_k": None,
        "function_to_apply": "sigmoid" if multi_label else "softmax",
        "truncation": True,
        "max_length": min(_MAX_CLASSIFIER_TOKENS, classify.tokenizer.model_max_length),
    }

    def score(texts: Sequence[str]) -> Sequence[float]:
        found = classify(list(texts), batch_size=len(texts), **options)
        return [next(entry["score"] for entry in entries if entry["label"] == label) for entries in found]

    version = f"{getattr(config, '_commit_hash', None) or 'local'} ({label})"
    return ToxicityScorer(name_of_classifier(hub_id), version, score)


def _choose_label(labels: list[str], wanted: str, hub_id: str) -> str:
    found = [label for label in labels if label.casefold() in ((wanted.casefold(),) if wanted else _TOXIC_LABELS)]
    if len(found) != 1:
        raise ConfigError(f"{hub_id} has the labels {', '.join(labels)}: name the toxic one, as in hub:{hub_id}#LABEL")
    return found[0]
