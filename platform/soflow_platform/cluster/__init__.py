"""A Ray to work on.

connection      connects to a cluster or starts a local Ray; checks that it lives
actor_pool      runs a job's tasks on actors, with progress and restarts
placement       releases what a killed Ray Train controller left behind
ray_internals   everything taken from Ray's private modules
"""
