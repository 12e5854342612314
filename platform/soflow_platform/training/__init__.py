"""Training of one trial, from its data to its checkpoints.

What it needs:
job            TrialJob: everything a worker process needs to train a trial, as plain data
dataset        finds the training data and checks that it fits the network
model          the network's configuration for given data
flops          FLOPs of a forward pass
memory         memory of a worker, by arithmetic
step_time      model of a step on GPUs: arithmetic, messages, seconds
alignment_cost  what training.alignment costs and fits, by its settings
feature_targets  features of clean samples that a network is aligned with
step_builder   the training step, with how its gradients are averaged over ranks
setup          TrialSetup: data loader, network, training step and evaluator of one rank

How it runs:
launch         starts a trial's workers with Ray Train
in_process     trains a trial without Ray and keeps nothing
step_check     one step of a trial with a small network, before it is started
length_dependence  whether a training depends on its total number of steps
worker         Trainer: the training loop of one rank
start          weights that a trial starts from, and their lineage
step_inputs    rows and draws of each step on the device, one step ahead, in either version of the draws
step_noise     times and noise of each step of the first version, drawn one step ahead
distributed    collective operations on Python objects and numbers
ema_network    the network with averaged weights, whole or sharded, for evaluations
throughput     images per second, FLOPs, time spent waiting for data, memory
memory_pieces  smaller pieces of a batch where memory is exhausted
stop_rules     values of a metric at which a trial is ended
stragglers     finds a rank that is slower than the others
resume         the checkpoint that training resumes from, and its state
state_files    files of a training state in a checkpoint: one, or parts that several threads write
stop_request   files that ask a sweep or a trial to stop
stop_agreement  what all ranks agree on after a step: stop, or save

What it writes (rank 0 alone):
trial_io       status, log, metrics, sample grids and checkpoints behind one interface
trial_status   status.json: its schema and its writer
trial_log      log.txt: its writer and its readers
checkpointer   writes checkpoints in a background thread
failure        what is kept of an exception, and whether another start may help
"""
