"""MLflow: its client, and everything that is written to runs. Registered models are written by the package `registry`.

Modules that write:
store          opens the client; creates and closes the runs of a sweep and of its trials, with their params and result
metric_logger  metrics and sample grids of a trial during training, in the background
run_writer     the requests that metric_logger sends, each of which can be repeated after a failure
page_texts     sample grids and links in the descriptions of runs and versions
score_log      scores of `evaluate` and results of `compare`, on runs and registered versions

Modules that do not:
environment    tags that describe the machine and the code of a run
links          addresses of pages of MLflow's web interface
run_names      names of the runs of trials
outages        tells an outage of a server, storage or disk from a bug
"""
