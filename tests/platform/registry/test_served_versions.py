"""`mlflow models serve` of a registered version answers over HTTP with the generator's images, and unpickles nothing."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from soflow_pipelines.shards.tables import read_info
from soflow_platform.generation.generator import Generator
from soflow_platform.registry.versions import NewVersion, describe_weights, register_weights
from soflow_platform.tracking.store import Tracking
from tests.support.commands import environment
from tests.support.generators import save_digits_generator, save_generator
from tests.support.small_networks import latent_set

pytestmark = pytest.mark.slow
SECONDS = 240
LABELS = [3, 1, 2]


def registered(tracking: Tracking, weights: Path) -> str:
    """The weights as a version; its `models:/` URI."""
    description = describe_weights(weights, {}, {"metrics": {}, "settings": {}})
    number = register_weights(tracking, NewVersion("served", weights, description, {}))
    return f"models:/served/{number}"


@contextlib.contextmanager
def served(tracking: Tracking, model: str, log: Path, **variables: str) -> Iterator[str]:
    """The address of a server of the model, in the environment of this process, with pickle forbidden."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [
        *(sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", model),
        *("--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
    ]
    forbidden = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    # The server finds uvicorn on the PATH.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    variables |= {**forbidden, "MLFLOW_TRACKING_URI": tracking.store.uri, "PATH": path}
    with log.open("w") as file:
        server = subprocess.Popen(
            arguments,
            env={**environment(), **variables},
            stdout=file,
            stderr=file,
            start_new_session=True,
            cwd=log.parent,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_it_answers(server, address, log)
        yield address
    finally:
        family = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
        # mlflow starts the server in a process of its own, and passes no signal on.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)
        _, left = psutil.wait_procs(family, timeout=30)
        for each in left:
            each.kill()


def wait_until_it_answers(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end = time.monotonic() + SECONDS
    while True:
        assert server.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < end, log.read_text()[-3000:]
        with (
            contextlib.suppress(urllib.error.URLError, OSError),
            urllib.request.urlopen(f"{address}/ping", timeout=5),
        ):
            return
        time.sleep(0.5)


def ask(address: str, content: dict[str, Any]) -> Any:
    body = json.dumps(content).encode()
    request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return json.loads(answer.read())


def images_of(answer: Any) -> list[np.ndarray[Any, Any]]:
    pngs = [base64.b64decode(row["png"]) for row in answer["predictions"]]
    return [np.asarray(Image.open(io.BytesIO(png))) for png in pngs]


def assert_generators_images(address: str, generator: Generator) -> None:
    """One request as the documentation writes it, and one with seed and steps."""
    rows = {"columns": ["label"], "data": [[label] for label in LABELS]}
    for params in ({}, {"seed": 5, "steps": 2}):
        answer = ask(address, {"dataframe_split": rows, **({"params": params} if params else {})})
        own = generator.png(LABELS, seed=params.get("seed", 0), steps=params.get("steps", 1))
        for served_image, png in zip(images_of(answer), own, strict=True):
            assert np.array_equal(served_image, np.asarray(Image.open(io.BytesIO(png))))


def test_a_digits_version_is_served_over_http(tracking: Tracking, tmp_path: Path) -> None:
    weights = save_digits_generator(tmp_path / "ema.safetensors")
    with served(tracking, registered(tracking, weights), tmp_path / "log") as address:
        assert_generators_images(address, Generator.open(weights))
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(address, {"dataframe_split": {"columns": ["label"], "data": [[10]]}})
        assert refused.value.code == 400
        assert "label 10 is not one of the network's 10 classes" in refused.value.read().decode()


def test_a_latent_version_is_served_with_the_autoencoder_named(tracking: Tracking, tmp_path: Path) -> None:
    autoencoder, data, _ = latent_set(tmp_path)
    weights = save_generator(tmp_path / "ema.safetensors", read_info(data))
    config = json.dumps({"autoencoder": str(autoencoder)})
    model = registered(tracking, weights)
    with served(tracking, model, tmp_path / "log", MLFLOW_PYFUNC_INFERENCE_CONFIG=config) as address:
        assert_generators_images(address, Generator.open(weights, autoencoder=str(autoencoder)))
