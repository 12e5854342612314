"""Conformance suite: tests that a part of the core keeps the contract of its base class. Needs pytest.

pytest -p soflow_core.conformance.command_line --pyargs soflow_core.conformance

tests every registered part; with `--objective my.module:Mine --network nets.py:UNetConfig` those classes alone.
An objective is tested with its default settings, on a small DiT; a network with those of its `example`. Options can be repeated.

part_kinds     the kinds, by their options
command_line   the options, and the parts that the tests are run for
"""
