"""A trial that is trained without Ray has the bits of the same trial in a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from soflow_platform.config.document import apply_override, read_document
from soflow_platform.config.validation import validate
from soflow_platform.storage.checkpoints import EMA
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.training.in_process import train_locally
from soflow_platform.tuning.record import all_records
from tests.end_to_end.test_failing_trial import SMALL
from tests.support.commands import ROOT, Run


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_local_run_has_the_weights_and_scores_of_a_trial_under_ray(soflowctl: Run, tmp_path: Path) -> None:
    project = ProjectFolder(tmp_path / "runs")
    settings = [*SMALL[:-1], "search.space={}"]
    done = soflowctl("run", "sweeps/digits.yaml", "--storage", str(project.root), *settings, timeout=500)
    assert done.returncode == 0, done.stderr
    (record,) = all_records(project)
    (checkpoint,) = (
        c for c in record.checkpoints(project, record.trials[0].name).published() if c.state.step == 20
    )

    document = read_document(ROOT / "sweeps" / "digits.yaml")
    for override in settings[1::2]:
        apply_override(document, override)
    trainer = train_locally(validate(document), "trial", project, print)
    assert trainer.evaluations == checkpoint.state.evaluations
    with checkpoint.opened(EMA) as path:
        kept = load_file(path)
    trained = trainer.train_step.ema_state()
    assert kept.keys() == trained.keys()
    for name, tensor in kept.items():
        assert torch.equal(tensor, trained[name]), name
