"""Our trainer, or TRL's, on a tiny model and a few token rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def build_tiny_trainer(
    model_folder: Path,
    output: Path,
    rows: list[dict[str, list[int]]],
    *,
    eval_rows: list[dict[str, list[int]]] | None = None,
    rank: int = 4,
    batch: int = 1,
    way: str = "ours",
    trained: float = 0.0,
    note: Any = print,
    text_kl_weight: float = 0.0,
    anchor_texts: Any = (),
    weights: dict[str, float] | None = None,
    targets: list[str] | None = None,
    **settings: Any,
) -> Any:
    """A trainer in fp32 on the CPU, logged every step, with a LoRA on `targets`, by default all linear layers.

    way        "ours", or "trl": TRL's own computations
    trained    standard deviation of the LoRA's second factors, which are zero in a fresh one; the same for both ways
    weights    of our further terms, by name
    settings   of DPOConfig
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from training.trainer import TokenisedDPOTrainer

    class OnTokenRows(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_args: Any, **_kwargs: Any) -> Any:
            return dataset

    extra: dict[str, Any] = (
        {"note": note, "text_kl_weight": text_kl_weight, "anchor_texts": anchor_texts, **(weights or {})} if way == "ours" else {}
    )
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    names = {name.split(".")[-1] for name, module in model.named_modules() if "proj" in name or name.endswith("dense")}
    defaults: dict[str, Any] = {"bf16": False, "learning_rate": 1e-2, "save_strategy": "no", "num_train_epochs": 1}
    trainer = (TokenisedDPOTrainer if way == "ours" else OnTokenRows)(
        model=model,
        args=DPOConfig(
            output_dir=str(output),
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=batch,
            activation_checkpointing=False,
            logging_steps=1,
            use_cpu=True,
            dataloader_pin_memory=False,
            report_to="none",
            disable_tqdm=True,
            **defaults | settings,
        ),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None,
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        peft_config=LoraConfig(r=rank, target_modules=targets or sorted(names - {"lm_head"}), task_type="CAUSAL_LM"),
        **extra,
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name and trained:
            torch.nn.init.normal_(parameter, std=trained, generator=generator)
    return trainer


def save_neox(folder: Path, tokenizer_of: Path) -> Path:
    """A random model of an architecture that no packed rows are computed of, with another model's tokenizer."""
    from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=480,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        eos_token_id=2,
        bos_token_id=2,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    return folder
