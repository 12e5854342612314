"""Batches in, batches out: shards, loader, images, features, metrics, writers. Local; no Ray, no MLflow."""
