"""Backends: engines that run a model's two sides. `open_backend` is the only place that chooses between them."""

from __future__ import annotations

from collections.abc import Callable

from biasdpo.backends.base import Backend
from biasdpo.config import BACKENDS, BackendName
from biasdpo.errors import BackendError, ConfigError
from biasdpo.models import AdapterSpec, ModelSpec, free_gpu_memory_gb
from biasdpo.workspace import Workspace

Progress = Callable[[float, str], None]
"""Called with the share done (0 to 1) and what is being done."""


def choose_backend(spec: ModelSpec, name: str = "auto") -> BackendName:
    """The backend that `name` means for this model here: transformers on a GPU that it fits, else llama.cpp on a GGUF."""
    if name == "auto":
        if spec.hf_folder is not None:
            fits = free_gpu_memory_gb() >= spec.memory_gb.get("transformers", 0.0) > 0
            return "transformers" if fits or spec.gguf_path is None else "llamacpp"
        return "llamacpp"
    for known in BACKENDS:
        if name == known:
            if known == "llamacpp" and spec.gguf_path is None:
                raise BackendError(f"{spec.title} has no GGUF file here, which llamacpp needs: use --backend transformers")
            return known
    raise ConfigError(f"Unknown backend {name!r}: choose one of auto, {', '.join(BACKENDS)}")


def open_backend(
    spec: ModelSpec,
    adapter: AdapterSpec | None,
    *,
    name: str = "auto",
    workspace: Workspace,
    on_progress: Progress = lambda _share, _what: None,
) -> Backend:
    """Load a model and an adapter, prove the comparison honest (ProofError if it is not), and return the engine. Close it."""
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
