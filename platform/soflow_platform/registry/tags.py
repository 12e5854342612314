"""Names of the tags that a registered version is described by; light to import, so that listing versions is quick."""

from __future__ import annotations

METHOD_TAG = "soflow.method"
NETWORK_TAG = "soflow.network"
PARAMETERS_TAG = "soflow.parameters"
IMAGES_TAG = "soflow.images"
"""Training images seen."""
PLUGINS_TAG = "soflow.plugins"
"""Plugins that loading needs, with the digests of their sources."""
RECIPE_TAG = "soflow.recipe"
"""Settings of the trial, as JSON."""
TRIALS_TAG = "soflow.trials"
"""Number of trials that it was chosen among."""
DECISION_PREFIX = "promotion."
"""Of the tags that hold the newest decision of the gate about a version."""
