"""Version of the evaluator: of everything between images and a score."""

EVALUATOR = "2"
"""A tag of each number and part of every cache key; raised where the same images would give another number."""
