"""Training: begin or resume a run, the loop, the engine, checkpoints and what is shown meanwhile."""

from tinyllm._internal.extras import check_extra

check_extra("train", "lightning_fabric", "tqdm")
