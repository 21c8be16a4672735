"""Random LoRA adapters for SmolLM2, without its files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.tiny_models import save_lora

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
    all_shapes = {f"model.layers.{i}.{module}": shape for i in range(layers) for module, shape in shapes.items()}
    some = {} if layers == 30 else {"layers_to_transform": list(range(layers))}
    settings = {"base_model_name_or_path": base_model, **some, **config}
    return save_lora(folder, all_shapes, rank, {}, alpha=alpha, size=size, seed=seed, dtype=dtype, **settings)
