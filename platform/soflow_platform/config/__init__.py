"""Sweep files: their schema and checks. Light to import: no Ray, no MLflow, no timm.

document     YAML with `extends`, overrides and the line of every key
validation   a document checked against the schema; errors in one sentence
experiment   the whole schema, checks across sections, digests
sections     base class, data, network, tracking
training     training loop and resources
evaluation   scores during training
gate         registry: the registered model and the gate before its champion
sampling_settings  how trained networks are sampled
comparison   ways of sampling that `compare` scores
search       search space, budgets, scheduler
mid_run      settings that may change in mid-run, and their changes
dimensions   how one setting of a search space varies
constraints  conditions between settings, parsed and evaluated
locations    paths and URIs made absolute
presets      sweep files by path, or by the name of one that comes with the package
proxy        a sweep at the size and length of another
recipe       the SoFlow paper's recipes, and what departs from them
"""
