"""Where a model's weights lie: on the GPU as far as its free memory goes, else in the CPU's. Decided before they are read."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from biasdpo.backends.hf_faults import first_line
from biasdpo.errors import BackendError, ModelError

Bits = Literal[4, 8]

# What one step takes beside the KV caches: activations of a prompt's chunk, cuBLAS's workspaces, the adapter, fragments.
_STEP_BYTES = 2**30
_SIDES = 2
# bitsandbytes: a byte a weight in 8 bits; in 4 bits half a byte, and a float32 scale for each block of 64.
_BYTES_OF_BITS: dict[Bits, float] = {8: 1.0, 4: 0.5 + 4 / 64}


@dataclass(frozen=True)
class Need:
    """Bytes that a model takes on a device.

    layers   the weights of each decoder layer
    rest     the weights outside of them: embeddings, last norm, head
    work     what computing takes: both sides' KV caches at the full context, and one step
    """

    layers: tuple[int, ...]
    rest: int
    work: int

    @property
    def weights(self) -> int:
        return sum(self.layers) + self.rest

    @property
    def total(self) -> int:
        return self.weights + self.work


@dataclass(frozen=True)
class Placement:
    """Where a model computes, and how many of its layers lie there; the others lie in the CPU's memory and pass through."""

    device: torch.device
    layers: int
    layers_on_device: int
    note: str = ""  # for people: what had to be given up, and why

    @property
    def whole(self) -> bool:
        return self.layers_on_device == self.layers

    def describe(self) -> str:
        """ "CPU, 2 threads", "cuda:0 (NVIDIA H100)", "cuda:0 (NVIDIA T4), 20 of 32 layers: it has 3.1 of 7.2 GB"."""
        text = device_for_people(self.device)
        if not self.whole:
            text += f", {self.layers_on_device} of {self.layers} layers"
        return f"{text}: {self.note}" if self.note else text


def choose_placement(folder: Path, device: str, context_length: int, bits: Bits | None) -> Placement:
    """Where the model in `folder` is to lie (see `open_transformers`); BackendError where nothing has room for it."""
    chosen = choose_device(device)
    check_bits(bits, chosen)
    skeleton = load_skeleton(folder)
    if chosen.type == "cpu":
        placement = on_cpu(chosen, len(skeleton.model.layers))
    else:
        need = need_of(skeleton, context_length, 2, bits)
        free = free_bytes(chosen)
        if bits is not None and need.total > free:
            raise BackendError(
                f"In {bits} bits the model needs {need.total / 1e9:.1f} GB of {chosen}, which has {free / 1e9:.1f} GB free, and "
                "can't be divided: close what uses it, or use "
                + ("transformers-4bit or --backend llamacpp" if bits == 8 else "--backend llamacpp")
            )
        placement = place(need, free, chosen)
    if bits is None:  # on their way to a GPU, too, the weights pass through the CPU's memory
        check_memory(need_of(skeleton, context_length, 4 if placement.device.type == "cpu" else 2).weights)
    return placement


def place(need: Need, free: int, device: torch.device) -> Placement:
    """All on the device where `need` fits its `free` bytes; else as many layers as fit beside one that passes through; where
    that is none, all on the CPU."""
    count = len(need.layers)
    if need.total <= free:
        return Placement(device, count, count)
    short = f"it has {max(free, 0) / 1e9:.1f} GB free of the {need.total / 1e9:.1f} needed"
    room = free - need.work - need.rest - max(need.layers)
    kept = sum(total <= room for total in accumulate(need.layers))
    if kept == 0:
        return on_cpu(torch.device("cpu"), count, f"not {device}, {short}; --backend llamacpp takes less")
    return Placement(device, count, kept, f"{short}, so the others pass through it at every token, which is slow")


def on_cpu(device: torch.device, layers: int, note: str = "") -> Placement:
    return Placement(device, layers, layers, note)


def device_map(model: Any, placement: Placement) -> dict[str, torch.device | str]:
    """Module -> device, as accelerate's `dispatch_model` takes it: the last layers on the CPU, the rest on the device."""
    here = placement.device
    places: dict[str, torch.device | str] = {name: here for name, _ in model.named_children() if name != "model"}
    places |= {f"model.{name}": here for name, _ in model.model.named_children() if name != "layers"}
    for i in range(placement.layers):
        places[f"model.layers.{i}"] = here if i < placement.layers_on_device else "cpu"
    return places


def load_skeleton(folder: Path) -> Any:
    """The model of a Hugging Face folder without its weights: shapes alone."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as exc:
        raise ModelError(f"transformers can't load {folder} ({first_line(exc)}): fetch the model again") from exc
    if not hasattr(getattr(skeleton, "model", None), "layers"):
        raise ModelError(f"{folder} is a {config.model_type} model: the transformers backend runs Llama's and Phi's kind")
    return skeleton


def need_of(skeleton: Any, context_length: int, value_bytes: int, bits: Bits | None = None) -> Need:
    """What a model takes on a device, from its shapes.

    value_bytes   of a value that is not quantized, weight or KV: 2 in bfloat16, 4 in float32
    bits          of the matrices in the decoder layers, where bitsandbytes quantizes them
    """
    config, layers = skeleton.config, skeleton.model.layers
    matrix_bytes = value_bytes if bits is None else _BYTES_OF_BITS[bits]
    by_layer = tuple(
        int(sum(p.numel() * (matrix_bytes if p.ndim == 2 else value_bytes) for p in layer.parameters())) for layer in layers
    )
    in_layers = sum(p.numel() for p in layers.parameters())
    rest = (sum(p.numel() for p in skeleton.parameters()) - in_layers) * value_bytes  # a tied head is counted once
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    positions = min(context_length, int(config.max_position_embeddings))
    kv_bytes = 2 * heads * head_size * len(layers) * positions * value_bytes  # keys and values
    return Need(by_layer, rest, _SIDES * kv_bytes + _STEP_BYTES)


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, less what torch holds there unused."""
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


def check_memory(weights: int) -> None:
    """BackendError where the CPU's memory has no room for so many bytes: else the system kills the process."""
    available = int(psutil.virtual_memory().available)
    if weights > available:
        raise BackendError(
            f"The model's weights take {weights / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free: close other "
            "programs, or use --backend llamacpp with a quantized GGUF"
        )


def check_bits(bits: Bits | None, device: torch.device) -> None:
    """BackendError where bitsandbytes can't run."""
    if bits is None:
        return
    if device.type != "cuda":
        raise BackendError(
            f"transformers-{bits}bit needs an NVIDIA GPU, none is here: use --backend llamacpp with a quantized GGUF"
        )
    if find_spec("bitsandbytes") is None:
        raise BackendError(
            f"transformers-{bits}bit needs bitsandbytes: `pip install bitsandbytes`, or use --backend transformers"
        )


def choose_device(name: str) -> torch.device:
    """The device called "auto" (the GPU with most free memory, if there is one), "cpu", "cuda" or "cuda:1"."""
    if name == "auto":
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
        name = f"cuda:{max(gpus, key=lambda i: torch.cuda.mem_get_info(i)[0])}" if gpus else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise BackendError(f"Unknown device {name!r}: choose auto, cpu or cuda")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as exc:
        raise BackendError(f"torch can't use the device {name!r} ({first_line(exc)}): choose auto or cpu") from exc
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else device


def device_for_people(device: torch.device) -> str:
    """ "CPU, 2 threads", "cuda:0 (NVIDIA H100)"."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    return f"{device} ({torch.cuda.get_device_name(device)})"
