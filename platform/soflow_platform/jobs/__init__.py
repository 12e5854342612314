"""Work of the commands that score, compare, generate and prepare.

targets            resolves a name given on the command line to weights or images
requests           the request of each command, as a dataclass
evaluate           scores a network or a set of images
model_under_test   a weights file and the sampler settings under which it is scored
score_summary      mean and deviation over seeds, and a plot against guidance or evaluations
search_steps       searches the time grid of a sampler for one trained network
log_scores         logs scores on the run and the registered version they belong to
promote            decides about a candidate and moves the champion alias
gate_scores        scores of candidate and champion under one protocol
compare            compares the methods of a sweep: distance and cost
compare_rows       its rows, and the mean and spread of those that differ in their seed alone
compare_report     conclusions, Markdown, CSV, JSON and plot of a comparison
report             writes a sweep as one HTML page
report_data        what it shows, from record, checkpoints, status files and MLflow
report_charts      its Plotly figures
report_importance  share of the metric's variance that each setting explains
report_page        its HTML, with style and script in the files beside it
report_pareto      fronts of several objectives
report_population  decisions at the rungs of a population, and what its trials went through
benchmark          seconds and memory of training and sampling
generate           a folder of images from weights
export             a generator as one file that runs without the platform, or as a folder for diffusers
export_diffusers   that folder: written, and loaded by diffusers
import_weights     registers a checkpoint of published code
posthoc_ema        averages of a trial's weights over other lengths
start_from         finds the weights that trials start from, and keeps a copy
detached           a sweep whose command runs on the cluster
doctor             checks that a machine or a cluster can run sweeps
doctor_checks      judges what machines say of themselves
doctor_services    checks the tracking store, the data and the weights that a sweep needs
node_report        versions, devices, limits and disks of one machine
node_survey        reports of all nodes of a cluster, and a sum between them
prepare            builds a shard set, here or on a Ray cluster
prepare_here       builds shards on threads of this process, where that is sooner done
"""
