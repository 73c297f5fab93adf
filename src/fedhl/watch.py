"""Reports from something that runs: lines of text, and the progress of a phase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Watcher:
    """`say` receives lines of text; `step` receives the name of a phase, its steps done and its steps in
    all."""

    say: Callable[[str], None] = lambda line: None
    step: Callable[[str, int, int], None] = lambda phase, done, total: None

    def labelled(self, label: str) -> Watcher:
        """The same watcher, with `label` before the name of each phase."""
        return replace(self, step=lambda phase, *counts: self.step(f"{label}, {phase}", *counts))


SILENT = Watcher()
"""A watcher that ignores everything."""
