"""Where runs are kept: the project folder, trial checkpoints, retries."""
