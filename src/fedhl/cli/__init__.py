"""The command line. Thin: every command parses its arguments and calls the library."""

from __future__ import annotations

from fedhl.cli.commands import main

__all__ = ["main"]
