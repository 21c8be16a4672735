"""DPO training of a LoRA adapter; `biasdpo.runs` starts it as a process of its own."""
