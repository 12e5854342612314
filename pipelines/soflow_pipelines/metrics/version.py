"""Version of the evaluator: of everything between images and a score."""

EVALUATOR = "2"
"""A tag of each score and part of every cache key; incremented when the same images get another score."""
