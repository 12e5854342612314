"""Agreement of a classifier's prediction with the label that a sample was generated for."""

from __future__ import annotations

from torch import Tensor


def count_label_matches(logits: Tensor, labels: Tensor) -> int:
    """The number of (B, K) logits whose largest entry is at the label (B,)."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit together")
    return int((logits.argmax(1).cpu() == labels.cpu()).sum())
