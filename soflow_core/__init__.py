"""The mathematics of one-step generators: networks, paths, objectives, samplers and the training step. Needs
torch and timm only.
"""
