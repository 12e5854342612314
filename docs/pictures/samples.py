"""The README's picture: one-step samples of SoFlow beside samples that take a thousand steps, as docs/pictures/samples.png.

    soflowctl run docs/pictures/samples.yaml --storage pictures
    python docs/pictures/samples.py pictures [--steps 1000] [--out docs/pictures/samples.png]

Reads the newest sweep `samples` of the project folder. Column i has the same noise and the same label in every row.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from soflow_platform.generation.generator import Generator

GUIDANCE = 3.0
"""SoFlow's is trained in; the other two are guided by the same scale while they sample."""
COLUMNS = 20
SCALE = 5
GAP = 6
CAPTION = 200


@dataclass(frozen=True)
class Row:
    caption: str
    method: str
    many: bool
    """Sampled in a thousand steps, not in one."""
    sampling: dict[str, Any]


ROWS = (
    Row("SoFlow", "soflow", False, {}),
    Row("Flow Matching", "flow_matching", False, {"sampling_scale": GUIDANCE}),
    Row("Flow Matching, Euler", "flow_matching", True, {"sampling_scale": GUIDANCE}),
    Row("DDPM", "diffusion", True, {"sampler": "ddpm", "sampling_scale": GUIDANCE}),
)


def weights_of(project: Path, method: str) -> Path:
    """EMA weights of the newest checkpoint of this method's trial."""
    found = project.glob(f"sweeps/samples-*/trials/*-{method}/checkpoints/step-*/ema.safetensors")
    return max(found, key=lambda path: path.stat().st_mtime)


def images(weights: Path, row: Row, steps: int) -> np.ndarray:
    """-> (COLUMNS, H, W) uint8: labels 0 to 9 in turn, with the noises 0, 1, 2, ... of seed 0."""
    generator = Generator.open(weights, row.sampling)
    labels = [i % 10 for i in range(COLUMNS)]
    parts: list[Tensor] = list(generator.samples(range(COLUMNS), labels, 0, steps if row.many else 1))
    samples = np.concatenate([part.numpy() for part in parts])
    return np.clip(127.5 * samples[:, 0] + 128, 0, 255).astype(np.uint8)


def picture(rows: Sequence[tuple[str, str, np.ndarray]]) -> Image.Image:
    """Captions on the left, one row of enlarged digits each."""
    side = rows[0][2].shape[1] * SCALE
    step = side + GAP
    sheet = Image.new("L", (CAPTION + COLUMNS * step, len(rows) * step + GAP), 255)
    draw = ImageDraw.Draw(sheet)
    name, small = ImageFont.load_default(18), ImageFont.load_default(14)
    for number, (caption, detail, digits) in enumerate(rows):
        top = GAP + number * step
        draw.text((8, top + 2), caption, fill=0, font=name)
        draw.text((8, top + 22), detail, fill=90, font=small)
        for column, digit in enumerate(digits):
            enlarged = Image.fromarray(digit).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (CAPTION + column * step, top))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("project", type=Path, help="project folder with the sweep `samples`")
    parser.add_argument("--steps", type=int, default=1000, help="of the rows that take many")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("samples.png"))
    options = parser.parse_args()
    rows = []
    for row in ROWS:
        steps = f"{options.steps:,} steps" if row.many else "1 step"
        rows.append((row.caption, steps, images(weights_of(options.project, row.method), row, options.steps)))
    picture(rows).save(options.out, optimize=True)
    print(options.out)


if __name__ == "__main__":
    main()
