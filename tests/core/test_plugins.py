"""Plugins: found by path, name, variable and entry point; their digest; and what is said where one is missing."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from soflow_core import plugins
from soflow_core.networks import NETWORKS, DiTConfig
from soflow_core.objectives import OBJECTIVES, SoFlow
from soflow_core.plugins import PluginError, load, load_recorded, plugins_of
from soflow_core.registration import parts_in
from soflow_core.weights import WeightsError, build_network, load_weights, save_weights
from tests.support.plugin_files import restored_registries, write_plugins


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    with restored_registries():
        yield


def test_a_file_registers_what_it_holds_and_is_known_by_its_digest(tmp_path: Path) -> None:
    method, _ = write_plugins(tmp_path)
    assert "weighted_flow" not in OBJECTIVES
    plugin = load(str(method))
    assert (plugin.module, plugin.path) == ("weighted_flow", str(method))
    assert plugin.digest == hashlib.sha256(method.read_bytes()).hexdigest()
    objective = OBJECTIVES["weighted_flow"](factor=3.0)  # type: ignore[call-arg]
    assert plugins_of(objective, OBJECTIVES["soflow"]()) == [plugin]
    assert load(str(method)) == plugin, "a second time is the first"


def test_a_package_has_a_digest_of_all_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "packed_plugin"
    package.mkdir()
    write_plugins(package)
    (package / "__init__.py").write_text("from packed_plugin import weighted_flow\n")
    monkeypatch.syspath_prepend(tmp_path)
    plugin = load("packed_plugin")
    assert "weighted_flow" in OBJECTIVES
    assert plugin.owns(OBJECTIVES["weighted_flow"])
    (package / "convolution_net.py").write_text("# another\n")
    assert plugins.source_digest(package) != plugin.digest


def test_the_variable_is_read_when_a_name_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, network = write_plugins(tmp_path)
    monkeypatch.setattr(plugins, "_asked", False)
    monkeypatch.setenv("SOFLOW_PLUGINS", f"{method}:{network}")
    assert "soflow" in OBJECTIVES
    assert plugins.loaded() == []
    assert "weighted_flow" in OBJECTIVES
    assert "convolution" in NETWORKS
    assert [plugin.module for plugin in plugins.loaded()] == ["weighted_flow", "convolution_net"]


def test_every_registry_looks_for_plugins_whatever_was_imported_before(tmp_path: Path) -> None:
    """In a process that imports a registry and nothing else."""
    method, _ = write_plugins(tmp_path)
    script = "from soflow_core.objectives.base import OBJECTIVES; print('weighted_flow' in OBJECTIVES)"
    environment = {**os.environ, "SOFLOW_PLUGINS": str(method)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_entry_points_are_read_when_a_name_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plugins(tmp_path)
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[soflow.plugins]\nmine = weighted_flow\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "_asked", False)
    assert "weighted_flow" in OBJECTIVES


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "raise RuntimeError('no GPU')",
            r"broken_plugin.py cannot be imported: RuntimeError: no GPU \(.*broken_plugin.py:1\)",
        ),
        ("from soflow_core.registration import register\nregister('x')(int)", "int is of no kind of part"),
    ],
)
def test_what_a_plugin_raises_is_said_with_its_place(source: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "broken_plugin.py").write_text(source)
    for _ in range(2):
        with pytest.raises(PluginError, match=message):
            load(str(tmp_path / "broken_plugin.py"))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("absent_plugin", "there is no module absent_plugin"),
        ("here/absent.py", "plugin here/absent.py is no Python file"),
        ("{tmp}/my-plugin.py", "'my-plugin' is no name of a module"),
        ("{tmp}/json.py", "a module json is imported already"),
    ],
)
def test_what_is_no_plugin_is_refused_in_one_sentence(reference: str, message: str, tmp_path: Path) -> None:
    for name in ("my-plugin.py", "json.py"):
        (tmp_path / name).write_text("")
    with pytest.raises(PluginError, match=message):
        load(reference.format(tmp=tmp_path))


def test_a_recorded_plugin_is_found_by_path_or_name_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    method, _ = write_plugins(tmp_path)
    gone = {"module": "weighted_flow", "path": "/on/another/machine/weighted_flow.py", "digest": "ab" * 32}
    with pytest.raises(
        PluginError,
        match=r"it needs the plugin weighted_flow \(sha256 abababababab\), which is not here: install",
    ):
        load_recorded(gone)
    monkeypatch.syspath_prepend(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert load_recorded(gone).path == str(method)
    assert "is not the one that was recorded (sha256 abababababab)" in caplog.text


def test_weights_name_the_plugins_that_they_need(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    method, network = write_plugins(tmp_path)
    path = tmp_path / "ema.safetensors"
    with restored_registries():
        load(str(method)), load(str(network))
        config = NETWORKS["convolution"](1, 4, 4)
        save_weights(path, config.build().state_dict(), config, OBJECTIVES["weighted_flow"](), {})
        assert build_network(load_weights(path)).config == config
    with pytest.raises(WeightsError) as caught:
        load_weights(path)
    digests = [hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in (method, network)]
    assert "its kind is 'convolution'; known are dit, unet; it needs the plugin " in str(caught.value)
    assert all(digest in str(caught.value) for digest in digests)
    assert "SOFLOW_PLUGINS" in str(caught.value)
    method.write_text(method.read_text() + "\n# changed\n")
    load(str(method)), load(str(network))
    with caplog.at_level(logging.WARNING):
        assert load_weights(path).objective == OBJECTIVES["weighted_flow"]()
    assert f"(sha256 {digests[0]}): numbers may differ" in caplog.text


def test_weights_name_the_plugin_of_a_path_and_are_refused_without_it(tmp_path: Path) -> None:
    file = tmp_path / "bent_path.py"
    file.write_text(PATH, encoding="utf-8")
    weights, config = tmp_path / "weights.safetensors", DiTConfig.example(channels=1, height=4, width=4)
    with restored_registries():
        plugin = load(str(file))
        objective = SoFlow(path="bent:1.5")
        assert plugins_of(*parts_in(objective)) == [plugin]
        save_weights(weights, config.build().state_dict(), config, objective, {})
        assert load_weights(weights).objective == objective
    with pytest.raises(
        WeightsError, match=r"SoFlow\.path is 'bent:1\.5'; it is one of .*; it needs the plugin bent_path"
    ):
        load_weights(weights)


PATH = '''"""A path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from soflow_core.paths import Path, PathPoint
from soflow_core.registration import register


@register("bent")
@dataclass(frozen=True)
class BentPath(Path):
    """alpha = (1 - t)^power, beta = t."""

    power: float = 1.5

    def __call__(self, t):
        return PathPoint((1 - t) ** self.power, t, -self.power * (1 - t) ** (self.power - 1), torch.ones_like(t))
'''
