"""A sweep of trials.

points         points of a search space: grid, draws, Sobol sequence; conditions and constraints
search_space   the trials of a sweep, each a checked experiment
trial_names    what trials are named by
tpe            points that Optuna's TPE proposes from results
drawing        trials that results lead to, drawn while a sweep runs or in its end
searcher       Tune's search algorithm over them
population     decides at a rung of population-based training who goes on from whom, and with which settings
population_run trains a population from rung to rung
lineage        what the trials of a population went through
ranking        points compared by the mean over their seeds
seed_statistics  mean and spread over seeds, and which means differ
plan           FLOPs, memory, bytes, GPU-hours and money of a sweep, before it is started
plan_assumptions  the GPU that a plan is computed for
record         sweep.json: settings, trials, result; the sweep's lock
recorded       the trials of a sweep as its record has them, and those that its file adds
continuation   trials that go on from a shorter training
lookup         finds a sweep or trial by what a user calls it
status         state of a sweep and its trials, from files
progress       Ray actor with the status of every running trial
trial_gauges   metrics of the trials for Prometheus
display        events and outcomes that the terminal shows
ray_tune       runs the trials under Ray Tune
halving        Tune's scheduler of search.asha
trial          Tune's trial function
context        a sweep, where it is kept and shown, and how its trials ended
sweep_data     the training data, with the statistics that trials are scored against
sweep          the driver: prepare, train, choose, register
conclusion     how a sweep ends: outcomes, the best trial, its registration
"""
