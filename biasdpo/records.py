"""The records that travel between the stages. All are frozen; each is checked once, where it is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from biasdpo.errors import ConfigError

Side = Literal["base", "tuned"]
Verdict = Literal["preferred", "tie", "both_biased", "retracted"]
FinishReason = Literal["end_of_text", "limit", "cancelled"]

STRENGTH_RANGE = (0.0, 1.5)
SEED_RANGE = (0, 2**31 - 1)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Both backends apply, in this order: repetition penalty (over prompt and completion,
    Keskar et al., 2019, arXiv:1909.05858), temperature, top-k, top-p (Holtzman et al., 2020, arXiv:1904.09751).

    max_new_tokens       tokens, at least 1
    temperature          0 is greedy: the most likely token, seed without effect
    top_p                probability mass kept, in (0, 1]; 1 keeps all
    top_k                tokens kept; 0 keeps all
    repetition_penalty   divides a seen token's logit; 1 is off
    seed                 of the random draw; 0 is a seed like any other
    """

    max_new_tokens: int = 160
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 40
    repetition_penalty: float = 1.1
    seed: int = 0

    def __post_init__(self) -> None:
        _check_integer("max_new_tokens", self.max_new_tokens, 1, 4096)
        _check_number("temperature", self.temperature, 0.0, 2.0)
        _check_number("top_p", self.top_p, 0.01, 1.0)
        _check_integer("top_k", self.top_k, 0, 1000)
        _check_number("repetition_penalty", self.repetition_penalty, 0.5, 2.0)
        _check_integer("seed", self.seed, *SEED_RANGE)


def check_strength(strength: float) -> float:
    """The adapter strength: multiplies the adapter's update; 0 is the base model, 1 is as trained."""
    _check_number("strength", strength, *STRENGTH_RANGE)
    return float(strength)


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{name} must be a number from {low} to {high}: got {value!r}; choose a value in that range")


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} must be a whole number from {low} to {high}: got {value!r}; choose a value in that range")


@dataclass(frozen=True)
class Completion:
    """What one side wrote, whole or so far. `finish_reason` is None while it is being written."""

    side: Side
    text: str = ""
    tokens: int = 0
    finish_reason: FinishReason | None = None
    seconds_to_first_token: float | None = None
    tokens_per_second: float | None = None  # after the first token

    def to_json(self) -> dict[str, Any]:
        row = asdict(self)
        del row["side"]
        return row


@dataclass(frozen=True)
class GenerationPair:
    """One prompt, two completions, and what produced each. `right` is None where there is no adapter (base-only)."""

    prompt: str
    model: str
    adapter: str  # adapter id, or "" for base-only
    backend: str
    sampling: Sampling
    system: str
    strength: float
    canary_kl_nats: float | None
    left: Completion
    right: Completion | None

    @property
    def finished(self) -> bool:
        return all(c is None or c.finish_reason is not None for c in (self.left, self.right))

    def to_json(self) -> dict[str, Any]:
        """The object that `python -m biasdpo compare --json` prints (DESIGN, command line)."""
        row: dict[str, Any] = {
            "prompt": self.prompt,
            "model": self.model,
            "adapter": self.adapter,
            "backend": self.backend,
            "seed": self.sampling.seed,
            "strength": self.strength,
            "sampling": asdict(self.sampling),
            "system": self.system,
        }
        for completion in (self.left, self.right):
            if completion is not None:
                row[completion.side] = completion.to_json()
        row.setdefault("tuned", None)
        row["canary_kl_nats"] = self.canary_kl_nats
        return row


@dataclass(frozen=True)
class JudgmentMeta:
    """What produced the two completions that were judged, and how it was done. Never null: "" or 0 where it does not apply.

    sampling      JSON of the `Sampling` that both were drawn with
    left_side     what stood left: base or tuned; "base 1" or "base 2" of two samples; "pasted 1" or "pasted 2"
    chosen_side   the same words for what was chosen; "" for a tie
    seconds       from showing the pair to the verdict
    """

    model: str = ""
    adapter: str = ""
    backend: str = ""
    sampling: str = ""
    seed: int = 0
    left_side: str = ""
    chosen_side: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Judgment:
    """What an annotator said of one generation pair: a row of the journal (DESIGN, Records). Texts are never null.

    id                    made before the first try to store it, so that a second try stores it once
    created_at            UTC, ISO 8601
    pair_id               the same two completions to the same prompt are the same pair
    chosen, rejected      as judged, edits included; left and right where neither is preferred
    original_*            the text before an edit; "" where there was none
    annotator             a pseudonym
    source                compare, label, import:NAME or seed
    retracts              the id of the judgment that this one takes back
    repeat_of             pair_id, where the pair was shown again to see whether the annotator says the same
    """

    id: str
    created_at: str
    pair_id: str
    prompt: str
    chosen: str
    rejected: str
    original_chosen: str = ""
    original_rejected: str = ""
    verdict: Verdict = "preferred"
    category: str = ""
    target_group: str = ""
    annotator: str = ""
    note: str = ""
    source: str = "label"
    retracts: str = ""
    repeat_of: str = ""
    meta: JudgmentMeta = JudgmentMeta()


@dataclass(frozen=True)
class Proof:
    """That the comparison is honest, established once per load at strength 1 (see `backends.base.prove`).

    base_max_difference   largest |logit| difference between the base side and the bare model
    noise                 largest |logit| difference between two runs of the base side
    tuned_max_difference  largest |logit| difference between the tuned and the base side
    kl_nats               KL(base || tuned), nats, mean over the canary's tokens; None where there is no adapter
    """

    base_max_difference: float
    noise: float
    tuned_max_difference: float | None
    kl_nats: float | None


@dataclass(frozen=True)
class LikelihoodRequest:
    """How likely is `continuation` after `prompt` rendered with the model's template and `system`?

    The template's completion prefix is put before the continuation. `end_of_text` counts the end-of-text token in, as
    training does.
    """

    prompt: str
    continuation: str
    system: str = ""
    end_of_text: bool = False


@dataclass(frozen=True)
class TextRequest:
    """How likely is a bare `text`, without any template? The first token is given, the others are scored."""

    text: str


@dataclass(frozen=True)
class ContinuationRequest:
    """How likely is `continuation` after the bare text `context`, without any template? Both are tokenized as one text.

    An empty context stands for the token that a text begins with (where the model has none: its end-of-text token), so that
    all of the continuation is scored. Both as lm-evaluation-harness does it.
    """

    context: str
    continuation: str


Request = LikelihoodRequest | TextRequest | ContinuationRequest


@dataclass(frozen=True)
class CompletionRequest:
    """What is written after `prompt`?

    bare     the prompt is a text that goes on, without any template; else it is rendered with the model's
    sample   tells several completions of one prompt apart: an evaluation derives the seed of each from it and its own
    """

    prompt: str
    sampling: Sampling
    bare: bool = False
    sample: int = 0


@dataclass(frozen=True)
class Likelihood:
    """`logp` (nats) summed over `tokens` scored tokens."""

    logp: float
    tokens: int
