"""Autoencoders between images and the latents that a network is trained on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soflow_core.failures import InputError


class AutoencoderError(InputError):
    """An autoencoder that cannot be had. The text names it and the ways out."""


@dataclass(frozen=True)
class AutoencoderFacts:
    """What must be known of an autoencoder to use its latents."""

    id: str  # the hub's id, or the folder's name
    digest: str  # of the weights
    channels: int  # of a latent
    factor: int  # image sides are this many times the latent's
    scaling: float
    shift: float


class KlAutoencoder:
    """diffusers' AutoencoderKL in float32, as Stable Diffusion's autoencoders are."""

    def __init__(self, network: Any, name: str, device: torch.device) -> None:
        self._network = network.eval().requires_grad_(False).to(device)
        self._device = device
        config = network.config
        self.facts = AutoencoderFacts(
            id=name,
            digest=weights_digest(network.state_dict()),
            channels=int(config.latent_channels),
            factor=2 ** (len(config.block_out_channels) - 1),
            scaling=float(config.scaling_factor),
            shift=float(getattr(config, "shift_factor", None) or 0.0),
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """[-1, 1] (B, 3, H, W) -> (B, 2C, h, w) float32 on the CPU: posterior mean, then standard deviation, unscaled."""
        posterior = self._network.encode(images.to(self._device, torch.float32)).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).float().cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) as the network sees them -> images in [-1, 1] (B, 3, H, W) float32 on the CPU."""
        unscaled = latents.to(self._device, torch.float32) / self.facts.scaling + self.facts.shift
        return self._network.decode(unscaled).sample.float().cpu()


def weights_digest(tensors: dict[str, Tensor]) -> str:
    """A short SHA-256 over names, shapes and values, the same wherever the weights were loaded from."""
    checksum = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu", torch.float32).contiguous()
        checksum.update(f"{name}{tuple(tensor.shape)}".encode())
        checksum.update(tensor.numpy().tobytes())
    return checksum.hexdigest()[:16]


def load_autoencoder(name: str, device: str | torch.device = "cpu") -> KlAutoencoder:
    """From a local folder in diffusers' format, or a hub id such as `stabilityai/sd-vae-ft-mse`.

    Weights are read from safetensors only. AutoencoderError where it cannot be had.
    """
    folder = Path(name).expanduser()
    local = folder.is_dir()
    if local and not (folder / "config.json").is_file():
        raise AutoencoderError(f"{folder} is no autoencoder in diffusers' format: it has no config.json.")
    if not local and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise AutoencoderError(f"the autoencoder {name} is neither a folder here nor a hub id (OWNER/NAME).")
    from diffusers import AutoencoderKL

    try:
        network = AutoencoderKL.from_pretrained(
            folder if local else name, use_safetensors=True, local_files_only=local, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if local:
            first = str(error).strip().splitlines()[0]
            raise AutoencoderError(f"the autoencoder in {folder} cannot be loaded: {first}") from error
        raise AutoencoderError(
            f"the autoencoder {name} cannot be had: there is no folder of that name and the hub gives no such model. "
            "Either download it where the hub can be reached (`hf download` fills the cache that HF_HOME names), "
            "or pass the path of a folder that holds its config.json and diffusion_pytorch_model.safetensors."
        ) from error
    return KlAutoencoder(network, folder.resolve().name if local else name, torch.device(device))
