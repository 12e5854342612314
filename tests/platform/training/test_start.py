"""A trial starts from the weights that `training.start_from` names, and its lineage is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from soflow_core.weights import load_weights
from soflow_pipelines.preparation.builtin import BUILTIN
from soflow_platform.errors import JobError, UserError
from soflow_platform.jobs.start_from import resolve_starts
from soflow_platform.registry.versions import find_version, register
from soflow_platform.storage.checkpoints import EMA, STATE
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking
from soflow_platform.training.in_process import train_locally
from soflow_platform.training.start import Start, check_start_file, describe_lineage
from soflow_platform.training.worker import Trainer
from soflow_platform.tuning.record import load_record
from tests.platform.conftest import small_experiment
from tests.support.scored_sweep import SWEEP
from tests.support.trained_trials import trainer_of

DATA = BUILTIN["digits"]
SOURCE = f"{SWEEP}/trial-01"


def start_of(project: ProjectFolder, name: str, *overrides: str) -> Start:
    experiment = small_experiment(f"training.start_from={name}", *overrides)
    return resolve_starts([("trial", experiment)], DATA, project, project.tracking_uri)["trial"]


def test_a_trial_starts_from_a_flow_matching_trial(scored: ProjectFolder) -> None:
    start = start_of(scored, SOURCE)
    record = load_record(scored, SWEEP)
    assert record is not None
    name = record.trials[1].name
    best = record.checkpoints(scored, name).best(record.metric, record.mode)
    assert best is not None
    with best[0].opened(EMA) as path:
        source = load_weights(path)
    (entry,) = start.lineage
    assert (entry["method"], entry["step"], entry["weights"]) == ("flow_matching", best[0].state.step, "ema")
    assert entry["run"] == best[0].state.run

    experiment = small_experiment(f"training.start_from={SOURCE}", "training.steps=2")
    lines: list[str] = []
    trainer = train_locally(experiment, "trial", scored, lines.append, start)
    assert any(f"weights of {SWEEP}/{name} at step" in line for line in lines)
    assert any("second time is new" in line for line in lines)
    job = trainer.setup.job
    network = Trainer.of_job(job, torch.device("cpu")).train_step.module
    old = source.tensors["blocks.0.attn.qkv.weight"]
    assert torch.equal(network.state_dict()["blocks.0.attn.qkv.weight"], old)
    assert not torch.equal(trainer.train_step.module.state_dict()["blocks.0.attn.qkv.weight"], old)


def test_raw_weights_are_those_of_the_training_state(scored: ProjectFolder) -> None:
    start = start_of(scored, SOURCE, "training.start_weights=raw")
    record = load_record(scored, SWEEP)
    assert record is not None
    best = record.checkpoints(scored, record.trials[1].name).best(record.metric, record.mode)
    assert best is not None
    with best[0].opened(STATE) as path:
        expected = torch.load(path, weights_only=True)["network"]
    tensors = load_weights(start.weights).tensors
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert start.lineage[0]["weights"] == "raw"


def test_the_lineage_is_in_checkpoint_registered_version_and_card(scored: ProjectFolder) -> None:
    record = load_record(scored, SWEEP)
    assert record is not None
    start = start_of(scored, SOURCE)
    experiment = small_experiment(f"training.start_from={SOURCE}", "training.steps=2")
    tracking = Tracking.open(scored.tracking_uri, "digits", scored)
    trainer = trainer_of(
        scored, tracking, experiment, "second", "trial", tags=start.tags(), start=start.as_dict()
    )
    assert trainer.run()
    (checkpoint,) = trainer.setup.checkpoints.published()
    assert checkpoint.state.start == start.lineage

    candidate = record.candidate("second")
    origin = {"sweep": "second", "trial": "trial", "step": 2}
    version = register(tracking, candidate.__class__(**{**vars(candidate), **origin}), checkpoint)
    found = find_version(tracking.store, f"second/{version}")
    assert json.loads(found.tags["start.lineage"]) == start.lineage
    assert "started from" in found.description
    assert SWEEP in found.description

    # What starts from it has both in its lineage; an alias that moves later is not followed by a sweep that goes on.
    again = start_of(scored, "models:/second@candidate")
    assert [entry["from"] for entry in again.lineage] == [
        f"models:/second/{version}",
        start.lineage[0]["from"],
    ]
    moved = small_experiment("training.start_from=models:/second@candidate")
    known = {"models:/second@candidate ema": again.as_dict()}
    tracking.client.delete_registered_model_alias("second", "candidate")
    kept = resolve_starts([("t", moved)], DATA, scored, scored.tracking_uri, known)
    assert kept["t"] == again
    tracking.client.set_registered_model_alias("second", "candidate", version)
    Path(again.weights).unlink()
    found_again = resolve_starts([("t", moved)], DATA, scored, scored.tracking_uri, known)
    assert found_again["t"].lineage == again.lineage
    Path(again.weights).unlink()
    other = {"models:/second@candidate ema": {**again.as_dict(), "lineage": [{"from": "x", "digest": "0"}]}}
    with pytest.raises(UserError, match="put it back, or pass --again"):
        resolve_starts([("t", moved)], DATA, scored, scored.tracking_uri, other)


def test_weights_that_are_not_there_or_do_not_fit_are_refused(scored: ProjectFolder, tmp_path: Path) -> None:
    for name, overrides, said in (
        (str(tmp_path / "none.pt"), (), "there is no file or folder"),
        ("models:/none@champion", (), "there is no registered model 'none'"),
        (f"{SWEEP}/other", (), "has no trial 'other'"),
        (SOURCE, ("network.hidden=32",), "with hidden 16 and this one has 32"),
        (SOURCE, ("training.start_layout=sit",), "leave it out"),
        ("models:/none@champion", ("training.start_weights=raw",), "averaged weights alone"),
    ):
        with pytest.raises(UserError, match=f"^trial trial: training.start_from: .*{said}"):
            start_of(scored, name, *overrides)


def test_a_file_is_looked_at_before_anything_starts(tmp_path: Path) -> None:
    missing = small_experiment(f"training.start_from={tmp_path}/none.pt")
    with pytest.raises(UserError, match=r"there is no file or folder .*none\.pt"):
        check_start_file(missing, None)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a complete safetensors file"):
        check_start_file(small_experiment(f"training.start_from={tmp_path}/bad.safetensors"), None)
    check_start_file(small_experiment("training.start_from=models:/none@champion"), None)


def test_a_copy_that_is_gone_is_a_sentence(scored: ProjectFolder) -> None:
    start = start_of(scored, SOURCE)
    Path(start.weights).unlink()
    with pytest.raises(JobError, match="is gone: put it back"):
        train_locally(small_experiment("training.steps=2"), "trial", scored, print, start)


def test_where_a_sweep_starts_decides_its_digest_and_nothing_else_does() -> None:
    plain = small_experiment()
    assert plain.digest() == small_experiment("training.start_from=null").digest()
    started = {
        small_experiment("training.start_from=models:/a@champion", *extra).digest()
        for extra in ((), ("training.start_weights=raw",))
    }
    assert len(started | {plain.digest()}) == 3


def test_a_lineage_reads_as_a_sentence() -> None:
    lineage = [
        {"from": "models:/b/2", "method": "soflow", "step": 1200, "weights": "ema"},
        {"from": "sit.pt", "method": "flow_matching", "weights": "raw"},
    ]
    text = describe_lineage(lineage)
    assert text == "models:/b/2 (soflow, 1,200 steps, ema), which started from sit.pt (flow_matching, raw)"
