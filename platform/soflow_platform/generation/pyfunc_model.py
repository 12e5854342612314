"""A registered generator as MLflow loads it (models from code): labels in, PNG images out.

model = mlflow.pyfunc.load_model("models:/digits@candidate")
model.predict(pandas.DataFrame({"label": [3, 1, 4]}), params={"seed": 0, "steps": 1})

Latents are decoded by the autoencoder of the training data; where that is in a folder, it is named when the model is loaded:

mlflow.pyfunc.load_model("models:/latents@candidate", model_config={"autoencoder": "/models/sd-vae-ft-mse"})
"""

from __future__ import annotations

from typing import Any

import mlflow
import mlflow.models
import pandas as pd

from soflow_pipelines.images.codec import AutoencoderError
from soflow_platform.generation.generator import Generator


class OneStepGenerator(mlflow.pyfunc.PythonModel):
    """EMA weights as safetensors; weights are read as tensors, never unpickled."""

    def load_context(self, context: Any) -> None:
        """Read the weights that were registered, and the autoencoder. Raises AutoencoderError where latents cannot be decoded."""
        autoencoder = (context.model_config or {}).get("autoencoder")
        try:
            self.generator = Generator.open(context.artifacts["weights"], autoencoder=autoencoder)
        except AutoencoderError as error:
            raise AutoencoderError(
                f"{error} In Python: load_model(..., model_config={{'autoencoder': FOLDER}}); for `mlflow models serve`: "
                'MLFLOW_PYFUNC_INFERENCE_CONFIG=\'{"autoencoder": "FOLDER"}\'.'
            ) from error

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One image for each row; row i takes the i-th noise of `seed`, whatever the other rows are."""
        del context
        params = params or {}
        labels = model_input["label"].astype(int).tolist()
        images = self.generator.png(
            labels, seed=int(params.get("seed", 0)), steps=int(params.get("steps", 1))
        )
        return pd.DataFrame({"png": images})


mlflow.models.set_model(OneStepGenerator())
