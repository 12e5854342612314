"""Share of one-step samples that a classifier outside the training recognises as the digit asked for.

python benchmarks/recognition.py --storage soflow-runs --num 1000

The classifier is a support vector machine on raw pixels, fitted to scikit-learn's real digits; the sweep's
classifier is a small convolutional network. Beside its score on samples stands its score on real digits it
was not fitted to, by five-fold cross-validation.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC

from soflow_platform.storage.project import find_project


def samples(storage: str | None, model: str, num: int, steps: int, seed: int) -> np.ndarray:
    """Registered model -> (num, 64) pixels in 0 to 255, sample i of class i modulo 10."""
    import mlflow
    import pandas as pd

    uri = find_project(storage).tracking_uri
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    labels = pd.DataFrame({"label": np.arange(num) % 10})
    pngs = mlflow.pyfunc.load_model(model).predict(labels, params={"seed": seed, "steps": steps})["png"]
    return np.stack([np.asarray(Image.open(io.BytesIO(png))).reshape(-1) for png in pngs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storage", type=Path)
    parser.add_argument("--model", default="models:/digits@candidate")
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=123)
    arguments = parser.parse_args()
    real = load_digits()
    pixels = real.data * (255 / 16)
    classifier = SVC(gamma="scale", C=10.0)
    print(f"real digits, five-fold: {cross_val_score(classifier, pixels, real.target, cv=5).mean():.4f}")
    classifier.fit(pixels, real.target)
    storage = str(arguments.storage) if arguments.storage else None
    for steps in (1, 2):
        made = samples(storage, arguments.model, arguments.num, steps, arguments.seed)
        right = classifier.predict(made) == np.arange(arguments.num) % 10
        by_class = " ".join(f"{digit}:{right[digit::10].mean():.2f}" for digit in range(10))
        print(f"{steps} NFE: {right.mean():.4f} of {arguments.num} recognised ({by_class})")


if __name__ == "__main__":
    main()
