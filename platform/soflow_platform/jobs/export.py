"""`soflowctl export`: a generator as one file that runs without this platform, or as a folder for diffusers, checked by running it.

The program takes noise (B, C, H, W) float32, and labels (B,) int64 where the network is conditional, for any B, and gives images
(B, C, H, W) float32 in [-1, 1]: the sampler's steps are in it, and the decoder where the network makes latents, then for B up to 63.
"""

from __future__ import annotations

import importlib.util
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from soflow_core.failures import summarize
from soflow_core.nfe import sampling_evaluations
from soflow_core.objectives import Objective
from soflow_core.samplers.noise import sample_noise
from soflow_pipelines.storage.files import atomic
from soflow_platform.errors import JobError, UserError
from soflow_platform.generation.decoding import decode_samples, kl_network
from soflow_platform.generation.generator import Generator
from soflow_platform.jobs.export_diffusers import load_folder, write_folder
from soflow_platform.jobs.targets import TargetResolver
from soflow_platform.storage.project import ProjectFolder, why_not_writable
from soflow_platform.tracking.store import TrackingStore

ExportFormat = Literal["safetensors", "torch-export", "onnx", "diffusers"]
FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)
SUFFIXES = {"safetensors": ".safetensors", "torch-export": ".pt2", "onnx": ".onnx", "diffusers": ""}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
CHECKED = (1, 3)
"""Batch sizes that a program is checked with; it was traced with another one."""
TRACED = 2
DECODED_AT_ONCE = 63
"""diffusers' decoder takes another way for 64 images and more, so that one program cannot hold both."""
TOLERANCE = 1e-3
"""Of images in [-1, 1]: less than a step of 8 bits, more than the rounding of another order of sums."""


@dataclass(frozen=True)
class ExportRequest:
    """Request of `soflowctl export`."""

    model: str
    format: ExportFormat
    out: Path
    steps: int = 1
    autoencoder: str | None = None


@dataclass(frozen=True)
class Exported:
    """The file or folder that was written."""

    out: Path
    bytes: int
    difference: float
    """Largest difference of its images from those of the generator, of values in [-1, 1]."""


class SamplingProgram(nn.Module):
    """Network, sampler and decoder as one module."""

    def __init__(self, generator: Generator, steps: int) -> None:
        super().__init__()
        self.network = generator.network
        self.decoder: Any = None
        self.scaling, self.shift = 1.0, 0.0
        if generator.decoder is not None:
            self.decoder = kl_network(generator.decoder)
            self.scaling, self.shift = generator.decoder.facts.scaling, generator.decoder.facts.shift
        self._objective: Objective = generator.objective
        self._steps = steps

    @property
    def largest_batch(self) -> int | None:
        """Images that the program makes at once, at most; None: any number."""
        return None if self.decoder is None else DECODED_AT_ONCE

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Noise (B, C, H, W), labels (B,) -> images (B, C', H', W') in [-1, 1]."""
        samples = self._objective.sample(self.network, noise, labels, self._steps)
        if self.decoder is not None:
            samples = self.decoder.decode(samples / self.scaling + self.shift).sample
        return samples.float().clamp(-1, 1)


def export(request: ExportRequest, project: ProjectFolder, store: TrackingStore) -> Exported:
    """Write the file, complete or not at all, after its images were compared with those of the generator.

    Raises InputError where the model cannot be exported so, JobError where the images differ.
    """
    _require_packages(request.format)
    _check_place(request)
    with tempfile.TemporaryDirectory(prefix="soflow-export-") as folder:
        target = TargetResolver(project, store, Path(folder), accepts_images=False).find(request.model)
        assert target.weights is not None
        # Weights are compared by the samples of the network, so that they can be had where the autoencoder is not.
        decode = request.format != "safetensors"
        generator = Generator.open(target.weights, autoencoder=request.autoencoder, decode=decode)
        _require_steps(generator, request.steps)
        aside = Path(folder) / f"exported{SUFFIXES[request.format]}"
        difference = _written(request, generator, target.weights, aside)
        if aside.is_dir():
            size = _publish_folder(aside, request.out)
        else:
            size = aside.stat().st_size
            with aside.open("rb") as source, atomic(request.out) as published:
                shutil.copyfileobj(source, published)
    return Exported(request.out, size, difference)


def _check_place(request: ExportRequest) -> None:
    """Raises UserError where the file or folder cannot be written, or a folder is there already."""
    out = request.out.absolute()
    try:
        there, in_folder = out.exists(), out.parent.is_dir()
    except OSError as error:
        raise UserError(f"--out {request.out} cannot be written: {error.strerror}.") from None
    if request.format == "diffusers":
        if there or not in_folder:
            raise UserError(
                f"--out {request.out} cannot be written: name a new folder in a folder that exists."
            )
    elif out.is_dir() or not in_folder:
        raise UserError(f"--out {request.out} cannot be written: name a file in a folder that exists.")
    reason = why_not_writable(out.parent)
    if reason is not None:
        raise UserError(f"--out {request.out} cannot be written: {reason}.")


def _publish_folder(folder: Path, out: Path) -> int:
    """Copy a folder to its place, complete or not at all. Returns its bytes."""
    aside = out.absolute().with_name(f".{out.name}.{secrets.token_hex(8)}.part")
    try:
        # Not with the permissions of a private file, which safetensors gives its own.
        shutil.copytree(folder, aside, copy_function=shutil.copyfile)
        aside.rename(out.absolute())
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def _written(request: ExportRequest, generator: Generator, weights: Path, path: Path) -> float:
    """Write the export to `path` and return by how much its images differ."""
    if request.format == "safetensors":
        shutil.copyfile(weights, path)
        again = Generator.open(path, decode=False)
        return _largest_difference(generator, _sampled(again, request.steps), request)
    if request.format == "diffusers":
        write_folder(generator, path, request.steps)
        return _largest_difference(generator, load_folder(path, request.steps), request)
    _require_deterministic(generator, request.steps)
    program = SamplingProgram(_on_cpu(generator), request.steps).eval()
    try:
        run = (
            _export_program(program, generator, path)
            if request.format == "torch-export"
            else _export_onnx(program, generator, path)
        )
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise JobError(
            f"{request.model} cannot be exported to {request.format}: {summarize(error)[:300]}"
        ) from error
    return _largest_difference(generator, run, request)


Run = Callable[[Tensor, Tensor | None], Tensor]


def _sampled(generator: Generator, steps: int) -> Run:
    """The images of a generator for given noise and labels."""

    def run(noise: Tensor, labels: Tensor | None) -> Tensor:
        device = generator.device
        on_device = None if labels is None else labels.to(device)
        with torch.inference_mode():
            samples = generator.objective.sample(
                generator.network, noise.to(device), on_device, steps, [noise.to(device)] * (steps - 1)
            )
        return decode_samples(samples.float().cpu(), generator.decoder).clamp(-1, 1)

    return run


def _export_program(program: SamplingProgram, generator: Generator, path: Path) -> Run:
    """Write a torch.export program, and return the one that was read back."""
    arguments = _inputs(generator, TRACED)
    batch = torch.export.Dim("batch", min=1, max=program.largest_batch)
    with torch.no_grad():
        exported = torch.export.export(
            program, arguments, dynamic_shapes=tuple({0: batch} for _ in arguments), strict=False
        )
    torch.export.save(exported, path)
    module = torch.export.load(path).module()

    def run(noise: Tensor, labels: Tensor | None) -> Tensor:
        with torch.no_grad():
            images: Tensor = module(noise) if labels is None else module(noise, labels)
        return images

    return run


def _export_onnx(program: SamplingProgram, generator: Generator, path: Path) -> Run:
    """Write an ONNX file with the weights in it, and return what onnxruntime makes of it."""
    import onnxruntime

    arguments = _inputs(generator, TRACED)
    names = ["noise", "labels"][: len(arguments)]
    batch = torch.export.Dim("batch", min=1, max=program.largest_batch)
    with warnings.catch_warnings(), torch.no_grad():
        # That noise and labels have one batch between them is meant so.
        warnings.filterwarnings("ignore", message=".*axis name.*")
        torch.onnx.export(
            program,
            arguments,
            path,
            input_names=names,
            output_names=["images"],
            dynamic_shapes=tuple({0: batch} for _ in arguments),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(noise: Tensor, labels: Tensor | None) -> Tensor:
        values = {"noise": noise.numpy()} | ({} if labels is None else {"labels": labels.numpy()})
        return torch.from_numpy(session.run(["images"], values)[0])

    return run


def _largest_difference(generator: Generator, run: Run, request: ExportRequest) -> float:
    """By how much the images of an export differ from the generator's. Raises JobError where they are not the same."""
    largest = 0.0
    expected = _sampled(generator, request.steps)
    for count in CHECKED:
        noise, *rest = _inputs(generator, count)
        labels = rest[0] if rest else None
        made, wanted = run(noise, labels), expected(noise, labels)
        if made.shape != wanted.shape:
            raise JobError(
                f"the export makes images {tuple(made.shape)} where {tuple(wanted.shape)} are due: nothing was written."
            )
        largest = max(largest, float((made - wanted).abs().max()))
    if not largest <= TOLERANCE:
        raise JobError(
            f"the export's images differ by {largest:.2g} from those of {request.model}: nothing was written."
        )
    return largest


def _inputs(generator: Generator, count: int) -> tuple[Tensor, ...]:
    """Noise, and labels where the network takes them."""
    config = generator.network.config
    noise = sample_noise(0, torch.arange(count), (config.channels, config.height, config.width))
    if config.classes is None:
        return (noise,)
    return noise, torch.arange(count) % config.classes


def _on_cpu(generator: Generator) -> Generator:
    generator.network.to("cpu")
    return generator


def _require_steps(generator: Generator, steps: int) -> None:
    """Raises UserError where the method cannot be sampled in so many steps."""
    try:
        sampling_evaluations(generator.objective, steps, generator.classes is not None)
    except ValueError as error:
        raise UserError(f"--steps {steps} of {generator.objective.method}: {summarize(error)}.") from None


def _require_deterministic(generator: Generator, steps: int) -> None:
    """Raises UserError where sampling in so many steps draws noise on the way."""
    try:
        with torch.inference_mode():
            noise, *labels = (each.to(generator.device) for each in _inputs(generator, 1))
            generator.objective.sample(generator.network, noise, labels[0] if labels else None, steps)
    except (ValueError, IndexError) as error:
        raise UserError(
            f"{generator.objective.method} in {steps} steps cannot be a program of noise and labels alone: {summarize(error)}; "
            "take --steps 1."
        ) from None


def _require_packages(format: ExportFormat) -> None:
    missing = [name for name in ONNX_PACKAGES if format == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--to onnx needs {', '.join(missing)}: pip install 'soflow[onnx]'.")
