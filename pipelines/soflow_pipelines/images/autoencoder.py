"""Opens autoencoders; the kind `kl`: KL autoencoders between images and latents, in diffusers' format."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soflow_core.failures import summarize
from soflow_core.plugins import VARIABLE
from soflow_core.registration import NAME, register
from soflow_core.weights import WeightsError, require_finite
from soflow_pipelines.images.codec import (
    AUTOENCODERS,
    Autoencoder,
    AutoencoderError,
    AutoencoderFacts,
    AutoencoderKind,
    named_kind,
)


class KlAutoencoder:
    """diffusers' AutoencoderKL in float32: the autoencoder of Stable Diffusion and its relatives."""

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

    @property
    def network(self) -> Any:
        """diffusers' module."""
        return self._network

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """[-1, 1] (B, 3, H, W) -> (B, 2C, h, w) float32 on the CPU: posterior mean, then standard deviation, unscaled."""
        posterior = self._network.encode(images.to(self._device, torch.float32)).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).float().cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w), as networks take them -> images in [-1, 1] (B, 3, H, W) float32 on the CPU."""
        unscaled = latents.to(self._device, torch.float32) / self.facts.scaling + self.facts.shift
        return self._network.decode(unscaled).sample.float().cpu()

    def decode_channels_last(self) -> None:
        """Lays the decoder's weights out in channels-last memory, which its activations take over. Encoding does not change."""
        for part in (self._network.post_quant_conv, self._network.decoder):
            if part is not None:
                part.to(memory_format=torch.channels_last)


def weights_digest(tensors: dict[str, Tensor]) -> str:
    """A short SHA-256 over names, shapes and values, the same wherever the weights were loaded from."""
    checksum = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu", torch.float32).contiguous()
        checksum.update(f"{name}{tuple(tensor.shape)}".encode())
        checksum.update(tensor.numpy().tobytes())
    return checksum.hexdigest()[:16]


def load_autoencoder(name: str, device: str | torch.device = "cpu", download: bool = True) -> Autoencoder:
    """The autoencoder of a local folder in diffusers' format, of a hub id such as `stabilityai/sd-vae-ft-mse`, or of `KIND:PLACE`.

    Without `download` nothing is fetched: of an id, what the hub's cache on this machine holds. Raises AutoencoderError where it cannot
    be loaded.
    """
    kind, place = named_kind(name)
    opened = AUTOENCODERS[kind]().open(place, torch.device(device), download)
    if kind != AUTOENCODERS.default and not opened.facts.id.startswith(f"{kind}:"):
        opened.facts = replace(opened.facts, id=f"{kind}:{opened.facts.id}")
    return opened


@register("kl")
@dataclass(frozen=True)
class KlKind(AutoencoderKind):
    """diffusers' AutoencoderKL, in a local folder or on the hub."""

    def open(self, place: str, device: torch.device, download: bool) -> KlAutoencoder:
        return _open_kl(place, device, download)

    @classmethod
    def example(cls, folder: Path) -> str:
        """Two resolutions of 8 channels with random weights."""
        from diffusers import AutoencoderKL

        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.5,
        ).save_pretrained(folder)
        return str(folder)


def _open_kl(name: str, device: torch.device, download: bool) -> KlAutoencoder:
    """Weights are read from safetensors only."""
    folder = Path(name).expanduser()
    local = folder.is_dir()
    if local and not (folder / "config.json").is_file():
        raise AutoencoderError(f"{folder} is no autoencoder in diffusers' format: it has no config.json.")
    kind, colon, _ = name.partition(":")
    if not local and colon and NAME.fullmatch(kind):
        raise AutoencoderError(
            f"the autoencoder {name} is of a kind that is not registered; known are {', '.join(AUTOENCODERS)}: name the plugin that "
            f"registers {kind} in {VARIABLE}."
        )
    if not local and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise AutoencoderError(f"the autoencoder {name} is neither a folder here nor a hub id (OWNER/NAME).")
    from diffusers import AutoencoderKL

    try:
        network = AutoencoderKL.from_pretrained(
            folder if local else name,
            use_safetensors=True,
            local_files_only=local or not download,
            low_cpu_mem_usage=False,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if local:
            raise AutoencoderError(
                f"the autoencoder in {folder} cannot be loaded: {summarize(error)}."
            ) from error
        raise AutoencoderError(
            f"the autoencoder {name} cannot be loaded: there is no folder of that name and the hub gives no such model. "
            "Either download it where the hub can be reached (`hf download` fills the cache that HF_HOME names), "
            "or pass the path of a folder that holds its config.json and diffusion_pytorch_model.safetensors."
        ) from error
    try:
        require_finite(network.state_dict(), folder if local else name)
    except WeightsError as error:
        raise AutoencoderError(f"{error}.") from None
    return KlAutoencoder(network, folder.resolve().name if local else name, device)
