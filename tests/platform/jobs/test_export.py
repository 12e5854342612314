"""An exported file makes the images of the generator, and is written only where it does."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from soflow_core.networks import DiT, DiTConfig
from soflow_core.objectives import OBJECTIVES, Objective
from soflow_core.samplers.noise import sample_noise
from soflow_core.weights import save_weights
from soflow_pipelines.images.codec import AutoencoderError
from soflow_pipelines.shards.info import DatasetInfo
from soflow_pipelines.shards.tables import read_info
from soflow_platform.errors import JobError, UserError
from soflow_platform.generation.generator import Generator
from soflow_platform.jobs import export as export_module
from soflow_platform.jobs.export import Exported, ExportFormat, ExportRequest, export
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import TrackingStore
from tests.support.small_networks import latent_set

DIGITS = DiTConfig(
    channels=1, height=8, width=8, patch=4, hidden=16, depth=1, heads=2, classes=10, null_label=True
)


def weights_file(
    path: Path,
    config: DiTConfig = DIGITS,
    objective: Objective | None = None,
    data: DatasetInfo | None = None,
) -> Path:
    """A network with weights in all of its layers, so that its images depend on noise, label and time."""
    torch.manual_seed(0)
    network = DiT(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    facts = {} if data is None else dict(vars(data))
    save_weights(path, network.state_dict(), config, objective or OBJECTIVES["soflow"](), facts)
    return path


def exported(
    weights: Path, format: ExportFormat, out: Path, steps: int = 1, autoencoder: str | None = None
) -> Exported:
    project = ProjectFolder(weights.parent / "runs")
    request = ExportRequest(str(weights), format, out, steps, autoencoder)
    return export(request, project, TrackingStore(project.tracking_uri))


def test_a_program_makes_the_generators_images_in_any_batch(tmp_path: Path) -> None:
    weights = weights_file(tmp_path / "ema.safetensors")
    done = exported(weights, "torch-export", tmp_path / "digits.pt2")
    assert done.difference < 1e-5
    program = torch.export.load(done.out).module()
    labels = torch.arange(7)
    with torch.no_grad():
        images = program(sample_noise(3, torch.arange(7), (1, 8, 8)), labels)
    (expected,) = Generator.open(weights).decoded(torch.arange(7), labels, 3, 1)
    assert torch.allclose(images, expected.clamp(-1, 1), atol=1e-5)
    assert images.std() > 0.01


def test_a_program_of_latents_holds_their_decoder(tmp_path: Path) -> None:
    autoencoder, place, _ = latent_set(tmp_path)
    info = read_info(str(place))
    config = DiTConfig(channels=4, height=8, width=8, patch=4, hidden=16, depth=1, heads=2, classes=4)
    weights = weights_file(tmp_path / "ema.safetensors", config, data=info)
    with pytest.raises(AutoencoderError, match="--autoencoder FOLDER"):
        exported(weights, "torch-export", tmp_path / "latents.pt2")
    done = exported(weights, "torch-export", tmp_path / "latents.pt2", autoencoder=str(autoencoder))
    program = torch.export.load(done.out).module()
    with torch.no_grad():
        images = program(sample_noise(0, torch.arange(2), (4, 8, 8)), torch.tensor([1, 3]))
    assert images.shape == (2, 3, 16, 16)
    generator = Generator.open(weights, autoencoder=str(autoencoder))
    (expected,) = generator.decoded(torch.arange(2), torch.tensor([1, 3]), 0, 1)
    assert torch.allclose(images, expected.clamp(-1, 1), atol=1e-4)


def test_several_steps_of_a_method_without_fresh_noise_are_one_program(tmp_path: Path) -> None:
    weights = weights_file(tmp_path / "ema.safetensors", objective=OBJECTIVES["flow_matching"]())
    assert exported(weights, "torch-export", tmp_path / "digits.pt2", steps=2).difference < 1e-5


@pytest.mark.parametrize("format", ["safetensors", "diffusers", "torch-export"])
def test_steps_that_the_method_cannot_take_are_refused(tmp_path: Path, format: ExportFormat) -> None:
    weights = weights_file(tmp_path / "ema.safetensors", objective=OBJECTIVES["diffusion"]())
    with pytest.raises(UserError, match=r"--steps 2000 of diffusion: .* give 1 to 1000\."):
        exported(weights, format, tmp_path / "digits", steps=2000)
    assert not (tmp_path / "digits").exists()


def test_fresh_noise_between_steps_is_no_part_of_a_program(tmp_path: Path) -> None:
    weights = weights_file(tmp_path / "ema.safetensors")
    with pytest.raises(UserError, match=r"soflow in 2 steps cannot be a program .* take --steps 1"):
        exported(weights, "torch-export", tmp_path / "digits.pt2", steps=2)


def test_exported_weights_are_the_weights(tmp_path: Path) -> None:
    weights = weights_file(tmp_path / "ema.safetensors")
    done = exported(weights, "safetensors", tmp_path / "out.safetensors")
    assert done.difference == 0
    for name, tensor in load_file(weights).items():
        assert torch.equal(load_file(done.out)[name], tensor)
    assert Generator.open(done.out).objective.method == "soflow"


def test_a_program_with_other_images_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler in the program is given other times than the generator's."""
    weights = weights_file(tmp_path / "ema.safetensors")
    original = export_module.SamplingProgram.forward

    def shifted(
        self: export_module.SamplingProgram, noise: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        return original(self, noise + 0.5, labels)

    monkeypatch.setattr(export_module.SamplingProgram, "forward", shifted)
    with pytest.raises(JobError, match=r"images differ by .* nothing was written"):
        exported(weights, "torch-export", tmp_path / "digits.pt2")
    assert not (tmp_path / "digits.pt2").exists()


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    weights = weights_file(tmp_path / "ema.safetensors")
    with pytest.raises(UserError, match="name a file in a folder that exists"):
        exported(weights, "safetensors", tmp_path / "absent" / "out.safetensors")


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in export_module.ONNX_PACKAGES),
    reason="needs soflow[onnx]",
)
def test_an_onnx_file_makes_the_generators_images(tmp_path: Path) -> None:
    weights = weights_file(tmp_path / "ema.safetensors")
    done = exported(weights, "onnx", tmp_path / "digits.onnx")
    assert done.difference < 1e-4
    assert done.bytes > 1000


def test_packages_that_onnx_needs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "ONNX_PACKAGES", ("onnx_that_is_not_there",))
    with pytest.raises(UserError, match=r"needs onnx_that_is_not_there: pip install 'soflow\[onnx\]'"):
        exported(weights_file(tmp_path / "ema.safetensors"), "onnx", tmp_path / "digits.onnx")


def loaded(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(str(folder), custom_pipeline=str(folder), trust_remote_code=True)


@pytest.mark.parametrize("steps", [1, 2])
def test_diffusers_loads_a_folder_and_makes_the_generators_images(tmp_path: Path, steps: int) -> None:
    weights = weights_file(tmp_path / "ema.safetensors")
    done = exported(weights, "diffusers", tmp_path / "digits", steps)
    assert done.difference < 1e-6
    pipeline = loaded(done.out)
    labels = [3, 1, 9]
    images = pipeline(class_labels=labels, seed=5, num_inference_steps=steps, output_type="pt").images
    (expected,) = Generator.open(weights).decoded(torch.arange(3), labels, 5, steps)
    assert torch.allclose(2 * images - 1, expected.clamp(-1, 1), atol=1e-5)
    assert images.std() > 0.01
    assert pipeline(class_labels=2).images[0].size == (8, 8)
    assert pipeline(class_labels=2, num_images=3, output_type="latent").images.shape == (3, 1, 8, 8)
    for wrong, message in ((None, "give class_labels from 0 to 9"), ([10], "class_labels are from 0 to 9")):
        with pytest.raises(ValueError, match=message):
            pipeline(class_labels=wrong)
    with pytest.raises(UserError, match="name a new folder"):
        exported(weights, "diffusers", tmp_path / "digits")


@pytest.mark.slow
def test_a_folder_of_latents_holds_their_autoencoder_and_an_example_that_runs(tmp_path: Path) -> None:
    autoencoder, place, _ = latent_set(tmp_path)
    info = read_info(str(place))
    config = DiTConfig(channels=4, height=8, width=8, patch=4, hidden=16, depth=1, heads=2, classes=4)
    weights = weights_file(tmp_path / "ema.safetensors", config, data=info)
    done = exported(weights, "diffusers", tmp_path / "latents", autoencoder=str(autoencoder))
    held = {str(path.relative_to(done.out)) for path in done.out.rglob("*") if path.is_file()}
    assert held == {
        "README.md",
        "model_index.json",
        "pipeline.py",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer/soflow_transformer.py",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    (example,) = re.findall(r"```python\n(.*?)```", (done.out / "README.md").read_text(), re.DOTALL)
    ran = subprocess.run([sys.executable, "-c", example], cwd=done.out, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    generator = Generator.open(weights, autoencoder=str(autoencoder))
    (expected,) = generator.images(torch.arange(2), [0, 3], 0, 1)
    shown = np.asarray(Image.open(done.out / "image.png"), int)
    assert np.abs(shown - expected[0].permute(1, 2, 0).numpy()).max() <= 1
