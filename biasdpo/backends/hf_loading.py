"""Loading for the transformers backend and for training: a model's Hugging Face folder, where its weights go, its tokenizer and
token ids, and torch's failures as errors of ours."""

from __future__ import annotations

import gc
import logging
import re
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate.hooks import remove_hook_from_submodules
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from biasdpo.chat import ChatTemplate, PromptTemplate, Segment, Turn, encode_inner, encode_jointly, quotes_special
from biasdpo.errors import BackendError, ModelError, WorkspaceError
from biasdpo.model_files import END_TOKENS, eos_token_ids, read_header, refuse_parts, safetensors_shapes, weight_files
from biasdpo.models import ModelSpec
from biasdpo.workspace import Workspace, locked, sha256_of

Bits = Literal[4, 8]

# The Hugging Face folder of a model

_LOCK_SECONDS = 1800.0  # another process may be writing Phi-2's 11 GB


def hf_copy(spec: ModelSpec, workspace: Workspace) -> Path:
    """The model's Hugging Face folder: its own, or one converted once from its GGUF into WORKSPACE/cache/hf.

    Raises ModelError if the GGUF is damaged or can't be converted.
    """
    if spec.hf_folder is not None:
        return spec.hf_folder
    from biasdpo.gguf.to_hf import write_hf_folder

    gguf_path = spec.require_files().gguf_path
    assert gguf_path is not None
    refuse_parts(gguf_path)
    read_header(gguf_path)  # checks it before it is hashed
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
                raise WorkspaceError(f"Can't write the copy of {gguf_path.name} to {folder}: {exc}; free some space") from exc
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder


# Placement: on the GPU if it has room; else as many layers as fit, the others streamed from CPU memory; else on the CPU

_STEP_BYTES = 2**30  # a step besides the KV caches: activations of a prompt chunk, cuBLAS workspaces, the adapter, fragmentation
_SIDES = 2
# bitsandbytes: one byte a weight in 8 bits; in 4 bits half a byte, plus a float32 scale per block of 64.
_BYTES_OF_BITS: dict[Bits, float] = {8: 1.0, 4: 0.5 + 4 / 64}


@dataclass(frozen=True)
class Placement:
    """Where a model's weights go. `device_map` is accelerate's, empty if all are on `device`."""

    device: torch.device
    device_map: dict[str, torch.device | str] = field(default_factory=dict)
    share: str = ""  # "20 of 32 layers" if divided
    note: str = ""  # for display: what had to be given up, and why

    @property
    def whole(self) -> bool:
        return not self.device_map

    def describe(self) -> str:
        """ "CPU, 2 threads", "cuda:0 (NVIDIA H100)", "cuda:0 (NVIDIA T4), 20 of 32 layers: it has 3.1 of 7.2 GB"."""
        if self.device.type == "cpu":
            threads = torch.get_num_threads()
            text = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
        else:
            text = f"{self.device} ({torch.cuda.get_device_name(self.device)})"
        return ", ".join(filter(None, (text, self.share))) + (f": {self.note}" if self.note else "")


def choose_placement(folder: Path, device_name: str, context_length: int, bits: Bits | None) -> Placement:
    """Choose where the model in `folder` goes (see `open_transformers`); BackendError if there is no room anywhere."""
    device = choose_device(device_name)
    check_bits(bits, device)
    skeleton = load_skeleton(folder)
    if device.type == "cpu":
        check_cpu_memory(weight_bytes(skeleton, 4))
        return Placement(device)
    free, work = free_bytes(device), work_bytes(skeleton, context_length, 2)
    needed = weight_bytes(skeleton, 2, bits) + work
    if needed <= free:
        return Placement(device)
    if bits is not None:
        raise BackendError(
            f"In {bits} bits the model needs {needed / 1e9:.1f} GB of {device}, which has {free / 1e9:.1f} GB free, and can't be "
            "divided: close what uses it, or use " + ("transformers-4bit or " if bits == 8 else "") + "--backend llamacpp"
        )
    shortage = f"it has {max(free, 0) / 1e9:.1f} GB free of the {needed / 1e9:.1f} needed"
    device_map = divide(skeleton, device, free - work)
    on_device = sum(_place_of(f"model.layers.{i}", device_map) == device for i in range(len(skeleton.model.layers)))
    if on_device == 0:
        check_cpu_memory(weight_bytes(skeleton, 4))
        return Placement(torch.device("cpu"), note=f"not {device}, {shortage}; --backend llamacpp takes less")
    check_cpu_memory(weight_bytes(skeleton, 2))
    layers = f"{on_device} of {len(skeleton.model.layers)} layers"
    return Placement(device, device_map, layers, f"{shortage}, so the rest passes through it at every token, which is slow")


def divide(skeleton: Any, device: torch.device, room: int) -> dict[str, torch.device | str]:
    """accelerate's device map of a 16-bit model: the first layers on the device, within `room` bytes less one layer that passes
    through; the rest in CPU memory."""
    logging.getLogger("accelerate.utils.modeling").setLevel(logging.ERROR)  # it warns about what is intended
    index = device.index or 0
    unlimited = 10 * weight_bytes(skeleton, 2)  # `check_cpu_memory` has the say
    places = infer_auto_device_map(
        skeleton,
        max_memory={index: max(room, 0), "cpu": unlimited},
        no_split_module_classes=list(skeleton._no_split_modules),
        dtype=torch.bfloat16,
        offload_buffers=True,
    )
    return {name: device if place == index else "cpu" for name, place in places.items()}


def _place_of(module: str, device_map: dict[str, torch.device | str]) -> torch.device | str:
    while module and module not in device_map:
        module = module.rpartition(".")[0]
    return device_map[module]


def load_skeleton(folder: Path) -> Any:
    """The model of a Hugging Face folder on the meta device: shapes without weights."""
    with _load_errors(folder):
        config = load_config(folder)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
    if not hasattr(getattr(skeleton, "model", None), "layers"):
        raise ModelError(f"{folder} is a {config.model_type} model: the transformers backend runs Llama and Phi models")
    return skeleton


def load_config(folder: Path, **settings: Any) -> Any:
    """transformers' config of a folder. A padding token past the embeddings, which torch refuses, is dropped: none is needed."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, **settings)
    pad, rows = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if isinstance(pad, int) and isinstance(rows, int) and pad >= rows:
        config.pad_token_id = None
    return config


@contextmanager
def _load_errors(folder: Path) -> Iterator[None]:
    """Convert the errors of transformers' loading, which are of any class, to ModelErrors; torch's own pass."""
    try:
        yield
    except RuntimeError:
        raise
    except Exception as exc:
        raise ModelError(f"transformers can't load {folder} ({first_line(exc)}): fetch the model again") from exc


def weight_bytes(skeleton: Any, value_bytes: int, bits: Bits | None = None) -> int:
    """Bytes of a model's weights; `bits`: the matrices in the decoder layers are quantized. A tied head counts once."""
    total: int = sum(p.numel() for p in skeleton.parameters())
    matrices: int = sum(p.numel() for p in skeleton.model.layers.parameters() if p.ndim == 2)
    matrix_bytes = value_bytes if bits is None else _BYTES_OF_BITS[bits]
    return int(matrices * matrix_bytes) + (total - matrices) * value_bytes


def work_bytes(skeleton: Any, context_length: int, value_bytes: int) -> int:
    """Bytes that computing takes besides the weights: both sides' KV caches at the full context, and one step."""
    config = skeleton.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    positions: int = min(context_length, int(config.max_position_embeddings))
    kv_bytes: int = 2 * heads * head_size * len(skeleton.model.layers) * positions * value_bytes  # keys and values
    return _SIDES * kv_bytes + _STEP_BYTES


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, including what torch holds unused."""
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


def check_cpu_memory(weights: int) -> None:
    """Raise BackendError if the weights exceed the free CPU memory: the system would kill the process."""
    available = int(psutil.virtual_memory().available)
    if weights > available:
        sizes = f"take {weights / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free"
        raise BackendError(f"The model's weights {sizes}: close other programs, or use --backend llamacpp with a quantized GGUF")


def check_bits(bits: Bits | None, device: torch.device) -> None:
    """Raise BackendError if bitsandbytes can't run."""
    name = f"transformers-{bits}bit"
    if bits is not None and device.type != "cuda":
        raise BackendError(f"{name} needs an NVIDIA GPU, none is here: use --backend llamacpp with a quantized GGUF")
    if bits is not None and find_spec("bitsandbytes") is None:
        raise BackendError(f"{name} needs bitsandbytes: `pip install bitsandbytes`, or use --backend transformers")


def choose_device(name: str) -> torch.device:
    """Resolve "auto" (the GPU with the most free memory, else the CPU), "cpu", "cuda" or "cuda:1"."""
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


# The model


def load_model(
    folder: Path, placement: Placement, bits: Bits | None, report: Callable[[float, str], None]
) -> tuple[Any, Placement]:
    """Load a model for inference; return it with its actual placement: the CPU if the GPU's memory ran out while loading.

    Weights are float32 on a CPU, bfloat16 on a GPU that supports it, else float16; `bits`: quantized by bitsandbytes.
    """
    report(0.1, "reading the weights" + (f": {placement.describe()}" if placement.note else ""))
    try:
        return _load(folder, placement, bits), placement
    except torch.OutOfMemoryError as exc:
        if placement.device.type == "cpu" or bits is not None:
            raise
        release(exc)
    gc.collect()
    placement = Placement(torch.device("cpu"), note=f"not {placement.device}, whose memory ran out while loading")
    check_cpu_memory(weight_bytes(load_skeleton(folder), 4))
    report(0.1, f"reading the weights: {placement.describe()}")
    return _load(folder, placement, None), placement


def _load(folder: Path, placement: Placement, bits: Bits | None) -> Any:
    dtype = torch.float32
    options: dict[str, Any] = {}
    if placement.device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        if placement.whole:
            options["device_map"] = {"": placement.device}
    if bits is not None:
        options["quantization_config"] = quantization(bits, dtype)
    model = load_base(folder, dtype=dtype, **options)
    model.eval().requires_grad_(False)
    if not placement.whole:
        _dispatch(model, placement)
    return model


NO_ADAPTER = {"subfolder": ".none"}
"""`adapter_kwargs` of from_pretrained, which would also load an adapter that lies in the model's folder."""


def load_base(folder: Path, **options: Any) -> Any:
    """The bare model of a folder, whatever else lies in it: transformers would also load an adapter that it finds there."""
    transformers_logging.disable_progress_bar()
    options |= {"local_files_only": True, "use_safetensors": True, "adapter_kwargs": NO_ADAPTER}
    with _load_errors(folder):
        return AutoModelForCausalLM.from_pretrained(folder, **{"config": load_config(folder), **options})


def independent_model(folder: Path, model: Any, device: torch.device) -> Any:
    """The model of a folder once more, for the proof: not by transformers' loading, but with each module's weights read from the
    safetensors files while it computes. Shares nothing with `model` but its settings."""
    with init_empty_weights(include_buffers=False):
        bare = type(model)(model.config)
    files = {name: file for file in weight_files(folder) for name in safetensors_shapes(file)}

    def read(module: Any, _args: Any) -> None:
        for key in module.own:
            name = "model.embed_tokens.weight" if key == "lm_head.weight" and key not in files else key  # a tied head
            if name not in files:
                raise ModelError(f"{folder} lacks the weights {name}: fetch the model again")
            with safe_open(files[name], framework="pt") as file:
                weights = file.get_tensor(name).to(device, model.dtype)
            module._parameters[key.rpartition(".")[2]] = torch.nn.Parameter(weights, requires_grad=False)

    def free(module: Any, _args: Any, _output: Any) -> None:
        module.to("meta")

    for path, module in bare.named_modules():
        module._buffers.update({name: buffer.to(device) for name, buffer in module.named_buffers(recurse=False)})
        if own := [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]:
            module.own = own
            module.register_forward_pre_hook(read)
            module.register_forward_hook(free)
    return bare.eval()


def quantization(bits: Bits, dtype: torch.dtype) -> Any:
    """bitsandbytes settings: LLM.int8() (arXiv:2208.07339), or NF4 as in QLoRA (arXiv:2305.14314)."""
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _dispatch(model: Any, placement: Placement) -> None:
    """Divide a model. accelerate's hooks copy layers from CPU memory to the device while they compute."""
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns about what is intended
    dispatch_model(model, placement.device_map, skip_keys=model._skip_keys_device_placement)


@contextmanager
def undispatched(model: Any, placement: Placement) -> Iterator[None]:
    """Remove a divided model's hooks within the block, so that layers can be added."""
    if placement.whole:
        yield
        return
    remove_hook_from_submodules(model)
    yield
    _dispatch(model, placement)


# Tokenizer and token ids


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a Hugging Face folder."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as exc:
        raise ModelError(f"{folder} has no tokenizer that transformers can load ({exc}): fetch the model again") from exc
    if not tokenizer.is_fast:
        raise ModelError(f"{folder} has no tokenizer.json: fetch the model again, with that file")
    # For a tokenizer that names no end-of-text token.
    tokenizer.init_kwargs["model_ends"] = ids_of(*eos_token_ids(folder))
    return tokenizer


def own_template(template: PromptTemplate, tokenizer: Any) -> PromptTemplate:
    """A chat template with the special tokens that the loaded tokenizer has, which may come from its class."""
    if not isinstance(template, ChatTemplate):
        return template
    variables = tuple(sorted((name, str(text)) for name, text in tokenizer.special_tokens_map.items()))
    return replace(template, special_tokens=special_tokens(tokenizer), variables=variables)


@lru_cache(maxsize=8)
def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts of the tokens that no user's text may become, longest first."""
    texts = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(texts, key=lambda text: (-len(text), text)))


def ids_of(*values: Any) -> list[int]:
    """Token ids of config fields that may hold an id, a list of ids, or null; in order, each once."""
    listed = (entry for value in values for entry in (value if isinstance(value, list | tuple) else [value]))
    return list(dict.fromkeys(int(entry) for entry in listed if isinstance(entry, int) and not isinstance(entry, bool)))


def end_of_completion(tokenizer: Any, template: PromptTemplate) -> int:
    """The token that ends a completion, in training and scoring: the one that the template writes there, else end-of-text."""
    named = [tokenizer.convert_tokens_to_ids(template.end)] if template.end else []
    ends = ids_of(*named, tokenizer.eos_token_id, tokenizer.init_kwargs.get("model_ends"))
    if not ends:
        raise ModelError("The tokenizer names no end-of-text token: name eos_token in its tokenizer_config.json")
    return ends[0]


def end_tokens(model: Any, tokenizer: Any, template: PromptTemplate) -> frozenset[int]:
    """Tokens at which generation stops: the end of a completion, EOS of the model and the tokenizer, and those at which
    llama.cpp always ends."""
    named = (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id)
    ends = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special and token.content in END_TOKENS}
    end = [tokenizer.convert_tokens_to_ids(template.end)] if template.end else []
    return frozenset(ends.union(ids_of(*named, *end)))


def padding(tokenizer: Any, rows: int) -> int:
    """A token id for padding, whose value nothing depends on: below `rows`, the number of embeddings."""
    named = ids_of(tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
    return next((i for i in named if i < rows), 0)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of plain text: no special tokens are parsed, no BOS is added."""
    ids: list[int] = tokenizer.encode(_encodable(text), add_special_tokens=False, split_special_tokens=True)
    return ids


def encode_inner_text(tokenizer: Any, text: str) -> list[int]:
    """The same for a text that follows another (see `chat.encode_inner`)."""
    return encode_inner(lambda segments: encode_text(tokenizer, segments[0].text), text)


def _encodable(text: str) -> str:
    """A lone surrogate, which UTF-8 can't encode, becomes "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")


def encode_segments(tokenizer: Any, segments: Sequence[Segment]) -> list[int]:
    """Token ids of segments, as of one text, like `apply_chat_template`. Only where plain text holds a special token is each
    segment encoded alone."""
    for token in dict.fromkeys(segment.text for segment in segments if segment.special):
        known = tokenizer.convert_tokens_to_ids(token)
        if known is None or tokenizer.convert_ids_to_tokens(known) != token:
            raise ModelError(f"The tokenizer lacks {token!r}, a special token of the prompt template: correct the template")
    if not quotes_special(segments, special_tokens(tokenizer)):
        text = "".join(segment.text for segment in segments)
        ids: list[int] = tokenizer.encode(_encodable(text), add_special_tokens=False)
        return ids
    parts = ([tokenizer.convert_tokens_to_ids(s.text)] if s.special else encode_text(tokenizer, s.text) for s in segments)
    return [i for part in parts for i in part]


def encode_prompt(
    tokenizer: Any, template: PromptTemplate, prompt: str, system: str = "", history: Sequence[Turn] = ()
) -> list[int]:
    """Token ids of a rendered prompt. Special tokens come from the template, never from a user's text."""
    template = own_template(template, tokenizer)
    begin = [] if template.writes_begin else begin_ids(tokenizer)
    return begin + encode_segments(tokenizer, template.render(prompt, system, history))


def encode_completion(
    tokenizer: Any, template: PromptTemplate, prompt: str, completion: str, system: str = "", history: Sequence[Turn] = ()
) -> tuple[list[int], list[int]]:
    """(token ids of a rendered prompt, those of a completion after it), tokenized jointly (see `chat.encode_jointly`)."""
    template = own_template(template, tokenizer)
    begin = [] if template.writes_begin else begin_ids(tokenizer)
    prompt_ids, ids = encode_jointly(
        lambda segments: encode_segments(tokenizer, segments),
        template.render(prompt, system, history),
        template.completed(completion),
    )
    return begin + prompt_ids, ids


def encode_continuation(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """(given, scored) token ids of a bare text (see `records.ContinuationRequest`)."""
    begin = begin_ids(tokenizer)
    if not context and not begin:
        begin = ids_of(tokenizer.bos_token_id, tokenizer.eos_token_id, 0)[:1]
    given = begin + encode_text(tokenizer, context)
    tokens = begin + encode_text(tokenizer, context + continuation)
    return tokens[: len(given)], tokens[len(given) :]


def begin_ids(tokenizer: Any) -> list[int]:
    """The tokens at the start of every text: BOS, or none."""
    ids: list[int] = tokenizer.encode("")
    return [i for i in ids if i == tokenizer.bos_token_id]


# Errors

_OUT_OF_MEMORY = (
    "Out of memory: shorten the prompt, close what else uses the device, or choose a smaller model, --backend "
    "transformers-4bit (a GPU with bitsandbytes) or --backend llamacpp"
)


@contextmanager
def foreign_errors() -> Iterator[None]:
    """Convert torch's failures to BackendErrors."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as exc:
        raise BackendError(_OUT_OF_MEMORY) from exc
    except RuntimeError as exc:
        if "alloc" in str(exc) and "memory" in str(exc):
            raise BackendError(_OUT_OF_MEMORY) from exc
        raise BackendError(f"torch failed ({first_line(exc)}): reload the model, or use --backend llamacpp") from exc


@contextmanager
def released_errors() -> Iterator[None]:
    """Free what an error that leaves the block refers to: an error that is stored (a page shows it) would otherwise keep the
    variables of every frame it passed, and with them weights and activations."""
    try:
        yield
    except BackendError as exc:
        release(exc)
        raise


def release(exc: BaseException) -> None:
    """Free the variables of an error's finished frames."""
    link: BaseException | None = exc
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def first_line(exc: BaseException) -> str:
    return (str(exc).strip().split("\n") or [""])[0][:300]
