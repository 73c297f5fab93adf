"""Who looks on while something runs: lines of text, and how far a phase is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Watcher:
    """`say` gets lines of text; `step` gets the name of a phase, and its steps done and to do."""

    say: Callable[[str], None] = lambda line: None
    step: Callable[[str, int, int], None] = lambda phase, done, total: None

    def labelled(self, label: str) -> Watcher:
        """The same watcher, with `label` before the name of each phase."""
        return replace(self, step=lambda phase, *counts: self.step(f"{label}, {phase}", *counts))


SILENT = Watcher()
"""Nobody looks on."""
