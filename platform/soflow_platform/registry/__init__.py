"""Registered models: versions, aliases, promotion."""
