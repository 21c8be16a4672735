"""What an evaluation and an export are configured with, until `biasdpo.config` has them beside TrainConfig."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from biasdpo import benchmarks as known
from biasdpo.backends import BACKENDS
from biasdpo.errors import ConfigError
from biasdpo.gguf.quantize import require_known
from biasdpo.records import SEED_RANGE, STRENGTH_RANGE

RUN, WORKSPACE = "run", "workspace"
"""Values of `dataset` that name no file."""

_MOST_STRENGTHS = 16


@dataclass(frozen=True)
class EvaluationConfig:
    """One evaluation. Names are those of the command line.

    adapter      an id, a run's id, a PEFT folder, "none": base alone, or "": the model's default
    limit        items of each benchmark, drawn by the seed; None: all
    seed         of the draw and of the bootstrap
    strengths    each once; 1 is as trained. Where there are several, the result holds a curve
    data_dir     holds one folder a benchmark; "": the Hub
    dataset      of `preference`: a JSONL file, "workspace": what the journal's judgments come to now, or "run": what the
                 adapter was trained on. Of each, those that the adapter's training held out are scored
    samples, max_new_tokens, toxicity_scorer   of benchmarks by generation; None and "": as each has them
    """

    model: str
    adapter: str = ""
    backend: str = "auto"
    benchmarks: tuple[str, ...] = ()
    limit: int | None = None
    seed: int = 0
    strengths: tuple[float, ...] = (1.0,)
    data_dir: str = ""
    dataset: str = ""
    samples: int | None = None
    max_new_tokens: int | None = None
    toxicity_scorer: str = ""

    def check(self) -> EvaluationConfig:
        """This request, or a ConfigError that says in one line what is wrong with it."""
        for name in ("model", "adapter", "backend", "data_dir", "dataset", "toxicity_scorer"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be text: got {getattr(self, name)!r}")
        if not self.model:
            raise ConfigError("No model to evaluate: name one with --model, e.g. smollm2")
        if self.backend not in ("auto", *BACKENDS):
            raise ConfigError(f"Unknown backend {self.backend!r}: choose one of auto, {', '.join(BACKENDS)}")
        if not self.benchmarks:
            raise ConfigError(f"No benchmark is named: choose of {', '.join(known.NAMES)}")
        for name in self.benchmarks:
            known.check_name(name)
        _each_once("benchmarks", self.benchmarks)
        if self.limit is not None and not _is_integer(self.limit, 1, 10**9):
            raise ConfigError(f"--limit must be a whole number from 1: got {self.limit!r}; leave it out for all items")
        if not _is_integer(self.seed, *SEED_RANGE):
            raise ConfigError(f"--seed must be a whole number from {SEED_RANGE[0]} to {SEED_RANGE[1]}: got {self.seed!r}")
        for name, value in (("samples", self.samples), ("max-new-tokens", self.max_new_tokens)):
            if value is not None and not _is_integer(value, 1, 4096):
                raise ConfigError(
                    f"--{name} must be a whole number from 1 to 4096: got {value!r}; leave it out for the usual one"
                )
        self._check_strengths()
        if "preference" in self.benchmarks and not self.dataset:
            raise ConfigError("preference needs the pairs: name with --dataset the file that was trained on, workspace or run")
        return self

    def _check_strengths(self) -> None:
        low, high = STRENGTH_RANGE
        for strength in self.strengths:
            if isinstance(strength, bool) or not isinstance(strength, int | float) or not low <= strength <= high:
                raise ConfigError(f"A strength is a number from {low:g} to {high:g}: got {strength!r}; choose one in that range")
        if not 1 <= len(self.strengths) <= _MOST_STRENGTHS:
            raise ConfigError(f"An evaluation has 1 to {_MOST_STRENGTHS} strengths: got {len(self.strengths)}; name fewer")
        _each_once("strengths", self.strengths)
        if len(self.strengths) > 1 and self.adapter == "none":
            raise ConfigError("Strengths are an adapter's: got several with adapter none; name an adapter, or leave them out")

    def command(self, out: Path | None = None, workspace: Path | None = None) -> list[str]:
        """`python -m biasdpo evaluate …` of this request, of this very Python. `out` None: result.json."""
        flags = {
            "--model": self.model,
            "--adapter": self.adapter,
            "--backend": self.backend if self.backend != "auto" else "",
            "--benchmark": ",".join(self.benchmarks),
            "--limit": "" if self.limit is None else str(self.limit),
            "--seed": str(self.seed) if self.seed else "",
            "--strengths": ",".join(f"{strength:g}" for strength in self.strengths) if self.strengths != (1.0,) else "",
            "--data-dir": self.data_dir,
            "--dataset": self.dataset if "preference" in self.benchmarks else "",
            "--samples": "" if self.samples is None else str(self.samples),
            "--max-new-tokens": "" if self.max_new_tokens is None else str(self.max_new_tokens),
            "--toxicity-scorer": self.toxicity_scorer,
            "--workspace": "" if workspace is None else str(workspace),
            "--out": "result.json" if out is None else str(out),
        }
        given = [f"{flag}={value}" for flag, value in flags.items() if value]  # one word each: a value may begin with a dash
        return [sys.executable, "-m", "biasdpo", "evaluate", *given]

    def parts(self) -> list[str]:
        """The benchmarks by the names that a result has them under: `utility` stands for two, `perplexity` for its quick half."""
        return ["utility" if name == "perplexity" else name for name in known.expand(self.benchmarks)]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EvaluationConfig:
        """The request that `to_json` gave. Raises ConfigError for what is none."""
        names = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or not isinstance(values.get("model"), str):
            raise ConfigError(f"Not an evaluation's request: {values!r:.80}; start the evaluation anew")
        kept: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name in names
        }
        return cls(**kept).check()


def _is_integer(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _each_once(name: str, values: tuple[object, ...]) -> None:
    if len(set(values)) < len(values):
        raise ConfigError(f"{name} names one twice: got {', '.join(map(str, values))}; name each once")


Format = Literal["lora", "merged"]
Source = Literal["auto", "hf", "gguf"]
FORMATS: tuple[Format, ...] = get_args(Format)
SOURCES: tuple[Source, ...] = get_args(Source)

DEFAULT_QUANTIZATION = "Q8_0"
MOST_PAIRS = 64
"""Held-out pairs that are scored before and after, where no other number is asked for."""


@dataclass(frozen=True)
class ExportConfig:
    """One export. Names are those of the command line.

    run            id of a finished run, whose adapter is exported; "" where `adapter` names one
    adapter        a shipped adapter's id, a run's, a PEFT folder, or "none": the model alone
    model          the base model; "" is the one that the adapter names
    quantization   of a merged file; "" is DEFAULT_QUANTIZATION. A LoRA GGUF is not quantized
    source         what a merged file is made from: "hf", the Hugging Face folder; "gguf", the base GGUF; "auto": the first of
                   them that is here
    pairs          held-out pairs at most, on which reward accuracy is measured before and after; 0: none
    threads        CPU threads; None: as many as there are cores
    """

    out: Path
    format: Format
    run: str = ""
    adapter: str = ""
    model: str = ""
    quantization: str = ""
    source: Source = "auto"
    pairs: int = MOST_PAIRS
    threads: int | None = None

    def checked(self) -> ExportConfig:
        """This request with its quantization named, or a ConfigError that says what is wrong with it."""
        if self.format not in FORMATS:
            raise ConfigError(f"An export's format is {' or '.join(FORMATS)}: got {self.format!r}; choose one")
        if self.source not in SOURCES:
            raise ConfigError(f"A merged file's source is {', '.join(SOURCES)}: got {self.source!r}; choose one")
        if bool(self.run) == bool(self.adapter):
            raise ConfigError("An export is of a run or of an adapter: name one of them, with --run or --adapter (or none)")
        if self.adapter == "none":
            if self.format == "lora":
                raise ConfigError("--format lora needs an adapter, got none: name one with --adapter or --run")
            if not self.model:
                raise ConfigError("--adapter none exports a model alone: name it with --model")
        if not isinstance(self.pairs, int) or isinstance(self.pairs, bool) or self.pairs < 0:
            raise ConfigError(f"pairs must be a whole number from 0: got {self.pairs!r}; 0 measures no reward accuracy")
        if self.threads is not None and (not isinstance(self.threads, int) or not 1 <= self.threads <= 1024):
            raise ConfigError(f"threads must be a whole number from 1 to 1024: got {self.threads!r}; leave it out for all cores")
        if self.out.is_dir():
            raise ConfigError(f"An export is one file: got the folder {self.out}; name a file in it, e.g. model.gguf")
        if self.format == "lora":
            if self.quantization:
                raise ConfigError(f"A LoRA GGUF is not quantized: got {self.quantization}; leave it out, or export merged")
            return self
        chosen = self.quantization or DEFAULT_QUANTIZATION
        require_known(chosen, keep=self.source != "hf")
        return replace(self, quantization=chosen)

    def command(self, workspace: Path | None = None) -> list[str]:
        """`python -m biasdpo export ...` of this config, with this very Python."""
        flags = {
            "--run": self.run,
            "--adapter": self.adapter,
            "--model": self.model,
            "--format": self.format,
            "--quantization": self.quantization,
            "--source": self.source if self.format == "merged" else "",
            "--pairs": str(self.pairs),
            "--threads": "" if self.threads is None else str(self.threads),
            "--out": str(self.out),
            "--workspace": "" if workspace is None else str(workspace),
        }
        return [sys.executable, "-m", "biasdpo", "export", *(f"{flag}={value}" for flag, value in flags.items() if value)]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "out": str(self.out)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ExportConfig:
        """The config that `to_json` gave. Raises ConfigError or TypeError."""
        names = {field.name for field in fields(cls)}
        given = {name: value for name, value in values.items() if name in names}
        return cls(**{**given, "out": Path(str(given.get("out", "")))}).checked()
