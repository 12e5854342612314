"""WebDataset shard sets: a folder or URI with tar files, an index, a manifest and `dataset.json`.

info          DatasetInfo: the content of `dataset.json`, and whether it fits a network
schema        types and ranges of the fields of `dataset.json`, and of the names and digests of shards
tables        manifest, index and `dataset.json`: reading, publishing, the set's digest
writer        writes tar files and whole sets
cache         ShardCache: remote shards on a local disk
order         SampleOrder: the shuffled order, a function of (seed, epoch) and the manifest
reader        SampleReader: random access to samples
prefetch      fetches the shards of the next window in the background
loader        ShardLoader: training batches, in an order that can be resumed exactly
training_rows stored rows to what a network trains on, on the training device
preview       a few decoded images of a set
index_checks  checks that description, manifest and index agree
verify        full check of a set against its index and manifest
"""
