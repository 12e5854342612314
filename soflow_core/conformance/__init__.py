"""Conformance suite: tests that a method, a network, a sampler or a time grid keeps the contract of its base class. Needs pytest.

pytest -p soflow_core.conformance.command_line --pyargs soflow_core.conformance

tests every registered part; with `--objective my.module:Mine --network nets.py:UNetConfig` those classes alone.
An objective is tested with its default settings, on a small DiT; a network with those of its `example`. Options can be repeated.
"""
