"""MLflow runs: store, outages, metric logger, environment tags."""
