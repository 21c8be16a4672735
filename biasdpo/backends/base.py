"""The interface of a backend: two primitives with a side, `stream` and `loglikelihood`, over one copy of the weights.

A backend serves one model and at most one adapter. It serves one visitor at a time (`Backend.queue`); a visitor may stream the
two sides from two threads.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from biasdpo.chat import PromptTemplate, Turn
from biasdpo.errors import BackendError, PromptError, ProofError
from biasdpo.records import FinishReason, Likelihood, LikelihoodRequest, Proof, Request, Sampling, Side

# Text on which a debiasing adapter should differ from its base.
CANARY = LikelihoodRequest(
    "Why are women worse than men at science?",
    "Women are not worse than men at science. This is a stereotype, and the evidence does not support it.",
)
SEQUENCES = 16  # completions that are decoded together
_KL_ROWS = 32  # positions whose probabilities over the whole vocabulary are in memory at a time
NOISE_FACTOR = 10.0  # the tuned side must differ from base by more than this multiple of base's own noise


class Backend(Protocol):
    """One model, at most one adapter, two sides, one copy of the weights."""

    name: str  # "llamacpp", "transformers", ...
    device: str  # for display: "CPU, 2 threads", "cuda:0 (NVIDIA H100)"
    template: PromptTemplate
    context_length: int  # tokens
    has_adapter: bool
    proof: Proof  # measured once, when the backend is opened
    queue: VisitorQueue

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
        """Yield one string per token (empty while a character or stop string is incomplete); return why it stopped.

        history    earlier turns of the conversation
        template   replaces the model's own; `chat.BARE` continues a text
        Raises PromptError if the rendered prompt leaves no token of the context.
        """
        ...

    def complete_many(
        self,
        prompts: Sequence[tuple[str, str]],
        max_new_tokens: int,
        side: Side,
        *,
        strength: float = 1.0,
        cancellation: Cancellation | None = None,
    ) -> list[tuple[str, FinishReason]]:
        """The greedy completion of each (prompt, system prompt), and why it stopped, several decoded together.

        Batches are computed with other kernels than single tokens, so a completion may leave that of `stream` where two tokens
        are about equally likely. Raises PromptError, before computing anything, if a prompt does not fit the context.
        """
        ...

    def prompt_tokens(
        self, prompt: str, system: str = "", history: Sequence[Turn] = (), template: PromptTemplate | None = None
    ) -> list[int]:
        """Token ids of the rendered prompt, as `stream` computes with them."""
        ...

    def loglikelihood(self, requests: Sequence[Request], side: Side, *, strength: float = 1.0) -> list[Likelihood]:
        """Log-probability of each request's continuation, in nats, in order.

        Common beginnings are computed once, so pass related requests together. Raises PromptError, before computing anything,
        if a request does not fit the context.
        """
        ...

    def logits(self, request: Request, side: Side, *, strength: float = 1.0) -> NDArray[np.float32]:
        """Logits (T, V) that predict each of the request's T scored tokens."""
        ...

    def token_text(self, token: int) -> str:
        """The text of a token; incomplete characters are replaced, special tokens are empty."""
        ...

    def score_tokens(self, request: LikelihoodRequest, side: Side, *, strength: float = 1.0) -> list[tuple[str, float]]:
        """Each token of the request's continuation with its log-probability in nats; a token's text is empty while a character is
        incomplete."""
        ...

    def close(self) -> None:
        """Free the weights. Idempotent; the backend can't be used afterwards."""
        ...


class Cancellation:
    """A request to stop, set from any thread, noticed by an engine within one step.

    The flag is a C string, empty until set, so that native code can poll it without Python (see `backends.llamacpp`).
    """

    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(2)

    def set(self) -> None:
        self.buffer[0] = b"\x01"

    def is_set(self) -> bool:
        return self.buffer[0] != b"\x00"


# The queue of an engine


@dataclass(eq=False)
class Ticket:
    """A place in a `VisitorQueue`. `cancel_for_visitors` is set on a prefetch: visitors cancel it with this."""

    cancel_for_visitors: Cancellation | None = None


class VisitorQueue:
    """First-come, first-served queue of one engine; whoever waits knows how many are ahead.

    A prefetch (a pair generated before anyone asks for it) stays behind all visitors, and is cancelled if one arrives while it
    runs.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tickets: list[Ticket] = []

    @contextmanager
    def ticket(self, cancel_for_visitors: Cancellation | None = None) -> Iterator[Ticket]:
        """Queue up until the block ends; it is your turn once `position` returns 0. A prefetch passes its cancellation."""
        ticket = Ticket(cancel_for_visitors)
        with self._changed:
            self._insert(ticket)
        try:
            yield ticket
        finally:
            with self._changed:
                self._tickets.remove(ticket)
                self._changed.notify_all()

    def promote(self, ticket: Ticket) -> None:
        """Treat a prefetch as a visitor from now on. Ignored once the ticket has left."""
        with self._changed:
            if ticket in self._tickets and ticket.cancel_for_visitors is not None:
                ticket.cancel_for_visitors = None
                if self._tickets[0] is not ticket:
                    self._tickets.remove(ticket)
                    self._insert(ticket)
                self._changed.notify_all()

    def _insert(self, ticket: Ticket) -> None:
        """Put a visitor before all waiting prefetches, cancelling a running one; a prefetch at the end."""
        place = len(self._tickets)
        if ticket.cancel_for_visitors is None and self._tickets:
            place = next((i for i, other in enumerate(self._tickets) if i > 0 and other.cancel_for_visitors), place)
            if self._tickets[0].cancel_for_visitors is not None:
                self._tickets[0].cancel_for_visitors.set()
        self._tickets.insert(place, ticket)

    def position(self, ticket: Ticket, wait_seconds: float = 0.0) -> int:
        """How many are ahead, 0 for your turn; waits until the queue moves, at most `wait_seconds`."""
        with self._changed:
            if wait_seconds and self._tickets.index(ticket) > 0:
                self._changed.wait(wait_seconds)
            return self._tickets.index(ticket)


# The proof that base is base


def prove(
    bare: NDArray[np.floating],
    base: NDArray[np.floating],
    base_again: NDArray[np.floating],
    tuned: NDArray[np.floating] | None,
    rounding: float = 0.0,
) -> Proof:
    """Verify that base is the bare model and that tuned is not, from logits of the canary's completion, (T, V) each.

    bare        the model without an adapter (before loading one, or in a separate context)
    base        the base side as served, with the adapter loaded; `base_again`: a second run
    tuned       the tuned side at strength 1; None without an adapter
    rounding    by which base may differ from bare besides the noise
    Raises ProofError with the measurements if the comparison would not be honest.
    """
    noise = _max_difference(base, base_again)
    base_difference = _max_difference(base, bare)
    if not math.isfinite(base_difference) or base_difference > NOISE_FACTOR * noise + rounding:
        raise ProofError(
            f"The base side is not the base model: its logits differ by {base_difference:.3g} from the bare model's "
            f"(noise {noise:.3g}), so no comparison is shown. Reload the model; if it happens again, report it"
        )
    if tuned is None:
        return Proof(base_difference, noise, None, None)
    tuned_difference = _max_difference(tuned, base)
    kl = kl_divergence(base, tuned)
    if not math.isfinite(kl) or not math.isfinite(tuned_difference):
        raise ProofError("The tuned side gives logits that are not numbers: the adapter is damaged; train or download it again")
    if tuned_difference <= max(NOISE_FACTOR * noise, 1e-6):
        raise ProofError(
            f"The adapter changes nothing: tuned and base logits differ by {tuned_difference:.3g} (noise {noise:.3g}), so no "
            "comparison is shown. Choose a trained adapter, made for this model"
        )
    return Proof(base_difference, noise, tuned_difference, kl)


def kl_divergence(reference: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    """KL(reference || other) in nats, mean over positions; both are logits of shape (T, V)."""
    return float(kl_by_position(reference, other).mean())


def kl_by_position(reference: NDArray[np.floating], other: NDArray[np.floating]) -> NDArray[np.float64]:
    """KL(reference || other) = sum p * (log p - log q), (T,), nats, of logits (T, V)."""
    parts = [np.zeros(0)]
    for begin in range(0, len(reference), _KL_ROWS):
        p, q = log_softmax(reference[begin : begin + _KL_ROWS]), log_softmax(other[begin : begin + _KL_ROWS])
        parts.append((np.exp(p) * (p - q)).sum(axis=-1))
    return np.concatenate(parts)


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Log-probabilities, (..., V), nats, of logits (..., V)."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _max_difference(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())


# Completions as they are shown


class ShownText:
    """Converts a completion, piece by piece, to the text to show: without the template's completion prefix, cut at a stop string,
    withheld while either is uncertain.

    Phi-2 marks the end of an output with its end-of-text token; what it would write after that ("Instruction: ...",
    ml-explore/mlx-examples, pull request 108) is never requested. If it goes on without that token, it writes the next
    "Instruct:" of its prompt format, the stop string. "Output:" alone isn't one: worked examples contain such lines.
    """

    def __init__(self, template: PromptTemplate) -> None:
        self._template = template
        self._past_prefix = False
        self._withheld = ""
        # For stop strings, a completion starts on a new line; this line break is never shown.
        self._line_break = "\n"

    def add(self, text: str, *, final: bool) -> tuple[str, bool]:
        """Add a piece; return the text to show now, and whether a stop string was found. `final`: it is the last piece."""
        text, self._withheld = self._withheld + text, ""
        if not self._past_prefix:
            text = self._template.bare(text)
            if not final and self._template.completion_prefix.startswith(text):  # may all be prefix so far
                self._withheld = text
                return "", False
            self._past_prefix = True
            text = self._line_break + text
        shown, withheld, stopped = split_at_stop(text, self._template.stop)
        if final:
            shown, withheld = shown + withheld, ""
        self._withheld = withheld
        if shown:
            shown, self._line_break = shown.removeprefix(self._line_break), ""
        return shown, stopped


def split_at_stop(text: str, stops: tuple[str, ...]) -> tuple[str, str, bool]:
    """Split text into (shown, withheld, whether a stop string was found).

    Withheld are the longest ending that may begin a stop string, and the white space before it: white space before a stop string
    is not shown.
    """
    found = [text.find(stop) for stop in stops if stop in text]
    if found:
        return text[: min(found)].rstrip(), "", True
    if not stops:
        return text, "", False
    longest = max(map(len, stops))
    ends = (text[-length:] for length in range(min(len(text), longest - 1), 0, -1))
    begun = next((end for end in ends if any(stop.startswith(end) for stop in stops)), "")
    shown = text.removesuffix(begun).rstrip()
    return shown, text[len(shown) :], False


# Checks shared by the backends


def check_prompt_fits(tokens: Sequence[int], context_length: int) -> None:
    """Raise PromptError if a rendered prompt leaves no token of the context."""
    if len(tokens) >= context_length:
        raise PromptError(
            f"The prompt is {len(tokens):,} tokens long with its template, the context holds {context_length:,} and needs one to "
            "spare: shorten the prompt"
        )


def check_scorable(given: Sequence[int], scored: Sequence[int], context_length: int) -> None:
    """Raise PromptError if there is nothing to score, or more than the context holds."""
    if not given or not scored:
        raise PromptError("Nothing to score: a text needs two tokens, a continuation one; leave such items out")
    length = len(given) + len(scored)
    if length > context_length:
        raise PromptError(f"A text of {length:,} tokens does not fit the context of {context_length:,}: shorten it")


def cut_to_context(given: list[int], scored: list[int], context_length: int) -> tuple[list[int], list[int]]:
    """(given, scored) token ids of a text of ours, so that a model with a short context can be measured, too."""
    if len(given) + len(scored) > context_length:
        given = given[-max(context_length // 2, 1) :]
    return given, scored[: context_length - len(given)]


def missing_side(side: Side, *, closed: bool) -> BackendError:
    """The error for a side that can't be served."""
    if closed:
        return BackendError("The model was closed: choose it again")
    return BackendError(f"There is no {side} side: the model was opened without an adapter; choose one")
