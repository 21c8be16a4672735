"""Proof that an exported GGUF is the model it was made of: transformers (+ PEFT) against llama.cpp on the file as written.

Both compute on the CPU; transformers in F32, llama.cpp with an F32 KV cache and without flash attention. Equal to the last bit
they can't be: ggml's GELU goes through F16, and sums run in another order. So of a file in F32 a bound is asked (`MAX_KL_NATS`,
and the same likeliest token wherever the two likeliest are more than `CLEAR` logits apart); of a quantized one nothing can be
proven, and what it changes is measured, above all whether the debiasing survives: reward accuracy on held-out pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from biasdpo import dataset
from biasdpo.dataset import PreferencePair
from biasdpo.errors import ModelError, WorkspaceError
from biasdpo.export_measures import (
    CLEAR,
    Equality,
    Survival,
    TokenizerCheck,
    compare_logits,
    compare_tokenizers,
    measure_survival,
)
from biasdpo.modelfile import gguf_value, open_gguf
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.records import Side
from biasdpo.workspace import ASSETS, Workspace, read_json, sha256_of

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
    from biasdpo.backends.hf_copy import hf_copy, load_tokenizer
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


# Held-out pairs


def held_out_pairs(adapter: AdapterSpec, workspace: Workspace, limit: int = 64) -> list[PreferencePair]:
    """Pairs that the adapter's training never saw, at most `limit`, evenly over all there are; [] where none are known.

    Of a run in the workspace: what it held out, by the split that training made. Of a shipped adapter: the seed set,
    less what the adapter was trained on, if on that.
    """
    pairs: Sequence[PreferencePair] = ()
    snapshot = adapter.folder.parent / "dataset.jsonl"
    if adapter.folder.parent.parent == workspace.runs and snapshot.is_file() and sha256_of(snapshot) == adapter.dataset_sha256:
        pairs = dataset.split(dataset.load_snapshot(snapshot)[0], adapter.held_out_share or 0.0).held_out
    elif adapter.folder.parent == ASSETS / "adapters":
        pairs = dataset.load_jsonl(ASSETS / "seed_pairs.jsonl")
        if "seed_pairs.jsonl" in read_json(adapter.folder / "provenance.json").get("dataset_files", []):
            pairs = dataset.split(pairs, adapter.held_out_share or 0.0).held_out
    count = min(limit, len(pairs))
    return [pairs[i * len(pairs) // count] for i in range(count)]
