"""Trackers: what they are told, what they have after a crash, and that a run is the same without them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.outcome import result
from support.tiny import classification, fedhl, start

from fedhl.compare.study import Study, settings
from fedhl.compare.variants import parse_variant
from fedhl.config import Config
from fedhl.errors import UserError
from fedhl.federation.first_look import check_config
from fedhl.record import read_metrics
from fedhl.run import tracking
from fedhl.run.folder import load_run_config, same_settings
from fedhl.run.trackers import plain
from fedhl.watch import Watcher

LINE: dict[str, Any] = {
    "round": 3,
    "learning_rate": 0.01,
    "evaluation": {
        "metric": "accuracy",
        "full": {"loss": 0.5, "examples": 60, "accuracy": 0.75},
        "truncated": {"rank": 6, "loss": None, "examples": 60, "accuracy": 0.7},
        "ranks": {"1": {"loss": 0.6, "examples": 60, "accuracy": 0.65}},
        "clients": {
            "mean": {"loss": 0.4, "accuracy": 0.8},
            "worst": {"client": "a/b", "loss": 0.9, "examples": 5, "accuracy": 0.6},
            "by_client": {"a/b": {"loss": 0.9, "examples": 5, "accuracy": 0.6}},
        },
        "tasks": {"current": 2, "accuracy": [0.5, 0.25]},
    },
    "clients": [
        {"id": "a/b", "examples": 30, "loss": 0.25, "weight": 0.9, "forgotten": True},
        {"id": "c", "examples": 10, "loss": 1.25, "weight": 0.1, "drift": None},
    ],
    "refused": [{"id": "d", "reason": "late"}],
    "diagnostics": {
        **{"effective_clients": 1.2, "energy": 2.0, "chi2": float("nan"), "epsilon": 0.5},
        **{"spectrum": [1.0, 0.5], "layers": {"q": {"energy": 2.0}}},
    },
    "bytes": {"down": 100, "up": 80},
    "seconds": {"train": 1.5, "total": 2.0},
}


def test_the_numbers_of_a_line() -> None:
    """Derived by hand: the training loss is (30 · 0.25 + 10 · 1.25) / 40."""
    assert tracking.numbers(LINE) == {
        **{"eval/full/loss": 0.5, "eval/full/accuracy": 0.75, "eval/truncated/accuracy": 0.7},
        **{"eval/ranks/1/loss": 0.6, "eval/ranks/1/accuracy": 0.65},
        **{"eval/clients/mean/loss": 0.4, "eval/clients/mean/accuracy": 0.8},
        **{"eval/clients/worst/loss": 0.9, "eval/clients/worst/accuracy": 0.6},
        **{"eval/tasks/1": 0.5, "eval/tasks/2": 0.25},
        **{"train/loss": 0.5, "train/learning_rate": 0.01, "train/clients": 2, "train/refused": 1},
        **{"bytes/down": 100, "bytes/up": 80, "seconds/train": 1.5, "seconds/total": 2.0},
        **{"diagnostics/effective_clients": 1.2, "diagnostics/energy": 2.0},
        **{"diagnostics/epsilon": 0.5, "round": 3},
    }
    more = tracking.numbers(LINE, clients=True).items() - tracking.numbers(LINE).items()
    assert dict(more) == {
        **{"clients/a%2Fb/eval/loss": 0.9, "clients/a%2Fb/eval/accuracy": 0.6},
        **{"clients/a%2Fb/eval/examples": 5, "clients/a%2Fb/examples": 30},
        **{"clients/a%2Fb/loss": 0.25, "clients/a%2Fb/weight": 0.9},
        **{"clients/c/examples": 10, "clients/c/loss": 1.25, "clients/c/weight": 0.1},
    }


def test_with_privacy_only_what_was_released_is_told() -> None:
    assert tracking.numbers(LINE, private=True) == {
        **{"eval/full/loss": 0.5, "eval/full/accuracy": 0.75, "eval/truncated/accuracy": 0.7},
        **{"eval/ranks/1/loss": 0.6, "eval/ranks/1/accuracy": 0.65, "train/learning_rate": 0.01},
        **{"diagnostics/energy": 2.0, "diagnostics/epsilon": 0.5, "round": 3},
    }


def test_a_round_without_evaluation_and_clients() -> None:
    bare = LINE | {"evaluation": None, "clients": [], "learning_rate": None, "diagnostics": {}}
    assert tracking.numbers(bare, clients=True) == {
        **{"train/clients": 0, "train/refused": 1, "bytes/down": 100, "bytes/up": 80},
        **{"seconds/train": 1.5, "seconds/total": 2.0, "round": 3},
    }


def test_names_for_mlflow() -> None:
    assert plain("clients/Klinik für Kinder (A)/loss") == "clients/Klinik für Kinder _28_A_29_/loss"
    assert plain("a%2Fb") != plain("a_2Fb")


# --- the records of real runs -------------------------------------------------------------------


def expected(run: Path, *, clients: bool = False) -> dict[str, list[tuple[int, float]]]:
    """What a tracker must have of a run, by name: every step once, in order."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in tracking.with_totals(read_metrics(run), Counter()):
        for name, value in tracking.numbers(line, clients=clients).items():
            found.setdefault(name, []).append((line["round"], value))
    return found


def in_tensorboard(run: Path) -> dict[str, list[tuple[int, Any]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {
        name: [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]  # float32
    }


def in_wandb(run: Path) -> tuple[dict[str, list[tuple[int, float]]], list[dict[str, Any]]]:
    """The history of the only record, and its entries for the run itself and for its end."""
    (record,) = (run / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(record)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    entries = [json.loads(text) for text in answer.stdout.splitlines()]
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in entries:
        if entry["type"] == "history":
            step = entry["history"]["step"]["num"]
            for name, value in entry["history"]["item"].items():
                if not name.startswith("_"):
                    found.setdefault(name, []).append((step, value))
    return found, [entry for entry in entries if entry["type"] in ("run", "exit")]


def in_mlflow(run: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Any]:
    """The history of every metric of the only run, and the run."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    client = MlflowClient((run / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("fedhl")
    assert experiment is not None
    (only,) = client.search_runs([experiment.experiment_id])
    histories = {
        name: [(m.step, m.value) for m in client.get_metric_history(only.info.run_id, name)]
        for name in only.data.metrics
    }
    return histories, only


@pytest.mark.slow
def test_killed_and_resumed(
    project: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tracker has every round once, and the run is the same as one without trackers."""
    run, to = tmp_path / "run", "report_to=[tensorboard, wandb, {name: mlflow, clients: true}]"
    command = start(project, "run", "tiny.yaml", "--set", to, "--out", run)
    done = command.kill_when(lambda: "round 2/5" in command.said())
    assert (done.code, done.err) == (-signal.SIGKILL, ""), done
    done = fedhl(project, "resume", run)
    assert (done.code, done.err) == (0, ""), done
    assert "warning" not in done.out and "resuming after round" in done.out
    assert in_tensorboard(run) == expected(run)
    history, (entry, end) = in_wandb(run)
    assert history == expected(run)
    told = entry["run"]
    assert (told["project"], told["display_name"], end["exit"]["exit_code"]) == ("fedhl", "tiny", 0)
    assert told["config"]["update"]["training.steps"] == 6
    histories, record = in_mlflow(run, monkeypatch)
    assert histories == expected(run, clients=True)
    assert (record.info.run_name, record.info.status) == ("tiny", "FINISHED")
    assert record.data.params["lora.ranks"] == "[1, 1, 2, 2, 4, 6]"
    for name in ("tensorboard", "wandb", "mlruns"):
        assert (run / name).stat().st_mode & 0o777 == 0o700
    one, other = result(run), result(runs / "tiny")
    for same in (one, other):
        del same["config"], same["files"], same["summary"]["hashes"]["config"]
    assert one == other


@contextmanager
def counting() -> Iterator[tuple[int, list[Any]]]:
    """A port, and who has connected to it so far."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        callers: list[Any] = []

        def accept() -> None:
            while True:
                try:
                    connection, caller = server.accept()
                except OSError:
                    return
                callers.append(caller)
                connection.close()

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1], callers
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.slow
def test_a_finished_run_is_tracked_without_a_network(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three libraries would tell their makers something; a proxy that they would use hears of nothing."""
    run = shutil.copytree(runs / "lm", tmp_path / "lm")
    to = "[tensorboard, mlflow, {name: wandb, clients: true, run: later, group: all, project: other}]"
    kept = ("WANDB_", "MLFLOW_", "PYTEST_", "CI")  # in CI, MLflow is silent by itself
    env = {name: value for name, value in os.environ.items() if not name.startswith(kept)}
    with counting() as (port, callers):
        proxy = f"http://127.0.0.1:{port}"
        env |= {"HTTPS_PROXY": proxy, "HTTP_PROXY": proxy, "HOME": str(tmp_path)}
        command = [sys.executable, "-m", "fedhl", "track", str(run), "--to", to]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "") and "warning" not in done.stdout, done
    assert callers == []
    assert in_tensorboard(run) == expected(run)
    assert in_mlflow(run, monkeypatch)[0] == expected(run)
    history, (entry, _) = in_wandb(run)
    assert history == expected(run, clients=True)
    told = entry["run"]
    assert (told["project"], told["display_name"], told["run_group"]) == ("other", "later", "all")


@pytest.mark.slow
def test_how_personal_models_score_is_one_more_step(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes once, whether a tracker was there when the models were made or not."""
    run, to = tmp_path / "run", "report_to=[tensorboard, {name: mlflow, clients: true}]"
    short = [f"{group}.steps=2" for group in ("training", "personal")]
    sets = [text for change in (to, "rounds=2", *short) for text in ("--set", change)]
    for command in (
        ["run", "tiny.yaml", *sets, "--out", run],
        ["resume", run],
        ["track", run, "--to", "wandb"],
        ["track", run],
    ):
        done = fedhl(project, *command)
        assert (done.code, done.err) == (0, "") and "warning" not in done.out, done
    scores = json.loads((run / "summary.json").read_text("utf-8"))["personal"]
    mean, own = scores["mean"], scores["clients"]
    steps = [("global", mean["global"]), ("personal", mean["personal"])]
    wanted = {f"personal/mean/{k}/{name}": x for k, values in steps for name, x in values.items()}
    wanted |= {f"personal/{name}": scores[name] for name in ("gained", "lost", "stayed")}
    history = in_wandb(run)[0]
    for found in (in_tensorboard(run), history):
        told = {name: values for name, values in found.items() if name.startswith("personal/")}
        assert told == {name: [(3, x)] for name, x in wanted.items()}
    histories, _ = in_mlflow(run, monkeypatch)
    for id, record in own.items():
        assert histories[f"clients/{id}/personal/loss"] == [(3, record["loss"])]
        accuracy = record["personal"]["accuracy"]
        assert histories[f"clients/{id}/personal/personal/accuracy"] == [(3, accuracy)]
    assert histories["round"] == [(0, 0), (1, 1), (2, 2), (3, 2)]


# --- when something is wrong --------------------------------------------------------------------


def test_a_tracker_that_fails_is_told_once_and_left_out(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "tiny", tmp_path / "run")
    said: list[str] = []
    config = load_run_config(run, ["report_to=tensorboard"])
    trackers = tracking.Trackers(config, run, Watcher(say=said.append))
    trackers.working["tensorboard"].close("finished")  # its file is closed under its hands
    for act in (trackers.send, trackers.send, trackers.close):
        act()
    look, warning = said
    assert look == f"tensorboard: to look at the metrics: tensorboard --logdir {run}"
    assert warning.startswith("warning: tensorboard has failed and is left out: Writer is closed")
    assert f"`fedhl track {run}` sends all rounds later" in warning


def test_half_a_line_is_not_told_before_it_is_whole(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "tiny", tmp_path / "run")
    whole = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(whole[:-40])
    trackers = tracking.Trackers(load_run_config(run), run, Watcher())
    assert [line["round"] for line in trackers.gained()] == [0, 1, 2, 3, 4]
    (run / "metrics.jsonl").write_bytes(whole)
    assert [line["round"] for line in trackers.gained()] == [5] and trackers.gained() == []


def test_a_tracker_that_cannot_begin_leaves_the_run_alone(
    project: Path, runs: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(runs / "tiny", tmp_path / "run")
    before = result(run)
    (run / "tensorboard").write_text("no folder")
    done = fedhl(project, "resume", run, "--set", "report_to=tensorboard")
    assert (done.code, done.err) == (0, "") and done.out.count(
        "warning: tensorboard has failed"
    ) == 1
    (run / "tensorboard").unlink()
    assert result(run) == before
    done = fedhl(project, "resume", run, "--set", "rounds=6")
    assert done.code == 2 and "only where things are, and where metrics go, can change" in done.err


def config_of(**changes: Any) -> Config:
    return Config.model_validate(classification(**changes))


def test_a_package_that_is_missing_is_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(report_to="wandb")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UserError, match=r"wandb is not installed; .*`pip install 'fedhl\[wandb\]'`"
    ):
        check_config(config)
    monkeypatch.delitem(sys.modules, "wandb")
    (tmp_path / "wandb").mkdir()  # the folder that wandb itself leaves
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="wandb is not installed"):
        check_config(config)


# --- settings -----------------------------------------------------------------------------------


def test_trackers_are_no_part_of_what_must_stay() -> None:
    one, other = config_of(report_to=["tensorboard"]), config_of()
    assert same_settings(one, other) and settings(one) == settings(other)
    assert not same_settings(one, config_of(rounds=6))


def test_a_uri_with_a_password_is_no_hyperparameter() -> None:
    config = config_of(report_to={"name": "mlflow", "uri": "http://me:secret@host:5000"})
    told = tracking.settings(config)
    assert "secret" not in str(told) and told["weighting.power"] == 2
    assert None not in told.values()


def test_the_runs_of_a_comparison_are_named_and_grouped() -> None:
    base = config_of(report_to=["tensorboard", {"name": "wandb", "group": "mine"}, "mlflow"])
    variants = [parse_variant("fedhl"), parse_variant("flexlora")]
    jobs = Study(base, variants, [0, 1], [], Path("runs/compare-tiny")).sweep(1, {})
    for job, label in zip(jobs, ["fedhl, seed 1", "flexlora, seed 1"], strict=True):
        tensorboard, wandb, mlflow = job.config.model_dump()["report_to"]
        assert tensorboard == {"name": "tensorboard", "clients": False}  # its names are folders
        assert wandb["run"] == mlflow["run"] == label == job.label and wandb["group"] == "mine"
    base = config_of(report_to={"name": "wandb", "run": "x"})
    (job,) = Study(base, variants[:1], [0], [], Path("runs/compare-tiny")).sweep(0, {})
    assert job.config.model_dump()["report_to"][0] == {
        **{"name": "wandb", "run": "x", "clients": False, "project": "fedhl", "entity": None},
        **{"group": "compare-tiny", "mode": "offline"},
    }
