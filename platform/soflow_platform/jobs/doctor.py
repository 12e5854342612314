"""Checks that a machine or a cluster can run sweeps, and says what to do about what is wrong."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from soflow_core.failures import summarize
from soflow_pipelines.storage.files import write_bytes
from soflow_platform.config.experiment import Experiment
from soflow_platform.errors import JobError, UserError
from soflow_platform.jobs.doctor_checks import (
    THIS_MACHINE,
    Check,
    State,
    check_collective,
    check_storage,
    judge,
    named_reports,
)
from soflow_platform.jobs.doctor_services import check_tracking, sweep_checks, sweep_questions
from soflow_platform.jobs.node_report import DRIVER_FILE, NodeQuestions, NodeReport, report_node
from soflow_platform.jobs.node_survey import Collective, NodeAnswer
from soflow_platform.storage.project import ProjectFolder


@dataclass(frozen=True)
class DoctorRequest:
    """What `soflowctl doctor` looks at."""

    address: str | None
    project: ProjectFolder
    tracking: str
    experiment: Experiment | None = None
    """A sweep, whose data and weights are looked at."""
    nodes: int = 1
    """Nodes that the cluster must have; they are waited for."""


def diagnose(request: DoctorRequest) -> Iterator[Check]:
    """All checks, each as soon as it is made. What goes wrong is a check that says so; nothing is raised for it."""
    with contextlib.ExitStack() as stack:
        try:
            questions = stack.enter_context(_shared_folder(request.project))
        except OSError as error:
            where = f"{request.project.root} cannot be written ({error.strerror})"
            yield Check("storage", State.wrong, where, "pass --storage FOLDER or set SOFLOW_STORAGE")
            questions = NodeQuestions("", "")
        questions = sweep_questions(questions, request.project, request.tracking, request.experiment)
        here = report_node(questions, "here")
        answers, collective, failure = _answers(request, questions, here)
        yield _ray_check(request, here, answers, failure)
        yield from judge(here, answers)
        if questions.folder:
            yield check_storage(request.project, questions, here, answers)
        if collective is not None:
            yield check_collective(collective)
        yield check_tracking(request.tracking, request.project, here, answers)
        yield from sweep_checks(request.experiment, questions, named_reports(here, answers))


@contextlib.contextmanager
def _shared_folder(project: ProjectFolder) -> Iterator[NodeQuestions]:
    """A folder in the project folder that the machines write to; it is removed, with the project folder where that was made for it."""
    made = not project.root.exists()
    token = secrets.token_hex(8)
    folder = project.root / f".doctor-{token}"
    folder.mkdir(parents=True)
    try:
        write_bytes(folder / DRIVER_FILE, token.encode(), durable=True)
        yield NodeQuestions(str(folder), token)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):
                project.root.rmdir()


def _answers(
    request: DoctorRequest, questions: NodeQuestions, here: NodeReport
) -> tuple[list[NodeAnswer], Collective | None, str | None]:
    """(answers of the nodes, the sum between them, why Ray could not be used); of this machine alone without an address."""
    from soflow_platform.cluster.connection import connected
    from soflow_platform.jobs.node_survey import add_up_between_nodes, survey, wait_for_nodes

    alone = [NodeAnswer(THIS_MACHINE, here)]
    try:
        with connected(request.address):
            if request.address is None:
                return alone, None, None
            wait_for_nodes(request.nodes)
            return survey(questions), add_up_between_nodes(), None
    except (UserError, JobError) as error:
        return alone, None, str(error)
    except Exception as error:
        return alone, None, summarize(error)


def _ray_check(
    request: DoctorRequest, here: NodeReport, answers: list[NodeAnswer], failure: str | None
) -> Check:
    version = here.versions.get("ray", "none")
    if failure is not None:
        return Check(
            "ray",
            State.wrong,
            failure.rstrip("."),
            "start it as infra/README.md says, or mend what the sentence names",
        )
    silent = [answer for answer in answers if answer.report is None]
    if silent:
        text = "; ".join(f"{answer.name}: {answer.failure}" for answer in silent)
        return Check(
            "ray", State.wrong, text, "look at Ray's logs on these nodes, below /tmp/ray/session_latest/logs"
        )
    if len(answers) < request.nodes:
        text = f"{len(answers)} of {request.nodes} nodes have joined {request.address or 'it'}"
        return Check(
            "ray",
            State.wrong,
            text,
            "start Ray on the others with `ray start --address`, and look at its messages there",
        )
    where = (
        "starts on this machine"
        if request.address is None
        else f"{len(answers)} nodes answer at {request.address}"
    )
    return Check("ray", State.ok, f"{version}, {where}")
