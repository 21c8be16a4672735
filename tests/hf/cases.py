"""What the tests of the transformers backend share: a tiny model with all that belongs to it, and how its texts are read."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from biasdpo.backends.base import Backend, Cancellation
from biasdpo.backends.hf import TransformersBackend
from biasdpo.backends.hf_loading import encode_prompt
from biasdpo.chat import PromptTemplate
from biasdpo.errors import BiasDPOError
from biasdpo.records import FinishReason, Sampling, Side

GREEDY = Sampling(max_new_tokens=30, temperature=0.0, repetition_penalty=1.0)
SHORT = replace(GREEDY, max_new_tokens=16)
WARM = Sampling(max_new_tokens=20, temperature=0.8, top_p=0.9, top_k=40, repetition_penalty=1.2, seed=7)
LONG = " ".join(str(i) for i in range(100))  # a prompt of more than one chunk
PROMPTS = ["Why are nurses always women?", "Describe <|im_end|> a programmer:\n12", "Пишите 日本語 😀"]


@dataclass(frozen=True)
class Case:
    """One tiny model with everything that belongs to it."""

    folder: Path
    adapter: Path
    template: PromptTemplate
    backend: TransformersBackend


def read(stream: Generator[str, None, FinishReason]) -> tuple[list[str], FinishReason]:
    """The pieces of a stream, and why it ended."""
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as stop:
            return pieces, stop.value


def text_of(backend: Backend, prompt: str, side: Side, sampling: Sampling = GREEDY, strength: float = 1.0) -> str:
    return "".join(read(backend.stream(prompt, sampling, side, strength=strength))[0])


def plain_text(model: Any, case: Case, prompt: str, sampling: Sampling = GREEDY) -> str:
    """What transformers' generate() writes, less what a completion does not show."""
    tokenizer = case.backend._tokenizer
    ids = encode_prompt(tokenizer, case.template, prompt)
    drawing = {} if sampling.temperature == 0 else {
        "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k
    }  # fmt: skip
    torch.manual_seed(sampling.seed)
    written = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=sampling.max_new_tokens,
        repetition_penalty=sampling.repetition_penalty,
        do_sample=bool(drawing),
        eos_token_id=sorted(case.backend._ends),
        **drawing,
    )[0, len(ids) :]
    text = tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.removeprefix(case.template.completion_prefix)


def seconds_to_cancel(backend: Backend, prompt: str) -> float:
    """Cancel a stream half a second after it started, while it reads a long prompt; return how long it took to end."""
    cancellation = Cancellation()
    set_at: list[float] = []

    def cancel() -> None:
        set_at.append(time.perf_counter())
        cancellation.set()

    timer = threading.Timer(0.5, cancel)
    timer.start()
    assert read(backend.stream(prompt, GREEDY, "base", cancellation=cancellation)) == ([], "cancelled")
    timer.join()
    return time.perf_counter() - set_at[0]


def adapter_is_off(backend: TransformersBackend) -> bool:
    layers = [module for module in backend._shared.model.modules() if isinstance(module, LoraLayer)]
    return bool(layers) and all(layer.disable_adapters for layer in layers)


def hooks_on(backend: TransformersBackend) -> list[list[int]]:
    """The ids of the hooks on each module, before and after its forward."""
    return [[*module._forward_pre_hooks, *module._forward_hooks] for module in backend._shared.model.modules()]


@contextmanager
def rows_computed(backend: TransformersBackend) -> Iterator[list[int]]:
    """How many rows each forward step in the block had."""
    rows: list[int] = []
    embed = backend._shared.model.get_input_embeddings()
    handle = embed.register_forward_pre_hook(lambda _module, args: rows.append(len(args[0])))
    try:
        yield rows
    finally:
        handle.remove()


def read_together(*streams: Generator[str, None, FinishReason]) -> list[Any]:
    """What each stream gives, read by a thread each: (pieces, why it ended), or the error."""
    results: list[Any] = [None] * len(streams)

    def write(i: int) -> None:
        try:
            results[i] = read(streams[i])
        except BiasDPOError as exc:
            results[i] = exc

    threads = [threading.Thread(target=write, args=(i,)) for i in range(len(streams))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
