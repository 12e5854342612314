"""How passes are run when a set is made: the default changes nothing, another precision is near it and never mixed with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from soflow_core.networks import NetworkModule
from soflow_core.sampling_networks import Bfloat16Network, RecordedNetwork
from soflow_pipelines.images.bfloat16_decoder import Bfloat16Autoencoder
from soflow_pipelines.shards.tables import read_info
from soflow_platform.errors import UserError
from soflow_platform.generation.execution import Execution
from soflow_platform.generation.finished_set import verify
from soflow_platform.generation.generator import Generator
from soflow_platform.generation.sampling import generate
from tests.support.generators import digests, interrupt_set, make_set, save_digits_generator, save_generator
from tests.support.in_process import run_here
from tests.support.recorded_operations import OperationRecorder
from tests.support.small_networks import latent_set

LOW = Execution("bfloat16")
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_digits_generator(tmp_path_factory.mktemp("model") / "ema.safetensors")


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("latent_model")
    autoencoder, data, _ = latent_set(root)
    return save_generator(root / "ema.safetensors", read_info(data)), str(autoencoder)


def settings(out: Path) -> dict[str, Any]:
    return json.loads((out / "generation.json").read_text())


def difference(one: Path, other: Path) -> int:
    """The largest of two sets' pixels, of 255."""
    names = sorted(path.name for path in one.glob("0*.png"))
    assert names == sorted(path.name for path in other.glob("0*.png"))
    both = [
        np.stack([np.asarray(Image.open(folder / name)) for name in names]).astype(int)
        for folder in (one, other)
    ]
    return int(np.abs(both[0] - both[1]).max())


def test_by_default_the_network_and_the_decoder_are_run_as_they_are(latent_model: tuple[Path, str]) -> None:
    weights, autoencoder = latent_model
    generator = Generator.open(weights, autoencoder=autoencoder)
    assert generator.decoder is not None
    assert generator.execution == Execution("float32", compile=False, graphs=False)
    assert generator._run_network is generator.network
    assert Execution().run_decoder(generator.decoder, generator.device) is generator.decoder


def test_network_and_decoder_are_both_run_in_bfloat16(latent_model: tuple[Path, str]) -> None:
    weights, autoencoder = latent_model
    generator = Generator.open(weights, autoencoder=autoencoder, execution=LOW)
    assert isinstance(generator._run_network, Bfloat16Network)
    assert isinstance(generator.decoder, Bfloat16Autoencoder)
    (samples,) = generator.samples([3], [1], seed=0, steps=2)
    (images,) = generator.decoded([3], [1], seed=0, steps=2)
    assert samples.dtype == images.dtype == torch.float32


def test_a_set_in_bfloat16_is_near_that_of_float32(latent_model: tuple[Path, str], tmp_path: Path) -> None:
    weights, autoencoder = latent_model
    for precision in ("float32", "bfloat16"):
        make_set(weights, tmp_path / precision, num=70, autoencoder=autoencoder, precision=precision)
    assert verify(str(tmp_path / "bfloat16")) == (70, [])
    # Of an autoencoder with random weights: 8 bits of the latents, and those of its layers.
    assert 0 < difference(tmp_path / "float32", tmp_path / "bfloat16") <= 12


@pytest.mark.parametrize("kind", ["png", "webdataset", "parquet", "npz", "latents"])
def test_a_set_in_bfloat16_has_the_same_bytes_in_any_batches_and_after_an_interruption(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    given = {"num": 150, "format": kind, "precision": "bfloat16", "steps": 2}
    make_set(model, tmp_path / "whole", **given)
    interrupt_set(monkeypatch, 2, model, tmp_path / "cut", **given)
    assert make_set(model, tmp_path / "cut", batch=7, **given).kept == 64
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
    assert verify(str(tmp_path / "cut")) == (150, [])


@pytest.mark.parametrize(
    ("began", "goes_on", "said"),
    [
        ({}, {"precision": "bfloat16"}, "precision float32, now bfloat16"),
        ({"precision": "bfloat16"}, {}, "precision bfloat16, now float32"),
        ({}, {"compile": True}, "compile False, now True"),
    ],
)
def test_a_set_begun_one_way_is_not_gone_on_with_another(
    model: Path, tmp_path: Path, began: dict[str, Any], goes_on: dict[str, Any], said: str
) -> None:
    make_set(model, tmp_path / "out", num=3, **began)
    before = digests(tmp_path / "out")
    with pytest.raises(UserError, match=rf"made with other settings \({said}\): choose another --out\.$"):
        make_set(model, tmp_path / "out", num=3, **goes_on)
    assert digests(tmp_path / "out") == before


def test_a_set_of_an_earlier_version_is_one_in_float32(model: Path, tmp_path: Path) -> None:
    make_set(model, tmp_path / "out", num=3)
    recorded = settings(tmp_path / "out")
    assert {name: recorded.pop(name) for name in ("precision", "compile", "graphs")} == {
        "precision": "float32",
        "compile": False,
        "graphs": False,
    }
    (tmp_path / "out" / "generation.json").write_text(json.dumps(recorded))
    (tmp_path / "out" / "000001-label-1.png").unlink()
    assert make_set(model, tmp_path / "out", num=3).made == 1
    with pytest.raises(UserError, match="precision float32, now bfloat16"):
        make_set(model, tmp_path / "out", num=3, precision="bfloat16")


def test_images_of_a_recorded_network_are_those_of_the_network(model: Path) -> None:
    generator = Generator.open(model)
    recorder = OperationRecorder()
    recorded = RecordedNetwork(generator.network, recorder)
    labels = torch.arange(64) % 10
    for first in range(0, 320, 64):
        indices = torch.arange(first, first + 64)
        (expected,) = generator.samples(indices, labels, seed=1, steps=2)
        made = generate(recorded, generator.objective, 1, indices, labels, 2, generator.device)
        assert torch.equal(made, expected)
    assert recorder.recorded == 1


@WITHOUT_GPU
def test_a_recording_is_refused_without_a_gpu_in_one_sentence(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_here(
        *(
            "generate",
            "--model",
            model,
            "--out",
            out,
            "--num",
            "2",
            "--graphs",
            "--storage",
            tmp_path / "runs",
        )
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    sentence = "--graphs records passes of a network on a GPU, and this machine has none: leave it out."
    assert line == f"soflowctl: error: {sentence}"
    assert not (out / "generation.json").exists()
    with pytest.raises(UserError, match="this machine has none"):
        Generator.open(model, execution=Execution(graphs=True))


def test_the_options_of_the_command_decide_the_set(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("generate", "--model", model, "--out", out, "--num", "2", "--storage", tmp_path / "runs")
    assert run_here(*words, "--precision", "bfloat16").returncode == 0
    assert settings(out)["precision"] == "bfloat16"
    again = run_here(*words)
    assert again.returncode == 2
    assert "(precision bfloat16, now float32): choose another --out." in again.stderr
    assert run_here("generate", "--verify", out).returncode == 0


@pytest.mark.slow
def test_a_compiled_network_makes_images_near_those_of_an_eager_one(model: Path) -> None:
    torch._dynamo.reset()
    compiled = Generator.open(model, execution=Execution(compile=True))
    indices, labels = range(70), [i % 10 for i in range(70)]
    made, expected = (
        torch.cat(list(each.samples(indices, labels, seed=0, steps=2)))
        for each in (compiled, Generator.open(model))
    )
    assert isinstance(compiled._run_network, NetworkModule)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_workers_run_passes_as_the_command_says(model: Path, tmp_path: Path) -> None:
    for name, workers in (("here", 1), ("two", 2)):
        out = tmp_path / name
        make_set(model, out, num=150, format="webdataset", precision="bfloat16", workers=workers)
    assert digests(tmp_path / "here") == digests(tmp_path / "two")
    shutil.rmtree(tmp_path / "two")
    make_set(model, tmp_path / "two", num=150, format="webdataset", workers=2)
    assert digests(tmp_path / "here") != digests(tmp_path / "two")
