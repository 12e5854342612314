"""A latent model that MLflow loads returns decoded images, with the autoencoder named when it is loaded."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from soflow_core.networks import DiT, DiTConfig
from soflow_core.objectives import SoFlow
from soflow_core.weights import save_weights
from soflow_pipelines.images.codec import AutoencoderError
from soflow_pipelines.shards.tables import read_info
from soflow_platform.generation.generator import Generator
from soflow_platform.registry.versions import PYFUNC_FILE
from tests.support.small_networks import latent_set


def test_a_latent_model_predicts_decoded_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    autoencoder, data, _ = latent_set(tmp_path)
    info = read_info(data)
    config = DiTConfig(*info.shape, 2, 16, 1, 2, classes=info.classes, null_label=True)
    weights = tmp_path / "ema.safetensors"
    save_weights(weights, DiT(config).state_dict(), config, SoFlow(), asdict(info))
    mlflow.pyfunc.save_model(
        tmp_path / "model",
        python_model=str(PYFUNC_FILE),
        artifacts={"weights": str(weights)},
        model_config={"autoencoder": None},
        pip_requirements=[],
    )
    model = mlflow.pyfunc.load_model(tmp_path / "model", model_config={"autoencoder": str(autoencoder)})
    predicted = model.predict(pd.DataFrame({"label": [1, 3]}))["png"]
    (expected,) = Generator.open(weights, autoencoder=str(autoencoder)).images(
        [0, 1], [1, 3], seed=0, steps=1
    )
    for png, image in zip(predicted, expected, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), image.permute(1, 2, 0).numpy())
    with pytest.raises(AutoencoderError, match=r"load_model.*autoencoder.*FOLDER"):
        mlflow.pyfunc.load_model(tmp_path / "model")
