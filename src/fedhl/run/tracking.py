"""What trackers are told of a run: the lines of metrics.jsonl, as numbers with names.

A tracker never stops a run and never changes it. Whatever its library raises is told once, and the run goes
on without that tracker; when the run is resumed, or by `fedhl track`, it is sent the rounds that it lacks.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedhl.config import Config
from fedhl.errors import in_one_line
from fedhl.record import Json, read_scores, read_summary, training_loss
from fedhl.run.trackers import OPEN, Run, Tracker
from fedhl.watch import SILENT, Watcher

# --- from a line to numbers ---------------------------------------------------------------------

RELEASED = (
    *("round", "train/learning_rate", "diagnostics/epsilon", "diagnostics/energy"),
    *("diagnostics/tail_share", "diagnostics/effective_rank"),
    *("eval/full/", "eval/truncated/", "eval/ranks/", "eval/validation/"),
)
"""With privacy, the beginnings of the names that are tracked: what follows from the released updates, from
the config and from the server's own rows. A sum of bytes or a mean of losses has no noise."""


def numbers(line: Json, *, clients: bool = False, private: bool = False) -> dict[str, float]:
    """The finite numbers of a line of metrics.jsonl, by names such as `eval/full/accuracy`. `clients`: with
    those of each client; `private`: the released ones alone."""
    evaluation = line["evaluation"] or {}
    over_clients = evaluation.get("clients") or {}
    tasks = (evaluation.get("tasks") or {}).get("accuracy", [])
    told: Json = {
        "eval": {
            **{rows: evaluation.get(rows) for rows in ("full", "truncated", "ranks", "validation")},
            "clients": {which: over_clients.get(which) for which in ("mean", "worst")},
            "tasks": {str(task): accuracy for task, accuracy in enumerate(tasks, start=1)},
        },
        "train": {
            "loss": training_loss(line),
            "learning_rate": line["learning_rate"],
            "clients": len(line["clients"]),
            "refused": len(line["refused"]),
        },
        "bytes": line["bytes"],
        "seconds": line["seconds"],
        "diagnostics": {k: v for k, v in line["diagnostics"].items() if k != "layers"},
    }
    if clients:
        own = over_clients.get("by_client") or {}
        told["clients"] = {id.replace("/", "%2F"): {"eval": metrics} for id, metrics in own.items()}
        for client in line["clients"]:
            told["clients"].setdefault(client["id"].replace("/", "%2F"), {}).update(client)
    told["round"] = line["round"]  # last: a tracker that has it has them all
    return {
        name: value
        for name, value in finite_leaves(told)
        if not name.startswith("eval/") or name.rpartition("/")[2] not in ("examples", "rank")
        if not private or name.startswith(RELEASED)
    }


def personal_numbers(scores: Json, *, clients: bool = False) -> dict[str, float]:
    """The finite numbers of how personal models score, by names such as `personal/mean/personal/accuracy`.
    `clients`: with those of each client."""
    told: Json = {"personal": {k: scores[k] for k in ("mean", "gained", "lost", "stayed")}}
    if clients:
        own = scores["clients"]
        told["clients"] = {id.replace("/", "%2F"): {"personal": own[id]} for id in own}
    told["round"] = scores["round"]
    return dict(finite_leaves(told))


def finite_leaves(value: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The finite numbers at the ends of a nested mapping."""
    for name, leaf in leaves(value, "/"):
        if type(leaf) in (int, float) and math.isfinite(leaf):
            yield name, leaf


def leaves(value: Mapping[str, Any], joint: str, above: str = "") -> Iterator[tuple[str, Any]]:
    """What a nested mapping has at its ends, each with the keys that lead there."""
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from leaves(inner, joint, f"{above}{key}{joint}")
        else:
            yield f"{above}{key}", inner


def settings(config: Config) -> dict[str, Any]:
    """The settings of a config that are not null, by names such as `training.steps`; lists as JSON. What
    concerns trackers is left out: a URI may have a password in it."""
    raw = config.model_dump(mode="json", exclude={"report_to"})
    raw["weighting"] = config.weighting_used.model_dump(mode="json")
    return {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
        for name, value in leaves(raw, ".")
        if value is not None
    }


# --- the trackers of a run ----------------------------------------------------------------------


class Trackers:
    """The open records of the run in `folder`, without those that have failed."""

    def __init__(self, config: Config, folder: Path, watcher: Watcher) -> None:
        self.config, self.folder, self.watcher = config, folder, watcher
        self.working: dict[str, Tracker] = {}
        self.read, self.total = 0, Counter[str]()
        self.last, self.personal = -1, False
        for given in config.report_to:
            with self.spared(given.name):
                run = Run(folder, config.name, settings(config))
                self.working[given.name] = OPEN[given.name](given, run)
                watcher.say(f"{given.name}: {self.working[given.name].shown}")

    @contextmanager
    def spared(self, name: str) -> Iterator[None]:
        """Whatever this tracker raises inside the block is a warning, and the end of this tracker alone."""
        try:
            yield
        except Exception as error:  # of any library: no record elsewhere is worth the run
            self.working.pop(name, None)
            self.watcher.say(
                f"warning: {name} has failed and is left out: {in_one_line(error)}; "
                f"`fedhl track {self.folder}` sends all rounds later"
            )

    def send(self) -> None:
        """Send each tracker the rounds that it lacks of those that metrics.jsonl has gained; and how the
        personal models made after the last of them score, once there are any, as one more step."""
        lines = [*with_totals(self.gained(), self.total)] if self.working else []
        private = self.config.privacy is not None
        self.last = lines[-1]["round"] if lines else self.last
        scores = None if self.personal else read_scores(self.folder)
        if scores is not None and scores["round"] != self.last:
            scores = None  # of rounds that are done again
        self.personal = self.personal or scores is not None
        for given in self.config.report_to:
            if (tracker := self.working.get(given.name)) is None:
                continue
            with self.spared(given.name):
                for line in lines:
                    if line["round"] >= tracker.lacks:
                        known = numbers(line, clients=given.clients, private=private)
                        tracker.log(line["round"], known)
                if scores is not None and self.last + 1 >= tracker.lacks:
                    tracker.log(self.last + 1, personal_numbers(scores, clients=given.clients))

    def gained(self) -> list[Json]:
        """The lines of metrics.jsonl since this function was last called: to read the whole file after every
        round takes longer than the trackers do."""
        file = self.folder / "metrics.jsonl"
        if not file.exists():
            return []
        with file.open("rb") as stream:
            stream.seek(self.read)
            # a process that was killed may have left half a line
            texts = [text for text in stream if text.endswith(b"\n")]
        self.read += sum(map(len, texts))
        return [json.loads(text) for text in texts]

    def close(self) -> None:
        status = read_summary(self.folder)["status"]
        for name, tracker in [*self.working.items()]:
            with self.spared(name):
                tracker.close(status)


@contextmanager
def tracked(
    config: Config, folder: Path, watcher: Watcher = SILENT
) -> Iterator[Callable[[], None]]:
    """Inside the block the run in `folder` has its trackers open, which know all its rounds so far. The
    function sends them the rounds since."""
    trackers = Trackers(config, folder, watcher)
    try:
        trackers.send()
        yield trackers.send
    finally:
        trackers.close()


def with_totals(lines: Iterable[Json], total: Counter[str]) -> Iterator[Json]:
    """The lines of metrics.jsonl, with `down_total` and `up_total` among their bytes: the sums over all
    rounds so far, which `total` keeps."""
    for line in lines:
        total.update(line["bytes"])
        yield line | {"bytes": line["bytes"] | {f"{way}_total": n for way, n in total.items()}}
