"""The label that stands for no class."""

from __future__ import annotations

NULL_LABEL = -1
"""Value for "no label" in a tensor of labels; a network looks it up in the last row of its table, index `classes`."""
