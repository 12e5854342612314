"""The pipeline of an exported folder: it is copied there as `pipeline.py`, and diffusers loads it from there.

Its sampler is that of the method in `soflow_core`, and takes the place of a scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

from soflow_core.objectives import OBJECTIVES
from soflow_core.samplers.noise import sample_noise


class SoFlowPipeline(DiffusionPipeline):
    """Makes images of classes: `pipeline(class_labels=[3, 1]).images`."""

    _optional_components: ClassVar[list[str]] = ["vae"]

    def __init__(
        self,
        transformer: Any,
        vae: Any = None,
        objective: dict[str, Any] | None = None,
        id2label: dict[str, str] | None = None,
        scaling: float = 1.0,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(objective=objective, id2label=id2label, scaling=scaling, shift=shift)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | None = None,
        num_images: int | None = None,
        num_inference_steps: int = 1,
        seed: int = 0,
        latents: Tensor | None = None,
        renoise: Sequence[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Images, one for each label; image i is that of `soflowctl generate` with this seed.

        `latents` (B, C, H, W) replaces the noise of the seed, `renoise` the noise between steps. `output_type` is `pil`, `np`
        (B, H, W, C) or `pt` (B, C, H, W), both from 0 to 1, or `latent`: the samples of the network. Raises ValueError for labels
        that the network does not know, and where it needs some.
        """
        shape = self.transformer.network.config.sample_shape
        labels = self._labels(class_labels, num_images, latents)
        count = (
            len(latents) if latents is not None else len(labels) if labels is not None else num_images or 1
        )
        device = self._execution_device
        indices = torch.arange(count)
        noise = sample_noise(seed, indices, shape) if latents is None else latents
        if renoise is None:
            renoise = [
                sample_noise(seed, indices, shape, draw + 1) for draw in range(num_inference_steps - 1)
            ]
        method = OBJECTIVES.read(self.config.objective)
        samples = method.sample(
            self.transformer,
            noise.to(device),
            None if labels is None else labels.to(device),
            num_inference_steps,
            [each.to(device) for each in renoise],
        ).float()
        images = samples if output_type == "latent" else self._decoded(samples, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _labels(
        self, class_labels: int | Sequence[int] | None, num_images: int | None, latents: Tensor | None
    ) -> Tensor | None:
        """(B,) int64; None for a network without classes."""
        classes = self.transformer.network.config.classes
        if classes is None:
            return None
        if class_labels is None:
            raise ValueError(f"give class_labels from 0 to {classes - 1}")
        if isinstance(class_labels, int):
            class_labels = [class_labels] * (num_images or (1 if latents is None else len(latents)))
        labels = torch.as_tensor(class_labels, dtype=torch.int64)
        if ((labels < 0) | (labels >= classes)).any():
            raise ValueError(f"class_labels are from 0 to {classes - 1}")
        return labels

    def _decoded(self, samples: Tensor, output_type: str) -> Any:
        if self.vae is not None:
            samples = self.vae.decode(samples / self.config.scaling + self.config.shift).sample
        images = (samples.float().clamp(-1, 1) + 1) / 2
        if output_type == "pt":
            return images
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        return arrays if output_type == "np" else self.numpy_to_pil(arrays)
