"""A cluster of another version of Ray is refused with both versions, one that asks for another token with what to set."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from soflow_platform.cluster.connection import connected
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
def test_a_cluster_with_another_token_is_refused_with_what_to_set(tmp_path: Path) -> None:
    with token_head(tmp_path, "a" * 64) as address:
        refused = asked(address, "b" * 64)
        assert refused.returncode == 1
        assert "asks for another token" in refused.stderr
        assert "RAY_AUTH_TOKEN" in refused.stderr
        accepted = asked(address, "a" * 64)
        assert accepted.returncode == 0, accepted.stderr


@contextlib.contextmanager
def token_head(folder: Path, token: str) -> Iterator[str]:
    """Address of a Ray head that asks for a token: a process of its own, because Ray reads the way of authentication once in each."""
    script = (
        "import sys; from pathlib import Path; from tests.support.ray_nodes import ray_nodes\n"
        f"with ray_nodes(Path({str(folder / 'code')!r}), nodes=0, token={token!r}) as address:\n"
        "    print('address', address, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as head:
        assert head.stdin is not None
        assert head.stdout is not None
        try:
            yield next(line.split()[1] for line in head.stdout if line.startswith("address "))
        finally:
            head.stdin.close()
            head.wait(60)


def asked(address: str, token: str) -> subprocess.CompletedProcess[str]:
    """A process of this token that asks the cluster whether it answers."""
    script = f"from soflow_platform.cluster.connection import require_answer; require_answer({address!r})"
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60
    )
