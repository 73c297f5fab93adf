"""A run folder: written round by round, resumed, evaluated, exported."""

from __future__ import annotations

from fedhl.run.loop import resume_run, start_run

__all__ = ["resume_run", "start_run"]
