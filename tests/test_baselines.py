"""What a federation is compared with: each client alone, all rows at one place, the untrained model."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from support.fake_run import Page
from support.tiny import fedhl, start

from fedhl.compare.variants import SETTINGS, parse_variant
from fedhl.config import Config, load_config
from fedhl.errors import UserError
from fedhl.federation.examine import examine
from fedhl.federation.prepare import prepare
from fedhl.federation.scores import over_clients
from fedhl.record import read_metrics, read_summary
from fedhl.report.compare import comparison_tables
from fedhl.run import start_run

SHORT = ["rounds=2", "training.steps=2"]
FEW = [*SHORT, "partition.clients=3", "lora.ranks=[1, 2, 4]"]
VARIANTS = "fedhl,alone,pooled,pooled_full"


def tiny(project: Path, monkeypatch: pytest.MonkeyPatch, *changes: str) -> Config:
    monkeypatch.chdir(project)
    return load_config(project / "tiny.yaml", [*SHORT, *changes])


@pytest.fixture(scope="module")
def compared(project: Path) -> Path:
    """A comparison that was interrupted while the third client trained alone, and continued."""
    changes = [word for change in FEW for word in ("--set", change)]
    arguments = ["compare", "tiny.yaml", "--methods", VARIANTS, "--seeds", "0", *changes]
    arguments += ["--out", "runs/baselines"]
    third = project / "runs/baselines/alone/seed-0/clients/2/state/round-000001"
    done = start(project, *arguments).kill_when(third.exists, signal.SIGINT)
    assert done.code == 130, done
    done = fedhl(project, *arguments)
    assert (done.code, done.err) == (0, ""), done
    assert "resuming after round" in done.out and "clients/0" not in done.out
    (project / "runs/baselines/printed.txt").write_text(done.out, "utf-8")
    return project / "runs/baselines"


def metrics(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(run)]


# --- who takes part -----------------------------------------------------------------------------


def test_a_client_alone_has_what_it_has_among_all(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everyone, ranks = examine(tiny(project, monkeypatch))
    only = tiny(project, monkeypatch, "participation.only=[client-3, client-5]")
    some, theirs = examine(only)
    assert list(some.clients) == list(some.client_held_out) == ["client-3", "client-5"]
    for name in theirs:
        assert theirs[name] == ranks[name]
        assert np.array_equal(some.clients[name], everyone.clients[name])
        assert np.array_equal(some.client_held_out[name], everyone.client_held_out[name])
    assert some.held_out == everyone.held_out and some.labels == everyone.labels
    with pytest.raises(UserError, match=r"participation.only: .*'client-9'.*did you mean"):
        examine(tiny(project, monkeypatch, "participation.only=[client-9]"))


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_travels_to_a_baseline_so_nothing_is_rounded(
    project: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    narrow = tiny(project, monkeypatch, "wire={payload: int8, download: float16}")
    wire = parse_variant(name).config(narrow, 0).wire
    assert (wire.payload, wire.download) == ("float32", None)


@pytest.mark.parametrize(
    ("changes", "steps"),  # a round has four of the six clients
    [
        (["training.steps=2"], 8),
        (["training.steps=null", "training.epochs=1", "training.batch_size=8"], None),
    ],
)
def test_pooled_rows_are_those_of_all_and_so_are_the_steps(
    changes: list[str], steps: int | None, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(project, monkeypatch, *changes)
    everyone, ranks = examine(config)
    together = tiny(project, monkeypatch, *changes, "participation.pooled=true", "method=fedit")
    prepared = prepare(together)
    (client,) = prepared.federation.clients
    assert (client.id, client.rank) == ("pooled", max(ranks.values()))
    assert np.array_equal(
        prepared.data.clients["pooled"], np.sort(np.concatenate(list(everyone.clients.values())))
    )
    if steps is None:  # two thirds of an epoch of all rows
        steps = round(-(-client.examples // 8) * 4 / 6)
    assert prepared.federation.steps_for(client.examples) == steps
    assert list(prepared.federation.own) == list(everyone.client_held_out)


# --- in a comparison ----------------------------------------------------------------------------


def test_each_client_alone_is_a_run_of_one(
    compared: Path, project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    alone = tiny(
        project,
        monkeypatch,
        *FEW,
        *("method=fedit", "weighting=uniform", "participation={only: [client-2], fraction: 1.0}"),
    )
    start_run(alone, tmp_path / "run")
    # the one that was interrupted
    assert metrics(compared / "alone/seed-0/clients/2") == metrics(tmp_path / "run")


def test_the_record_of_all_is_their_mean(compared: Path) -> None:
    folder = compared / "alone/seed-0"
    runs = [read_metrics(folder / "clients" / str(k)) for k in range(3)]
    for t, line in enumerate(read_metrics(folder)):
        each = [run[t]["evaluation"] for run in runs]
        full = line["evaluation"]["full"]
        assert full["accuracy"] == pytest.approx(fmean(e["full"]["accuracy"] for e in each))
        own = line["evaluation"]["clients"]
        assert len(own["by_client"]) == 3
        assert own["mean"]["loss"] == pytest.approx(
            fmean(m["loss"] for e in each for m in e["clients"]["by_client"].values())
        )
        assert (
            own["worst"]
            == over_clients(own["by_client"], "accuracy", True, "share of rows")["worst"]
        )
        assert line["bytes"] == {"down": 0, "up": 0}
        assert len(line["clients"]) == (3 if t else 0)
    summary = read_summary(folder)
    assert (summary["status"], summary["method"]["name"]) == ("finished", "alone")
    assert sorted(c["rank"] for c in summary["clients"]) == [1, 2, 4]


@pytest.mark.parametrize("command", [["resume"], ["eval"], ["export", "--merged", "--out", "x"]])
def test_the_record_of_all_is_no_run(command: list[str], compared: Path, project: Path) -> None:
    done = fedhl(project, command[0], compared / "alone/seed-0", *command[1:])
    assert done.code == 2 and "is the record of several runs, one for each client alone" in done.err


def test_a_record_that_cannot_be_written_is_told(project: Path) -> None:
    blocked = project / "runs/blocked"
    blocked.mkdir(parents=True)
    (blocked / "alone").write_text("a file in the way", "utf-8")
    arguments = ["compare", "tiny.yaml", "--methods", "alone", "--seeds", "0", "--out"]
    done = fedhl(project, *arguments, "runs/blocked")
    assert done.code == 2 and "cannot write to runs/blocked: " in done.err, done


def test_the_comparison_tells_them_apart(compared: Path) -> None:
    known = json.loads((compared / "comparison.json").read_text("utf-8"))
    fedhl_, alone, pooled, full = known["variants"]
    for variant in (alone, pooled, full):
        assert variant["weighting"] is None and variant["finished"] == 1
        assert variant["bytes"] == {"down": 0, "up": 0} and variant["scores"]["mean"]["accuracy"]
        assert variant["difference"]["mean"] is not None
    assert fedhl_["bytes"]["down"] > 0
    assert pooled["ranks"] == [4] and full["ranks"] == []
    runs = [read_metrics(compared / f"{name}/seed-0")[1:] for name in ("pooled", "pooled_full")]
    ours, theirs = ([line["clients"][0]["steps"] for line in run] for run in runs)
    assert ours == theirs and len(ours) == 2
    start = read_metrics(compared / "fedhl/seed-0")[0]["evaluation"]["full"]["accuracy"]
    assert known["untrained"]["full"]["values"] == [start]
    page = Page((compared / "comparison.html").read_text("utf-8"))
    said = " ".join(" ".join(page.text).split())
    assert "alone: no federation. Each client trains for itself" in said
    assert "pooled: no federation. One client has the training rows of all" in said
    assert "pooled_full: no federation. One client has the training rows of all" in said
    assert "differ in how clients are weighted" not in said
    first = comparison_tables(compared)[0]
    assert list(first.columns[0].cells)[-1].plain == "untrained"  # pyright: ignore
    report = (compared / "alone/seed-0/report.html").read_text("utf-8")
    assert "alone" in " ".join(Page(report).text)
