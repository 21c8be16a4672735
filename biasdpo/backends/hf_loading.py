"""A model as transformers and TRL want it: its Hugging Face folder, its tokenizer, and token ids as the template wants them."""

from __future__ import annotations

import gc
import logging
import re
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from biasdpo.chat import PromptTemplate
from biasdpo.errors import BackendError, ModelError, WorkspaceError
from biasdpo.model_files import END_TOKENS
from biasdpo.models import ModelSpec
from biasdpo.workspace import Workspace, locked, sha256_of

# --- hf faults: Torch's failures as one line of ours, with nothing of what failed kept alive


_OUT_OF_MEMORY = (
    "Out of memory: shorten the prompt, close what else uses the device, or choose a smaller model, --backend "
    "transformers-4bit (a GPU with bitsandbytes) or --backend llamacpp"
)


@contextmanager
def foreign_errors() -> Iterator[None]:
    """Torch's failures as BackendErrors."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as exc:
        raise BackendError(_OUT_OF_MEMORY) from exc
    except RuntimeError as exc:
        if "alloc" in str(exc) and "memory" in str(exc):
            raise BackendError(_OUT_OF_MEMORY) from exc
        raise BackendError(f"torch failed ({first_line(exc)}): reload the model, or use --backend llamacpp") from exc


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Errors that leave the block hold nothing of what was computed in it: one that somebody keeps (a page shows it) would keep
    the variables of every call on its way, and so the weights, and the tensors that were too many."""
    try:
        yield
    except BackendError as exc:
        release(exc)
        raise


def release(exc: BaseException) -> None:
    """Free what the calls that an error came through hold, but for those still under way."""
    link: BaseException | None = exc
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def first_line(exc: BaseException) -> str:
    return (str(exc).strip().split("\n") or [""])[0][:300]


# --- hf device: Where a model's weights lie: on the GPU as far as its free memory goes, else in the CPU's


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


# --- hf load: Loading for the transformers backend: the weights to where they are to lie, and the tokens that


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


# --- hf copy: A model as transformers and TRL want it: its Hugging Face folder, its tokenizer, and token ids


_LOCK_SECONDS = 1800.0  # another process may be writing Phi-2's 11 GB


def hf_copy(spec: ModelSpec, workspace: Workspace) -> Path:
    """The model's Hugging Face folder: its own, or one written from its GGUF into WORKSPACE/cache/hf, once.

    Raises ModelError where the GGUF is damaged or holds what can't be carried over.
    """
    if spec.hf_folder is not None:
        return spec.hf_folder
    from biasdpo.gguf.to_hf import write_hf_folder

    gguf_path = spec.require_files().gguf_path
    assert gguf_path is not None
    if not gguf_path.is_file():
        raise ModelError(f"No model file {gguf_path}: check the path, or fetch the file again")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", gguf_path.stem)
    folder = workspace.cache / "hf" / f"{name}-{sha256_of(gguf_path)[:12]}"
    with locked(folder, _LOCK_SECONDS):
        if not folder.is_dir():
            for abandoned in folder.parent.glob(f".{folder.name}.*"):
                shutil.rmtree(abandoned, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            try:
                write_hf_folder(gguf_path, temporary)
                temporary.chmod(0o755)
                temporary.rename(folder)
            except OSError as exc:
                raise WorkspaceError(f"Can't write the copy of {gguf_path.name} to {folder}: {exc}; make room there") from exc
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a Hugging Face folder."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as exc:
        raise ModelError(f"{folder} has no tokenizer that transformers can load ({exc}): fetch the model again") from exc
    if not tokenizer.is_fast:
        raise ModelError(f"{folder} has no tokenizer.json: fetch the model again, with that file")
    return tokenizer


# Token ids


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of plain text: what looks like a special token stays text; no begin-of-text token."""
    # Half a surrogate pair, which no UTF-8 can hold, becomes "?".
    clean = text.encode("utf-8", "replace").decode("utf-8")
    ids: list[int] = tokenizer.encode(clean, add_special_tokens=False, split_special_tokens=True)
    return ids


def encode_prompt(tokenizer: Any, template: PromptTemplate, prompt: str, system: str = "") -> list[int]:
    """Token ids of a rendered prompt. Special tokens come from the template's own segments, never from a user's text."""
    ids = begin_ids(tokenizer)
    for segment in template.render(prompt, system):
        if segment.special:
            token = tokenizer.convert_tokens_to_ids(segment.text)
            if token is None or tokenizer.convert_ids_to_tokens(token) != segment.text:
                raise ModelError(
                    f"The prompt template has the special token {segment.text!r}, which the model's tokenizer lacks: correct "
                    "the template in assets/models.toml"
                )
            ids.append(token)
        else:
            ids += encode_text(tokenizer, segment.text)
    return ids


def encode_completion(tokenizer: Any, template: PromptTemplate, text: str, end_of_text: bool) -> list[int]:
    """Token ids of a completion that follows a rendered prompt, with the end-of-text token if asked for."""
    ids = encode_text(tokenizer, template.completed(text))
    return [*ids, int(tokenizer.eos_token_id)] if end_of_text else ids


def encode_continuation(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of (what is given, what is scored) of a bare text (see `records.ContinuationRequest`)."""
    begin = begin_ids(tokenizer)
    if not context and not begin:
        begin = [int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)]
    given = begin + encode_text(tokenizer, context)
    tokens = begin + encode_text(tokenizer, context + continuation)
    return tokens[: len(given)], tokens[len(given) :]


def begin_ids(tokenizer: Any) -> list[int]:
    """What the model's text begins with: its begin-of-text token, or nothing."""
    ids: list[int] = tokenizer.encode("")
    return [i for i in ids if i == tokenizer.bos_token_id]
