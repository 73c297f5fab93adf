"""A run folder: written round by round, resumed, evaluated, exported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedhl.lazy import lazy

if TYPE_CHECKING:
    from fedhl.run.loop import resume_run, start_run
    from fedhl.run.result import Result
    from fedhl.run.simulate import simulate

__all__ = ["Result", "resume_run", "simulate", "start_run"]

__getattr__, __dir__ = lazy(
    __name__,
    {
        **dict.fromkeys(("resume_run", "start_run"), "fedhl.run.loop"),
        "Result": "fedhl.run.result",
        "simulate": "fedhl.run.simulate",
    },
)
