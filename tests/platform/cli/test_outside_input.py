"""Commands on random input: exit code 0, 1 or 2 with a sentence, never a traceback or "this is a bug", in bounded time and memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from safetensors.torch import save_file

from soflow_core.networks import DiT, DiTConfig
from soflow_core.objectives import SoFlow
from soflow_core.settings import to_dict
from soflow_core.weights import HEADER, save_weights
from soflow_pipelines.shards.info import DatasetInfo
from soflow_pipelines.shards.writer import Sample, write_shards
from soflow_pipelines.sources.digits import load_digits
from tests.support.checked_command import CheckedCommand
from tests.support.fuzz import AMOUNTS, EDITS, JSON, Edit, edited, examples

SWEEP = """\
name: small
extends: []
data: {source: digits}
network: {patch: 2, hidden: 32, depth: 2, heads: 2}
objective: {method: soflow, weight_power: 1.0}
training: {steps: &steps 40, batch: 16, ema: [0.9]}
evaluation: {every: *steps, samples: 64}
search: {space: {objective.weight_power: [0.5, 1.0]}}
"""
CONFIG = DiTConfig(channels=1, height=4, width=4, patch=2, hidden=16, depth=1, heads=2, classes=3)
KEYS = st.sampled_from(
    [
        *(
            "seed",
            "name",
            "description",
            "data",
            "data.source",
            "network",
            "network.depth",
            "objective",
            "training",
        ),
        *("objective.method", "objective.guidance.scale", "optimizer.lr", "search.space", "search.trials"),
        *(
            "training.checkpoints",
            "tracking.uri",
            "registry.model",
            "evaluation.features",
            "a.b",
            "x\x1b]0;x\x07",
            "",
        ),
    ]
)
TEXT = st.text(max_size=30) | st.text(alphabet="&*[]{}:,-'\"|>!%@`?#\n ab01.=", max_size=40)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_any_value_of_a_setting(tmp_path: Path, command: CheckedCommand, amount: int) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP)
    assert command("validate", str(path)) == 0
    assert command("run", str(path), "--dry-run") == 0

    @examples(amount, KEYS, JSON.map(json.dumps) | TEXT)
    def check(key: str, value: str) -> None:
        override = f"{key}={value}"
        command("validate", str(path), "--set", override)
        command("run", str(path), "--dry-run", "--set", override)

    check()


@pytest.mark.parametrize("amount", AMOUNTS)
def test_any_damage_to_a_sweep_file(tmp_path: Path, command: CheckedCommand, amount: int) -> None:
    path = tmp_path / "sweep.yaml"

    @examples(amount, EDITS)
    def check(edits: list[Edit]) -> None:
        path.write_bytes(edited(SWEEP.encode(), edits))
        command("validate", str(path))

    check()


@pytest.mark.parametrize("amount", AMOUNTS)
def test_any_text_as_a_sweep_file_and_as_an_override(
    tmp_path: Path, command: CheckedCommand, amount: int
) -> None:
    path = tmp_path / "sweep.yaml"

    @examples(amount, TEXT)
    def check(text: str) -> None:
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        assert command("validate", str(path)) == 2
        command("validate", "digits", "--set", text)

    check()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 of the digits in three shards."""
    data, folder = load_digits(), tmp_path_factory.mktemp("fuzz") / "digits"
    info = DatasetInfo(kind="pixels", shape=(1, 8, 8), dtype="uint8", classes=10)
    samples = (Sample(f"{n:08d}", data.images[n], int(data.labels[n])) for n in range(120))
    write_shards(samples, folder, info, per_shard=40)
    return folder


@pytest.mark.parametrize("name", ["dataset.json", "manifest.parquet", "index.parquet"])
@pytest.mark.parametrize("amount", AMOUNTS)
def test_any_damage_to_a_sidecar(
    tmp_path: Path, digits: Path, command: CheckedCommand, name: str, amount: int
) -> None:
    folder = Path(shutil.copytree(digits, tmp_path / "set"))
    content = (folder / name).read_bytes()

    @examples(amount, EDITS)
    def check(edits: list[Edit]) -> None:
        (folder / name).write_bytes(edited(content, edits))
        seen = command("data", "inspect", str(folder))
        passed = command("data", "verify", str(folder))
        assert passed != 0 or seen == 0

    check()


@pytest.mark.parametrize("amount", AMOUNTS)
def test_any_damage_to_a_weights_file(tmp_path: Path, command: CheckedCommand, amount: int) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, DiT(CONFIG).state_dict(), CONFIG, SoFlow(), {})
    content = path.read_bytes()
    assert command("generate", "--model", str(path), "--num", "2", "--out", str(tmp_path / "sound")) == 0

    @examples(amount, EDITS)
    def check(edits: list[Edit]) -> None:
        # Most of the file is numbers, which may be any; its beginning says what they are.
        path.write_bytes(edited(content[:4000], edits) + content[4000:])
        out = tmp_path / "images"
        command("generate", "--model", str(path), "--num", "2", "--out", str(out))
        shutil.rmtree(out, ignore_errors=True)

    check()


@pytest.mark.parametrize("amount", AMOUNTS)
def test_any_value_in_the_header_of_weights(tmp_path: Path, command: CheckedCommand, amount: int) -> None:
    path, out = tmp_path / "w.safetensors", tmp_path / "images"
    header: dict[str, Any] = {
        "format": 1,
        "network": to_dict(CONFIG),
        "objective": to_dict(SoFlow()),
        "data": {"kind": "pixels", "shape": [1, 4, 4], "class_names": ["a", "b", "c"]},
    }
    tensors = dict(DiT(CONFIG).state_dict())
    places = [(part, key) for part, content in header.items() if isinstance(content, dict) for key in content]
    places += [(part, None) for part in header]

    @examples(amount, st.sampled_from(places), JSON)
    def check(place: tuple[str, str | None], value: Any) -> None:
        part, key = place
        changed = value if key is None else {**header[part], key: value}
        save_file(tensors, path, metadata={HEADER: json.dumps({**header, part: changed})})
        command("generate", "--model", str(path), "--num", "2", "--out", str(out))
        shutil.rmtree(out, ignore_errors=True)

    check()


@pytest.mark.parametrize("amount", AMOUNTS)
def test_any_text_as_a_place(
    tmp_path: Path, command: CheckedCommand, monkeypatch: pytest.MonkeyPatch, amount: int
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = st.sampled_from(
        [
            ("data", "inspect", "--", "{}"),
            ("data", "verify", "--", "{}"),
            ("validate", "--", "{}"),
            ("validate", "digits", "--set", "tracking.uri='{}'"),
            ("validate", "digits", "--set", "training.checkpoints='{}'"),
            ("run", "digits", "--dry-run", "--set", "data.source='{}'"),
            ("generate", "--num", "1", "--out", "images", "--model={}"),
        ]
    )
    scheme = st.sampled_from(["", "http://127.0.0.1:1", "s3://", "sqlite:///", "models:/", "hf:", "file:"])

    @examples(amount, arguments, scheme, st.text(alphabet="ab.:/@?#[]%&=~\\ \x1b\u202eé0", max_size=12))
    def check(words: tuple[str, ...], scheme: str, text: str) -> None:
        command(*(word.replace("{}", scheme + text) for word in words))

    check()
