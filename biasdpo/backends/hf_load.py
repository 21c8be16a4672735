"""Loading for the transformers backend: the weights to where they are to lie, and the tokens that end a completion."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from biasdpo.backends.hf_device import Bits, Placement, check_memory, device_map, load_skeleton, need_of, on_cpu
from biasdpo.backends.hf_faults import first_line, release
from biasdpo.errors import ModelError
from biasdpo.gguf_names import END_TOKENS
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


def load_model(
    folder: Path, placement: Placement, bits: Bits | None, report: Callable[[float, str], None]
) -> tuple[Any, Placement]:
    """The model of a Hugging Face folder, ready to compute, and where it lies: float32 on a CPU, bfloat16 on a GPU that knows
    it, else float16; `bits`: quantized by bitsandbytes. Where a GPU turns out to have less room than was free when the
    placement was chosen, all of it lies on the CPU."""
    report(0.1, "reading the weights" + (f": {placement.describe()}" if placement.note else ""))
    try:
        return _load(folder, placement, bits), placement
    except torch.OutOfMemoryError as exc:
        if placement.device.type == "cpu" or bits is not None:
            raise
        release(exc)
    gc.collect()
    placement = on_cpu(torch.device("cpu"), placement.layers, f"not {placement.device}, whose memory ran out while loading")
    check_memory(need_of(load_skeleton(folder), 1, 4).weights)
    report(0.1, f"reading the weights: {placement.describe()}")
    return _load(folder, placement, None), placement


def _load(folder: Path, placement: Placement, bits: Bits | None) -> Any:
    dtype = torch.float32
    if placement.device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {}
    if bits is not None:  # bitsandbytes quantizes on the GPU, tensor by tensor
        options = {"quantization_config": quantization(bits, dtype), "device_map": {"": placement.device}}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError, SafetensorError) as exc:
        raise ModelError(f"transformers can't load {folder} ({first_line(exc)}): fetch the model again") from exc
    model.eval().requires_grad_(False)
    if bits is None:
        dispatch(model, placement)
    return model


def quantization(bits: Bits, dtype: torch.dtype) -> Any:
    """bitsandbytes' settings: LLM.int8() (arXiv:2208.07339), or NF4 as QLoRA uses it (arXiv:2305.14314)."""
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def dispatch(model: Any, placement: Placement) -> None:
    """Move a model to where it is to lie. Layers left on the CPU are copied to the device for the time of their computation
    (accelerate's hooks)."""
    if placement.whole:
        model.to(placement.device)
        return
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns of what was asked for
    dispatch_model(model, device_map(model, placement), skip_keys=model._skip_keys_device_placement)


@contextmanager
def undispatched(model: Any, placement: Placement) -> Iterator[None]:
    """Within the block accelerate's hooks are off, so that layers can be added; each weight lies where it lies between two
    computations."""
    if placement.whole:
        yield
        return
    remove_hook_from_submodules(model)
    yield
    dispatch(model, placement)
