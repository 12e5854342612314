"""A cluster of another version of Ray is refused with both versions, one that asks for another token with what to set."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from soflow_platform.cluster.connection import connected, require_answer
from soflow_platform.errors import UserError
from tests.support.ray_nodes import ray_nodes


@pytest.mark.slow
def test_a_cluster_of_another_ray_is_refused_with_both_versions(tmp_path: Path) -> None:
    nodes = ray_nodes(tmp_path / "code", nodes=0, ray_version="2.50.1")
    with nodes as address, pytest.raises(UserError) as refused, connected(address):
        pass
    assert f"the cluster at {address} runs Ray 2.50.1 on Python " in str(refused.value)
    assert f"this command Ray {ray.__version__} on Python " in str(refused.value)
    assert str(refused.value).endswith("install the same Ray on both sides.")


@pytest.mark.slow
def test_a_cluster_with_another_token_is_refused_with_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ray_nodes(tmp_path / "code", nodes=0, token="a" * 64) as address:
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 64)
        with pytest.raises(UserError, match="asks for another token") as refused:
            require_answer(address)
        assert "RAY_AUTH_TOKEN" in str(refused.value)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
        require_answer(address)
