"""`soflowctl help`: sections of a sweep file and registered parts, with their settings, from their classes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from soflow_platform.errors import UserError

if TYPE_CHECKING:
    from soflow_core.registration import Registry


def help_command(
    topic: Annotated[
        str | None,
        typer.Argument(
            metavar="TOPIC",
            help="A section of a sweep file (training), a kind of part (samplers), or a part's name (soflow). Default: all of them.",
        ),
    ] = None,
) -> None:
    """Show the settings of a section of a sweep file, or of a method, network, sampler, metric or other part.

    Parts of plugins are shown where SOFLOW_PLUGINS or an installed package names them.
    """
    from soflow_core.plugins import load_named

    load_named()
    kinds = {_plural(registry): registry for registry in _registries()}
    sections = _sections()
    if topic is None:
        _overview(sections, kinds)
        return
    wanted = topic.strip().lower()
    found = False
    if wanted in sections:
        _settings(f"{wanted}:", sections[wanted])
        found = True
    for name, registry in kinds.items():
        if wanted in (name, name.removesuffix("s"), registry.field, registry.kind):
            _parts(name, registry)
            found = True
        elif wanted in registry:
            _part(wanted, registry)
            found = True
    if not found:
        known = [*sections, *kinds, *(name for registry in kinds.values() for name in registry)]
        near = difflib.get_close_matches(wanted, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ": `soflowctl help` lists what there is."
        raise UserError(f"there is no section or part {topic!r}{hint}")


def _registries() -> list[Registry[Any]]:
    """Every registry of the platform, with its parts."""
    from soflow_core.networks import NETWORKS
    from soflow_core.objectives import OBJECTIVES
    from soflow_core.objectives.alpha_schedule import ALPHAS
    from soflow_core.parameterization import PARAMETERIZATIONS
    from soflow_core.paths import PATHS
    from soflow_core.samplers.base import SAMPLERS
    from soflow_core.samplers.grids import GRIDS
    from soflow_core.schedule_shapes import DECAYS, SHAPES
    from soflow_core.times import TIMES
    from soflow_pipelines.features.registry import FEATURES
    from soflow_pipelines.images.autoencoder import AUTOENCODERS
    from soflow_pipelines.metrics import METRICS
    from soflow_pipelines.sources.opening import SOURCES

    core: list[Registry[Any]] = [
        OBJECTIVES,
        NETWORKS,
        SAMPLERS,
        GRIDS,
        PATHS,
        PARAMETERIZATIONS,
        TIMES,
        SHAPES,
        ALPHAS,
        DECAYS,
    ]
    return [*core, METRICS, FEATURES, SOURCES, AUTOENCODERS]


def _plural(registry: Registry[Any]) -> str:
    """`training method` -> `methods`, `time grid` -> `time-grids`."""
    kind = registry.kind.removeprefix("training ").replace(" ", "-")
    return f"{kind}s"


def _sections() -> dict[str, type]:
    """Sections of a sweep file that are no registered part."""
    from soflow_core.optimizer import OptimizerConfig
    from soflow_platform.config.comparison import SamplingConfig
    from soflow_platform.config.experiment import Experiment

    models = {name: field.annotation for name, field in Experiment.model_fields.items()}
    sections = {name: kind for name, kind in models.items() if hasattr(kind, "model_fields")}
    return {**sections, "optimizer": OptimizerConfig, "comparison": SamplingConfig}  # type: ignore[dict-item]


def _overview(sections: Iterable[str], kinds: dict[str, Registry[Any]]) -> None:
    typer.echo(f"sections  {', '.join(sections)}")
    width = max(map(len, kinds))
    for name, registry in kinds.items():
        typer.echo(f"{name:<{width}}  {', '.join(registry)}")


def _parts(name: str, registry: Registry[Any]) -> None:
    from soflow_core.part_docs import summary

    typer.echo(f"{name}:")
    width = max(map(len, registry), default=0)
    for part, kind in registry.items():
        typer.echo(f"  {part:<{width}}  {summary(kind)}")


def _part(name: str, registry: Registry[Any]) -> None:
    from soflow_core.part_docs import summary
    from soflow_core.registration import where

    part = registry[name]
    typer.echo(f"{registry.kind} {name}: {summary(part)}")
    typer.echo(f"  {where(part)}")
    _settings("", part, without=registry.field)


def _settings(title: str, part: type, without: str = "") -> None:
    from soflow_core.part_docs import ABSENT, settings_of

    if title:
        typer.echo(title)
    for each in settings_of(part):
        if each.name != without:
            default = "required" if each.default is ABSENT else f"= {_shown(each.default)}"
            known = f"one of {', '.join(each.known)}" if each.known else ""
            typer.echo("  ".join(filter(None, (f"  {each.name} {default}", each.text, known))))


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) and value else str(value)
