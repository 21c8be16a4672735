"""Logits of the same token ids from transformers (+ PEFT) and from llama.cpp, both in F32 on one thread."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from biasdpo.backends.llamacpp import Context, Model


def transformers_logits(folder: Path, ids: list[int], adapter: Path | None = None) -> NDArray[np.float32]:
    """Logits (T, V) after each of the tokens."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(torch.tensor([ids])).logits[0].numpy()
    return logits


def llamacpp_logits(gguf: Path, ids: list[int], lora: Path | None = None) -> NDArray[np.float32]:
    """Logits (T, V) after each of the tokens."""
    model = Model(gguf, lambda _share, _what: None)
    try:
        if lora is not None:
            model.load_adapter(lora)
        context = Context(model, 512, "f32", lambda: 1)
        try:
            if lora is not None:
                context.set_strength(1.0)
            return context.logits(ids[:1], [*ids[1:], 0])
        finally:
            context.close()
    finally:
        model.close()
