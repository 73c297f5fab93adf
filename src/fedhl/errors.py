"""The one exception that means "the user can fix this", and what is quoted of the exceptions of others."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in a config, a path or the data; its message says what to do about it.

    The command line prints the message alone, without a traceback, and exits with code 2.
    """


def first_line(error: Exception) -> str:
    """What a library's error says, in one line of at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
