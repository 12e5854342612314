"""Checks of what machines say of themselves: each compares reports and returns what was found, with what to do where it is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from soflow_platform.jobs.node_report import NodeQuestions, NodeReport
from soflow_platform.jobs.node_survey import Collective, NodeAnswer
from soflow_platform.storage.project import ProjectFolder

THIS_MACHINE = "this machine"
PYTHONS = ((3, 10), (3, 11), (3, 12))
SKEW_SECONDS = 2.0
SHARED_MEMORY_BYTES = 1 << 30
OPEN_FILES = 8192
FREE_BYTES = 5 << 30
FULL_SHARE = 0.95
"""Ray stops giving work to a node whose disk is fuller."""


class State(str, Enum):
    """Outcome of a check."""

    ok = "ok"
    wrong = "wrong"
    skipped = "skipped"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State
    text: str
    """What was found."""
    mend: str | None = None
    """What to do, where it is wrong."""


Reports = Sequence[tuple[str, NodeReport]]


def named_reports(here: NodeReport, answers: Iterable[NodeAnswer]) -> Reports:
    """The reports that came, by the names of the nodes; the command's own where none did."""
    return [(answer.name, answer.report) for answer in answers if answer.report is not None] or [
        (THIS_MACHINE, here)
    ]


def judge(here: NodeReport, answers: list[NodeAnswer]) -> Iterator[Check]:
    """Checks of what machines say of themselves; `here` is the command's own report."""
    reports = named_reports(here, answers)
    yield check_same("python", here, reports)
    yield check_same("torch", here, reports)
    yield check_accelerator(reports)
    yield check_torchvision(reports)
    yield check_same("code", here, reports)
    yield check_clock(answers)
    yield check_shared_memory(reports)
    yield check_open_files(reports)
    yield check_disks(reports)


def _check(name: str, fine: str, wrong: Sequence[str], mend: str) -> Check:
    if not wrong:
        return Check(name, State.ok, fine)
    return Check(name, State.wrong, "; ".join(wrong), mend)


def check_same(name: str, here: NodeReport, reports: Reports) -> Check:
    """Every node has the command's version of Python or torch, or its code."""
    mine = here.versions.get(name)
    if mine is None:
        return Check(name, State.wrong, "not installed", f"python -m pip install {name}")
    wrong = [
        f"{node} has {report.versions.get(name, 'none')}, this command {mine}"
        for node, report in reports
        if report.versions.get(name) != mine
    ]
    if name == "python" and tuple(int(part) for part in mine.split(".")[:2]) not in PYTHONS:
        return Check(name, State.wrong, mine, "install Python 3.10, 3.11 or 3.12 and soflow in it")
    mends = {
        "python": f"install Python {mine} on them, and soflow in it",
        "torch": f"python -m pip install 'torch=={mine}' on them, or that of the nodes here",
        "code": "python -m pip install the same wheel on them",
    }
    return _check(name, mine, wrong, mends[name])


def check_accelerator(reports: Reports) -> Check:
    """Torch can use the GPUs that are there."""
    wrong = [
        f"{node} has NVIDIA's driver and torch {report.versions.get('torch')} "
        + ("is built without CUDA" if report.cuda is None else f"(CUDA {report.cuda}) sees no GPU")
        for node, report in reports
        if report.driver and not report.devices
    ]
    devices = [f"{len(report.devices)} x {report.devices[0]}" for _, report in reports if report.devices]
    fine = ", ".join(dict.fromkeys(devices)) or "no GPU: the CPUs train"
    mend = (
        "install a torch whose CUDA the driver knows (`nvidia-smi` shows it; https://pytorch.org/get-started lists the commands), "
        "and unset CUDA_VISIBLE_DEVICES where it is empty"
    )
    return _check("accelerator", fine, wrong, mend)


def check_torchvision(reports: Reports) -> Check:
    """Torchvision is built for the torch beside it, and can be imported."""
    wrong: list[str] = []
    wanted: set[str | None] = set()
    for node, report in reports:
        torch = report.versions.get("torch", "none")
        other = report.torch_wanted is not None and report.torch_wanted != torch.split("+")[0]
        if report.torchvision_error is None and not other:
            continue
        built = f" is built for torch {report.torch_wanted}, torch is {torch}" if other else ""
        failure = f" cannot be imported ({report.torchvision_error})" if report.torchvision_error else ""
        wrong.append(f"{node}: torchvision {report.versions.get('torchvision', '')}{built}{failure}")
        wanted.add(report.torch_wanted)
    fine = ", ".join(sorted({report.versions.get("torchvision", "") for _, report in reports}))
    one = wanted.pop() if len(wanted) == 1 else None
    pinned = f"'torch=={one}' torchvision" if one else "torch torchvision"
    mend = (
        f"install both in one command from one index: python -m pip install --force-reinstall {pinned} "
        "(without a GPU with --index-url https://download.pytorch.org/whl/cpu)"
    )
    return _check("torchvision", f"{fine} fits torch", wrong, mend)


def check_clock(answers: list[NodeAnswer]) -> Check:
    """Clocks agree, because `status` shows differences between machines' clocks."""
    wrong = [
        f"{answer.name} is {abs(answer.skew):.0f} s {'ahead' if answer.skew > 0 else 'behind'}"
        for answer in answers
        if abs(answer.skew) > SKEW_SECONDS
    ]
    fine = f"within {SKEW_SECONDS:g} s on {len(answers)} node(s)"
    return _check("clock", fine, wrong, "let chrony or systemd-timesyncd set the clocks")


def check_shared_memory(reports: Reports) -> Check:
    """/dev/shm holds Ray's objects and what processes exchange; containers have 64 MB of it unless told otherwise."""
    found = [(node, report.shared_memory) for node, report in reports if report.shared_memory is not None]
    wrong = [f"{node} has {_size(disk.total)}" for node, disk in found if disk.total < SHARED_MEMORY_BYTES]
    least = min((disk.total for _, disk in found), default=0)
    fine = f"{_size(least)} of /dev/shm" if found else "no /dev/shm"
    return _check(
        "shared memory",
        fine,
        wrong,
        "docker run --shm-size=8g; in Kubernetes an emptyDir with medium: Memory at /dev/shm",
    )


def check_open_files(reports: Reports) -> Check:
    """A process may open enough files: Ray needs several for every worker and node."""
    wrong = [
        f"{node} allows {report.open_files:,}" for node, report in reports if report.open_files < OPEN_FILES
    ]
    least = min(report.open_files for _, report in reports)
    return _check(
        "open files",
        f"{least:,}",
        wrong,
        "ulimit -Hn 65536 before Ray starts (LimitNOFILE=65536 in a systemd unit)",
    )


def check_disks(reports: Reports) -> Check:
    """The project's and the temporary file system have space left."""
    wrong = [
        f"{node}: {disk.path} has {_size(disk.free)} left of {_size(disk.total)}"
        for node, report in reports
        for disk in report.disks
        if disk.free < FREE_BYTES or disk.free < (1 - FULL_SHARE) * disk.total
    ]
    least = min((disk.free for _, report in reports for disk in report.disks), default=0)
    mend = "free space, or put the project elsewhere with --storage, temporary files with TMPDIR and Ray's with RAY_TMPDIR"
    return _check("disk", f"{_size(least)} free at least", wrong, mend)


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def check_storage(
    project: ProjectFolder, questions: NodeQuestions, here: NodeReport, answers: list[NodeAnswer]
) -> Check:
    """Every machine writes to one and the same project folder, whole files, and this one sees what they write."""
    reports = [*named_reports(here, answers)]
    wrong = [f"{node}: {report.errors['storage']}" for node, report in reports if "storage" in report.errors]
    folder = Path(questions.folder)
    for node, report in reports:
        name = "here" if node == THIS_MACHINE else node
        if "storage" not in report.errors and not (folder / f"node-{name}").exists():
            wrong.append(f"{node}: what it writes to {project.root} is not seen here")
    mend = (
        f"mount one shared file system at {project.root} on every node, writable for the user that runs Ray"
    )
    return _check("storage", f"{project.root}, written by {len(reports)} node(s)", wrong, mend)


def check_collective(collective: Collective) -> Check:
    """The nodes can send each other gradients."""
    if collective.skipped is not None:
        return Check("between nodes", State.skipped, collective.skipped)
    name = collective.backend.upper() if collective.backend == "nccl" else collective.backend.capitalize()
    rate = f"{name} over {collective.nodes} nodes, {collective.gigabytes_per_second:.2f} GB/s"
    wrong = (
        [] if collective.failure is None else [f"{name} over {collective.nodes} nodes: {collective.failure}"]
    )
    interface = "NCCL" if collective.backend == "nccl" else "GLOO"
    mend = (
        f"open the ports between the nodes, and set {interface}_SOCKET_IFNAME to the interface that joins them before `ray start`"
        + ("; NCCL_DEBUG=INFO shows more" if interface == "NCCL" else "")
    )
    return _check("between nodes", rate, wrong, mend)
