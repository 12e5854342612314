"""The version of everything between images and a score."""

EVALUATOR = "2"
"""Goes with each number and into the key of whatever is kept; another one where the same images would give another number."""
