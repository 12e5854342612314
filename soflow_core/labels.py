"""The label that stands for no class."""

from __future__ import annotations

NULL_LABEL = -1
"""Stands for "no label" in a tensor of labels; the network looks it up in the last row of its table, index
`classes`.
"""
