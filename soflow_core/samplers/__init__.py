"""From noise to data."""
