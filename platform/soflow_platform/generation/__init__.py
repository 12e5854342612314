"""Weights to images: sampling, decoding, the generator, MLflow's model."""
