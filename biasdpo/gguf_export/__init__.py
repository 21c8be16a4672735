"""Adapter -> GGUF: as a LoRA file beside its base model, or merged into one complete, quantized file."""

from biasdpo.gguf_export.expected import expected_bytes
from biasdpo.gguf_export.factors import load_factors
from biasdpo.gguf_export.lora_file import cached_lora, export_lora, lora
from biasdpo.gguf_export.merging import export_merged, merged
from biasdpo.gguf_export.quantizations import QUANTIZATIONS, Quantization
from biasdpo.gguf_export.written import Fallback, Progress, Source, Written

__all__ = [
    "QUANTIZATIONS",
    "Fallback",
    "Progress",
    "Quantization",
    "Source",
    "Written",
    "cached_lora",
    "expected_bytes",
    "export_lora",
    "export_merged",
    "load_factors",
    "lora",
    "merged",
]
