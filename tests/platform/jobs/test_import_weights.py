"""An official checkpoint becomes a version that generates, whatever its network was wrapped in."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from soflow_core.failures import InputError
from soflow_core.networks import DiT, DiTConfig
from soflow_core.published import Conventions, read_published
from soflow_platform.cli.export import scoring_command
from soflow_platform.errors import UserError
from soflow_platform.generation.generator import Generator
from soflow_platform.jobs.import_weights import ImportRequest, import_weights
from soflow_platform.registry.versions import find_version
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking
from tests.support.scored_sweep import local_services
from tests.support.small_networks import latent_set

CONFIG = DiTConfig(
    channels=4, height=8, width=8, patch=2, hidden=384, depth=12, heads=6, classes=4, null_label=True
)
PIXELS = DiTConfig(channels=1, height=8, width=8, patch=4, hidden=16, depth=1, heads=2, classes=10)


def official(path: Path, config: DiTConfig, prefix: str = "module.") -> tuple[Path, DiT]:
    """A checkpoint as the official code writes it, and the network of its EMA."""
    torch.manual_seed(0)
    network = DiT(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    ema = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    model = {name: torch.zeros_like(tensor) for name, tensor in ema.items()}
    torch.save({"model": model, "ema_model": ema, "step": 3}, path)
    return path, network.eval()


@pytest.fixture(scope="module")
def latents_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a network of size S/2: a quarter of a gigabyte."""
    return official(tmp_path_factory.mktemp("checkpoint") / "official.pt", CONFIG)[0]


@pytest.fixture
def imported(storage: ProjectFolder, tracking: Tracking) -> Any:
    def take(path: Path, **settings: Any) -> str:
        request = ImportRequest(path, **{"name": "official", **settings})
        return import_weights(request, storage, tracking.store.uri)

    return take


def test_latents_of_an_official_checkpoint_become_images(
    imported: Any, storage: ProjectFolder, tracking: Tracking, tmp_path: Path
) -> None:
    autoencoder, _, _ = latent_set(tmp_path / "latents")
    path, network = official(tmp_path / "official.pt", CONFIG)
    number = imported(path, network="S/2", classes=4, autoencoder=str(autoencoder))
    version = find_version(tracking.store, f"official/{number}")
    assert (version.tags["soflow.method"], version.tags["soflow.network"]) == ("soflow", "DiT-384x12/2")
    assert "official.pt" in version.description
    target = local_services(storage).resolver.find(f"models:/official/{number}")
    assert target.weights is not None
    generator = Generator.open(target.weights)
    assert generator.network.config == CONFIG
    for name, tensor in network.state_dict().items():
        assert torch.equal(generator.network.state_dict()[name].cpu(), tensor)
    (images,) = generator.images([0, 1], [1, 2], 0, 1)
    assert images.shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    "prefix", ["", "module._orig_mod.", "_orig_mod.module.network.", "network._orig_mod.module."]
)
def test_prefixes_are_taken_off_in_any_order(tmp_path: Path, prefix: str) -> None:
    path, network = official(tmp_path / "official.pt", PIXELS, prefix)
    weights = read_published(path, conventions=Conventions(2, False))
    assert weights.tensors.keys() == network.state_dict().keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": 4}, "makes latents of 4 x 8 x 8: name their autoencoder with --autoencoder"),
        ({}, r"5 rows; say whether .* \(--classes says it\)"),
        ({"classes": 7}, "its label table has 5 rows, 7 classes have 7 or 8"),
        (
            {"classes": 4, "network": "XL/2"},
            "--network XL/2 has width 1152, depth 28, patch 2; the checkpoint has width 384",
        ),
        ({"classes": 4, "network": "S/4"}, "patch 4; the checkpoint has width 384, depth 12, patch 2"),
        ({"classes": 4, "network": "Q/4"}, "--network 'Q/4' is not known; sizes are S, B, M, L, XL"),
        ({"classes": 4, "name": "a/b"}, "--name 'a/b': a registered model's name has letters"),
        ({"classes": 4, "method": "gan"}, "--method 'gan' is not known; there are alphaflow"),
    ],
)
def test_what_does_not_fit_is_refused(
    imported: Any, tracking: Tracking, latents_checkpoint: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        imported(latents_checkpoint, **settings)
    assert tracking.client.search_registered_models() == []


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04" + bytes(100)])
def test_a_file_that_is_no_checkpoint_is_refused(imported: Any, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "official.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"official\.pt cannot be imported"):
        imported(tmp_path / "official.pt", classes=4)
    with pytest.raises(InputError, match=r"absent\.pt cannot be imported"):
        imported(tmp_path / "absent.pt", classes=4)


def test_heads_of_a_network_of_no_named_size_are_asked_for(
    imported: Any, tracking: Tracking, tmp_path: Path
) -> None:
    path, _ = official(tmp_path / "official.pt", PIXELS)
    with pytest.raises(UserError, match=r"say how many heads it has \(--heads says it\)"):
        imported(path, classes=10)
    number = imported(path, classes=10, heads=2)
    assert find_version(tracking.store, f"official/{number}").tags["soflow.network"] == "DiT-16x1/4"


@pytest.mark.parametrize(
    ("settings", "rest"),
    [
        ({"data": "imagenet-latents"}, ""),
        ({}, " --reference IMAGES"),
        ({"autoencoder": "stabilityai/sd-vae-ft-mse"}, " --reference IMAGES"),
        ({"autoencoder": "FOLDER"}, " --reference IMAGES --autoencoder FOLDER"),
    ],
)
def test_the_command_that_scores_an_import_names_what_it_needs(
    tmp_path: Path, settings: dict[str, Any], rest: str
) -> None:
    named = {key: value.replace("FOLDER", str(tmp_path)) for key, value in settings.items()}
    request = ImportRequest(tmp_path / "official.pt", "official", **named)
    expected = f"soflowctl evaluate models:/official/2{rest}".replace("FOLDER", str(tmp_path))
    assert scoring_command(request, "2") == expected


def test_a_sit_checkpoint_becomes_a_version_that_flows(
    imported: Any, storage: ProjectFolder, tracking: Tracking, tmp_path: Path
) -> None:
    """Its noise is at time 0, it predicts variances as well, and its arguments lie beside its weights."""
    _, network = official(tmp_path / "official.pt", PIXELS)
    tensors = {name: t for name, t in network.state_dict().items() if not name.startswith("s_embedder")}
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        tensors[name] = torch.cat([tensors[name], tensors[name]])
    path = tmp_path / "sit.pt"
    torch.save({"model": tensors, "ema": tensors, "args": Namespace(num_classes=10)}, path)
    with pytest.raises(
        UserError, match=r"whether the noise is at 0, as in SiT, or at 1 \(--noise-at says it\)"
    ):
        imported(path, classes=10, heads=2)
    with pytest.raises(
        UserError, match=r"one embedding of the time, and soflow needs two: .* --method flow_matching"
    ):
        imported(path, classes=10, heads=2, noise_at=0, method="soflow")
    number = imported(path, classes=10, heads=2, noise_at=0)
    version = find_version(tracking.store, f"official/{number}")
    assert version.tags["soflow.method"] == "flow_matching"
    target = local_services(storage).resolver.find(f"models:/official/{number}")
    assert target.weights is not None
    (images,) = Generator.open(target.weights).images([0, 1], [1, 2], 0, 4)
    assert images.shape == (2, 1, 8, 8)


def test_latents_with_another_scaling_are_refused(imported: Any, tmp_path: Path) -> None:
    autoencoder, _, _ = latent_set(tmp_path / "latents")
    _, network = official(tmp_path / "official.pt", CONFIG)
    names = {"t_embedder": "noise_labels_embedder", "s_embedder": "noise_labels_next_embedder"}
    state = {}
    for name, tensor in network.state_dict().items():
        head, dot, rest = name.partition(".")
        state[f"model.{names.get(head, head)}{dot}{rest}"] = tensor

    def checkpoint(deviation: float) -> Path:
        beside = {
            "autoencoder_mean": torch.zeros(1, 4, 1, 1),
            "autoencoder_var": torch.full((1, 4, 1, 1), deviation**2),
        }
        torch.save({"ema": {**state, **beside}}, tmp_path / "alpha.pt")
        return tmp_path / "alpha.pt"

    settings = {"classes": 4, "autoencoder": str(autoencoder)}
    with pytest.raises(UserError, match=r"latents with a scaling of 0\.25, the scaling of .* is 0\.5"):
        imported(checkpoint(4.0), **settings)
    assert imported(checkpoint(2.0), **settings) == "1"
