"""`infra/slurm/sweep.sbatch` with stand-ins for SLURM's programs and Ray's own processes: two nodes on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tuning.record import all_records
from tests.support.commands import ROOT

SCRIPT = ROOT / "infra" / "slurm" / "sweep.sbatch"
SCONTROL = """#!/bin/bash
if [[ $1 = show ]]; then
    printf 'node-a\\nnode-b\\n'
else
    echo "$@" >> "$STAND_IN/requeued"
fi
"""
SRUN = """#!/bin/bash
while [[ $1 = --* ]]; do
    shift
done
exec "$@"
"""
SETTINGS = [
    "network={patch: 4, hidden: 32, depth: 2, heads: 2}",
    "training={steps: 3000, batch: 32, ema: [0.9], log_every: 50, checkpoint_every: 100}",
    "evaluation={every: 1500, samples: 64, nfe: [1], features: pooled, grid: 2}",
    "search={space: {}, metric: eval/fd_nfe1}",
    "resources.cpus_per_worker=0.5",
]


def job(folder: Path, storage: ProjectFolder, number: int) -> subprocess.Popen[str]:
    """The script as SLURM starts it on the first node."""
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "STAND_IN": str(folder),
        "SLURM_JOB_ID": str(number),
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_GPUS_ON_NODE": "0",
        "SOFLOW_STORAGE": str(storage.root),
        "OMP_NUM_THREADS": "1",
    }
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    with (folder / f"job-{number}.log").open("w") as log:
        return subprocess.Popen(
            ["bash", str(SCRIPT), "digits", *settings],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
            text=True,
        )


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    folder = tmp_path / "slurm"
    folder.mkdir()
    programs = {"scontrol": SCONTROL, "srun": SRUN}
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def end(process: subprocess.Popen[str], log: Path, seconds: float = 300) -> str:
    """What the job printed; nothing of it runs any more."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    assert process.wait(seconds) == 0, log.read_text()[-3000:]
    assert psutil.wait_procs(family, timeout=30)[1] == []
    return log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_saves_before_its_time_limit_and_goes_on_when_it_is_started_again(
    stand_ins: Path, tmp_path: Path
) -> None:
    storage = ProjectFolder(tmp_path / "runs")
    number = 4_000_000 + os.getpid() % 10_000
    log = stand_ins / f"job-{number}.log"
    process = job(stand_ins, storage, number)
    try:
        until = time.monotonic() + 400
        while not list(storage.root.glob("sweeps/*/trials/*/checkpoints/step-*/checkpoint.json")):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        printed = end(process, log)
        assert "2 nodes answer at" in printed
        assert "queued again" in printed
        assert "Draining" not in printed
        assert (stand_ins / "requeued").read_text() == f"requeue {number}\n"
        (record,) = all_records(storage)
        (trial,) = record.trials
        step = max(each.state.step for each in record.checkpoints(storage, trial.name).published())
        assert 0 < step < 3000

        process = job(stand_ins, storage, number)
        printed = end(process, log)
        (record,) = all_records(storage)
        assert record.finished
        assert record.attempts == 2
    finally:
        if process.poll() is None:
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                each.kill()
