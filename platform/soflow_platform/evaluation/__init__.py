"""Scores of images: scoring protocols, statistics computed in blocks, evaluations during training.

block_store       block files of a statistics job
evaluator         scores of a network's samples during training
feature_networks  the feature network of an evaluation
image_sources     generated images as plain data for a statistics job
protocol          feature network, metrics and reference that together define a score
ranks             the processes that score one network together
runner            statistics runners: a Ray cluster, this process
"""
