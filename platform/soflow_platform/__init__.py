"""Ray and MLflow: clusters, training, sweeps, tracking, registry, jobs, and the `soflowctl` command line."""


def version() -> str:
    """The installed distribution's version."""
    from importlib.metadata import version as installed

    return installed("soflow")
