import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file

REFERENCE = Path(__file__).parents[1] / "reference"
settings.register_profile("field", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("field")


@pytest.fixture(scope="session")
def reference_settings() -> dict[str, Any]:
    return json.loads((REFERENCE / "soflow_reference.json").read_text())


@pytest.fixture(scope="session")
def reference_tensors() -> dict[str, torch.Tensor]:
    return load_file(REFERENCE / "soflow_reference.safetensors")
