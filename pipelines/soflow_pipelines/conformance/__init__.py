"""Conformance suite: tests that a metric, a data source, a feature network or an autoencoder keeps the contract of its base class.

Needs pytest.

pytest -p soflow_pipelines.conformance.part_options --pyargs soflow_pipelines.conformance

tests every registered part; with `--metric my.module:Mine --source npy_pairs.py:NpyPairs` those classes alone. Options can be repeated,
and those of `soflow_core.conformance` may stand beside them, with both packages behind `--pyargs`.

part_options   the options, and the parts that the tests are run for
"""
