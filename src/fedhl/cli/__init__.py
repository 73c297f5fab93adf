"""The command line. Thin: every command parses its arguments and calls the library.

Mistakes that need no tensor are told without torch: a command imports what it needs in the order in which it
needs it, and what imports torch comes last.
"""

from __future__ import annotations

from fedhl.cli import reference, results, training
from fedhl.cli.app import app

__all__ = ["main"]

for group in (training, results, reference):  # the order of `fedhl --help`
    app.add_typer(group.commands)


def main() -> None:
    """The entry point of the `fedhl` command."""
    app(prog_name="fedhl")
