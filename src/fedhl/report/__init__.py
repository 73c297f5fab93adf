"""A run folder as one self-contained page, and as a small table for the terminal.

Both are pure functions of the folder's files (`metrics.jsonl`, `summary.json`, `config.yaml`): the same
files give the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedhl.files import write_text
from fedhl.names import size
from fedhl.report.files import best, dig, final_evaluation, headline_kinds, num, read_run

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["final_table", "write_report"]

# Modules that import matplotlib are imported in the functions: a folder that is no run is refused without it.


def write_report(run: Path, refresh: int | None = None) -> Path:
    """Write `run`/report.html from the files beside it, and return its path. `refresh`: seconds after which a
    browser loads the page again, for a run that goes on.

    Raises UserError when metrics.jsonl is missing, or when it or summary.json is malformed; an incomplete
    last line of metrics.jsonl, left by a killed process, is ignored.
    """
    read = read_run(run)
    from fedhl.report.run_page import run_page

    write_text(run / "report.html", run_page(read, refresh))
    return run / "report.html"


def final_table(run: Path) -> Table:
    """A table of round 0, the last round of each task, the best and the last evaluated round, with bytes and
    seconds up to each; with tasks also the mean accuracy over the tasks so far, and at the end the
    forgetting.
    """
    read = read_run(run)
    from rich.table import Table
    from rich.text import Text

    from fedhl.report.format import metric_text, percent, seconds
    from fedhl.report.statistics import mean_accuracy
    from fedhl.report.tasks import matrix

    result = Table(title=Text(read.name), title_justify="left")
    kinds = headline_kinds(read)
    for header in (
        "",
        "round",
        *(f"{read.metric} {name}" for name, _ in kinds),
        "down",
        "up",
        "time",
    ):
        result.add_column(Text(header), justify="right" if header else "left")
    last, _ = final_evaluation(read)
    accuracy = matrix(read)
    ends = {round: k for k, round in enumerate(dig(read.summary, "tasks", "rounds") or (), start=1)}
    after = [(f"task {k}", round) for round, k in ends.items() if round != last]
    for header in ("mean of tasks", "forgetting") if ends else ():
        result.add_column(Text(header), justify="right")
    for name, wanted in (("start", 0), *after, ("best", best(read)[0]), ("final", last)):
        line = next((r for r in read.rounds if r["round"] == wanted), None)
        if line is None:
            continue
        until = [r for r in read.rounds if r["round"] <= line["round"]]
        values = [num(line, "evaluation", *keys, read.metric) for _, keys in kinds]
        sums = [
            sum(num(r, group, key) or 0.0 for r in until)
            for group, key in (("bytes", "down"), ("bytes", "up"), ("seconds", "total"))
        ]
        texts = ["–" if v is None else metric_text(read.unit, v) for v in values]
        texts += [size(sums[0]), size(sums[1]), seconds(sums[2])]
        if k := ends.get(line["round"]):
            forgot = num(read.summary, "tasks", "forgetting") if k == len(ends) else None
            texts += [
                percent(mean_accuracy(accuracy[k - 1])),
                "–" if forgot is None else percent(forgot),
            ]
        result.add_row(name, str(line["round"]), *texts)
    return result
