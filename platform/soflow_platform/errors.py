"""The two ways a command ends badly: the user's mistake (exit code 2) and a job that failed (exit code 1)."""

from soflow_core.failures import InputError


class UserError(InputError):
    """A mistake the user can mend. The text is one sentence: what is wrong, where, and what to do."""


class JobError(Exception):
    """A job that started and did not finish. The text says what is lost, what is kept and how to go on."""


class Stopped(Exception):
    """The work was asked to stop and did, with everything saved: exit code 143."""
