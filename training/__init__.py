"""The training process. Nothing imports it: `biasdpo.runs` starts it through `accelerate launch`."""
