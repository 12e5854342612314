"""The one error of every storage."""


class StorageError(Exception):
    """A place that cannot be read or written. The text names it and says what is wrong."""
