"""Loading an autoencoder: which files are refused, and what the error tells the user to do."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from soflow_core.registration import register
from soflow_pipelines.images.autoencoder import load_autoencoder
from soflow_pipelines.images.codec import AutoencoderError, AutoencoderFacts, AutoencoderKind, named_kind
from tests.support.plugin_files import restored_registries


@dataclass
class Opened:
    """An autoencoder that knows its facts alone."""

    facts: AutoencoderFacts


@dataclass(frozen=True)
class Blocks(AutoencoderKind):
    """A kind that opens anything."""

    def open(self, place: str, device: torch.device, download: bool) -> Any:
        del device, download
        return Opened(AutoencoderFacts(place, "0" * 16, 3, 2, 1.0, 0.0))


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "/nowhere/at/all"])
def test_an_autoencoder_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(AutoencoderError, match="neither a folder here nor a hub id"):
        load_autoencoder(name)


def test_an_autoencoder_that_the_hub_does_not_give_names_both_ways_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AutoencoderError, match=r"HF_HOME.*pass the path of a folder"):
        load_autoencoder("no-such-owner/no-such-model")


def test_a_folder_without_a_config_is_no_autoencoder(tmp_path: Path) -> None:
    with pytest.raises(AutoencoderError, match=r"no config\.json"):
        load_autoencoder(str(tmp_path))


def test_a_kind_that_is_not_registered_names_those_that_are() -> None:
    with pytest.raises(
        AutoencoderError,
        match=r"blocks:2 is of a kind that is not registered; known are kl: .* SOFLOW_PLUGINS",
    ):
        load_autoencoder("blocks:2")


def test_a_kind_is_kept_with_the_place_that_it_opens() -> None:
    with restored_registries():
        register("blocks")(Blocks)
        assert load_autoencoder("blocks:2").facts.id == "blocks:2"
    assert named_kind("owner/name") == ("kl", "owner/name")
    assert named_kind("kl:owner/name") == ("kl", "owner/name")
    assert named_kind("s3://blocks") == ("kl", "s3://blocks")
