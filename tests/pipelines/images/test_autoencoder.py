"""Loading an autoencoder: which files are refused, and what the error tells the user to do."""

from pathlib import Path

import pytest

from soflow_pipelines.images.autoencoder import AutoencoderError, load_autoencoder


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
