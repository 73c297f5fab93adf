"""A run that another process works on: its rounds as they come, and a report that stays fresh."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

from fedhl.record import FAILED, FINISHED, read_metrics, read_summary
from fedhl.report import write_report
from fedhl.run.folder import load_run_config, writing
from fedhl.run.progress import told

POLL = 1.0
"""Seconds between two looks at the files of a run."""
REFRESH = 10
"""Seconds between two reports of a run that goes on; a browser loads its page again as often."""


def follow(folder: Path, say: Callable[[str], None], wait: Callable[[float], None] = sleep) -> None:
    """Say what the run in `folder` says of its rounds, those so far and those to come, and keep its
    report.html fresh, until the run has ended. `wait` is called with the seconds to the next look.

    Raises UserError for a folder without the config of a run, and where the report cannot be written.
    """
    config = load_run_config(folder)
    last, drawn, stale, at_work = -1, -float(REFRESH), False, True
    while True:
        # in this order: a run that has ended writes no line any more
        status = read_summary(folder)["status"] if (folder / "summary.json").is_file() else None
        lines = read_metrics(folder)
        if lines and lines[-1]["round"] < last:  # resumed from an earlier checkpoint
            last = lines[-1]["round"]
        fresh = [line for line in lines if line["round"] > last]
        for line in fresh:
            for text in told(line, config):
                say(text)
            last = line["round"]
        ended, stale = status in (FINISHED, FAILED), stale or bool(fresh)
        if lines and (ended or (stale and monotonic() - drawn >= REFRESH)):
            with writing(folder):
                write_report(folder, None if ended else REFRESH)
            if drawn < 0 and not ended:
                say(f"report, which loads itself again: {folder / 'report.html'}")
            drawn, stale = monotonic(), False
        if ended:
            say(f"the run is {status}; report: {folder / 'report.html'}")
            return
        if at_work != (at_work := held(folder)) and not at_work:
            say(f"no process works on this run now; to go on: fedhl resume {folder}")
        wait(POLL)


def held(folder: Path) -> bool:
    """Whether a process works on this run: it has the lock of `fedhl.run.folder.alone`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # some network file systems have no such lock
        return True
    finally:
        os.close(descriptor)
