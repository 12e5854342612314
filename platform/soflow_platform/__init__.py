"""Ray and MLflow: clusters, training, sweeps, tracking, registry, jobs, and the `soflowctl` command line."""

from pathlib import Path


def version() -> str:
    """The installed distribution's version."""
    from importlib.metadata import version as installed

    return installed("soflow")


def registered_model_path() -> Path:
    """The file that MLflow keeps with each registered generator."""
    return Path(__file__).with_name("registered_model.py")


def sweeps_folder() -> Path:
    """The sweep files that come with the package: in the wheel beside this file, in a clone at its top."""
    packaged = Path(__file__).with_name("sweeps")
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "sweeps"
