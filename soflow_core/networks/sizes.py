"""Named sizes of DiT (arXiv 2212.09748, Table 1; M as in MeanFlow, arXiv 2505.13447)."""

from __future__ import annotations

from soflow_core.networks.dit import DiTConfig

SIZES: dict[str, tuple[int, int, int]] = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "M": (1024, 16, 16),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
"""Name -> hidden, depth, heads."""

PATCHES = (2, 4, 8)


def dit_config(
    size: str,
    channels: int,
    height: int,
    width: int,
    classes: int | None = None,
    null_label: bool = False,
    guidance_scale: bool = False,
    guidance_interval: bool = False,
) -> DiTConfig:
    """Architecture of a named size, for example "XL/2" (size / patch). Raises ValueError for an unknown name."""
    name, _, patch = size.partition("/")
    if name not in SIZES or patch not in {str(p) for p in PATCHES}:
        known = ", ".join(SIZES)
        raise ValueError(
            f'unknown network size "{size}"; write one of {known}, a slash, and a patch of 2, 4 or 8'
        )
    hidden, depth, heads = SIZES[name]
    return DiTConfig(
        channels=channels,
        height=height,
        width=width,
        patch=int(patch),
        hidden=hidden,
        depth=depth,
        heads=heads,
        classes=classes,
        null_label=null_label,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
    )
