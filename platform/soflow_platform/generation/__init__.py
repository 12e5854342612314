"""Weights to images by index.

decoding      samples of a network to images
generator     samples and images from a weights file
pyfunc_model  a registered generator as MLflow loads it
sampling      samples by index, and the settings that act at sampling alone
"""
