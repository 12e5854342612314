"""Image sets for evaluation, and reference statistics."""
