"""Training, evaluation and registration of generators with Ray and MLflow, and the `soflowctl` command line.

config      sweep files: their schema and checks
storage     files of runs: the project folder, checkpoints, records
generation  images from weights
cluster     Ray: connection, actor pools, release of placement groups
tracking    MLflow: its client, and everything that is written to runs
evaluation  scoring protocols, statistics computed in blocks, evaluations during training
registry    registered models: versions, promotion, rollback
training    one trial, from its data to its checkpoints
tuning      a sweep of trials under Ray Tune
jobs        the work of evaluate, compare, generate and data prepare
cli         the commands
errors      errors that end a command, with their exit codes
generator   import path for models that version 0.1.0 registered
"""


def version() -> str:
    """The installed distribution's version."""
    from importlib.metadata import version as installed

    return installed("soflow")
