"""A run folder: written round by round, resumed, evaluated, exported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedhl.lazy import lazy

if TYPE_CHECKING:
    from fedhl.run.loop import resume_run, start_run

__all__ = ["resume_run", "start_run"]

__getattr__, __dir__ = lazy(__name__, dict.fromkeys(("resume_run", "start_run"), "fedhl.run.loop"))
