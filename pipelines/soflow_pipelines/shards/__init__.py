"""WebDataset shard sets: description, writing, reading, order, loading, verification."""
