"""A small sweep file, and a way to write one."""

from __future__ import annotations

from pathlib import Path

MINIMAL = """\
name: small
data: {source: digits}
network: {patch: 2, hidden: 32, depth: 2, heads: 2}
objective: {method: soflow}
training: {steps: 40, batch: 16}
evaluation: {every: 20}
"""


def write(folder: Path, text: str, name: str = "sweep.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path
