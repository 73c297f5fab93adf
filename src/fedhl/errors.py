"""The one exception that means "the user can fix this", and what is quoted of the exceptions of others."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in a config, a path or the data; its message says what to do about it.

    The command line prints the message alone, without a traceback, and exits with code 2.
    """


def in_one_line(error: Exception) -> str:
    """What a library's error says, in one line of at most 300 characters."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return " ".join(str(error).split())[:300] or type(error).__name__
