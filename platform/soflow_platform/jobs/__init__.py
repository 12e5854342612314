"""Work of the commands that score, compare, generate and prepare.

targets            resolves a name given on the command line to weights or images
requests           the request of each command, as a dataclass
evaluate           scores a network or a set of images
model_under_test   a weights file and the sampler settings under which it is scored
log_scores         logs scores on the run and the registered version they belong to
promote            decides about a candidate and moves the champion alias
gate_scores        scores of candidate and champion under one protocol
compare            compares the methods of a sweep: distance and cost
compare_report     conclusions, Markdown, CSV, JSON and plot of a comparison
benchmark          seconds and memory of training and sampling
generate           a folder of images from weights
export             a generator as one file that runs without the platform
import_weights     registers a checkpoint of the official code
prepare            builds a shard set on a Ray cluster
"""
