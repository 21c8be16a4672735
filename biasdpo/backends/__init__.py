"""Backends run a model's two sides. `open_backend` is the only place that chooses between them."""

from __future__ import annotations

from collections.abc import Callable

from biasdpo.backends.base import Backend
from biasdpo.config import BACKENDS, BackendName
from biasdpo.errors import BackendError, ConfigError
from biasdpo.models import AdapterSpec, ModelSpec, free_gpu_memory_gb
from biasdpo.workspace import Workspace

Progress = Callable[[float, str], None]
"""Called with the completed share (0 to 1) and the current activity."""


def choose_backend(spec: ModelSpec, name: str = "auto") -> BackendName:
    """Resolve a backend's name for this model; "auto" is transformers on a GPU with room, else llama.cpp on a GGUF."""
    if name == "auto":
        if spec.hf_folder is not None:
            fits = free_gpu_memory_gb() >= spec.memory_gb.get("transformers", 0.0) > 0
            return "transformers" if fits or spec.gguf_path is None else "llamacpp"
        return "llamacpp"
    if name not in BACKENDS:
        raise ConfigError(f"Unknown backend {name!r}: choose one of auto, {', '.join(BACKENDS)}")
    if name == "llamacpp" and spec.gguf_path is None:
        raise BackendError(f"{spec.title} has no GGUF file here, which llamacpp needs: use --backend transformers")
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
    bits: Bits | None = 8 if chosen == "transformers-8bit" else 4 if chosen == "transformers-4bit" else None
    return open_transformers(folder, spec.template, adapter_folder, spec.context_length, bits=bits, on_progress=on_progress)
