"""Listing images, writing files and reading a set's description load no torch: commands that need only these start at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

from soflow_pipelines.preparation.builtin import ensure_builtin

PACKAGES = Path(__file__).parents[2] / "pipelines" / "soflow_pipelines"
HEAVY = ["torch", "torchvision", "timm", "diffusers", "safetensors", "sklearn", "scipy", "ray", "mlflow"]
LIGHT = {
    "storage": None,
    "sources": None,
    "images": ["codec", "decode", "encode"],
    "shards": ["info", "tables", "writer", "order", "cache", "verify"],
    "preparation": ["shard_plan", "state", "builtin"],
}
"""The modules that load none of HEAVY, by package; None for all."""
CODE = """
import importlib, json, sys
from pathlib import Path
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
from soflow_pipelines.images.encode import encode_png
from soflow_pipelines.shards.tables import read_info
from soflow_pipelines.sources.opening import open_source
from soflow_pipelines.storage.files import write_json
folder = Path(sys.argv[2])
source = open_source(str(folder / "images"))
pixels = __import__("numpy").asarray(source.image(0))
write_json(folder / "file.json", {"images": len(source), "png": len(encode_png(pixels))})
assert read_info(folder / "digits").samples == 1797
print(json.dumps(sorted(set(json.loads(sys.argv[3])) & set(sys.modules))))
"""


def light_modules() -> list[str]:
    return [
        f"soflow_pipelines.{package}.{name}"
        for package, names in LIGHT.items()
        for name in names or sorted(path.stem for path in (PACKAGES / package).glob("*.py"))
        if name != "__init__"
    ]


def test_files_sources_and_descriptions_load_no_torch(tmp_path: Path) -> None:
    (tmp_path / "images" / "cat").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "cat" / "0.png")
    ensure_builtin("digits", tmp_path / "digits")
    command = [sys.executable, "-c", CODE, json.dumps(light_modules()), str(tmp_path), json.dumps(HEAVY)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout) == []
    assert json.loads((tmp_path / "file.json").read_text())["images"] == 1
