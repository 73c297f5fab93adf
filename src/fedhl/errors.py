"""The one exception that means "the user can fix this"."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in a config, a path or the data; its message says what to do about it.

    The command line prints the message alone, without a traceback, and exits with code 2.
    """
