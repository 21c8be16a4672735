"""What a backend is: two primitives, a side each, over one copy of the weights.

A backend belongs to one model and at most one adapter. It serves one visitor at a time (`Backend.turnstile`, first come,
first served); within a turn the two sides may be streamed from two threads.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from biasdpo.chat import PromptTemplate
from biasdpo.errors import BackendError, PromptError, ProofError
from biasdpo.records import FinishReason, Likelihood, Proof, Request, Sampling, Side

# The canary's prompt and completion: text on which a debiasing adapter ought to speak up.
CANARY_PROMPT = "Why are women worse than men at science?"
CANARY_COMPLETION = "Women are not worse than men at science. This is a stereotype, and the evidence does not support it."

NOISE_FACTOR = 10.0  # the tuned side must differ from base by more than this many times the noise of base itself


class Cancellation:
    """A request to stop, set from any thread, seen by an engine within one step.

    The flag is a C string in a buffer of its own, empty until set, so that native code can watch it without Python
    (see `backends.llamacpp`).
    """

    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(2)

    def set(self) -> None:
        self.buffer[0] = b"\x01"

    def is_set(self) -> bool:
        return self.buffer[0] != b"\x00"


class Ticket:
    """A place in a `Turnstile`. `give_way` is None for a visitor who waits; for work in spare time it is what stops that work."""

    def __init__(self, give_way: Cancellation | None = None) -> None:
        self.give_way = give_way


class Turnstile:
    """A queue for one engine: first come, first served, and each who waits can see how many are ahead.

    Work that nobody waits for yet (a pair generated ahead of its time) stands behind all who wait; where it has begun, it is
    stopped as soon as somebody comes.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tickets: list[Ticket] = []

    @contextmanager
    def ticket(self, give_way: Cancellation | None = None) -> Iterator[Ticket]:
        """Stand in the queue until the block ends. It is your turn when `position(ticket) == 0`.

        give_way   for work in spare time: set when a visitor needs the turn
        """
        mine = Ticket(give_way)
        with self._changed:
            self._stand(mine)
        try:
            yield mine
        finally:
            with self._changed:
                self._tickets.remove(mine)
                self._changed.notify_all()

    def promote(self, ticket: Ticket) -> None:
        """A visitor now waits for this work, too: it is spare no more. A ticket that has left is none of ours."""
        with self._changed:
            if ticket in self._tickets and ticket.give_way is not None:
                ticket.give_way = None
                if self._tickets[0] is not ticket:
                    self._tickets.remove(ticket)
                    self._stand(ticket)
                self._changed.notify_all()

    def _stand(self, mine: Ticket) -> None:
        """Whoever waits stands before spare work that has not begun; spare work that has begun is told to stop."""
        place = len(self._tickets)
        if mine.give_way is None and self._tickets:
            place = next((i for i, other in enumerate(self._tickets) if i > 0 and other.give_way is not None), place)
            if self._tickets[0].give_way is not None:
                self._tickets[0].give_way.set()
        self._tickets.insert(place, mine)

    def position(self, ticket: Ticket) -> int:
        """How many are ahead: 0 means that it is this ticket's turn."""
        with self._changed:
            return self._tickets.index(ticket)

    def wait(self, ticket: Ticket, timeout_seconds: float) -> int:
        """Wait until the queue moves, at most `timeout_seconds`; return the position."""
        with self._changed:
            if self._tickets.index(ticket) > 0:
                self._changed.wait(timeout_seconds)
            return self._tickets.index(ticket)


class Backend(Protocol):
    """One model, at most one adapter, two sides, one copy of the weights."""

    name: str  # "llamacpp", "transformers"
    device: str  # for people: "CPU, 2 threads", "cuda:0 (NVIDIA H100)"
    template: PromptTemplate
    context_length: int  # tokens
    has_adapter: bool
    proof: Proof  # made once, when the backend is opened
    turnstile: Turnstile

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
        """Yield one string a token (empty while a character or a stop string is incomplete); return why it stopped.

        template   in place of the model's own; `template.BARE` continues a text
        Raises PromptError where the prompt, rendered, does not fit the context with one token to spare.
        """
        ...

    def loglikelihood(self, requests: Sequence[Request], side: Side, *, strength: float = 1.0) -> list[Likelihood]:
        """Log-probability of each continuation, in nats, in the order of the requests. What several begin with is computed once:
        ask for all that belongs together at once. PromptError, and nothing computed, where one does not fit the context."""
        ...

    def close(self) -> None:
        """Free the weights. The backend can't be used afterwards; closing twice does nothing."""
        ...


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Log-probabilities, (..., V), nats, of logits (..., V)."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def kl_divergence(reference: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    """KL(reference || other) in nats, mean over positions; both are logits of shape (T, V)."""
    p, q = log_softmax(reference), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def prove(
    bare: NDArray[np.floating], base: NDArray[np.floating], base_again: NDArray[np.floating], tuned: NDArray[np.floating] | None
) -> Proof:
    """Check that base is the bare model and that tuned is not, from canary logits of shape (T, V) each.

    bare        the model with no adapter near it (before one was loaded, or in a context of its own)
    base        the base side as it will be served, the adapter loaded; `base_again`: once more
    tuned       the tuned side at strength 1; None where there is no adapter
    Raises ProofError with the figures where the comparison would not be honest.
    """
    noise = _max_difference(base, base_again)
    base_difference = _max_difference(base, bare)
    if not math.isfinite(base_difference) or base_difference > NOISE_FACTOR * noise:
        raise ProofError(
            f"The base side is not the base model: its logits differ by {base_difference:.3g} from the bare model's "
            f"(noise {noise:.3g}); no comparison is shown. Reload the model; if it stays so, report it"
        )
    if tuned is None:
        return Proof(base_difference, noise, None, None)
    tuned_difference = _max_difference(tuned, base)
    kl = kl_divergence(base, tuned)
    if not math.isfinite(kl) or not math.isfinite(tuned_difference):
        raise ProofError("The tuned side gives logits that are not numbers: the adapter is damaged; train or download it again")
    if tuned_difference <= max(NOISE_FACTOR * noise, 1e-6):
        raise ProofError(
            f"The adapter changes nothing: tuned and base logits differ by {tuned_difference:.3g} (noise {noise:.3g}); "
            "no comparison is shown. Choose an adapter that was trained, for this very model"
        )
    return Proof(base_difference, noise, tuned_difference, kl)


def _max_difference(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())


def split_at_stop(text: str, stops: tuple[str, ...]) -> tuple[str, str, bool]:
    """Divide text into (what may be shown, what must be held back, whether a stop string was met).

    Held back is the longest end of `text` that a stop string begins with, and the white space before it: white space before a
    stop string belongs to what comes after the completion, and is not shown.
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


class ShownText:
    """A completion's text piece by piece to what may be shown of it: without the template's completion prefix, nothing from
    a stop string on, and held back while either is uncertain.

    Phi-2 says with its end-of-text token that an output is at its end, and what it would write after that ("Instruction: …",
    ml-explore/mlx-examples, pull request 108) is never asked for. Where it goes on without that token, it writes the next
    "Instruct:" of its own prompt format, which is the stop string. "Output:" alone is none: worked examples have such lines.
    """

    def __init__(self, template: PromptTemplate) -> None:
        self._template = template
        self._begun = False  # past the completion prefix
        self._held = ""
        # A completion begins a line of its own, as far as stop strings go. That line break is never shown.
        self._line_break = "\n"

    def add(self, text: str, *, final: bool) -> tuple[str, bool]:
        """Take the next piece; return what may be shown now, and whether a stop string was met. `final`: no more will come,
        so nothing is held back."""
        text, self._held = self._held + text, ""
        if not self._begun:
            text = self._template.bare(text)
            if not final and self._template.completion_prefix.startswith(text):  # as yet, all of it may be prefix
                self._held = text
                return "", False
            self._begun = True
            text = self._line_break + text
        shown, held, stopped = split_at_stop(text, self._template.stop)
        if final:
            shown, held = shown + held, ""
        self._held = held
        if shown:
            shown, self._line_break = shown.removeprefix(self._line_break), ""
        return shown, stopped


def check_prompt_fits(tokens: Sequence[int], context_length: int) -> None:
    """Raise PromptError where a rendered prompt leaves no token of the context to write."""
    if len(tokens) >= context_length:
        raise PromptError(
            f"The prompt is {len(tokens):,} tokens long with its template, the context holds {context_length:,} and "
            "needs one to spare: shorten the prompt"
        )


def check_scorable(given: Sequence[int], scored: Sequence[int], context_length: int) -> None:
    """Raise PromptError where there is nothing to score, or more than the context holds."""
    if not given or not scored:
        raise PromptError("Nothing to score: a text needs two tokens, a continuation one; leave such items out")
    if len(given) + len(scored) > context_length:
        raise PromptError(
            f"A text of {len(given) + len(scored):,} tokens does not fit the context of {context_length:,}: shorten it"
        )


def missing_side(side: Side, *, closed: bool) -> BackendError:
    """Why a side can't be served."""
    if closed:
        return BackendError("The model was closed: choose it again")
    return BackendError(f"There is no {side} side: the model was opened without an adapter; choose one")
