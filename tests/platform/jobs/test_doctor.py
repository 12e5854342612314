"""What `soflowctl doctor` says of machines that lack something; a cluster is asked in tests/end_to_end/test_cluster.py."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from soflow_platform.cli.main import main
from soflow_platform.jobs.doctor_checks import Check, State, check_collective, judge
from soflow_platform.jobs.node_report import (
    DRIVER_FILE,
    Disk,
    NodeQuestions,
    NodeReport,
    report_node,
    shared_folder_error,
)
from soflow_platform.jobs.node_survey import Collective, NodeAnswer, clock_skew

GIB = 1 << 30
SOUND = NodeReport(
    host="one",
    versions={
        "python": "3.11.7",
        "torch": "2.9.1+cu128",
        "torchvision": "0.24.1+cu128",
        "ray": "2.60.0",
        "code": "abc",
    },
    torch_wanted="2.9.1",
    torchvision_error=None,
    devices=("NVIDIA H100",),
    cuda="12.8",
    driver=True,
    shared_memory=Disk("/dev/shm", 8 * GIB, 8 * GIB),
    open_files=65536,
    disks=(Disk("/tmp", 100 * GIB, 200 * GIB),),
)


def wrong(report: NodeReport, skew: float = 0.0) -> dict[str, Check]:
    """The checks that fail where the second of two nodes is `report` and the first one is sound."""
    checks = judge(SOUND, [NodeAnswer("10.0.0.1", SOUND), NodeAnswer("10.0.0.2", report, skew=skew)])
    return {check.name: check for check in checks if check.state is State.wrong}


def test_nothing_is_wrong_with_sound_nodes() -> None:
    assert wrong(SOUND) == {}


FAULTS = {
    "python": (replace(SOUND, versions={**SOUND.versions, "python": "3.11.9"}), "3.11.9", "install Python 3.11.7"),
    "torch": (replace(SOUND, versions={**SOUND.versions, "torch": "2.8.0"}, torch_wanted="2.8.0"), "2.8.0", "torch==2.9.1"),
    "code": (replace(SOUND, versions={**SOUND.versions, "code": "abd"}), "abd, this command abc", "the same wheel"),
    "torchvision": (replace(SOUND, torch_wanted="2.8.0"), "is built for torch 2.8.0, torch is 2.9.1", "'torch==2.8.0' torchvision"),
    "accelerator": (replace(SOUND, devices=(), cuda=None), "is built without CUDA", "nvidia-smi"),
    "shared memory": (replace(SOUND, shared_memory=Disk("/dev/shm", 0, 64 << 20)), "0.1 GiB", "--shm-size"),
    "open files": (replace(SOUND, open_files=1024), "1,024", "ulimit -Hn"),
    "disk": (replace(SOUND, disks=(Disk("/scratch", GIB, 900 * GIB),)), "/scratch has 1.0 GiB left", "--storage"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_node_that_lacks_something_is_named_with_what_to_do(name: str) -> None:
    report, found, mend = FAULTS[name]
    (check,) = wrong(report).values()
    assert check.name == name
    assert check.text.startswith("10.0.0.2")
    assert "10.0.0.1" not in check.text
    assert found in check.text
    assert mend in (check.mend or "")


def test_a_clock_that_is_off_is_named_with_its_direction() -> None:
    assert wrong(SOUND, skew=-7.0)["clock"].text == "10.0.0.2 is 7 s behind"
    assert (clock_skew(10.5, 10, 11), clock_skew(15, 10, 11), clock_skew(3, 10, 11)) == (0, 4, -7)


def test_nodes_that_cannot_add_up_are_told_which_interface_to_set() -> None:
    check = check_collective(Collective("nccl", 2, failure="connection refused"))
    assert check.state is State.wrong
    assert "NCCL_SOCKET_IFNAME" in (check.mend or "")


def test_a_machine_with_another_folder_at_the_path_is_told_so(tmp_path: Path) -> None:
    questions = NodeQuestions(str(tmp_path), "token")
    assert "another folder" in (shared_folder_error(questions, "node") or "")
    (tmp_path / DRIVER_FILE).write_text("token")
    assert shared_folder_error(questions, "node") is None
    assert (tmp_path / "node-node").exists()
    missing = NodeQuestions(
        str(tmp_path), "token", data=str(tmp_path / "no-set"), autoencoder=str(tmp_path / "no-vae")
    )
    assert set(report_node(missing, "node").errors) == {"data", "autoencoder"}


@pytest.mark.slow
def test_this_machine_can_run_the_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["soflowctl", "doctor", "digits", "--storage", str(tmp_path / "runs"), "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    checks = json.loads(capsys.readouterr().out)
    assert [check for check in checks if check["state"] != "ok"] == []
    assert {"ray", "torchvision", "storage", "mlflow", "data", "features"} <= {
        check["check"] for check in checks
    }
    assert ended.value.code == 0
    assert list(tmp_path.iterdir()) == []
