"""What an export's proof measures: two tokenizers, two engines' probabilities, and whether the debiasing survives.

"Original" is the model in transformers (+ PEFT) in F32, "exported" is the file in llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from biasdpo import export_strings
from biasdpo.backends.base import Backend, log_softmax
from biasdpo.benchmarks.preference import Preference
from biasdpo.dataset import PreferencePair
from biasdpo.errors import ModelError, PromptError
from biasdpo.records import LikelihoodRequest, Side, TextRequest
from biasdpo.template import PromptTemplate, Segment
from biasdpo.workspace import ASSETS

if TYPE_CHECKING:  # both are dear to import
    from biasdpo.backends.hf import TransformersBackend
    from biasdpo.backends.llamacpp import LlamaCppBackend

CLEAR = 0.02  # logits: what is nearer than this may change places by ggml's F16 GELU
_ROWS = 32  # positions whose probabilities over the whole vocabulary are held at a time

Count = Callable[[int, int], None]
"""Called with (done, in all)."""


def fixed_texts() -> list[LikelihoodRequest | TextRequest]:
    """assets/proof_texts.jsonl: completions that refuse a stereotype, prose, code, numbers, other languages."""
    lines = (ASSETS / "proof_texts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        LikelihoodRequest(row["prompt"], row["text"], end_of_text=True) if row["prompt"] else TextRequest(row["text"])
        for row in rows
    ]


# Tokenizers


@dataclass(frozen=True)
class TokenizerCheck:
    """Texts that both tokenizers were given. `first`: the first that differs, by repr, with both readings; "" where none does."""

    strings: int
    different: int
    first: str = ""


def compare_tokenizers(exported: LlamaCppBackend, tokenizer: Any, template: PromptTemplate) -> TokenizerCheck:
    """Both tokenizers on the strings of `export_strings` as a user's text, on rendered prompts, and their end of text."""
    count, different, first = 0, 0, ""
    for text, ours, theirs in tokenized(exported, tokenizer, template):
        count += 1
        if ours != theirs:
            different += 1
            first = first or f"{text!r}: {ours[:12]} in llama.cpp, {theirs[:12]} in transformers"
    return TokenizerCheck(count, different, first)


def tokenized(exported: LlamaCppBackend, tokenizer: Any, template: PromptTemplate) -> Iterator[tuple[str, list[int], list[int]]]:
    """(text, llama.cpp's token ids, transformers' token ids), through the functions with which the backends read text."""
    from biasdpo.backends.hf_copy import encode_prompt, encode_text

    own = sorted({*tokenizer.all_special_tokens, *(str(token) for token in tokenizer.added_tokens_decoder.values())})
    for text in export_strings.strings(own):
        yield text, exported.tokenize((Segment(text, special=False),), begin=False), encode_text(tokenizer, text)
    for prompt in [request.prompt for request in fixed_texts() if isinstance(request, LikelihoodRequest)]:
        rendered = template.render(prompt)
        yield template.render_text(prompt), exported.tokenize(rendered), encode_prompt(tokenizer, template, prompt)
    yield "(end of text)", [exported.end_of_text], [int(tokenizer.eos_token_id)]


# Probabilities


@dataclass(frozen=True)
class Equality:
    """Both engines' next-token probabilities at every position of the fixed texts, the text so far given. KL in nats.

    mean_kl, max_kl    KL(original || exported)
    agreement          share of positions with the same likeliest token
    clear_agreement    the same at the `clear_positions`, where the original's two likeliest are more than CLEAR apart
    adapter_kl         mean KL(original || original without its adapter): what leaving it out would cost; None without one
    to_base_kl         mean KL(original without its adapter || exported); None without one
    not_numbers        positions at which the exported logits are no numbers; such positions are in no other figure
    """

    texts: int
    positions: int
    mean_kl: float
    max_kl: float
    agreement: float
    clear_positions: int
    clear_agreement: float
    adapter_kl: float | None = None
    to_base_kl: float | None = None
    not_numbers: int = 0


def compare_logits(original: TransformersBackend, exported: LlamaCppBackend, side: Side, on_text: Count) -> Equality:
    """Both engines on the fixed texts, one text in memory at a time. `side`: of `exported`, the one that holds the adapter."""
    kls, sames, clears, adapter_kls, base_kls = [], [], [], [], []
    not_numbers = 0
    texts = fixed_texts()
    for done, request in enumerate(texts):
        on_text(done, len(texts))
        ours = exported.logits(request, side)
        theirs = original.logits(request, "tuned" if original.has_adapter else "base")
        if ours.shape != theirs.shape:
            raise ModelError(
                f"The file has {ours.shape[1]:,} tokens, the model that it was made of {theirs.shape[1]:,}: export it again"
            )
        numbers = np.isfinite(ours).all(axis=-1)
        not_numbers += int((~numbers).sum())
        ours, theirs = ours[numbers], theirs[numbers]
        kls.append(kl_by_position(theirs, ours))
        sames.append(ours.argmax(-1) == theirs.argmax(-1))
        second, first = np.sort(np.partition(theirs, -2, axis=-1)[:, -2:], axis=-1).T
        clears.append(first - second > CLEAR)
        if original.has_adapter:
            base = original.logits(request, "base")[numbers]
            adapter_kls.append(kl_by_position(theirs, base))
            base_kls.append(kl_by_position(base, ours))
    kl, same, clear = np.concatenate(kls), np.concatenate(sames), np.concatenate(clears)
    return Equality(
        texts=len(texts),
        positions=len(kl),
        mean_kl=float(kl.mean()) if len(kl) else 0.0,
        max_kl=float(kl.max(initial=0.0)),
        agreement=float(same.mean()) if len(kl) else 0.0,
        clear_positions=int(clear.sum()),
        clear_agreement=float(same[clear].mean()) if clear.any() else 1.0,
        adapter_kl=float(np.concatenate(adapter_kls).mean()) if original.has_adapter else None,
        to_base_kl=float(np.concatenate(base_kls).mean()) if original.has_adapter else None,
        not_numbers=not_numbers,
    )


def kl_by_position(reference: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(reference || other), (T,), nats, of logits (T, V)."""
    parts = [np.zeros(0)]
    for begin in range(0, len(reference), _ROWS):
        p, q = log_softmax(reference[begin : begin + _ROWS]), log_softmax(other[begin : begin + _ROWS])
        parts.append((np.exp(p) * (p - q)).sum(axis=-1))
    return np.concatenate(parts)


# Debiasing


@dataclass(frozen=True)
class Survival:
    """Does the debiasing survive? Reward accuracy and log-ratio margin (nats), as in `benchmarks.preference`, over the base model
    in transformers.

    before    of the adapter in transformers
    after     of the exported file
    left_out  pairs too long to score
    """

    pairs: int
    left_out: int
    before: float
    after: float
    margin_before: float
    margin_after: float


def measure_survival(
    original: TransformersBackend, exported: LlamaCppBackend, side: Side, pairs: Sequence[PreferencePair], on_pair: Count
) -> Survival | None:
    """Score held-out pairs with both engines; None where there is none that fits the context."""
    benchmark = Preference(pairs)
    scored: list[tuple[list[float], list[float], list[float]]] = []
    for done, pair in enumerate(pairs):
        on_pair(done, len(pairs))

        def scores(backend: Backend, of_side: Side, pair: PreferencePair = pair) -> list[float]:
            return benchmark.scores(pair, backend.loglikelihood(benchmark.requests(pair), of_side))

        try:
            scored.append((scores(original, "base"), scores(original, "tuned"), scores(exported, side)))
        except PromptError:  # too long: counted, never scored
            continue
    if not scored:
        return None
    base, tuned, file = (np.array(rows) for rows in zip(*scored, strict=True))
    metrics = benchmark.paired_metrics()
    before, after = np.concatenate([base, tuned], axis=1), np.concatenate([base, file], axis=1)
    return Survival(
        pairs=len(scored),
        left_out=len(pairs) - len(scored),
        before=float(metrics["reward_accuracy"](before)),
        after=float(metrics["reward_accuracy"](after)),
        margin_before=float(metrics["logratio_margin_nats"](before)),
        margin_after=float(metrics["logratio_margin_nats"](after)),
    )
