"""Training: begin or resume a run, the loop, the engine, checkpoints and what is shown meanwhile."""
