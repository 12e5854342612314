"""Preparation: from a source of images to a shard set of pixels or latents.

shard_plan  ShardPlan: which images make which shard, and the set's description
state       progress of a preparation in its store: what is built, begin, finish, lock
build       ShardBuilder: builds one shard; prepare_locally: a whole set in this process
builtin     data sets that come with a dependency, as shards
"""
