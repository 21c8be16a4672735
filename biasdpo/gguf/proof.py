"""Proof that an exported GGUF is the model it was made from: transformers (+ PEFT) against llama.cpp on the file as written.

Both compute on the CPU; transformers in F32, llama.cpp with an F32 KV cache and without flash attention. They can't be equal to
the last bit: ggml's GELU goes through F16, and sums run in another order. So a file in F32 must stay within a bound
(`MAX_KL_NATS`, and the same top token wherever the top two are more than `CLEAR` logits apart). A quantized file can't be proven
equal; the proof measures what quantization changes, above all whether the debiasing survives: reward accuracy on held-out pairs.
"""

from __future__ import annotations

import json
import random
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import psutil
from numpy.typing import NDArray
from pydantic import TypeAdapter

from biasdpo.backends.base import Backend, kl_by_position
from biasdpo.benchmarks.preference import Preference
from biasdpo.chat import PromptTemplate, Segment
from biasdpo.config import ProofDepth
from biasdpo.data.pairs import PreferencePair
from biasdpo.errors import ModelError, PromptError, WorkspaceError, plural
from biasdpo.gguf.write import Progress
from biasdpo.model_files import Header, read_header
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.records import LikelihoodRequest, Side, TextRequest
from biasdpo.workspace import ASSETS, Workspace, read_json

if TYPE_CHECKING:
    from biasdpo.backends.hf import TransformersBackend
    from biasdpo.backends.llamacpp import LlamaCppBackend

MAX_KL_NATS = 1e-5  # mean over positions, for a file in F32
CLEAR = 0.02  # logits: closer tokens may swap places through ggml's F16 GELU
MAX_DROP = 0.02  # of reward accuracy, before a better quantization is recommended
QUICK = 5  # a quick proof takes every fifth text
CONTEXT_LENGTH = 512  # tokens, as long as training's rows by default; keeps the F32 KV cache small
RESERVED_BYTES = 10**9  # besides the weights: activations, logits, KV caches

# The next better quantization; "keep" may meet some that are not on offer here.
_BETTER = {
    "Q4_0": "Q4_K_M", "Q4_1": "Q5_K_M", "Q4_K_S": "Q4_K_M", "Q4_K_M": "Q5_K_M", "Q5_0": "Q5_K_M", "Q5_1": "Q6_K",
    "Q5_K_S": "Q6_K", "Q5_K_M": "Q6_K", "Q6_K": "Q8_0", "Q8_0": "F16", "F16": "F32", "BF16": "F32",
}  # fmt: skip

Count = Callable[[int, int], None]
"""Called with (done, total)."""


# What is measured


@dataclass(frozen=True)
class TokenizerCheck:
    """Texts given to both tokenizers."""

    strings: int
    different: int
    first: str = ""  # the first that differs, with both readings


@dataclass(frozen=True)
class Equality:
    """Both engines' next-token probabilities at every position of the fixed texts, teacher-forced. KL in nats."""

    texts: int
    positions: int
    mean_kl: float  # KL(original || exported)
    max_kl: float
    agreement: float  # share of positions with the same top token
    clear_positions: int  # where the original's top two are more than CLEAR apart
    clear_agreement: float  # the same at the clear positions
    adapter_kl: float | None = None  # mean KL(original || original without its adapter): the adapter's effect; None without one
    to_base_kl: float | None = None  # mean KL(original without its adapter || exported); None without one
    not_numbers: int = 0  # positions where the exported logits are NaN or infinite; excluded from all other figures


@dataclass(frozen=True)
class Survival:
    """Whether the debiasing survives: reward accuracy and log-ratio margin (nats), as in `benchmarks.preference`, against the
    base model in transformers; before: of the adapter in transformers, after: of the exported file."""

    pairs: int
    left_out: int  # too long to score
    before: float
    after: float
    margin_before: float
    margin_after: float


@dataclass(frozen=True)
class ExportProof:
    """The results of an export's proof; None where nothing was measured."""

    quantization: str  # of the file: "F32", "Q4_K_M", …
    lossless: bool  # all weights are F32, so equality is required
    depth: ProofDepth = "full"
    tokenizer: TokenizerCheck | None = None
    equality: Equality | None = None
    survival: Survival | None = None
    skipped: str = ""  # why the logits were not compared, and what to do
    failures: tuple[str, ...] = ()  # evidence that the file is not the model; such a file must not be used
    warnings: tuple[str, ...] = ()  # what the user should know before using the file
    seconds: float = 0.0

    @property
    def verdict(self) -> Literal["equal", "measured", "not verified", "not equal"]:
        if self.failures:
            return "not equal"
        if self.equality is None:
            return "not verified"
        return "equal" if self.lossless else "measured"

    @property
    def passed(self) -> bool | None:
        """False: the file is not the model. True: it is, up to rounding. None: can't be proven, only measured."""
        return {"equal": True, "not equal": False}.get(self.verdict)

    def sentence(self) -> str:
        """The outcome in one line."""
        if self.failures:
            return f"Not equal to the original: {self.failures[0]}"
        parts = []
        if (e := self.equality) is not None:
            parts.append(f"mean KL {e.mean_kl:.2g} nats over {e.positions:,} positions, same top token at {e.agreement:.1%}")
        if (s := self.survival) is not None:
            parts.append(f"reward accuracy {s.before:.1%} before, {s.after:.1%} after, on {plural(s.pairs, 'held-out pair')}")
        if self.tokenizer is not None:
            parts.append(f"{self.tokenizer.strings:,} texts tokenize identically")
        if self.verdict == "not verified":
            return "; ".join([f"Not verified: {self.skipped}", *parts])
        verdict = "Equal to the original, up to rounding" if self.passed else f"{self.quantization}, compared with the original"
        return f"{verdict}{' (quick verification)' if self.depth == 'quick' else ''}: {'; '.join(parts)}"

    def rows(self) -> list[list[str]]:
        """Each measurement, what was found, and what is required."""
        rows: list[list[str]] = []
        if (tokens := self.tokenizer) is not None:
            rows.append([f"Tokens of {tokens.strings:,} texts", f"{tokens.different:,} differ", "0 differ"])
        if (e := self.equality) is not None:
            exact, limit = ("100%", f"at most {MAX_KL_NATS:g}") if self.lossless else ("–", "–")
            rows.append([f"Mean KL, {e.positions:,} positions", f"{e.mean_kl:.2g}", limit])
            rows.append(["Largest KL", f"{e.max_kl:.2g}", "–"])
            rows.append(["Same most likely token", f"{e.agreement:.2%}", "–"])
            rows.append([f"Same at the {e.clear_positions:,} positions with no near tie", f"{e.clear_agreement:.2%}", exact])
            if e.adapter_kl is not None:
                rows.append(["For comparison: mean KL if the adapter were left out", f"{e.adapter_kl:.2g}", "–"])
        if (s := self.survival) is not None:
            found = f"{s.before:.1%} before, {s.after:.1%} after"
            rows.append([f"Reward accuracy on {plural(s.pairs, 'held-out pair')}", found, f"drops by at most {MAX_DROP:.0%}"])
        return rows

    def to_json(self) -> dict[str, Any]:
        """All fields, with `verdict`, `passed` and `sentence`."""
        return {"verdict": self.verdict, "passed": self.passed, "sentence": self.sentence(), **asdict(self)}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> ExportProof:
        """The inverse of `to_json`. ValueError if the row is not a proof's."""
        return TypeAdapter(cls).validate_python(row)


# The proof


def prove(
    gguf: Path,
    lora: Path | None,
    spec: ModelSpec,
    adapter: AdapterSpec | None,
    workspace: Workspace,
    *,
    depth: ProofDepth = "full",
    pairs: Sequence[PreferencePair] | None = None,
    threads: int | None = None,
    on_progress: Progress = lambda _share, _what: None,
) -> ExportProof:
    """Compare a GGUF, with a LoRA GGUF if given, with what it was made from: `spec` and `adapter` in transformers.

    gguf     the merged or converted model; or the base GGUF that `lora` was made for
    depth    "quick": every fifth text, no pairs; "none": nothing is compared, and the proof says so
    pairs    held-out pairs for the reward accuracy (see `held_out_pairs`); None: not to be measured
    threads  of each engine; default: each engine's own choice
    A file that an engine can't open raises its error (ModelError, AdapterError, BackendError, ProofError).
    """
    from biasdpo.backends.hf import open_transformers
    from biasdpo.backends.hf_loading import hf_copy, load_tokenizer
    from biasdpo.backends.llamacpp import open_llamacpp

    started = time.monotonic()
    header = read_header(gguf)
    parameters = sum(tensor.elements for tensor in header.tensors.values())
    quantization = _quantization(header)
    proof = ExportProof(quantization, quantization == "F32", depth)
    if depth == "none":
        return replace(proof, skipped="no verification was requested")
    step, measured = (1, pairs) if depth == "full" else (QUICK, None)
    on_progress(0.0, "verification: opening the file in llama.cpp")
    with closing(open_llamacpp(gguf, spec.template, lora, CONTEXT_LENGTH, threads=threads, kv_cache="f32")) as exported:
        on_progress(0.05, "verification: preparing the model for transformers")
        try:
            folder = hf_copy(spec, workspace)
        except (ModelError, WorkspaceError) as exc:
            return replace(proof, skipped=str(exc), seconds=time.monotonic() - started)
        on_progress(0.1, "verification: comparing the tokenizers")
        tokens = compare_tokenizers(exported, load_tokenizer(folder), spec.template, step)
        proof = replace(proof, tokenizer=tokens, skipped=_lacking_memory(parameters))
        if not proof.skipped and not tokens.different:
            on_progress(0.15, "verification: opening the model in transformers")
            peft = None if adapter is None else adapter.folder
            side: Side = "base" if lora is None else "tuned"
            middle = 0.5 if adapter is not None and measured else 1.0
            options: dict[str, Any] = {"device": "cpu", "threads": threads}
            with closing(open_transformers(folder, spec.template, peft, CONTEXT_LENGTH, **options)) as original:
                on_text = _counter(on_progress, 0.25, middle, "text")
                proof = replace(proof, equality=compare_logits(original, exported, side, on_text, step))
                if adapter is not None and measured:
                    on_pair = _counter(on_progress, middle, 1.0, "held-out pair")
                    proof = replace(proof, survival=measure_survival(original, exported, side, measured, on_pair))
    unseen = adapter.id if adapter is not None and measured is not None else ""
    return replace(judge(proof, unseen), seconds=time.monotonic() - started)


def _counter(on_progress: Progress, begin: float, end: float, what: str) -> Count:
    return lambda done, total: on_progress(begin + (end - begin) * done / total, f"verification: {what} {done + 1} of {total}")


def _quantization(header: Header) -> str:
    """As the file names it."""
    from gguf import LlamaFileType

    if all(tensor.kind == "F32" for tensor in header.tensors.values()):
        return "F32"
    try:
        name: str = LlamaFileType(header.values.get("general.file_type", LlamaFileType.GUESSED)).name
    except ValueError:  # newer than the gguf package
        return "unknown quantization"
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")


def _lacking_memory(parameters: int) -> str:
    """One line if transformers' weights in F32 do not fit into free memory, else ""."""
    needed, free = 4 * parameters + RESERVED_BYTES, psutil.virtual_memory().available
    if needed <= free:
        return ""
    return (
        f"transformers in F32 needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free, so the file was not compared "
        "with the model it was made from: close other programs or export on a larger machine"
    )


def judge(proof: ExportProof, adapter_id: str = "") -> ExportProof:
    """The proof with the failures and warnings that follow from its figures. `adapter_id`: whose debiasing was to be measured."""
    failures, warnings = [], []
    tokens, equality, survival = proof.tokenizer, proof.equality, proof.survival
    remedy = "report it: F32 loses nothing" if proof.lossless else f"use {_BETTER.get(proof.quantization, 'Q8_0')} or better"
    if tokens is not None and tokens.different:
        failures.append(f"{tokens.different:,} of {tokens.strings:,} texts tokenize differently, first {tokens.first}")
    if equality is not None:
        failures += _inequalities(equality, proof.lossless)
        if not failures and equality.adapter_kl is not None and equality.mean_kl > equality.adapter_kl:
            warnings.append(
                f"{proof.quantization} changes the model more (mean KL {equality.mean_kl:.2g} nats) than the adapter does "
                f"({equality.adapter_kl:.2g}): {remedy}"
            )
        if adapter_id and survival is None and not proof.lossless:
            warnings.append(
                f"Whether the debiasing survives was not measured: no pairs are known that adapter {adapter_id} never saw"
            )
    if survival is not None and survival.before - survival.after > MAX_DROP:
        lost = round((survival.before - survival.after) * survival.pairs)
        warnings.append(
            f"The debiasing suffers: reward accuracy fell from {survival.before:.1%} to {survival.after:.1%}, by {lost} of "
            f"{plural(survival.pairs, 'held-out pair')}; {remedy}"
        )
    if survival is not None and survival.left_out:
        warnings.append(f"Left out, longer than {CONTEXT_LENGTH} tokens: {plural(survival.left_out, 'held-out pair')}")
    return replace(proof, failures=tuple(failures), warnings=tuple(warnings))


def _inequalities(equality: Equality, lossless: bool) -> list[str]:
    """The figures that show that the file is not the model."""
    again = "export it again, and report it if it happens again"
    failures = []
    if equality.not_numbers:
        failures.append(f"its logits are NaN or infinite at {equality.not_numbers:,} positions: the file is damaged; {again}")
    if lossless and (equality.mean_kl > MAX_KL_NATS or equality.clear_agreement < 1.0):
        failures.append(
            f"in F32, mean KL is {equality.mean_kl:.2g} nats (at most {MAX_KL_NATS:g} allowed) and the top token is the same at "
            f"{equality.clear_agreement:.2%} of the {equality.clear_positions:,} positions where the top two are more than "
            f"{CLEAR} apart (all required); {again}"
        )
    elif equality.to_base_kl is not None and equality.to_base_kl < equality.mean_kl / 2:
        failures.append(
            f"it is the base model rather than the tuned one: KL {equality.to_base_kl:.2g} nats from base, "
            f"{equality.mean_kl:.2g} from tuned; {again}"
        )
    return failures


# Tokenizers


def compare_tokenizers(exported: LlamaCppBackend, tokenizer: Any, template: PromptTemplate, step: int = 1) -> TokenizerCheck:
    """Both tokenizers on every `step`-th of `strings` as a user's text, on rendered prompts, and their end of text."""
    read = list(tokenize_both(exported, tokenizer, template, step))
    different = [
        f"{text!r}: {ours[:12]} in llama.cpp, {theirs[:12]} in transformers" for text, ours, theirs in read if ours != theirs
    ]
    return TokenizerCheck(len(read), len(different), different[0] if different else "")


def tokenize_both(
    exported: LlamaCppBackend, tokenizer: Any, template: PromptTemplate, step: int = 1
) -> Iterator[tuple[str, list[int], list[int]]]:
    """(text, llama.cpp's token ids, transformers' token ids), through the backends' own functions."""
    from biasdpo.backends.hf_loading import encode_prompt, encode_text, end_of_completion

    own = sorted({*tokenizer.all_special_tokens, *(str(token) for token in tokenizer.added_tokens_decoder.values())})
    for text in strings(own)[::step]:
        yield text, exported.tokenize((Segment(text, special=False),), begin=False), encode_text(tokenizer, text)
    for prompt in [request.prompt for request in fixed_texts() if isinstance(request, LikelihoodRequest)]:
        yield template.render_text(prompt), exported.prompt_tokens(prompt), encode_prompt(tokenizer, template, prompt)
    yield "(end of a completion)", [exported.end_of_completion], [end_of_completion(tokenizer, template)]


# Probabilities


def fixed_texts() -> list[LikelihoodRequest | TextRequest]:
    """assets/proof_texts.jsonl: completions that reject a stereotype, prose, code, numbers, other languages."""
    rows = [json.loads(line) for line in (ASSETS / "proof_texts.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        LikelihoodRequest(row["prompt"], row["text"], end_of_text=True) if row["prompt"] else TextRequest(row["text"])
        for row in rows
    ]


def compare_logits(
    original: TransformersBackend, exported: LlamaCppBackend, side: Side, on_text: Count, step: int = 1
) -> Equality:
    """Both engines on every `step`-th fixed text, one in memory at a time. `side`: of `exported`, the one with the adapter."""
    kls, sames, clears, adapter_kls, base_kls = [], [], [], [], []
    not_numbers = 0
    texts = fixed_texts()[::step]
    for done, request in enumerate(texts):
        on_text(done, len(texts))
        ours = exported.logits(request, side, cut=True)
        theirs = original.logits(request, "tuned" if original.has_adapter else "base", cut=True)
        if ours.shape != theirs.shape:
            raise ModelError(f"The file has {ours.shape[1]:,} tokens, its original {theirs.shape[1]:,}: export it again")
        numbers = np.isfinite(ours).all(axis=-1)
        not_numbers += int((~numbers).sum())
        ours, theirs = ours[numbers], theirs[numbers]
        kls.append(kl_by_position(theirs, ours))
        sames.append(ours.argmax(-1) == theirs.argmax(-1))
        second, first = np.sort(np.partition(theirs, -2, axis=-1)[:, -2:], axis=-1).T
        clears.append(first - second > CLEAR)
        if original.has_adapter:
            base = original.logits(request, "base", cut=True)[numbers]
            adapter_kls.append(kl_by_position(theirs, base))
            base_kls.append(kl_by_position(base, ours))
    kl, same, clear = np.concatenate(kls), np.concatenate(sames), np.concatenate(clears)
    return Equality(
        texts=len(texts),
        positions=len(kl),
        mean_kl=_mean(kl),
        max_kl=float(kl.max(initial=0.0)),
        agreement=_mean(same),
        clear_positions=int(clear.sum()),
        clear_agreement=float(same[clear].mean()) if clear.any() else 1.0,
        adapter_kl=_mean(np.concatenate(adapter_kls)) if original.has_adapter else None,
        to_base_kl=_mean(np.concatenate(base_kls)) if original.has_adapter else None,
        not_numbers=not_numbers,
    )


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else 0.0


# Debiasing


def measure_survival(
    original: TransformersBackend, exported: LlamaCppBackend, side: Side, pairs: Sequence[PreferencePair], on_pair: Count
) -> Survival | None:
    """Score held-out pairs with both engines; None if no pair fits the context."""
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


# Texts on which two tokenizers may disagree

# Code points of planes that Unicode 3.2 (2002) left empty; 4 to 13 are empty to this day.
_LATER_PLANES = {3: range(0x30000, 0x3134B)} | {plane: range(plane << 16, (plane + 1) << 16) for plane in range(4, 14)}


def strings(tokens: Sequence[str] = (), *, count: int = 2000, seed: int = 0) -> list[str]:
    """`count` different strings: each kind of text by itself, then random mixtures. `tokens`: the model's own special tokens."""
    rng = random.Random(seed)
    kinds: dict[str, list[str]] = read_json(ASSETS / "proof_strings.json")
    kinds["look_alikes"] += tokens
    made = dict.fromkeys(_one_of_each(kinds, rng))  # an ordered set
    while len(made) < count:
        made["".join(_piece(kinds, rng) for _ in range(rng.randint(1, 12)))] = None
    return list(made)[:count]


def _one_of_each(kinds: Mapping[str, Sequence[str]], rng: random.Random) -> Iterator[str]:
    yield from (text for kind, texts in kinds.items() if kind != "look_alikes" for text in texts)
    for token in kinds["look_alikes"][:120]:  # a model may have a thousand; the mixtures draw from all
        half = len(token) // 2
        yield from (token, f"a {token}b", f"{token}{token} ", f"{token[:half]}{token}{token[half:]}")
    for plane in range(17):
        yield from ("".join(rng.choices(_characters(plane), k=length)) for length in (1, 2, 5, 20))
    for length in range(1, 81):
        yield from (" " * length + "x", "x" + "\n" * length, "\t" * length)
        yield "y" + "".join(rng.choices(" \t\n", k=length)) + "z"


def _piece(kinds: Mapping[str, Sequence[str]], rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.55:
        return rng.choice(kinds[rng.choice(("look_alikes", "spaces", "numbers", "words", "emoji"))])
    if kind < 0.75:
        planes = rng.choices((0, 0, 0, 0, 1, 1, 2, 3, 14, 15, 16), k=rng.randint(1, 6))
        return "".join(rng.choice(_characters(plane)) for plane in planes)
    if kind < 0.85:
        return str(rng.randint(0, 10 ** rng.randint(1, 12)))
    if kind < 0.95:
        return rng.choice((" ", "\t", "\n", "\r\n", " \n")) * rng.randint(1, 40)
    return rng.choice(kinds["code"])


@cache
def _characters(plane: int) -> Sequence[str]:
    """A plane's characters in Unicode 3.2, which every later version classifies alike; surrogates excluded."""
    points = _LATER_PLANES.get(plane)
    if points is not None:
        return [chr(point) for point in points]
    category = unicodedata.ucd_3_2_0.category
    return [c for c in map(chr, range(plane << 16, (plane + 1) << 16)) if category(c) not in ("Cn", "Cs")]
