"""The training process. Nothing imports it: `biasdpo.jobs.worker` starts it through `accelerate launch`."""
