"""One trial: data set, model, worker loop, launch, ranks, checkpoints, status."""
