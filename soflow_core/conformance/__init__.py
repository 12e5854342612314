"""Conformance suite: tests that a method or a network keeps the contract of its base class. Needs pytest.

pytest -p soflow_core.conformance.command_line --pyargs soflow_core.conformance                                    every registered part
pytest -p soflow_core.conformance.command_line --pyargs soflow_core.conformance --objective my.module:Mine         a class of yours
pytest -p soflow_core.conformance.command_line --pyargs soflow_core.conformance --objective mine.py:Mine --network nets.py:UNetConfig

An objective is tested with its default settings, on a small DiT; a network with those of its `example`. Options can be repeated.
"""
