"""`soflowctl import`: registers a checkpoint of published code as a version."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from soflow_core.networks import SIZES, Architecture, DiTConfig
from soflow_core.objectives import OBJECTIVES
from soflow_core.published import Conventions, Kept, read_published
from soflow_core.weights import Weights, build_network, save_weights
from soflow_pipelines.images.autoencoder import load_autoencoder
from soflow_pipelines.shards.info import DatasetInfo, format_shape
from soflow_pipelines.shards.tables import read_info
from soflow_pipelines.storage.files import sha256
from soflow_platform.config.gate import model_name
from soflow_platform.config.locations import absolute_autoencoder
from soflow_platform.errors import UserError
from soflow_platform.registry.versions import NewVersion, describe_weights, register_weights
from soflow_platform.storage.checkpoints import EMA
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking

PIXELS = (1, 3)
"""Channels of a network of pixels; others make latents."""
ONE_TIME = ("flow_matching",)
"""Methods whose networks need no second time and take any time from 0 to 1."""
SAME = 1e-3
"""Relative difference up to which two normalizations of latents are one, written with fewer digits."""
DIGEST_TAG = "soflow.imported_digest"


@dataclass(frozen=True)
class ImportRequest:
    """Request of `soflowctl import`."""

    checkpoint: Path
    name: str
    """Registered model."""
    network: str | None = None
    """Named size such as `XL/2`, which the shapes must be of. None: the shapes alone."""
    method: str | None = None
    """Method that it was trained with. None: that of the code whose names the tensors have."""
    which: Kept = "ema"
    classes: int | None = None
    """Number of classes; a label table with one row more has a null label."""
    data: str | None = None
    """Shard set that it was trained on."""
    autoencoder: str | None = None
    """Autoencoder of its latents. None: that of `data`."""
    heads: int | None = None
    """Attention heads, which shapes do not show. None: those of the named size with its width and depth."""
    second_time: Literal["difference", "time"] = "difference"
    """What the second time embedding is given: t - s or s."""
    noise_at: Literal[0, 1] | None = None
    """The time of pure noise of a network with one time."""


def import_weights(request: ImportRequest, project: ProjectFolder, tracking_uri: str) -> str:
    """Register the weights of a checkpoint. Returns the version.

    Raises InputError where the file holds no such network, or what is said of it does not fit.
    """
    try:
        model_name(request.name)
    except ValueError as error:
        raise UserError(f"--name {request.name!r}: {error}.") from None
    if request.method is not None and request.method not in OBJECTIVES:
        raise UserError(f"--method {request.method!r} is not known; there are {', '.join(OBJECTIVES)}.")
    described = read_info(request.data) if request.data is not None else None
    weights = _read(request, described)
    info = _data(request, weights, described)
    assert weights.objective is not None
    objective = OBJECTIVES[request.method]() if request.method is not None else weights.objective
    tracking = Tracking.open(tracking_uri, request.name, project)
    origin = {
        "imported_from": request.checkpoint.name,
        "imported_digest": sha256(request.checkpoint),
        "imported_weights": request.which,
    }
    tags = {DIGEST_TAG: origin["imported_digest"]}
    if request.data is not None and info is not None:
        tags |= {"data.source": str(request.data), "data.digest": info.digest}
    with tempfile.TemporaryDirectory(prefix="soflow-import-") as folder:
        path = Path(folder) / EMA
        facts: dict[str, Any] = {} if info is None else asdict(info)
        save_weights(path, weights.tensors, weights.network_config, objective, facts)
        description = describe_weights(path, origin, {"metrics": {}, "settings": {}})
        return register_weights(tracking, NewVersion(request.name, path, description, tags))


def _read(request: ImportRequest, described: DatasetInfo | None) -> Weights:
    """The weights, with a network that was built of them once."""
    classes = request.classes or (None if described is None else described.classes)
    heads = request.heads
    if request.network is not None:
        size = request.network.partition("/")[0]
        if size not in SIZES:
            raise UserError(
                f"--network {request.network!r} is not known; sizes are {', '.join(SIZES)}, as in XL/2."
            )
        heads = heads or SIZES[size][2]
    try:
        null_label = None if classes is None else False
        conventions = Conventions(heads, null_label, request.second_time, request.noise_at)
        weights = read_published(request.checkpoint, request.which, conventions)
        config = weights.network_config
        if isinstance(config, DiTConfig) and config.classes is not None and classes is not None:
            weights = replace(weights, network_config=_with_classes(config, config.classes, classes))
        build_network(weights)
    except (OSError, ValueError, RuntimeError, EOFError, KeyError) as error:
        hints = {
            "null label": " (--classes says it)",
            "how many heads": " (--heads says it)",
            "noise is at": " (--noise-at says it)",
        }
        hint = next((hint for words, hint in hints.items() if words in str(error)), "")
        raise UserError(f"{request.checkpoint} cannot be imported: {str(error).rstrip('.')}{hint}.") from None
    config = weights.network_config
    if request.network is not None:
        _require_size(request.network, config)
    if (
        isinstance(config, DiTConfig)
        and config.second_time == "none"
        and request.method not in (None, *ONE_TIME)
    ):
        raise UserError(
            f"{request.checkpoint} has one embedding of the time, and {request.method} needs two: its method is --method "
            f"{' or '.join(ONE_TIME)}."
        )
    return weights


def _with_classes(config: DiTConfig, rows: int, classes: int) -> DiTConfig:
    """The configuration for this many classes. Raises ValueError where the label table has neither as many rows nor one more."""
    if rows not in (classes, classes + 1):
        raise ValueError(
            f"its label table has {rows} rows, {classes} classes have {classes} or {classes + 1}"
        )
    return replace(config, classes=classes, null_label=rows == classes + 1)


def _require_size(name: str, config: Architecture) -> None:
    if not isinstance(config, DiTConfig):
        raise UserError(f"--network {name} is a size of a DiT; the checkpoint is a {config.title}.")
    size, _, patch = name.partition("/")
    expected = (*SIZES[size], patch or str(config.patch))
    found = (config.hidden, config.depth, config.heads, str(config.patch))
    if found != expected:
        raise UserError(
            f"--network {name} has width {expected[0]}, depth {expected[1]}, patch {expected[3]}; the checkpoint has width {found[0]}, "
            f"depth {found[1]}, patch {found[3]}."
        )


def _data(request: ImportRequest, weights: Weights, described: DatasetInfo | None) -> DatasetInfo | None:
    """The description of the data that the samples are like; None for pixels of unknown data."""
    info = _described(request, weights.network_config, described)
    known = {"scaling": 1.0, "shift": 0.0} if info is None else {"scaling": info.scaling, "shift": info.shift}
    for name, value in weights.data.items():
        if abs(value - known[name]) > SAME * max(abs(value), abs(known[name])):
            raise UserError(
                f"{request.checkpoint} was trained on latents with a {name} of {value:.6g}, the {name} of "
                f"{request.data or request.autoencoder or 'pixels'} is {known[name]:.6g}: samples would be decoded wrongly."
            )
    return info


def _described(
    request: ImportRequest, config: Architecture, described: DatasetInfo | None
) -> DatasetInfo | None:
    shape = (config.channels, config.height, config.width)
    if described is not None:
        described.check_fits(shape, config.classes, where=f"--data {request.data}")
        return described
    if config.channels in PIXELS:
        if request.autoencoder is not None:
            raise UserError("this network makes pixels: leave --autoencoder out.")
        return None
    if request.autoencoder is None:
        raise UserError(
            f"this network makes latents of {format_shape(shape)}: name their autoencoder with --autoencoder, or the shard set it was "
            "trained on with --data."
        )
    name = absolute_autoencoder(request.autoencoder) or request.autoencoder
    facts = load_autoencoder(name).facts
    if facts.channels != config.channels:
        raise UserError(
            f"the autoencoder {request.autoencoder} has latents of {facts.channels} channels, the network makes {config.channels}."
        )
    return DatasetInfo(
        kind="latents",
        shape=shape,
        dtype="float32",
        classes=config.classes,
        resolution=config.height * facts.factor,
        autoencoder=name,
        autoencoder_digest=facts.digest,
        scaling=facts.scaling,
        shift=facts.shift,
    )
