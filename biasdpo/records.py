"""Frozen records passed between modules; each is validated once, when it is created."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from biasdpo.errors import ConfigError

Side = Literal["base", "tuned"]
Verdict = Literal["preferred", "tie", "both_biased", "both_unusable", "retracted"]
FinishReason = Literal["end_of_text", "limit", "cancelled"]

STRENGTH_RANGE = (0.0, 1.5)
SEED_RANGE = (0, 2**31 - 1)


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. Both backends apply, in this order: repetition penalty (over prompt and completion, Keskar et al.,
    2019, arXiv:1909.05858), temperature, top-k, top-p (Holtzman et al., 2020, arXiv:1904.09751)."""

    max_new_tokens: int = 160
    temperature: float = 0.7  # 0: greedy decoding, the seed has no effect
    top_p: float = 0.9  # probability mass to keep, in (0, 1]
    top_k: int = 40  # tokens to keep; 0 keeps all
    repetition_penalty: float = 1.1  # 1: off
    seed: int = 0

    def __post_init__(self) -> None:
        _check_integer("max_new_tokens", self.max_new_tokens, 1, 4096)
        _check_number("temperature", self.temperature, 0.0, 2.0)
        _check_number("top_p", self.top_p, 0.01, 1.0)
        _check_integer("top_k", self.top_k, 0, 1000)
        _check_number("repetition_penalty", self.repetition_penalty, 0.5, 2.0)
        _check_integer("seed", self.seed, *SEED_RANGE)


def check_strength(strength: float) -> float:
    """Validate an adapter strength, the factor on the adapter's update: 0 is the base model, 1 is as trained."""
    _check_number("strength", strength, *STRENGTH_RANGE)
    return float(strength)


def _check_number(name: str, value: object, low: float, high: float, types: Any = int | float, what: str = "number") -> None:
    if isinstance(value, bool) or not isinstance(value, types) or not low <= value <= high:
        raise ConfigError(f"{name} must be a {what} from {low} to {high}: got {value!r}; choose a value in that range")


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    _check_number(name, value, low, high, int, "whole number")


@dataclass(frozen=True)
class Completion:
    """One side's text, complete or in progress (`finish_reason` is None)."""

    side: Side
    text: str = ""
    tokens: int = 0
    finish_reason: FinishReason | None = None
    seconds_to_first_token: float | None = None
    tokens_per_second: float | None = None  # after the first token

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "side"}


class PairTurn(NamedTuple):
    """An earlier turn of a conversation: one prompt, and what each arm answered ("" for an arm that is not there)."""

    prompt: str
    base: str
    tuned: str


@dataclass(frozen=True)
class GenerationPair:
    """One prompt, its two completions, and the settings that produced them. `right` is None without an adapter.

    history   the conversation so far; each arm reads its own completions
    """

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
    history: tuple[PairTurn, ...] = ()

    def history_of(self, side: Side) -> tuple[tuple[str, str], ...]:
        """The earlier (prompt, completion) turns of one arm."""
        return tuple((turn.prompt, turn.base if side == "base" else turn.tuned) for turn in self.history)

    def continued(self) -> tuple[PairTurn, ...]:
        """The history of a follow-up: this pair's, and this pair."""
        return (*self.history, PairTurn(self.prompt, self.left.text, self.right.text if self.right is not None else ""))

    @property
    def finished(self) -> bool:
        return all(c is None or c.finish_reason is not None for c in (self.left, self.right))

    def to_json(self) -> dict[str, Any]:
        """The JSON object printed by `python -m biasdpo compare --json`."""
        keys = ("prompt", "model", "adapter", "backend", "strength", "system")
        row: dict[str, Any] = {key: getattr(self, key) for key in keys}
        row |= {"seed": self.sampling.seed, "sampling": asdict(self.sampling)}
        for completion in (self.left, self.right):
            if completion is not None:
                row[completion.side] = completion.to_json()
        row.setdefault("tuned", None)
        row["canary_kl_nats"] = self.canary_kl_nats
        if self.history:
            row["history"] = [turn._asdict() for turn in self.history]
        return row


@dataclass(frozen=True)
class JudgmentMeta:
    """How the two judged completions were produced and shown. Never null: "" or 0 where a field does not apply."""

    model: str = ""
    adapter: str = ""
    backend: str = ""
    sampling: str = ""  # JSON of the `Sampling`
    seed: int = 0
    left_side: str = ""  # shown on the left: base or tuned; "base 1" or "base 2" (two samples); "pasted 1" or "pasted 2"
    chosen_side: str = ""  # in the same words; "" for a tie
    seconds: float = 0.0  # from showing the pair to the verdict
    left_finish: str = ""  # why the left completion ended: a `FinishReason`; "" for text that was not generated here
    right_finish: str = ""
    browser: str = ""  # hash of the secret of the annotator's browser, which finds its own judgments again


@dataclass(frozen=True)
class Judgment:
    """An annotator's verdict on one generation pair: one row of the journal. Texts are never null."""

    id: str  # created before the first attempt to store it, so that a retry stores it once
    created_at: str  # UTC, ISO 8601
    pair_id: str  # equal for the same two completions of the same prompt
    prompt: str
    chosen: str  # as judged, edits included; left and right if neither is preferred
    rejected: str
    original_chosen: str = ""  # before an edit; "" without one
    original_rejected: str = ""
    verdict: Verdict = "preferred"
    category: str = ""
    target_group: str = ""
    annotator: str = ""  # a pseudonym
    note: str = ""
    source: str = "label"  # compare, label, import:NAME or seed
    retracts: str = ""  # id of the judgment that this one retracts
    repeat_of: str = ""  # pair_id, if the pair was shown again to measure self-agreement
    meta: JudgmentMeta = JudgmentMeta()


@dataclass(frozen=True)
class Proof:
    """Evidence that base is the unmodified model and tuned is not, measured once per load (see `backends.base.prove`)."""

    base_max_difference: float  # largest |logit| difference between the base side and the bare model
    noise: float  # the same between two runs of the base side
    tuned_max_difference: float | None  # the same between the tuned and the base side; None without an adapter
    kl_nats: float | None  # KL(base || tuned), mean over the canary's tokens; None without an adapter


@dataclass(frozen=True)
class LikelihoodRequest:
    """Asks for the log-probability of `continuation` after `prompt`, rendered with the model's template and `system`.

    The template's completion prefix precedes the continuation. `end_of_text` includes the end-of-text token, as training does.
    """

    prompt: str
    continuation: str
    system: str = ""
    end_of_text: bool = False
    history: tuple[tuple[str, str], ...] = ()  # earlier (prompt, completion) turns


@dataclass(frozen=True)
class TextRequest:
    """Asks for the log-probability of a bare `text`: its first token is given, the others are scored."""

    text: str


@dataclass(frozen=True)
class ContinuationRequest:
    """Asks for the log-probability of `continuation` after the bare text `context`, both tokenized as one text.

    An empty context stands for the BOS token (or EOS if the model has none), so that the whole continuation is scored. Both
    follow lm-evaluation-harness.
    """

    context: str
    continuation: str


Request = LikelihoodRequest | TextRequest | ContinuationRequest


@dataclass(frozen=True)
class CompletionRequest:
    """Asks for a completion of `prompt`."""

    prompt: str
    sampling: Sampling
    bare: bool = False  # continue the prompt as plain text instead of rendering it with the model's template
    sample: int = 0  # index among several completions of one prompt; an evaluation derives each one's seed from it


@dataclass(frozen=True)
class Likelihood:
    """`logp` (nats) summed over `tokens` scored tokens."""

    logp: float
    tokens: int


# Cells of a CSV file

_FORMULA = re.compile(r"'*[=+\-@\t\r]")


def csv_cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: a quote stands before a text that begins like one."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def csv_text(cell: str) -> str:
    """The text that `csv_cell` has made a cell of."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
