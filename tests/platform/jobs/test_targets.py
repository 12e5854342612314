"""A name given on the command line is resolved to weights or images, their run and their training data, or refused."""

from __future__ import annotations

import contextlib
import functools
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from soflow_core.failures import InputError
from soflow_core.weights import load_weights
from soflow_platform.config.experiment import Experiment
from soflow_platform.errors import UserError
from soflow_platform.jobs.targets import EvaluationTarget, TargetResolver, copy_by_content, find_target
from soflow_platform.registry.versions import register
from soflow_platform.storage import checkpoints
from soflow_platform.storage.checkpoints import CheckpointStore
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking, TrackingStore
from soflow_platform.training.trial_status import TrialState
from soflow_platform.tuning.context import SweepContext, trial_outcome
from soflow_platform.tuning.display import Display
from soflow_platform.tuning.record import BestTrial, SweepRecord, load_record
from soflow_platform.tuning.search_space import Trial
from tests.support.scored_sweep import SWEEP


def find(name: str, storage: ProjectFolder) -> EvaluationTarget:
    return find_target(name, storage, TrackingStore(storage.tracking_uri))


def trial(storage: ProjectFolder, record: SweepRecord, name: str, newest: bool = False) -> EvaluationTarget:
    return TargetResolver.for_scoring(storage, TrackingStore(storage.tracking_uri)).trial(
        record, name, newest
    )


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The URL of a web server for the files of a folder."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def run_of(storage: ProjectFolder, trial: str) -> str:
    record = load_record(storage, SWEEP)
    assert record is not None
    found = Tracking(TrackingStore(storage.tracking_uri), record.experiment_id or "").find(SWEEP, trial)
    assert found is not None
    return str(found.info.run_id)


def test_a_trial_is_its_best_checkpoint_or_its_newest(scored_once: ProjectFolder) -> None:
    record = load_record(scored_once, SWEEP)
    assert record is not None
    root = scored_once.trial(SWEEP, "trial-00-soflow") / "checkpoints"
    complete = CheckpointStore(root).published()
    scores = {e["step"]: e["eval/fd_nfe1"] for e in complete[-1].state.evaluations}
    best = trial(scored_once, record, "trial-00-soflow")
    assert best.step == min(scores, key=lambda step: scores[step])
    assert trial(scored_once, record, "trial-00-soflow", newest=True).step == 6
    assert best.run == run_of(scored_once, "trial-00-soflow")
    assert best.data == "digits"


def test_damaged_weights_are_neither_chosen_nor_scored(scored: ProjectFolder) -> None:
    record = load_record(scored, SWEEP)
    assert record is not None
    first = next(t for t in trials_of(record) if t.name == "trial-00-soflow")
    root = scored.trial(SWEEP, first.name) / "checkpoints"
    context = SweepContext(record, first.experiment, [first], scored, Display())
    before = trial_outcome(context, first, None)
    assert (before.status.state, before.status.step) == (TrialState.FINISHED, 6)
    assert before.best is not None
    weights = root / f"step-{before.best.step:08d}" / checkpoints.EMA
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    after = trial_outcome(context, first, None)
    assert after.best is not None
    assert after.best.step != before.best.step
    assert trial(scored, record, first.name).step == after.best.step
    with pytest.raises(UserError, match=r"ema.safetensors is damaged: its checksum differs"):
        find(str(weights.parent), scored)
    (weights.parent / checkpoints.RECORD).write_text("")
    with pytest.raises(UserError, match=r"checkpoint.json is damaged"):
        find(str(weights.parent), scored)


def trials_of(record: SweepRecord) -> list[Trial]:
    experiment = Experiment(**record.experiment)
    return [
        Trial(number, entry.name, entry.settings, experiment, budgets=())
        for number, entry in enumerate(record.trials)
    ]


@pytest.mark.parametrize("name", ["digits", SWEEP, f"{SWEEP}/trial-00", "trial-00-soflow", "run id"])
def test_a_sweep_a_trial_and_their_runs_have_the_same_weights(scored_once: ProjectFolder, name: str) -> None:
    expected = find(f"{SWEEP}/trial-00-soflow", scored_once)
    name = run_of(scored_once, "trial-00-soflow") if name == "run id" else name
    assert find(name, scored_once) == expected
    assert expected.weights is not None
    objective = load_weights(expected.weights).objective
    assert objective is not None
    assert objective.method == "soflow"


def test_a_checkpoint_folder_knows_its_run_and_its_data(scored_once: ProjectFolder) -> None:
    folder = scored_once.trial(SWEEP, "trial-01-flow_matching") / "checkpoints" / "step-00000004"
    found = find(str(folder), scored_once)
    assert found.weights == folder / checkpoints.EMA
    assert (found.step, found.data) == (4, "digits")
    assert found.run == run_of(scored_once, "trial-01-flow_matching")


def test_a_checkpoint_taken_elsewhere_is_scored_without_a_run(
    scored_once: ProjectFolder, tmp_path: Path
) -> None:
    folder = scored_once.trial(SWEEP, "trial-00-soflow") / "checkpoints" / "step-00000006"
    shutil.copytree(folder, tmp_path / "taken")
    empty = ProjectFolder(tmp_path / "nothing")
    found = find(str(tmp_path / "taken"), empty)
    assert (found.step, found.run, found.data) == (6, None, None)
    assert (
        find(str(tmp_path / "taken" / checkpoints.EMA), empty).weights == tmp_path / "taken" / checkpoints.EMA
    )
    assert not empty.root.exists()


def test_a_registered_version_is_a_copy_in_the_project_folder(scored: ProjectFolder, tmp_path: Path) -> None:
    """Whatever store MLflow's global functions, or its variables in the environment, name."""
    record = load_record(scored, SWEEP)
    assert record is not None
    tracking = Tracking(TrackingStore(scored.tracking_uri), record.experiment_id or "")
    root = scored.trial(SWEEP, "trial-00-soflow") / "checkpoints"
    newest = CheckpointStore(root).published()[-1]
    record.best = BestTrial("trial-00-soflow", 6, {"eval/fd_nfe1": 1.0})
    version = register(tracking, record.candidate("digits"), newest)
    for name in ("models:/digits@candidate", f"models:/digits/{version}"):
        TrackingStore(f"sqlite:///{tmp_path}/another.db").select()
        found = find(name, scored)
        assert found.weights is not None
        assert found.weights.is_relative_to(scored.root)
        assert found.weights.read_bytes() == (root / newest.name / checkpoints.EMA).read_bytes()
        assert (found.version, found.step, found.data) == (("digits", version), 6, "digits")


def test_a_folder_and_an_npz_file_are_images(tmp_path: Path) -> None:
    storage = ProjectFolder(tmp_path / "runs")
    Image.new("L", (8, 8)).save(tmp_path / "one.png")
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    assert find(str(tmp_path), storage).images == str(tmp_path)
    assert find(str(tmp_path / "samples.npz"), storage).images == str(tmp_path / "samples.npz")


def test_a_shard_set_in_a_folder_and_at_a_uri_is_images(scored_once: ProjectFolder) -> None:
    shards = scored_once.data / "digits"
    assert find(str(shards), scored_once).images == str(shards)
    with served(shards.parent) as url:
        assert find(f"{url}/digits", scored_once).images == f"{url}/digits"


def test_copied_weights_are_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, copies = tmp_path / "ema.safetensors", tmp_path / "copies"
    weights.write_bytes(b"weights")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfileobj", interrupted)
        with pytest.raises(KeyboardInterrupt):
            copy_by_content(weights, copies)
    assert list(copies.iterdir()) == []
    copy = copy_by_content(weights, copies)
    assert copy.read_bytes() == b"weights"
    assert copy_by_content(weights, copies) == copy


@pytest.mark.parametrize("name", ["images", "samples.npz"])
def test_images_are_refused_where_weights_are_needed(tmp_path: Path, name: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "samples.npz").touch()
    storage = ProjectFolder(tmp_path / "runs")
    resolver = TargetResolver(storage, TrackingStore(storage.tracking_uri), tmp_path, accepts_images=False)
    with pytest.raises(UserError, match=r"holds no weights: name .*, or a .safetensors file\.$"):
        resolver.find(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent/weights.safetensors", "there is no such file or folder; name models:/NAME@ALIAS, a run"),
        ("./absent", "there is no such file or folder; name models:/NAME@ALIAS, a run"),
        ("no-such-sweep", "'no-such-sweep' is nothing that can be scored"),
        (f"{SWEEP}/trial-07", f"sweep {SWEEP} has no trial 'trial-07'; it has trial-00-soflow, "),
        ("models:/nobody@champion", "there is no registered model 'nobody'"),
        ("0" * 32, "there is no run 00000000000000000000000000000000"),
        ("gopher://place/step-00000006", "gopher:// is not understood"),
    ],
)
def test_an_unknown_name_is_refused_in_one_sentence(
    scored_once: ProjectFolder, name: str, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        find(name, scored_once)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
