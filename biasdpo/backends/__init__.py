"""Backends run a model's two sides. `open_backend` is the only place that chooses between them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from biasdpo.backends.base import Backend
from biasdpo.config import BACKENDS, BackendName
from biasdpo.errors import BackendError, ConfigError
from biasdpo.models import AdapterSpec, ModelSpec, free_gpu_memory_gb
from biasdpo.workspace import Workspace, is_zerogpu

Progress = Callable[[float, str], None]
"""Called with the completed share (0 to 1) and the current activity."""


NO_LLAMA_CPP = "llama.cpp is not installed here, so transformers runs the models."


def has_llama_cpp() -> bool:
    """Whether llama-cpp-python is installed; pip compiles it, so a Space may have none."""
    return find_spec("llama_cpp") is not None


def require_llama_cpp(remedy: str = "") -> None:
    """Raise BackendError without llama.cpp. `remedy`: what else helps than installing it."""
    if not has_llama_cpp():
        raise BackendError(f"llama.cpp is not installed: `pip install -r requirements.txt`{remedy}")


def choose_backend(spec: ModelSpec, name: str = "auto") -> BackendName:
    """Resolve a backend's name for this model; "auto" is transformers on a GPU with room, on a ZeroGPU Space and without
    llama.cpp, else llama.cpp on a GGUF."""
    if name == "auto":
        if is_zerogpu() or not has_llama_cpp():
            return "transformers"
        if spec.hf_folder is not None:
            fits = free_gpu_memory_gb() >= spec.memory_gb.get("transformers", 0.0) > 0
            return "transformers" if fits or spec.gguf_path is None else "llamacpp"
        return "llamacpp"
    if name not in BACKENDS:
        raise ConfigError(f"Unknown backend {name!r}: choose one of auto, {', '.join(BACKENDS)}")
    if name == "llamacpp" and spec.gguf_path is None:
        raise BackendError(f"{spec.title} has no GGUF file here, which llamacpp needs: use --backend transformers")
    if name == "llamacpp":
        require_llama_cpp(", or use --backend transformers")
    if name in ("transformers-8bit", "transformers-4bit") and is_zerogpu():
        raise BackendError(f"{name} does not run on ZeroGPU: use --backend transformers")
    return next(known for known in BACKENDS if known == name)


def open_backend(
    spec: ModelSpec,
    adapter: AdapterSpec | None,
    *,
    name: str = "auto",
    workspace: Workspace,
    on_progress: Progress = lambda _share, _what: None,
) -> Backend:
    """Load a model and an adapter on a backend, and prove that base is base (ProofError). Close it when done."""
    chosen = choose_backend(spec, name)
    if chosen == "llamacpp":
        from biasdpo.backends.llamacpp import open_llamacpp
        from biasdpo.gguf import write

        assert spec.gguf_path is not None
        lora = None
        if adapter is not None:
            on_progress(0.0, "building the adapter's GGUF")
            lora = write.cached_lora(adapter, spec.gguf_path, workspace)
        return open_llamacpp(spec.gguf_path, spec.template, lora, spec.context_length, on_progress=on_progress)
    from biasdpo.backends.hf import open_transformers
    from biasdpo.backends.hf_loading import Bits, hf_copy

    on_progress(0.0, "preparing the transformers copy of the model")
    folder = hf_copy(spec, workspace)
    adapter_folder = None if adapter is None else adapter.folder
    if is_zerogpu():
        from biasdpo.backends.zerogpu import open_zerogpu

        return open_zerogpu(folder, spec.template, adapter_folder, spec.context_length, on_progress=on_progress)
    bits: Bits | None = 8 if chosen == "transformers-8bit" else 4 if chosen == "transformers-4bit" else None
    return open_transformers(folder, spec.template, adapter_folder, spec.context_length, bits=bits, on_progress=on_progress)
