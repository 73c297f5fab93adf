"""The trackers: the record of a run in TensorBoard, in Weights & Biases and in MLflow.

A record is opened for every process of a run anew, also for one that is resumed. It is then sent the rounds
that it lacks: by TensorBoard and W&B offline all rounds, as a whole new record in place of the old one; by
W&B online and MLflow the rounds after the last that it has. The libraries are imported when a record is
opened, and this module alone imports them.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Any, Protocol

from fedhl.config.tracking import MLflowTracker, TensorBoardTracker, WandbTracker
from fedhl.files import private_folder, write_text
from fedhl.record import FINISHED


@dataclass(frozen=True)
class Run:
    """What a tracker is told of a run: its folder, its name, its settings as `training.steps: 20`."""

    folder: Path
    name: str
    settings: Mapping[str, Any]

    def private(self, name: str) -> Path:
        """A folder in the run folder, which only its owner may enter."""
        private_folder(self.folder / name)
        return self.folder / name

    def id_there(self, where: str, make: Callable[[], str]) -> str:
        """The id of this run's record at a place, from `trackers.json`; a new record's is `make()`."""
        file = self.folder / "trackers.json"
        ids = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if where not in ids:
            ids[where] = make()
            write_text(file, json.dumps(ids, indent=1) + "\n")
        return ids[where]


class Tracker(Protocol):
    """The open record of a run. Its constructor opens it, or goes on in it.

    Every function may raise what the library raises; whoever calls it must not let that end the run.
    """

    shown: str
    """Where the record is, and how to look at it."""
    lacks: int
    """The first round that the record lacks when it is opened."""

    def log(self, round: int, numbers: Mapping[str, float]) -> None:
        """Add one round, at step = round; the numbers are finite."""
        ...

    def close(self, status: str) -> None:
        """Write what is left; `status`: as in summary.json."""
        ...


class TensorBoard:
    """An event file for each process, whose first event tells readers to forget all events before it."""

    def __init__(self, settings: TensorBoardTracker, run: Run) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = run.private("tensorboard")
        self.shown = f"to look at the metrics: tensorboard --logdir {run.folder}"
        self.lacks = 0
        self.file = EventFileWriter(str(folder))
        start = SessionLog(status=SessionLog.START)
        self.file.add_event(Event(wall_time=time(), step=self.lacks, session_log=start))
        self.file.add_event(Event(wall_time=time(), summary=hparams_pb(dict(run.settings))))
        self.file.flush()

    def log(self, round: int, numbers: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore

        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self.file.add_event(Event(wall_time=time(), step=round, summary=Summary(value=values)))
        self.file.flush()

    def close(self, status: str) -> None:
        self.file.close()


class Wandb:
    """A run of a fixed id. Offline, each process writes a folder with all rounds, which replaces those before
    it: W&B flushes its file every 15 seconds, so that a killed process leaves any part of it."""

    def __init__(self, settings: WandbTracker, run: Run) -> None:
        # without it wandb reports its own errors to its makers, also where it is offline
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        id = run.id_there("wandb", lambda: secrets.token_hex(8))
        folder, online = run.private("wandb"), settings.mode == "online"
        if online and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("there is no API key: call `wandb login`, or set mode: offline")
        before = [*folder.glob(f"offline-run-*-{id}")]
        self.run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            group=settings.group,
            name=settings.run or run.name,
            id=id,
            dir=run.folder,
            mode=settings.mode,
            resume="allow" if online else None,
            config=dict(run.settings),
            allow_val_change=True,
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
                finish_timeout=60.0,  # seconds for a network that does not answer
            ),
        )
        for old in [] if online else before:
            shutil.rmtree(old)
        self.lacks = self.run.step if online else 0
        offline = f"offline; to send the metrics: wandb sync {folder / 'latest-run'}"
        self.shown = f"the metrics go to {self.run.url}" if online else offline

    def log(self, round: int, numbers: Mapping[str, float]) -> None:
        self.run.log(dict(numbers), step=round, commit=True)

    def close(self, status: str) -> None:
        self.run.finish(exit_code=0 if status == FINISHED else 1)


class MLflow:
    """A run in an experiment, by MLflow's client, which leaves alone what the program does with MLflow."""

    def __init__(self, settings: MLflowTracker, run: Run) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it reports to its makers
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # or files are refused
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")  # 30 seconds, and not minutes
        from mlflow import MlflowClient
        from mlflow.entities import Param

        if settings.uri is None:
            here = run.private("mlruns")
            uri, look = here.absolute().as_uri(), f"mlflow ui --backend-store-uri {here}"
            self.shown = f"to look at the metrics: MLFLOW_ALLOW_FILE_STORE=true {look}"
        else:
            uri, self.shown = settings.uri, f"the metrics go to experiment {settings.experiment!r}"
        self.client = MlflowClient(tracking_uri=uri)
        known = self.client.get_experiment_by_name(settings.experiment)
        experiment = known and known.experiment_id
        experiment = experiment or self.client.create_experiment(settings.experiment)

        def new() -> str:
            return self.client.create_run(experiment, run_name=settings.run or run.name).info.run_id

        self.id = run.id_there(f"mlflow {settings.uri or 'mlruns'}", new)
        done = self.client.get_metric_history(self.id, "round")
        self.lacks = max((metric.step for metric in done), default=-1) + 1
        self.client.update_run(self.id, status="RUNNING")
        if not self.client.get_run(self.id).data.params:
            params = [Param(plain(name), str(value)) for name, value in run.settings.items()]
            self.client.log_batch(self.id, params=params)

    def log(self, round: int, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time() * 1000)
        metrics = [Metric(plain(name), value, now, round) for name, value in numbers.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def close(self, status: str) -> None:
        ends = {FINISHED: "FINISHED", "failed": "FAILED"}
        self.client.set_terminated(self.id, ends.get(status, "KILLED"))


OPEN: dict[str, Callable[[Any, Run], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
}
"""By the name of a tracker, what opens the record of a run for the tracker's settings."""


def plain(name: str) -> str:
    """A name that MLflow takes: of letters, digits, spaces and `/_-.:`, and `_28_` for another character."""
    return re.sub(r"[^\w.\- :/]", lambda odd: f"_{ord(odd[0]):X}_", name)
