"""Proof that an exported GGUF is the model it was made of: transformers (+ PEFT) against llama.cpp on the file as written.

Both compute on the CPU; transformers in F32, llama.cpp with an F32 KV cache and without flash attention. Equal to the last bit
they can't be: ggml's GELU goes through F16, and sums run in another order. So of a file in F32 a bound is asked (`MAX_KL_NATS`,
and the same likeliest token wherever the two likeliest are more than `CLEAR` logits apart); of a quantized one nothing can be
proven, and what it changes is measured, above all whether the debiasing survives: reward accuracy on held-out pairs."""

from __future__ import annotations

import json
import random
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from numpy.typing import NDArray

from biasdpo.backends.base import Backend, log_softmax
from biasdpo.benchmarks.preference import Preference
from biasdpo.chat import PromptTemplate, Segment
from biasdpo.data.pairs import PreferencePair
from biasdpo.errors import ModelError, PromptError, WorkspaceError
from biasdpo.model_files import gguf_value, open_gguf
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.records import LikelihoodRequest, Side, TextRequest
from biasdpo.workspace import ASSETS, Workspace

if TYPE_CHECKING:
    from biasdpo.backends.hf import TransformersBackend
    from biasdpo.backends.llamacpp import LlamaCppBackend


# --- export strings: Text on which two tokenizers would part: what an export's proof compares them on


COUNT = 2000

# Look-alikes of special tokens, of the families that chat models use; the model's own are added.
_LOOK_ALIKES = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|eot_id|>", "<s>", "</s>", "<unk>", "<pad>",
    "[INST]", "[/INST]", "<<SYS>>", "<start_of_turn>", "<repo_name>", "<file_sep>", "[PAD480]", "[PAD51199]", "Instruct:",
    "\nOutput:", "<|", "|>", "<||>", "{prompt}", "{system}", "<|im_start|", "im_end|>", "<| im_end |>", "\u0120", "\u010a",
    "\u2581", "<0x0A>",
)  # fmt: skip
# Kinds of white space, line breaks and joiners, and bytes that some vocabularies lack.
_SPACES = (
    " ", "  ", "\t", "\n", "\n\n", "\r\n", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\u00a0", "\u1680", "\u2003", "\u2028", "\u2029",
    "\u202f", "\u205f", "\u3000", "\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\u00ad", "\x00", "\x04", "\x16\x14", "\x7f",
)  # fmt: skip
_NUMBERS = (
    "0", "12", "\n12", "\n  7", "345", "6789", "1,234.56", "-0.5e-10", "$5.00", "½", "²", "Ⅷ", "٣٤", "०९", "𝟘𝟙", "㊿", "①",
    "三百", "0x7f3a", "3rd", "v2.10.3", "192.0.2.1", "12:30", "a1b2", "\uff11\uff12", "৭", "↉",
)  # fmt: skip
_WORDS = (
    "hello", " world", "The", " the", "'s", "'re", "'LL", "n't", "I'd've", "\u2019s", "naïve", "Äpfel", "straße", "e\u0301",
    "\ufb01", "İ", "日本語", "カタカナ", "中文", "한국어", "ไทย", "العربية", "हिन्दी", "русский", "Ελληνικά", "עברית", "Việt",
    "ქართული", "\ud83d", "!!!", "...", "—", "//", "?!", "«»", "://", "@#$%", "^_^", "\\n", '"', "``", "~~~", "#include", "_x",
    "__init__", "CamelCase",
)  # fmt: skip
_EMOJI = (
    "😀", "👩\u200d👩\u200d👧", "👍🏽", "🇩🇪", "🇺🇸🇫🇷", "1\ufe0f\u20e3", "❤\ufe0f", "☺", "🧑🏿\u200d🚀", "🫠",
    "👨\u200d👩\u200d👧\u200d👦", "🏳\ufe0f\u200d🌈", "🤷🏻\u200d♀\ufe0f", "©", "™", "🀄", "🂡", "🏴\U000e0067\U000e0062\U000e007f",
)  # fmt: skip
_CODE = (
    "def f(x):\n    if x:\n        return [i for i in x]\n",
    'for (int i = 0; i < n; ++i) {\n\t\tprintf("%d\\n", a[i]);\n\t}',
    '{"key": [1, 2.5, null], "nested": {"a": "\\u00e9"}}',
    "<div class='x'>&nbsp;<!-- <|im_end|> --></div>\r\n",
    "SELECT * FROM t WHERE name = 'O''Brien';",
    "$ grep -rn 'foo' . | awk '{print $1}' > /dev/null 2>&1",
    "\\frac{1}{2} \\sum_{i=1}^{n} x_i^2",
    "let f = async (a, b) => a?.b ?? await b!;",
    "class A:\n\n\n" + 48 * " " + "def g(self): pass",
    "- [ ] item\n  - nested\n\n| a | b |\n|---|---|",
    "http://example.org/?q=%20a&b=c#d",
)

# (first, last) code point of what characters are drawn from.
_BLOCKS = {
    0: [(0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x1FFF), (0x2000, 0x2FFF), (0x3000, 0x9FA5), (0xA000, 0xA48C), (0xAC00, 0xD7A3),
        (0xE000, 0xF8FF), (0xF900, 0xFFFF)],
    1: [(0x10300, 0x1044F), (0x12000, 0x1236E), (0x13000, 0x1342E), (0x1D100, 0x1D7FF), (0x1F300, 0x1F5FF), (0x1F600, 0x1F64F)],
    2: [(0x20000, 0x2A6D6), (0x2F800, 0x2FA1D)],
    3: [(0x30000, 0x3134A)],
    14: [(0xE0001, 0xE0001), (0xE0020, 0xE007F), (0xE0100, 0xE01EF)],
    15: [(0xF0000, 0xFFFFD)],
    16: [(0x100000, 0x10FFFF)],
}  # fmt: skip
_EMPTY_PLANES = range(4, 14)  # no character was ever assigned there
# Blocks with gaps that later versions filled: there, what Unicode 3.2 (2002) knew, which every Python carries.
_WITH_GAPS = [(0x370, 0x1FFF), (0x2000, 0x2FFF), (0x3000, 0x9FA5), (0xF900, 0xFFFF), (0x10300, 0x1044F), (0x1D100, 0x1D7FF)]


def strings(tokens: Sequence[str] = (), *, count: int = COUNT, seed: int = 0) -> list[str]:
    """`count` different strings: each kind of text by itself, then random mixtures of all kinds.

    tokens   the model's own special and added tokens, as text
    """
    rng = random.Random(seed)
    look_alikes = (*_LOOK_ALIKES, *tokens)
    made = dict.fromkeys(_one_of_each(look_alikes, rng))  # in order, none twice
    while len(made) < count:
        made["".join(_piece(look_alikes, rng) for _ in range(rng.randint(1, 12)))] = None
    return list(made)[:count]


def _one_of_each(look_alikes: Sequence[str], rng: random.Random) -> Iterator[str]:
    yield from (*_SPACES, *_NUMBERS, *_WORDS, *_EMOJI, *_CODE)
    for token in look_alikes[:120]:  # a model may have a thousand of its own; the mixtures draw from all
        yield from (token, f"a {token}b", f"{token}{token} ", f"{token[: len(token) // 2]}{token}{token[len(token) // 2 :]}")
    for plane in range(17):
        yield from ("".join(_character(plane, rng) for _ in range(length)) for length in (1, 2, 5, 20))
    for length in range(1, 81):
        yield from (" " * length + "x", "x" + "\n" * length, "\t" * length)
        yield "y" + "".join(rng.choice(" \t\n") for _ in range(length)) + "z"


def _piece(look_alikes: Sequence[str], rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.55:
        return rng.choice(rng.choice((look_alikes, _SPACES, _NUMBERS, _WORDS, _EMOJI)))
    if kind < 0.75:
        return "".join(_character(rng.choice((0, 0, 0, 0, 1, 1, 2, 3, 14, 15, 16)), rng) for _ in range(rng.randint(1, 6)))
    if kind < 0.85:
        return str(rng.randint(0, 10 ** rng.randint(1, 12)))
    if kind < 0.95:
        return rng.choice((" ", "\t", "\n", "\r\n", " \n")) * rng.randint(1, 40)
    return rng.choice(_CODE)


def _character(plane: int, rng: random.Random) -> str:
    if plane in _EMPTY_PLANES:
        return chr(plane * 0x10000 + rng.randint(0, 0xFFFF))
    block = rng.choice(_BLOCKS[plane])
    while True:
        character = chr(rng.randint(*block))
        if block not in _WITH_GAPS or unicodedata.ucd_3_2_0.category(character) != "Cn":
            return character


# --- export measures: What an export's proof measures: two tokenizers, two engines' probabilities, and whether the de


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
    from biasdpo.backends.hf_loading import encode_prompt, encode_text

    own = sorted({*tokenizer.all_special_tokens, *(str(token) for token in tokenizer.added_tokens_decoder.values())})
    for text in strings(own):
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


# --- export proof: Proof that an exported GGUF is the model it was made of: transformers (+ PEFT) against llama.cp


MAX_KL_NATS = 1e-5  # mean over positions, for a file in F32
MAX_DROP = 0.02  # of reward accuracy, before a better quantization is named
CONTEXT_LENGTH = 512  # tokens, as long as training's rows by default; keeps the F32 KV cache small
ROOM_BYTES = 10**9  # beside the weights: activations, logits, KV caches

# What loses less, for each way of storing weights that loses something.
_BETTER = {
    "Q4_0": "Q4_K_M",
    "Q4_1": "Q5_K_M",
    "Q4_K_S": "Q4_K_M",
    "Q4_K_M": "Q5_K_M",
    "Q5_0": "Q5_K_M",
    "Q5_1": "Q6_K",
    "Q5_K_S": "Q6_K",
    "Q5_K_M": "Q6_K",
    "Q6_K": "Q8_0",
    "Q8_0": "F16",
    "F16": "F32",
    "BF16": "F32",
}

Report = Callable[[float, str], None]


@dataclass(frozen=True)
class ExportProof:
    """What was proven or measured of an exported file.

    quantization   of the file: "F32", "Q4_K_M", …; `lossless` where all its weights are F32, so that equality is asked of it
    tokenizer, equality, survival   the measurements (see `export_measures`); None where one could not be made
    skipped        why the logits were not compared, and what to do; "" where they were
    failures       what proves that the file is not the model; such a file is not to be used
    warnings       what the user should know before using the file
    seconds        that the proof took
    """

    quantization: str
    lossless: bool
    tokenizer: TokenizerCheck | None = None
    equality: Equality | None = None
    survival: Survival | None = None
    skipped: str = ""
    failures: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def passed(self) -> bool | None:
        """False: the file is not the model. True: it is, to rounding. None: no proof can be had, only figures."""
        if self.failures:
            return False
        return True if self.lossless and self.equality is not None else None

    def sentence(self) -> str:
        """The outcome in one line, for people."""
        if self.failures:
            return f"Not the model it was made of: {self.failures[0]}"
        parts = []
        if (e := self.equality) is not None:
            parts.append(
                f"mean KL {e.mean_kl:.2g} nats over {e.positions:,} positions, same likeliest token at {e.agreement:.1%}"
            )
        if (s := self.survival) is not None:
            parts.append(f"reward accuracy {s.before:.1%} before, {s.after:.1%} after, on {s.pairs} held-out pairs")
        if self.tokenizer is not None:
            parts.append(f"{self.tokenizer.strings:,} texts tokenize alike")
        if self.skipped:
            return "; ".join([f"Not compared: {self.skipped}", *parts])
        verdict = "Proven equal to transformers" if self.passed else f"{self.quantization}, measured against transformers in F32"
        return f"{verdict}: {'; '.join(parts)}"

    def to_json(self) -> dict[str, Any]:
        """All fields, with `passed` and `sentence`."""
        return {"passed": self.passed, "sentence": self.sentence(), **asdict(self)}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> ExportProof:
        """What `to_json` gave, read back."""
        values: dict[str, Any] = {name: value for name, value in row.items() if name not in ("passed", "sentence")}
        for name, kind in (("tokenizer", TokenizerCheck), ("equality", Equality), ("survival", Survival)):
            values[name] = kind(**values[name]) if values.get(name) is not None else None
        for name in ("failures", "warnings"):
            values[name] = tuple(values.get(name, ()))
        return cls(**values)


def prove(
    gguf: Path,
    lora: Path | None,
    spec: ModelSpec,
    adapter: AdapterSpec | None,
    workspace: Workspace,
    *,
    pairs: Sequence[PreferencePair] = (),
    threads: int | None = None,
    on_progress: Report = lambda _share, _what: None,
) -> ExportProof:
    """Compare the GGUF, with the LoRA GGUF if given, with what it was made of: `spec` and `adapter` in transformers.

    gguf     the merged or converted model; or the base GGUF that `lora` was made for
    pairs    held-out pairs for the reward accuracy (see `held_out_pairs`)
    threads  of each engine; default: each one's own choice
    A file that an engine can't open raises its error (ModelError, AdapterError, BackendError, ProofError): no proof of it either.
    """
    from biasdpo.backends.hf import open_transformers
    from biasdpo.backends.hf_loading import hf_copy, load_tokenizer
    from biasdpo.backends.llamacpp import open_llamacpp

    started = time.monotonic()
    quantization, lossless, parameters = _describe(gguf)
    proof = ExportProof(quantization, lossless)
    on_progress(0.0, "proof: opening the file in llama.cpp")
    exported = open_llamacpp(gguf, spec.template, lora, CONTEXT_LENGTH, threads=threads, kv_cache="f32")
    try:
        on_progress(0.05, "proof: preparing the model for transformers")
        try:
            folder = hf_copy(spec, workspace)
        except (ModelError, WorkspaceError) as exc:
            return replace(proof, skipped=str(exc), seconds=time.monotonic() - started)
        on_progress(0.1, "proof: comparing the tokenizers")
        tokens = compare_tokenizers(exported, load_tokenizer(folder), spec.template)
        proof = replace(proof, tokenizer=tokens)
        lacking = _lacking_memory(parameters)
        if lacking or tokens.different:
            return replace(judged(proof, adapter), skipped=lacking, seconds=time.monotonic() - started)
        on_progress(0.15, "proof: opening the model in transformers")
        adapter_folder = None if adapter is None else adapter.folder
        original = open_transformers(folder, spec.template, adapter_folder, CONTEXT_LENGTH, device="cpu", threads=threads)
        try:
            side: Side = "base" if lora is None else "tuned"
            end = 0.5 if adapter is not None and pairs else 1.0

            def told(begin: float, end: float, what: str) -> Callable[[int, int], None]:
                return lambda done, total: on_progress(
                    begin + (end - begin) * done / total, f"proof: {what} {done + 1} of {total}"
                )

            proof = replace(proof, equality=compare_logits(original, exported, side, told(0.25, end, "text")))
            if adapter is not None and pairs:
                proof = replace(
                    proof, survival=measure_survival(original, exported, side, pairs, told(end, 1.0, "held-out pair"))
                )
        finally:
            original.close()
    finally:
        exported.close()
    return replace(judged(proof, adapter), seconds=time.monotonic() - started)


def _describe(gguf: Path) -> tuple[str, bool, int]:
    """(quantization as the file names it, whether all weights are F32, count of weights)."""
    from gguf import GGMLQuantizationType, LlamaFileType

    reader = open_gguf(gguf)
    lossless = all(tensor.tensor_type == GGMLQuantizationType.F32 for tensor in reader.tensors)
    try:
        name = LlamaFileType(int(gguf_value(reader, "general.file_type", LlamaFileType.GUESSED))).name
    except ValueError:  # newer than the gguf package
        name = "unknown quantization"
    quantization = "F32" if lossless else name.removeprefix("MOSTLY_").removeprefix("ALL_")
    return quantization, lossless, sum(int(tensor.n_elements) for tensor in reader.tensors)


def _lacking_memory(parameters: int) -> str:
    """One line where transformers' copy of the weights in F32 does not fit the free memory; "" where it does."""
    needed, free = 4 * parameters + ROOM_BYTES, psutil.virtual_memory().available
    if needed <= free:
        return ""
    return (
        f"transformers in F32 needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free, so the file was not compared "
        "with the model it was made of: close other programs or export on a larger machine"
    )


def judged(proof: ExportProof, adapter: AdapterSpec | None) -> ExportProof:
    """The proof with its failures and warnings, by its figures."""
    failures, warnings = [], []
    tokens, equality, survival = proof.tokenizer, proof.equality, proof.survival
    if tokens is not None and tokens.different:
        failures.append(f"{tokens.different:,} of {tokens.strings:,} texts tokenize differently, first {tokens.first}")
    if equality is not None:
        failures += _inequalities(equality, proof)
        if not failures and equality.adapter_kl is not None and equality.mean_kl > equality.adapter_kl:
            warnings.append(
                f"{proof.quantization} moves the model further (mean KL {equality.mean_kl:.2g} nats) than the adapter does "
                f"({equality.adapter_kl:.2g}): {_remedy(proof)}"
            )
        if adapter is not None and survival is None:
            warnings.append(
                f"Whether the debiasing survives was not measured: there are no pairs that adapter {adapter.id} never saw"
            )
    if survival is not None and survival.before - survival.after > MAX_DROP:
        lost = round((survival.before - survival.after) * survival.pairs)
        warnings.append(
            f"The debiasing suffers: reward accuracy fell from {survival.before:.1%} to {survival.after:.1%}, by {lost} of "
            f"{survival.pairs} held-out pairs; {_remedy(proof)}"
        )
    if survival is not None and survival.left_out:
        warnings.append(f"{survival.left_out} held-out pairs were left out: longer than {CONTEXT_LENGTH} tokens")
    return replace(proof, failures=tuple(failures), warnings=tuple(warnings))


def _inequalities(equality: Equality, proof: ExportProof) -> list[str]:
    """What in the figures shows that the file is not the model."""
    again = "export it again, and report it if it stays so"
    failures = []
    if equality.not_numbers:
        failures.append(f"its logits are no numbers at {equality.not_numbers:,} positions: the file is damaged; {again}")
    if proof.lossless and (equality.mean_kl > MAX_KL_NATS or equality.clear_agreement < 1.0):
        failures.append(
            f"in F32, mean KL is {equality.mean_kl:.2g} nats (at most {MAX_KL_NATS:g}) and the likeliest token the same at "
            f"{equality.clear_agreement:.2%} of the {equality.clear_positions:,} positions where the two likeliest are more than "
            f"{CLEAR} apart (all wanted); {again}"
        )
    elif equality.to_base_kl is not None and equality.to_base_kl < equality.mean_kl / 2:
        failures.append(
            f"it is the base model rather than the tuned one: KL {equality.to_base_kl:.2g} nats from base, "
            f"{equality.mean_kl:.2g} from tuned; {again}"
        )
    return failures


def _remedy(proof: ExportProof) -> str:
    return "report it: F32 loses nothing" if proof.lossless else f"use {_BETTER.get(proof.quantization, 'Q8_0')} or better"
