"""The final state of a trial, tensor by tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from soflow_platform.storage.checkpoints import CheckpointStore
from soflow_platform.training.state_files import opened_state


def final_state(root: str) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint, network, EMAs and optimizer, by its path in the state."""
    found, damaged = CheckpointStore(root).newest()
    assert found is not None
    assert damaged == []
    with opened_state(found) as state:
        tensors = {key: value.clone() for key, value in _flat(state).items() if isinstance(value, Tensor)}
    assert len(tensors) > 50
    return tensors


def differing_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])]


def _flat(state: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(state, dict):
        return {k: v for key, below in state.items() for k, v in _flat(below, f"{prefix}{key}.").items()}
    return {prefix: state}
