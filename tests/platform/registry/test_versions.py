"""A registered version holds all that loads, samples and describes it, and is loaded without unpickling."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from soflow_platform.generation.generator import Generator
from soflow_platform.jobs.promote import promote
from soflow_platform.jobs.requests import PromoteRequest
from soflow_platform.registry.card import DESCRIPTION_LIMIT, model_card, with_decision
from soflow_platform.registry.version_list import list_versions
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import TrackingStore
from tests.support.commands import environment
from tests.support.scored_sweep import SWEEP, artifacts_of, local_services

LOADED = """
import sys, mlflow, pandas

mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/digits/1")
images = model.predict(pandas.DataFrame({"label": [3, 1, 4]}), params={"seed": 5, "steps": 1})["png"]
sys.stdout.buffer.write(images[1])
"""


@pytest.fixture(scope="module")
def registered(scored_once: ProjectFolder, tmp_path_factory: pytest.TempPathFactory) -> ProjectFolder:
    """A project whose first trial is version 1 of the model digits, and champion. Tests read it."""
    project = ProjectFolder(
        Path(shutil.copytree(scored_once.root, tmp_path_factory.mktemp("registered") / "runs"))
    )
    promote(PromoteRequest(f"{SWEEP}/trial-00-soflow"), local_services(project))
    return project


def artifacts(project: ProjectFolder) -> Path:
    return artifacts_of(project, "1")


def test_a_version_describes_itself_as_json(registered: ProjectFolder) -> None:
    described = json.loads((artifacts(registered) / "model.json").read_text(encoding="utf-8"))
    header = Generator.open(artifacts(registered) / "ema.safetensors")
    assert described["method"] == header.objective.method == "soflow"
    assert described["network"]["hidden"] == header.network.config.hidden
    assert described["parameters"] == sum(p.numel() for p in header.network.state_dict().values())
    assert header.info is not None
    assert described["data"]["digest"] == header.info.digest
    assert described["data"]["class_names"] == list(header.info.class_names)
    assert described["normalization"] == {"space": "pixels", "range": [-1, 1]}
    assert described["sampling"]["steps"] == 1
    assert (described["sweep"], described["trial"], described["step"], described["images"]) == (
        SWEEP,
        "trial-00-soflow",
        described["step"],
        8 * described["step"],
    )
    assert described["recipe"]["training"]["steps"] == 6
    assert described["recipe"]["objective"]["method"] == "soflow"
    assert described["evaluation"]["metrics"]["eval/fd_nfe1"] > 0


def test_the_card_is_the_description_on_the_page(registered: ProjectFolder) -> None:
    version = TrackingStore(registered.tracking_uri).client.get_model_version("digits", "1")
    card = (artifacts(registered) / "README.md").read_text(encoding="utf-8")
    for text in (version.description, card):
        assert "| method | soflow |" in text
        assert f"sweep {SWEEP}, trial trial-00-soflow" in text
        assert "eval/fd\\_nfe1" in text or "eval/fd_nfe1" in text
        assert "mlflow.pyfunc.load_model" in text
    assert "## Recipe" in card
    assert "models:/digits/1" in version.description
    assert version.description.splitlines()[-1].endswith("first champion")
    assert Image.open(artifacts(registered) / "samples.png").width > 8


def test_a_version_is_loaded_with_pickle_forbidden(registered: ProjectFolder) -> None:
    """In a process of its own, as a server loads it; the images are those of the weights."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, registered.tracking_uri],
        env={
            **environment(),
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        },
        capture_output=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    made = np.asarray(Image.open(io.BytesIO(done.stdout)))
    own = Generator.open(artifacts(registered) / "ema.safetensors").png([3, 1, 4], seed=5, steps=1)[1]
    assert np.array_equal(made, np.asarray(Image.open(io.BytesIO(own))))
    pickles = [p.name for p in artifacts(registered).parent.rglob("*") if p.suffix in (".pkl", ".pt", ".pth")]
    assert pickles == []


def test_versions_are_listed_with_their_aliases_and_scores(registered: ProjectFolder) -> None:
    store = TrackingStore(registered.tracking_uri)
    (listed,) = list_versions(store)
    assert list_versions(store, "it's") == list_versions(store, "both ' and \"") == []
    assert (listed.model, listed.version, listed.aliases) == ("digits", "1", ("candidate", "champion"))
    assert listed.metric == "eval/fd_nfe1"
    assert listed.score is not None
    assert (listed.method, listed.network, listed.decision) == ("soflow", "DiT-16x1/4", "promoted")
    assert listed.images is not None
    assert listed.images % 8 == 0


def test_foreign_text_is_escaped_in_a_card(registered: ProjectFolder) -> None:
    described = json.loads((artifacts(registered) / "model.json").read_text(encoding="utf-8"))
    described["data"]["class_names"] = ["a|b", "<script>", "[x](http://y)", *["c"] * 7]
    card = model_card("digits/1", described)
    assert "a\\|b, \\<script>, \\[x\\](http://y)" in card
    assert "soflowctl generate --model models:/digits/1 --num 100" in card
    assert "generate --model 'models:/my digits/1' --num 100" in model_card("my digits/1", described)


def test_a_description_keeps_the_newest_decisions_first() -> None:
    text = with_decision(with_decision("card", "one\nline"), "two")
    assert text == "card\n\n## Decisions\n\n- two\n- one line"
    assert len(with_decision("c" * 2500, "x" * 9000)) == DESCRIPTION_LIMIT
