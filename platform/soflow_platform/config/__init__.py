"""Sweep files: document, schema, validation, presets."""
