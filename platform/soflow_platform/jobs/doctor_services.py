"""Checks of what a sweep uses beside the machines: the tracking store, its training data, and weights of other networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from soflow_core.failures import InputError, summarize
from soflow_pipelines.preparation.builtin import BUILTIN
from soflow_platform.config.evaluation import DIGITS, POOLED
from soflow_platform.config.experiment import Experiment
from soflow_platform.jobs.doctor_checks import Check, Reports, State
from soflow_platform.jobs.node_report import NodeQuestions, NodeReport
from soflow_platform.jobs.node_survey import NodeAnswer
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import TrackingStore

EXPERIMENT = "soflow-doctor"
"""MLflow experiment of the runs that the check writes and deletes."""
METRIC, ARTIFACT = "doctor", "doctor.txt"


def sweep_questions(
    questions: NodeQuestions, project: ProjectFolder, tracking: str, experiment: Experiment | None
) -> NodeQuestions:
    """The questions, with those about the tracking server and about what the sweep needs on every machine."""
    if tracking.startswith(("http://", "https://")):
        questions = replace(questions, tracking=tracking)
    if experiment is None:
        return questions
    source, scores = experiment.data.source, experiment.evaluation
    checkpoints = experiment.training.checkpoints
    needs_images = scores.features not in (POOLED, DIGITS)
    autoencoder = scores.autoencoder or experiment.data.autoencoder
    shape = experiment.data.shape
    return replace(
        questions,
        checkpoints=checkpoints if checkpoints and "://" in checkpoints else None,
        data=source if source and source not in BUILTIN else None,
        features=scores.features if needs_images else None,
        shape=None if shape is None else tuple(shape),
        autoencoder=autoencoder if needs_images else None,
        cache=str(project.features),
    )


def check_tracking(
    uri: str, project: ProjectFolder, here: NodeReport, answers: Sequence[NodeAnswer]
) -> Check:
    """The tracking store takes a run, a metric and an artifact, and gives them back; its server answers every node."""
    mend = (
        "start it as infra/README.md says, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on every node where it asks "
        "for them"
    )
    reports = [(answer.name, answer.report) for answer in answers if answer.report] or [
        ("this machine", here)
    ]
    wrong = [
        f"{node}: {report.errors['tracking']}" for node, report in reports if "tracking" in report.errors
    ]
    if wrong:
        return Check("mlflow", State.wrong, "; ".join(wrong), mend)
    store = TrackingStore(uri)
    if not store.exists():
        return Check("mlflow", State.ok, f"{uri} is made by the first run")
    try:
        _write_and_read(store, project)
    except InputError as error:
        return Check("mlflow", State.wrong, str(error).rstrip("."), mend)
    except Exception as error:
        return Check("mlflow", State.wrong, f"{uri} cannot be written: {summarize(error)}", mend)
    if store.database is not None and len({report.host for _, report in reports}) > 1:
        return Check(
            "mlflow",
            State.wrong,
            f"{uri} is a file and the cluster has several machines",
            "start a tracking server (infra/mlflow) and set tracking.uri to its address",
        )
    return Check("mlflow", State.ok, f"{uri} is writable")


def _write_and_read(store: TrackingStore, project: ProjectFolder) -> None:
    """Raises where a run, its metric or its artifact is not taken, or not given back."""
    store.prepare()
    client = store.client
    store.select()
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None and found.lifecycle_stage != "active":
        client.restore_experiment(found.experiment_id)
    location = project.artifacts.as_uri() if store.database is not None else None
    experiment = (
        found.experiment_id if found else client.create_experiment(EXPERIMENT, artifact_location=location)
    )
    run = client.create_run(experiment).info.run_id
    try:
        client.log_metric(run, METRIC, 1.0)
        client.log_text(run, ARTIFACT, ARTIFACT)
        if client.get_run(run).data.metrics.get(METRIC) != 1.0:
            raise InputError("a metric that was logged is not there.")
        import mlflow.artifacts

        if mlflow.artifacts.load_text(f"runs:/{run}/{ARTIFACT}") != ARTIFACT:
            raise InputError("an artifact that was logged is not what was logged.")
        client.set_terminated(run)
    finally:
        client.delete_run(run)


def sweep_checks(
    experiment: Experiment | None, questions: NodeQuestions, reports: Reports
) -> Iterator[Check]:
    """Checks of a sweep's data, checkpoints, feature network and autoencoder on every machine."""
    if experiment is None:
        return
    yield _data(experiment, reports)
    if questions.checkpoints is not None:
        mend = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY on every node, and let that user write and delete there"
        yield _of("checkpoints", questions.checkpoints, reports, mend)
    features = experiment.evaluation.features
    if questions.features is None:
        yield Check("features", State.ok, f"{features} needs no weight file")
    else:
        yield _of("features", features, reports, "put the file where the sentence says")
    if questions.autoencoder is not None:
        mend = "run `hf download` for it on every node with HF_HOME on the shared file system, or name its folder"
        yield _of("autoencoder", questions.autoencoder, reports, mend)


def _data(experiment: Experiment, reports: Reports) -> Check:
    """The training data are there, fit the network, and can be read on every machine."""
    from soflow_platform.training.dataset import check_data

    try:
        check_data(experiment)
    except InputError as error:
        text, _, mend = str(error).partition(": ")
        return Check("data", State.wrong, text, mend or "see the sentence")
    return _of(
        "data", str(experiment.data.source), reports, "mount or copy the set to the same path on every node"
    )


def _of(name: str, fine: str, reports: Reports, mend: str) -> Check:
    wrong = [f"{node}: {report.errors[name]}" for node, report in reports if name in report.errors]
    return Check(name, State.wrong, "; ".join(wrong), mend) if wrong else Check(name, State.ok, fine)
