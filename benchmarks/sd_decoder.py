"""A decoder with the sizes of Stable Diffusion's autoencoder (f8, 4 channels, 49.5 M parameters) and random weights, for timing.

(B, 4, H, W) latents -> (B, 3, 8 H, 8 W) images. It needs torch alone.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

WIDTHS = (512, 512, 256, 128)


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(32, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(functional.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(functional.silu(self.norm2(inner)))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.GroupNorm(32, width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(tokens).chunk(3, dim=2)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return x + self.out(mixed).transpose(1, 2).reshape(x.shape)


class Decoder(nn.Module):
    def __init__(self, channels: int = 4, widths: tuple[int, ...] = WIDTHS, blocks: int = 3) -> None:
        super().__init__()
        first = widths[0]
        layers: list[nn.Module] = [nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, first, 3, padding=1)]
        layers += [Residual(first, first), Attention(first), Residual(first, first)]
        before = first
        for number, width in enumerate(widths):
            layers += [Residual(before if block == 0 else width, width) for block in range(blocks)]
            if number < len(widths) - 1:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)]
            before = width
        self.layers = nn.Sequential(*layers)
        self.norm, self.out = nn.GroupNorm(32, before), nn.Conv2d(before, 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        images: Tensor = self.out(functional.silu(self.norm(self.layers(latents))))
        return images
