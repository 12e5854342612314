"""Feature networks are opened by name, and their names are read without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from soflow_pipelines.features.network import FeatureError
from soflow_pipelines.features.registry import open_features


def test_pooled_features_are_opened_by_name_with_a_shape(tmp_path: Path) -> None:
    assert open_features("pooled", tmp_path, shape=(4, 32, 32)).id == "pooled-4x8x8-1"
    with pytest.raises(FeatureError, match="pooled features need the shape"):
        open_features("pooled", tmp_path)


def test_a_name_that_is_no_network_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match=r"no feature network 'vgg'; there are inception, .*, file:PATH"):
        open_features("vgg", tmp_path)


def test_names_are_read_without_torch() -> None:
    code = "import sys; from soflow_pipelines.features import FEATURE_NAMES; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
