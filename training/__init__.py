"""DPO training of a LoRA adapter; `biasdpo.jobs` starts it as a process of its own."""
