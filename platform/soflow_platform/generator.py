"""Import path of `Generator` in the Python file of models that were registered by version 0.1.0; new code imports it from
`soflow_platform.generation.generator`."""

from soflow_platform.generation.generator import Generator

__all__ = ["Generator"]
