"""Errors that end a command: input that cannot be used (exit code 2), a job that failed (1), a requested stop (143)."""

from soflow_core.failures import InputError


class UserError(InputError):
    """A mistake that the user can correct. The text is one sentence: what is wrong, where, and what to do."""


class JobError(Exception):
    """A job that started and did not finish. The text says what is lost, what is kept and how to resume."""


class Stopped(Exception):
    """The work was asked to stop and did, with everything saved: exit code 143."""
