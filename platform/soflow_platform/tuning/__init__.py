"""A sweep of trials.

search_space   the trials of a search space, each a checked experiment
plan           FLOPs, memory, bytes, GPU-hours and money of a sweep, before it is started
record         sweep.json: settings, trials, result; the sweep's lock
lookup         finds a sweep or trial by what a user calls it
status         state of a sweep and its trials, from files
progress       Ray actor with the status of every running trial
display        events and outcomes that the terminal shows
ray_tune       runs the trials under Ray Tune
trial          Tune's trial function
sweep          the driver: prepare, train, choose, register
"""
