"""What a registered version is: a description as JSON values, and the card in Markdown that people read."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from soflow_core.networks import NETWORKS
from soflow_core.settings import to_dict
from soflow_core.weights import Weights, needed_plugins
from soflow_platform.generation.sampling import sampling_facts

FORMAT = 1
"""Of the description."""
DESCRIPTION_LIMIT = 5000
"""Characters that MLflow's databases keep of a version's description."""
DECISIONS = "\n\n## Decisions\n\n"
SHOWN_CLASSES = 12
"""Class names that a card lists."""


def describe(
    header: Weights, origin: Mapping[str, Any], parameters: int, evaluation: Mapping[str, Any]
) -> dict[str, Any]:
    """The description of weights as JSON values: all that is needed to load, sample, score and train them again.

    `origin` says where they come from (sweep, trial, step, images, recipe), `evaluation` how they were scored.
    """
    objective = header.objective
    assert objective is not None, "weights are registered with their method"
    network, data = header.network_config, header.data
    plugins = needed_plugins(network, objective)
    return {
        "format": FORMAT,
        "method": objective.method,
        "network": to_dict(network),
        "parameters": parameters,
        "objective": to_dict(objective),
        "sampling": {"steps": _usual_steps(origin), "seed": 0, **sampling_facts(objective)},
        "data": {key: value for key, value in data.items() if key != "left_out"},
        "normalization": _normalization(data),
        "evaluation": dict(evaluation),
        **({"plugins": plugins} if plugins else {}),
        **origin,
    }


def _usual_steps(origin: Mapping[str, Any]) -> int:
    """`sampling.steps` of the sweep that the weights come from; 1 where that says nothing."""
    sampling = (origin.get("recipe") or {}).get("sampling") or {}
    return int(sampling.get("steps", 1))


def _normalization(data: Mapping[str, Any]) -> dict[str, Any]:
    """How stored samples become what the network takes, and back."""
    if data.get("kind") == "latents":
        keys = ("autoencoder", "autoencoder_digest", "scaling", "shift")
        return {"space": "latents", **{key: data.get(key) for key in keys}}
    return {"space": "pixels", "range": [-1, 1]}


def model_card(name: str, description: Mapping[str, Any]) -> str:
    """The card of a version in Markdown; `name` is `MODEL/VERSION`, or MODEL where the version has no number yet."""
    network, data = description["network"], description["data"]
    shape = " x ".join(str(network[side]) for side in ("channels", "height", "width"))
    rows = {
        "method": description["method"],
        "network": f"{_network_row(network)}, {description['parameters'] / 1e6:.1f} M parameters",
        "samples": f"{shape} in {description['normalization']['space']}",
        "data": _data_row(data),
        "classes": _classes_row(network, data),
        "autoencoder": _autoencoder_row(data),
        "trained": _training_row(description),
        "from": _origin_row(description),
        "plugins": plugin_text(description),
        "started from": _start_row(description),
    }
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items() if value)
    parts = [
        f"# {name}",
        f"| | |\n|---|---|\n{table}",
        _scores(description["evaluation"]),
        _loading(name, network["classes"] is not None, description["sampling"]["steps"]),
        _recipe(description),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def short_card(card: str) -> str:
    """A card as a version's description: without the recipe, which is longer than MLflow keeps."""
    return card.split("\n## Recipe", 1)[0].strip()[: DESCRIPTION_LIMIT // 2]


def with_decision(description: str, line: str) -> str:
    """A version's description with one more decision, the newest first; the oldest are dropped where they do not fit."""
    card, _, older = description.partition(DECISIONS)
    lines = [f"- {' '.join(line.split())}", *(entry for entry in older.splitlines() if entry)]
    while len(lines) > 1 and len(card) + len(DECISIONS) + len("\n".join(lines)) > DESCRIPTION_LIMIT:
        lines.pop()
    return (card + DECISIONS + "\n".join(lines))[:DESCRIPTION_LIMIT]


def _network_row(network: Mapping[str, Any]) -> str:
    if NETWORKS.name_in(network) == "dit":
        return f"DiT, width {network['hidden']}, depth {network['depth']}, patch {network['patch']}"
    return NETWORKS.read(network).title


def plugin_text(description: Mapping[str, Any]) -> str:
    """Names and digests of the plugins that a version needs; empty where it needs none."""
    return ", ".join(f"{each['module']} (sha256 {each['digest']})" for each in description.get("plugins", ()))


def _data_row(data: Mapping[str, Any]) -> str:
    if not data:
        return "unknown"
    recipe = data.get("recipe") or {}
    source = recipe.get("source", "a shard set") if isinstance(recipe, Mapping) else "a shard set"
    return f"{source}, {data.get('samples', '?')} samples, digest {str(data.get('digest', '?'))[:23]}"


def _classes_row(network: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    if network["classes"] is None:
        return "none (unconditional)"
    names = [str(name) for name in data.get("class_names") or ()]
    listed = ", ".join(names[:SHOWN_CLASSES]) + (", ..." if len(names) > SHOWN_CLASSES else "")
    return f"{network['classes']}" + (f": {listed}" if names else "")


def _autoencoder_row(data: Mapping[str, Any]) -> str:
    if data.get("kind") != "latents":
        return ""
    return f"{data.get('autoencoder')} ({data.get('autoencoder_digest')}), scaling {data.get('scaling')}, shift {data.get('shift')}"


def _training_row(description: Mapping[str, Any]) -> str:
    if description.get("step") is None:
        return ""
    images = description.get("images")
    length = description.get("ema_length")
    return (
        f"{description['step']:,} steps"
        + (f", {images:,} images" if images is not None else "")
        + (f"; power-function average of relative width {length:g}" if length is not None else "")
    )


def _origin_row(description: Mapping[str, Any]) -> str:
    if description.get("sweep"):
        return f"sweep {description['sweep']}, trial {description['trial']}"
    return str(description.get("imported_from") or "")


def _start_row(description: Mapping[str, Any]) -> str:
    lineage = [entry for entry in description.get("started_from") or [] if isinstance(entry, Mapping)]
    return ", before that ".join(
        f"{entry.get('from')} ({entry.get('method') or 'unknown method'}, {entry.get('weights')} weights, "
        f"digest {str(entry.get('digest'))[:16]})"
        for entry in lineage
    )


def _scores(evaluation: Mapping[str, Any]) -> str:
    metrics = evaluation.get("metrics") or {}
    if not metrics:
        return ""
    rows = "\n".join(f"| {_cell(key)} | {value:.5g} |" for key, value in metrics.items())
    settings = "; ".join(
        f"{key.removeprefix('eval.')} {value}" for key, value in evaluation["settings"].items()
    )
    return f"## Scores\n\n| metric | value |\n|---|---|\n{rows}\n\n{settings}".rstrip()


def _loading(name: str, conditional: bool, steps: int) -> str:
    columns = '{"label": [3, 1, 4]}' if conditional else '{"label": [0, 0, 0]}'
    place = shlex.quote(f"models:/{name}")
    return f"""## Loading

```sh
soflowctl generate --model {place} --num 100 --out images
```

```python
import mlflow, pandas

model = mlflow.pyfunc.load_model("models:/{name}")
images = model.predict(pandas.DataFrame({columns}), params={{"seed": 0, "steps": {steps}}})["png"]
```

The weights are `artifacts/ema.safetensors`, read as tensors; `artifacts/model.json` has all settings."""


def _recipe(description: Mapping[str, Any]) -> str:
    recipe = description.get("recipe")
    if not recipe:
        return ""
    text = yaml.safe_dump(dict(recipe), sort_keys=False, default_flow_style=False).rstrip()
    return f"## Recipe\n\n```yaml\n{text}\n```"


def _cell(value: object) -> str:
    """Text in a cell of a table, from wherever it comes: one line, no cell of its own, no markup."""
    text = " ".join(str(value).split())
    for mark in ("\\", "|", "`", "<", "[", "]", "*"):
        text = text.replace(mark, f"\\{mark}")
    return text
