"""The training engine: DeepSpeed behind one file, the only loop, checkpoints, metrics and interruptions."""
