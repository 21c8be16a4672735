"""Random LoRA adapters in PEFT's format, without torch: real files, arbitrary content."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

SMOLLM2 = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}


def write_lora(
    folder: Path,
    *,
    shapes: dict[str, tuple[int, int]] = SMOLLM2,
    layers: int = 30,
    rank: int = 4,
    alpha: float = 8.0,
    size: float = 0.03,
    seed: int = 0,
    dtype: type = np.float16,
    base_model: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
    **config: object,
) -> Path:
    """Write an adapter whose B factors have standard deviation `size` (0: it changes nothing); return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(layers):
        for module, (out, into) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = (rng.standard_normal((rank, into)) / np.sqrt(into)).astype(dtype)
            tensors[f"{name}.lora_B.weight"] = (rng.standard_normal((out, rank)) * size).astype(dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({module.split(".")[-1] for module in shapes}),
        "base_model_name_or_path": base_model,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
