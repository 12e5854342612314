"""Limits on images from outside, before they are decoded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageLimits:
    """What an image may cost. An image beyond a limit counts as damaged."""

    megapixels: int = 178
    """Pixels of an image, in millions."""
    file_megabytes: int = 256
    """Bytes of an image's file, in 2^20; in an archive, of what a member unpacks to."""
    ratio: int = 1000
    """The longer side of an image divided by the shorter one. Of a longer one the crop would show next to nothing."""
    growth: int = 1100
    """What a member of a zip file unpacks to, divided by what it takes there. Deflate reaches 1032; the others reach more."""

    @property
    def file_bytes(self) -> int:
        """Bytes of an image's file."""
        return self.file_megabytes * 2**20

    @property
    def pixels(self) -> int:
        """Pixels of an image."""
        return self.megapixels * 10**6


DEFAULT_LIMITS = ImageLimits()
