"""Trainers and policies on tiny models and a few token rows."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ACCELERATOR = SimpleNamespace(unwrap_model=lambda model: model, device=torch.device("cpu"), autocast=nullcontext)
ROWS = [
    {"prompt_ids": [40, 41, 42], "chosen_ids": [50, 51, 2], "rejected_ids": [60, 2]},
    {"prompt_ids": [40, 41], "chosen_ids": [70], "rejected_ids": [80, 81, 82, 83, 84, 85, 86, 87, 88, 89, 90, 91, 2]},
    {"prompt_ids": [44], "chosen_ids": [2], "rejected_ids": [90, 91, 2]},
    {"prompt_ids": [40, 41, 45, 46], "chosen_ids": [71, 72, 73, 74, 75, 76, 2], "rejected_ids": [92, 2]},
]
TEXTS = [[30, 31, 32, 33, 34], [40, 41], [50]]


def build_tiny_trainer(
    model_folder: Path,
    output: Path,
    rows: list[dict[str, list[int]]],
    *,
    eval_rows: list[dict[str, list[int]]] | None = None,
    batch: int = 1,
    rank: int = 4,
    ours: bool = True,
    trained: float = 0.0,
    terms: dict[str, Any] | None = None,
    note: Any = None,
    targets: list[str] | None = None,
    **settings: Any,
) -> Any:
    """A trainer in fp32 on the CPU that logs every step, with a LoRA on `targets`, by default all linear layers.

    ours       our trainer, or else TRL's
    trained    standard deviation of the LoRA's B factors, which are zero in a fresh one; the same for both trainers
    terms      of `ExtraTerms`
    settings   of DPOConfig
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from training.trainer import ExtraTerms, TokenizedDPOTrainer

    class OnTokenRows(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_args: Any, **_kwargs: Any) -> Any:
            return dataset

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    names = {name.split(".")[-1] for name, module in model.named_modules() if "proj" in name or name.endswith("dense")}
    extra = {"terms": ExtraTerms(**(terms or {})), "note": note or (lambda _text: None)} if ours else {}
    arguments: dict[str, Any] = {"bf16": False, "learning_rate": 1e-2, "save_strategy": "no", "num_train_epochs": 1}
    trainer = (TokenizedDPOTrainer if ours else OnTokenRows)(
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
            **arguments | settings,
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


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def load_policies(folder: Path) -> tuple[Any, Any]:
    """The same PeftModel twice, with an adapter that changes something: as it is, and computing packed rows."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from training.packing import add_packed_forward

    policies = []
    for _ in range(2):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
        names = ["q_proj", "v_proj", "dense" if "phi" in folder.name else "o_proj"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        policies.append(model)
    add_packed_forward(policies[1].get_base_model())
    return policies[0], policies[1]


def reset_adapter(policy: Any) -> None:
    """Make the policy equal to its base."""
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.zero_()


def assert_same_gradients(ours: Any, theirs: Any, tolerance: float = 1e-4) -> None:
    """The trainable parameters' gradients, to a share of the largest of each; the frozen ones have none."""
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        gradient = expected[name].grad
        assert gradient.abs().max() > 1e-6
        assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=tolerance * gradient.abs().max().item()), name


def save_neox(folder: Path, tokenizer_of: Path) -> Path:
    """A random model of an architecture that can't compute packed rows, with another model's tokenizer."""
    from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

    size = {"vocab_size": 480, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    GPTNeoXForCausalLM(GPTNeoXConfig(**size, eos_token_id=2, bos_token_id=2)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    return folder
