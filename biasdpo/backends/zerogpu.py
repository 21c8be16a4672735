"""The transformers backend on a ZeroGPU Space, where a process gets a GPU for one call at a time.

The page's process never uses CUDA: it holds the model on the CPU, proves its sides there, and refuses what can't be computed
before it asks for a GPU. What it streams and scores is computed by `on_gpu`, in a process that the `spaces` package forks. That
process opens and proves the model itself, on the GPU, and keeps it for the next call. Everything that crosses is picklable.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from biasdpo.backends.base import SEQUENCES, Cancellation, VisitorQueue, check_prompt_fits, missing_side
from biasdpo.chat import PromptTemplate, Turn
from biasdpo.errors import BackendError, BiasDPOError
from biasdpo.records import FinishReason, Likelihood, LikelihoodRequest, Request, Sampling, Side, check_strength
from biasdpo.workspace import is_zerogpu

if TYPE_CHECKING:
    from biasdpo.backends.hf import TransformersBackend

# Seconds of a GPU to ask for. A visitor's daily quota must cover them, and shorter calls are served earlier.
_OPENING_SECONDS = 20.0  # a new process opens and proves the model
_STEP_SECONDS = 0.05
_LONGEST_SECONDS = 120.0
_POLL_SECONDS = 0.05  # between two looks at a cancellation
_RETURN_SECONDS = 2.0  # a cancelled GPU is returned after its next token


@dataclass(frozen=True)
class Opening:
    """The arguments of `open_transformers` in the process that has the GPU."""

    folder: Path
    template: PromptTemplate
    adapter_folder: Path | None
    context_length: int
    device: str = "cuda"


@dataclass(frozen=True)
class Call:
    """One call of a backend's method. `steps`: forward passes, about."""

    method: Literal["stream", "complete_many", "loglikelihood", "logits", "score_tokens"]
    side: Side
    steps: int
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Ended:
    """The last event of a call: what it returned, or its error."""

    result: Any = None
    error: BiasDPOError | None = None


Event = tuple[int, "str | Ended"]
"""A call's place among those of one `on_gpu`, and the next piece of its text, or its end."""
Function = TypeVar("Function", bound=Callable[..., Any])


def seconds_of(_opening: Opening, calls: Sequence[Call]) -> int:
    """How long to ask for a GPU, from the arguments of `on_gpu`. The calls run together."""
    return math.ceil(min(_OPENING_SECONDS + _STEP_SECONDS * max(call.steps for call in calls), _LONGEST_SECONDS))


def lent_gpu(function: Function) -> Function:
    """`spaces.GPU` on a ZeroGPU Space; anywhere else, and without the package, the function itself."""
    if not is_zerogpu() or find_spec("spaces") is None:
        return function
    import spaces

    decorated: Function = spaces.GPU(duration=seconds_of)(function)
    return decorated


# In the process that has the GPU

_kept: dict[Opening, TransformersBackend] = {}  # one at most


@lent_gpu
def on_gpu(opening: Opening, calls: list[Call]) -> Generator[Event, None, None]:
    """Compute the calls together, a thread each, so that the two sides of a pair share a batch. Closing the generator cancels."""
    try:
        backend = _open(opening)
    except Exception as exc:  # as an event, since `spaces` passes on an error's class only
        yield from ((place, Ended(error=_portable(exc))) for place in range(len(calls)))
        return
    cancellation = Cancellation()
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def compute(place: int, call: Call) -> Any:
        if call.method != "stream":
            return getattr(backend, call.method)(side=call.side, **call.arguments)
        stream = backend.stream(side=call.side, cancellation=cancellation, **call.arguments)
        while True:
            try:
                events.put((place, next(stream)))
            except StopIteration as stop:
                return stop.value

    def run(place: int, call: Call) -> None:
        try:
            ended = Ended(compute(place, call))
        except BaseException as exc:
            ended = Ended(error=_portable(exc))
        events.put((place, ended))

    threads = [threading.Thread(target=run, args=(place, call), daemon=True) for place, call in enumerate(calls)]
    try:
        for thread in threads:
            thread.start()
        running = len(calls)
        while running:
            event = events.get()
            running -= isinstance(event[1], Ended)
            yield event
    finally:
        cancellation.set()
        for thread in threads:
            thread.join()


def _portable(exc: BaseException) -> BiasDPOError:
    """An error of ours without its traceback, which holds tensors."""
    if isinstance(exc, BiasDPOError):
        return type(exc)(str(exc))
    return BackendError(f"The GPU's process failed ({type(exc).__name__}: {exc}): try again")


def _open(opening: Opening) -> TransformersBackend:
    from biasdpo.backends.hf import open_transformers

    if opening not in _kept:
        for backend in _kept.values():
            backend.close()
        _kept.clear()
        _kept[opening] = open_transformers(
            opening.folder, opening.template, opening.adapter_folder, opening.context_length, device=opening.device
        )
    return _kept[opening]


# In the page's process


class Lease:
    """Calls that share one use of the GPU, which begins when the lease is made. Each call is read by one thread."""

    def __init__(self, opening: Opening, calls: list[Call]) -> None:
        self._calls = calls
        self._events: list[queue.SimpleQueue[str | Ended]] = [queue.SimpleQueue() for _ in calls]
        self._lock = threading.Lock()
        self._readers = len(calls)
        # In the visitor's context: ZeroGPU counts the seconds for whoever has sent the request that is found there.
        self._thread = threading.Thread(target=copy_context().run, args=(self._receive, opening), name="ZeroGPU", daemon=True)
        self._thread.start()

    def read(self, call: Call, cancellation: Cancellation) -> Generator[str, None, Any]:
        """Yield the pieces of a call's text; return its result. Raises its error."""
        events = self._events[next(i for i, one in enumerate(self._calls) if one is call)]
        try:
            while not cancellation.is_set():
                try:
                    event = events.get(timeout=_POLL_SECONDS)
                except queue.Empty:
                    continue
                if not isinstance(event, Ended):
                    yield event
                elif event.error is not None:
                    raise event.error
                else:
                    return event.result
            return "cancelled"
        finally:
            with self._lock:
                self._readers -= 1
            if not self._readers:
                self._thread.join(_RETURN_SECONDS)

    def _receive(self, opening: Opening) -> None:
        last = [Ended(error=BackendError("The GPU's process ended before its answer: try again"))] * len(self._calls)
        running = len(self._calls)
        try:
            stream = on_gpu(opening, self._calls)
            for place, event in stream:
                if not self._readers:
                    stream.close()
                elif isinstance(event, Ended):
                    last[place] = event
                    running -= 1
                # The last end waits until the GPU is returned, so that the next call gets the same process, with its model.
                if running:
                    self._events[place].put(event)
        except Exception as exc:  # `spaces` raises Gradio's errors: no quota left, no GPU free
            said = getattr(exc, "message", exc)
            error = BackendError(f"ZeroGPU did not compute this ({said}): try again later, or sign in to the Hub for more quota")
            last = [Ended(error=exc if isinstance(exc, BiasDPOError) else error)] * len(self._calls)
        for events, ended in zip(self._events, last, strict=True):
            events.put(ended)  # once more, where it was read


@dataclass(eq=False)
class ZeroGpuBackend:
    """See `backends.base.Backend`. Created by `open_zerogpu`."""

    local: TransformersBackend
    opening: Opening
    queue: VisitorQueue = field(default_factory=VisitorQueue)
    device: str = "ZeroGPU, a GPU for each request"

    def __post_init__(self) -> None:
        from biasdpo.backends.hf import Pairing

        self.name = self.local.name
        self.template, self.context_length = self.local.template, self.local.context_length
        self.has_adapter, self.proof = self.local.has_adapter, self.local.proof
        self._pairing = Pairing[Call, Lease]()
        self._closed = False

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
        """See `backends.base.Backend.stream`. The two sides of a pair share a lease."""
        self._check(side, strength)
        check_prompt_fits(self.prompt_tokens(prompt, system, history, template), self.context_length)
        arguments = {"prompt": prompt, "sampling": sampling, "system": system, "history": tuple(history)}
        arguments |= {"strength": strength, "template": template}
        call = Call("stream", side, sampling.max_new_tokens, arguments)
        lease = self._pairing.batch_of([], call, self._lend) if self.has_adapter else self._lend([call])
        reason: FinishReason = yield from lease.read(call, cancellation or Cancellation())
        return reason

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
        self._check(side, strength)
        arguments = {"prompts": list(prompts), "max_new_tokens": max_new_tokens, "strength": strength}
        steps = max_new_tokens * math.ceil(len(prompts) / SEQUENCES)
        result = self._result(Call("complete_many", side, steps, arguments), cancellation)
        return [("", "cancelled")] * len(prompts) if result == "cancelled" else result

    def prompt_tokens(
        self, prompt: str, system: str = "", history: Sequence[Turn] = (), template: PromptTemplate | None = None
    ) -> list[int]:
        """See `backends.base.Backend.prompt_tokens`."""
        return self.local.prompt_tokens(prompt, system, history, template)

    def loglikelihood(self, requests: Sequence[Request], side: Side, *, strength: float = 1.0) -> list[Likelihood]:
        """See `backends.base.Backend.loglikelihood`."""
        self._check(side, strength)
        call = Call("loglikelihood", side, len(requests), {"requests": list(requests), "strength": strength})
        result: list[Likelihood] = self._result(call)
        return result

    def logits(self, request: Request, side: Side, *, strength: float = 1.0) -> NDArray[np.float32]:
        """See `backends.base.Backend.logits`."""
        self._check(side, strength)
        result: NDArray[np.float32] = self._result(Call("logits", side, 1, {"request": request, "strength": strength}))
        return result

    def token_text(self, token: int) -> str:
        """See `backends.base.Backend.token_text`."""
        return self.local.token_text(token)

    def score_tokens(self, request: LikelihoodRequest, side: Side, *, strength: float = 1.0) -> list[tuple[str, float]]:
        """See `backends.base.Backend.score_tokens`."""
        self._check(side, strength)
        result: list[tuple[str, float]] = self._result(Call("score_tokens", side, 1, {"request": request, "strength": strength}))
        return result

    def close(self) -> None:
        """Free the weights in this process; those on the GPU go with its process."""
        self._closed = True
        self.local.close()

    def _lend(self, calls: list[Call]) -> Lease:
        return Lease(self.opening, calls)

    def _result(self, call: Call, cancellation: Cancellation | None = None) -> Any:
        reading: Iterator[str] = self._lend([call]).read(call, cancellation or Cancellation())
        try:
            next(reading)
        except StopIteration as stop:
            return stop.value
        raise AssertionError(f"{call.method} does not stream")

    def _check(self, side: Side, strength: float) -> None:
        check_strength(strength)
        if self._closed or (side == "tuned" and not self.has_adapter):
            raise missing_side(side, closed=self._closed)


def open_zerogpu(
    folder: Path,
    template: PromptTemplate,
    adapter_folder: Path | None,
    context_length: int,
    *,
    device: str = "cuda",
    on_progress: Callable[[float, str], None] = lambda _share, _what: None,
) -> ZeroGpuBackend:
    """`open_transformers` on a ZeroGPU Space: here on the CPU, at the first call on the GPU that is lent for it.

    device   of the process that `on_gpu` runs in
    """
    from biasdpo.backends.hf import open_transformers

    local = open_transformers(folder, template, adapter_folder, context_length, device="cpu", on_progress=on_progress)
    return ZeroGpuBackend(local, Opening(folder, template, adapter_folder, context_length, device))
