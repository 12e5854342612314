"""Ray and MLflow: clusters, training, sweeps, tracking, registry, distributed jobs and the soflowctl command line."""
