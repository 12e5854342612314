"""Files of runs: the project folder, checkpoints and JSON records.

project      ProjectFolder: the paths of everything that is kept of runs
checkpoints  CheckpointStore: the checkpoints of one trial, in a folder or in S3
checkpoint_files  reads the files of a checkpoint, several at a time, each in one pass
ema_snapshots  snapshots of power-function averages, published as checkpoints are
records      reads JSON records of this and earlier versions
locks        file locks between processes
code_digest  digest of the source files that decide a loss, a sample or a score
retry        retry with exponential backoff during an outage
background   BackgroundQueue: tasks in order in a background thread
"""
