"""Loading for the transformers backend: device, weights, tokens that end a completion; torch's failures as lines of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from biasdpo.backends.gguf_tokenizer import END_TOKENS
from biasdpo.errors import BackendError, ModelError
from biasdpo.template import PromptTemplate


def end_tokens(model: Any, tokenizer: Any, template: PromptTemplate) -> frozenset[int]:
    """Tokens that end a completion: the model's and the tokenizer's end of text, those that llama.cpp ends at whatever the
    model says, and what ends a turn in the template."""
    named = model.generation_config.eos_token_id
    ends = {*(named if isinstance(named, list) else [named]), model.config.eos_token_id, tokenizer.eos_token_id}
    ends |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special and token.content in END_TOKENS}
    after_prompt = template.text.partition("{prompt}")[2]
    positions = {after_prompt.index(token): token for token in template.special_tokens if token in after_prompt}
    if positions:
        ends.add(tokenizer.convert_tokens_to_ids(positions[min(positions)]))
    flat = {end for entry in ends for end in (entry if isinstance(entry, list) else [entry])}
    return frozenset(int(end) for end in flat if end is not None)


def choose_device(name: str) -> torch.device:
    """The device called "auto" (the GPU if there is one), "cpu", "cuda" or "cuda:1"."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise BackendError(f"Unknown device {name!r}: choose auto, cpu or cuda")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as exc:
        raise BackendError(f"torch can't use the device {name!r} ({_first_line(exc)}): choose auto or cpu") from exc
    return device


def device_for_people(device: torch.device) -> str:
    """ "CPU, 2 threads", "cuda:0 (NVIDIA H100)"."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    index = torch.cuda.current_device() if device.index is None else device.index
    return f"cuda:{index} ({torch.cuda.get_device_name(index)})"


def load_model(folder: Path, device: torch.device) -> Any:
    """The model of a Hugging Face folder, ready to compute: float32 on a CPU, bfloat16 on a GPU that knows it, else float16."""
    dtype = torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, KeyError, SafetensorError) as exc:
        raise ModelError(f"transformers can't load {folder} ({_first_line(exc)}): fetch the model again") from exc
    return model.eval().requires_grad_(False).to(device)


@contextmanager
def foreign_errors() -> Iterator[None]:
    """Torch's failures as one line of ours."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as exc:
        raise BackendError("Out of memory: choose a smaller model, a shorter prompt or --backend llamacpp") from exc
    except RuntimeError as exc:
        if "alloc" in str(exc) and "memory" in str(exc):
            raise BackendError("Out of memory: choose a smaller model, a shorter prompt or --backend llamacpp") from exc
        raise BackendError(f"torch failed ({_first_line(exc)}): reload the model, or use --backend llamacpp") from exc


def _first_line(exc: BaseException) -> str:
    return (str(exc).strip().split("\n") or [""])[0][:300]
