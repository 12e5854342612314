"""A generator as a folder that diffusers' `DiffusionPipeline` loads, with a transformer and a pipeline of its own.

README.md                                what it is, and how it is loaded
model_index.json                         classes of the parts; method, scaling, class names
pipeline.py                              `SoFlowPipeline`: the method's own sampler, in place of a scheduler
transformer/                             config.json, weights as safetensors, `soflow_transformer.py`
vae/                                     where the network makes latents: the autoencoder that decodes them

diffusers has no transformer that is conditioned on two times; the code in the folder needs the package `soflow`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soflow_core.settings import to_dict
from soflow_platform import generation
from soflow_platform.generation.decoding import kl_network
from soflow_platform.generation.generator import Generator

TEMPLATES = Path(generation.__file__).parent
PIPELINE, TRANSFORMER = "pipeline", "soflow_transformer"
WEIGHTS = "diffusion_pytorch_model.safetensors"
EXAMPLE = """import torch
from diffusers import DiffusionPipeline

folder = "."  # where this file is
pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
images = pipeline({call}).images
images[0].save("image.png")
"""


def write_folder(generator: Generator, folder: Path, steps: int) -> None:
    """Write the folder, which must not exist yet."""
    from safetensors.torch import save_file

    transformer = folder / "transformer"
    transformer.mkdir(parents=True)
    shutil.copyfile(TEMPLATES / "diffusers_pipeline.py", folder / f"{PIPELINE}.py")
    shutil.copyfile(TEMPLATES / "diffusers_transformer.py", transformer / f"{TRANSFORMER}.py")
    tensors = {
        f"network.{name}": tensor.detach().cpu().contiguous()
        for name, tensor in generator.network.state_dict().items()
    }
    save_file(tensors, transformer / WEIGHTS, metadata={"format": "pt"})
    if generator.decoder is not None:
        kl_network(generator.decoder).save_pretrained(folder / "vae")
    _write(transformer / "config.json", _transformer_config(generator))
    _write(folder / "model_index.json", _index(generator))
    (folder / "README.md").write_text(_readme(generator, steps), encoding="utf-8")


def _transformer_config(generator: Generator) -> dict[str, Any]:
    import diffusers

    return {
        "_class_name": "SoFlowTransformer",
        "_diffusers_version": diffusers.__version__,
        "architecture": to_dict(generator.network.config),
    }


def _index(generator: Generator) -> dict[str, Any]:
    """Content of model_index.json. Lists in it are parts of the pipeline, so that names of classes are a dictionary."""
    import diffusers

    facts = None if generator.decoder is None else generator.decoder.facts
    names = () if generator.info is None else generator.info.class_names
    return {
        "_class_name": "SoFlowPipeline",
        "_diffusers_version": diffusers.__version__,
        "transformer": [TRANSFORMER, "SoFlowTransformer"],
        "vae": [None, None] if facts is None else ["diffusers", "AutoencoderKL"],
        "objective": to_dict(generator.objective),
        "id2label": {str(number): name for number, name in enumerate(names)},
        "scaling": 1.0 if facts is None else facts.scaling,
        "shift": 0.0 if facts is None else facts.shift,
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _readme(generator: Generator, steps: int) -> str:
    config = generator.network.config
    words = [
        "num_images=2" if config.classes is None else f"class_labels=[0, {config.classes - 1}]",
        "seed=0",
    ]
    if steps > 1:
        words.append(f"num_inference_steps={steps}")
    samples = " x ".join(map(str, config.sample_shape))
    decoded = "the images" if generator.decoder is None else "latents, which `vae` decodes"
    return (
        f"# One-step generator, {generator.objective.method}\n\n"
        f"{config.title}, for {samples}: {decoded}. diffusers has no\n"
        "transformer with two times, so that its code and the pipeline's are in this folder; they need the package `soflow`.\n\n"
        f"```python\n{EXAMPLE.format(call=', '.join(words))}```\n\n"
        "`trust_remote_code` runs the two Python files of this folder: look at them where the folder is not your own.\n\n"
        "There is no scheduler: the sampler is the method's, and `num_inference_steps` its number of steps. Image i of a seed is\n"
        "that of `soflowctl generate`. `output_type` is `pil`, `np`, `pt` or `latent`.\n"
    )


def load_folder(folder: Path, steps: int) -> Callable[[Tensor, Tensor | None], Tensor]:
    """What diffusers makes of a folder: a function of noise and labels to images in [-1, 1]."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    place = str(folder)
    pipeline = DiffusionPipeline.from_pretrained(place, custom_pipeline=place, trust_remote_code=True)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")

    def run(noise: Tensor, labels: Tensor | None) -> Tensor:
        images = pipeline(
            class_labels=None if labels is None else labels.tolist(),
            latents=noise,
            num_inference_steps=steps,
            renoise=[noise] * (steps - 1),
            output_type="pt",
        ).images
        return 2 * images.cpu() - 1

    return run
