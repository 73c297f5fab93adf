"""Comparisons: the same conditions for every method, nothing run twice, and the numbers of the files."""

from __future__ import annotations

import json
import math
import re
import signal
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any

import pytest
import yaml
from markupsafe import escape
from support.fake_run import EVIL, Page, evil, evil_metric, fake_run
from support.tiny import classification, fedhl, start, write_config

from fedhl.cli.app import parse_numbers
from fedhl.compare import compare
from fedhl.compare.study import Study, best_rate, difference, warn_of_left_out
from fedhl.compare.variants import parse_variant, parse_variants
from fedhl.config import Config, load_config
from fedhl.config.ranks import RankShares
from fedhl.errors import UserError
from fedhl.record import read_metrics, read_summary
from fedhl.report.compare import comparison_tables, read_comparison, write_comparison
from fedhl.report.format import spread_text
from fedhl.report.statistics import mean_interval, t_quantile
from fedhl.run.folder import load_run_config
from fedhl.watch import Watcher

Json = dict[str, Any]
METHODS = ["fedhl", "flexlora"]
SHORT = ["--set", "rounds=2", "--set", "training.steps=2"]
ARGUMENTS = ["compare", "tiny.yaml", "--methods", ",".join(METHODS), *SHORT]


@pytest.fixture(scope="module")
def compared(project: Path) -> Path:
    """Two methods with two seeds; what was printed is in `printed.txt`."""
    done = fedhl(project, *ARGUMENTS, "--seeds", "0,1", "--out", "runs/compared")
    assert (done.code, done.err) == (0, ""), done
    (project / "runs/compared/printed.txt").write_text(done.out, encoding="utf-8")
    return project / "runs/compared"


def results(folder: Path) -> Json:
    return json.loads((folder / "comparison.json").read_text("utf-8"))


def without(value: Any, *names: str) -> Any:
    """The same JSON without these keys, at any depth."""
    if isinstance(value, list):
        return [without(one, *names) for one in value]
    if not isinstance(value, dict):
        return value
    return {key: without(one, *names) for key, one in value.items() if key not in names}


def metrics(run: Path) -> list[Json]:
    """What is reproducible of a run, round by round."""
    return without(read_metrics(run), "seconds")


# --- statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("df", "level", "value"),  # of any printed table
    [
        *((1, 0.95, 12.706), (2, 0.95, 4.303), (3, 0.95, 3.182), (4, 0.95, 2.776)),
        *((9, 0.95, 2.262), (10, 0.95, 2.228), (30, 0.95, 2.042), (29, 0.95, 2.045)),
        *((1, 0.5, 1.0), (4, 0.99, 4.604), (7, 0.9, 1.895)),
    ],
)
def test_quantiles_of_students_t(df: int, level: float, value: float) -> None:
    assert t_quantile(df, level) == pytest.approx(value, abs=5e-4)  # half of the last digit printed


def test_many_values_make_it_normal() -> None:
    for df in (1000, 1001):  # t = z + (z³ + z)/4df + ..., with z = 1.96
        assert t_quantile(df) == pytest.approx(NormalDist().inv_cdf(0.975), abs=2.5e-3)
    with pytest.raises(ValueError, match="df >= 1"):
        t_quantile(0)


def test_the_interval_of_a_mean() -> None:
    mean, half = mean_interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.302653 * stdev([1.0, 2.0, 4.0]) / math.sqrt(3), rel=1e-6)
    assert mean_interval([5.0]) == (5.0, None)
    assert mean_interval([5.0, None]) == mean_interval([]) == (None, None)
    assert mean_interval([2.0, 2.0]) == (2.0, 0.0)


def test_how_an_interval_is_written() -> None:
    assert spread_text("share", 0.7766, 0.0081) == "77.7 ± 0.8%"
    assert spread_text("share of rows", 0.5, None) == "50.0%"
    assert spread_text("number", -0.4587, 0.065) == "\u22120.459 ± 0.065"
    assert spread_text("number", None, None) == "–"


# --- variants -----------------------------------------------------------------------------------


def test_a_variant_is_a_method_with_settings_of_its_own(project: Path) -> None:
    text = (
        "fedhl, fedit@lora.ranks=[4, 4]@training.steps=3,flexlora@lora.ranks={shares: {2: 1, 4: 1}}"
    )
    parts = parse_variants(text)
    assert len(parts) == 3
    first, second, third = (parse_variant(part) for part in parts)
    assert (first.method, first.changes, first.folder) == ("fedhl", (), "fedhl")
    assert second.changes == ("lora.ranks=[4, 4]", "training.steps=3")
    assert second.folder == "fedit-lora.ranks-4-4-training.steps-3"
    base = load_config(project / "tiny.yaml")
    config = third.config(base, 7, "training.learning_rate=1e-05")
    assert (config.seed, config.method.name) == (7, "flexlora")
    assert config.lora.ranks == RankShares(shares={2: 1.0, 4: 1.0})
    assert config.training.learning_rate == 1e-5
    assert config.lora.targets == base.lora.targets and config.weighting == base.weighting
    assert parse_variant("my.module:Mine").folder == "my.module-Mine"


def test_hyperparameters_in_the_config_stay_with_their_method(project: Path) -> None:
    base = load_config(project / "tiny.yaml", ["method={name: florist, threshold: 0.5}"])
    assert parse_variant("florist").config(base, 0).method.hyperparameters == {"threshold": 0.5}
    assert parse_variant("fedhl").config(base, 0).method.hyperparameters == {"exact": False}
    for text, count, fraction in (
        ("fedhl@participation.count=2", 2, None),
        ("fedhl@participation.count=2@participation.fraction=null", 2, None),
        ("fedhl@participation.count=2@participation.fraction=0.5", None, 0.5),
    ):
        got = parse_variant(text).config(base, 0).participation
        assert (got.count, got.fraction) == (count, fraction)
    own = parse_variant("florist@method.threshold=0.7").config(base, 0)
    assert own.method.hyperparameters == {"threshold": 0.7}


def test_each_method_has_the_weighting_of_its_paper_unless_one_is_named(project: Path) -> None:
    base = load_config(project / "tiny.yaml", ["weighting=null"])
    used = {m: parse_variant(m).config(base, 0).weighting_used.name for m in ("fedhl", "flexlora")}
    assert used == {"fedhl": "truncation", "flexlora": "examples"}
    named = parse_variant("fedhl@weighting=uniform").config(base, 0)
    assert named.weighting_used.name == "uniform"


def test_the_first_setting_that_differs() -> None:
    was = {"a": {"b": 1, "c": [1, 2]}, "d": None}
    assert difference(was, was) is None
    assert difference(was, {"a": {"b": 1, "c": [1, 3]}, "d": None}) == ("a.c", [1, 2], [1, 3])
    assert difference(was, {"a": {"b": 1}, "d": None}) == ("a.c", [1, 2], None)
    assert difference(was, {**was, "d": {"e": 1}}) == ("d", None, {"e": 1})


# --- the same conditions for all ----------------------------------------------------------------


def test_a_run_is_what_fedhl_run_would_make(compared: Path, runs: Path) -> None:
    assert metrics(compared / "flexlora/seed-0") == metrics(runs / "flexlora")


def conditions(run: list[Json]) -> list[Any]:
    """Whose turn it was in each round, and on how many rows and steps."""
    return [[(c["id"], c["examples"], c["steps"]) for c in line["clients"]] for line in run]


def test_methods_see_the_same_clients_rows_and_steps(compared: Path) -> None:
    for seed in (0, 1):
        ours, theirs = (metrics(compared / method / f"seed-{seed}") for method in METHODS)
        assert conditions(ours) == conditions(theirs) and len(conditions(ours)[1]) == 4
        # nothing is aggregated before the first round: same start, same batches, same losses
        losses = [[client["loss"] for client in run[1]["clients"]] for run in (ours, theirs)]
        assert losses[0] == losses[1]
        assert ours[0]["evaluation"] == theirs[0]["evaluation"]
        assert ours[2]["evaluation"]["full"] != theirs[2]["evaluation"]["full"]
    first, second = (metrics(compared / "fedhl" / f"seed-{seed}") for seed in (0, 1))
    assert conditions(first) != conditions(second)


# --- nothing twice ------------------------------------------------------------------------------


def written(folder: Path) -> dict[str, int]:
    """When each file of the run folders was last written."""
    files = (path for path in folder.glob("*/*/**/*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def test_what_is_finished_is_left_alone(compared: Path, project: Path) -> None:
    before, text = written(compared), (compared / "comparison.json").read_text("utf-8")
    page = (compared / "comparison.html").read_bytes()
    assert len([name for name in before if name.endswith("summary.json")]) == 4
    done = fedhl(project, *ARGUMENTS, "--seeds", "0,1", "--out", "runs/compared")
    assert (done.code, done.err) == (0, "")
    assert "round" not in done.out and done.out in (compared / "printed.txt").read_text("utf-8")
    assert written(compared) == before
    assert (compared / "comparison.json").read_text("utf-8") == text
    assert (compared / "comparison.html").read_bytes() == page


def test_stopped_and_killed_it_comes_to_the_same_numbers(compared: Path, project: Path) -> None:
    folder = project / "runs/stopped"
    arguments = [*ARGUMENTS, "--seeds", "0", "--out", "runs/stopped"]
    second = folder / "flexlora/seed-0"
    done = start(project, *arguments).kill_when(
        (second / "state/round-000001").exists, signal.SIGINT
    )
    assert done.code == 130, done
    assert "stopped; 1 of 2 runs are finished" in done.err and "the same command" in done.err
    assert read_summary(second)["status"] == "interrupted"
    assert results(folder)["variants"][1]["runs"][0]["status"] == "interrupted"
    assert "1 of 2 runs are finished" in (folder / "comparison.html").read_text("utf-8")
    rows = [text for text in done.out.splitlines() if text.startswith(("fedhl  ", "flexlora  "))]
    assert [" 1/1 " in rows[0], " 0/1 " in rows[1]] == [True, True]  # it reports what there is

    command = start(project, *arguments)
    done = command.kill_when(lambda: "resuming after round 1 of 2" in command.said())
    assert (done.code, done.err) == (-signal.SIGKILL, "")
    assert done.out.startswith("flexlora, seed 0 (2 of 2)\n")
    done = fedhl(project, *arguments, "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    for method, ours, theirs in zip(
        METHODS, results(folder)["variants"], results(compared)["variants"], strict=True
    ):
        once = without(theirs["runs"][:1], "seconds", "commit")
        assert (
            without(ours["runs"], "seconds", "commit") == once and once[0]["status"] == "finished"
        )
        run = Path(method) / "seed-0"
        assert metrics(folder / run) == metrics(compared / run)


# --- refusals -----------------------------------------------------------------------------------

REFUSALS: dict[str, tuple[Json, list[str], Json, str]] = {
    # changes of the config, variants, other arguments, what is said
    "mixed ranks": (
        {},
        ["fedhl", "fedit"],
        {},
        r"--methods fedit: fedit needs one rank .* has 1, 2, 4, 6; .*: fedit@lora.ranks=2$",
    ),
    "mixed shares": (
        {"lora": {"ranks": {"shares": {8: 1, 2: 2}}}},
        ["ffa_lora"],
        {},
        r"ffa_lora@lora.ranks=2$",
    ),
    "mixed by client": (
        {"lora": {"ranks": {"clients": {"client-1": 4}, "default": 2}}},
        ["fedit@training.steps=1"],
        {},
        r"has 2, 4; .*fedit@training.steps=1@lora.ranks=2$",
    ),
    "unknown method": ({}, ["fedlh"], {}, r"--methods fedlh: .*did you mean 'fedhl'"),
    "unknown setting": ({}, ["fedhl@lora.rank=2"], {}, r"'rank'; did you mean 'ranks'"),
    "no value": ({}, ["fedhl@lora.ranks"], {}, "expected NAME or NAME@KEY=VALUE"),
    "no name": ({}, [""], {}, "expected the name of a method"),
    "a seed of its own": ({}, ["fedhl@seed=3"], {}, "seed follows from --seeds"),
    "another method": ({}, ["fedhl@method.name=fedit"], {}, "method.name follows from its name"),
    "a setting of the method": ({}, ["hetlora@gamma=1"], {}, r"; write hetlora@method\.gamma=1$"),
    "nothing to evaluate": (
        {"evaluation": {"client_fraction": 0.0}},
        ["fedsa_lora@lora.ranks=2"],
        {},
        "--methods fedsa_lora@lora.ranks=2: .* no global model, .* set evaluation.client_fraction",
    ),
    "the same twice": ({}, ["fedhl", "fedhl"], {}, "--methods: fedhl is given twice"),
    "a seed twice": ({}, ["fedhl"], {"seeds": [1, 1]}, "--seeds: 1 is given twice"),
    "a bad seed": ({}, ["fedhl"], {"seeds": [1, -1]}, "seed: .* got -1"),
    "a rate twice": ({}, ["fedhl"], {"rates": [0.1, 0.1]}, "--rates: 0.1 is given twice"),
    "a bad rate": ({}, ["fedhl"], {"rates": [0.1, -1.0]}, "training.learning_rate: .* got -1.0"),
    "a rate of its own": (
        {},
        ["fedhl@training.learning_rate=0.1"],
        {"rates": [0.2]},
        "--rates chooses training.learning_rate",
    ),
    "nothing to choose by": (
        {"evaluation": {"client_fraction": 0}},
        ["fedhl"],
        {"rates": [0.2]},
        r"--set data.validation=500, or .* --set evaluation.client_fraction",
    ),
    "nothing else to report": (
        {"data": {"held_out": None}},
        ["fedhl"],
        {"rates": [0.2]},
        "beside data.held_out",
    ),
}


@pytest.mark.parametrize("mistake", REFUSALS)
def test_a_mistake_is_refused_before_anything_is_run(mistake: str, tmp_path: Path) -> None:
    changes, variants, more, said = REFUSALS[mistake]
    config = load_config(write_config(tmp_path / "c.yaml", classification(**changes)))
    arguments: Json = {"seeds": [0], **more}
    with pytest.raises(UserError, match=said):
        compare(config, variants, folder=str(tmp_path / "out"), **arguments)
    assert not (tmp_path / "out").exists()


def test_the_command_line_refuses_too(project: Path, compared: Path) -> None:
    def refused(*arguments: str) -> str:
        done = fedhl(project, *arguments)
        assert done.code == 2 and done.err.startswith("error: "), done
        assert len(done.err.splitlines()) == 1
        return done.err

    before = written(compared)
    other = refused(*ARGUMENTS, "--set", "training.batch_size=8", "--out", "runs/compared")
    assert "runs/compared/fedhl/seed-0 was made with training.batch_size = 16" in other
    assert "needs 8" in other and "remove that folder, or choose another one with --out" in other
    weighting = refused(*ARGUMENTS, "--weighting", "examples", "--out", "runs/compared")
    assert "weighting.name = 'truncation', and this comparison needs 'examples'" in weighting
    assert written(compared) == before
    assert "cannot write to rows.jsonl" in refused(*ARGUMENTS, "--out", "rows.jsonl")
    with pytest.raises(UserError, match="--seeds '0;1': expected numbers separated by commas"):
        parse_numbers("--seeds", "0;1", int, "0,1,2")


def test_variants_that_are_not_named_again_are_missed(compared: Path) -> None:
    said: list[str] = []
    warn_of_left_out([parse_variant("flexlora")], compared, Watcher(say=said.append))
    assert len(said) == 1 and "the report leaves out fedhl, whose runs" in said[0]
    warn_of_left_out([parse_variant(text) for text in METHODS], compared, Watcher(say=said.append))
    warn_of_left_out([], compared / "elsewhere", Watcher(say=said.append))
    assert len(said) == 1


# --- learning rates -----------------------------------------------------------------------------


def test_a_rate_is_chosen_by_the_clients_and_its_run_is_not_repeated(
    compared: Path, project: Path
) -> None:
    """Of two rates, one of them far too small; and a method of one rank meets the same conditions."""
    arguments = ["compare", "tiny.yaml", "--methods", "fedit@lora.ranks=4", "--seeds", "0"]
    arguments += ["--rates", "1e-6,3e-2", *SHORT, "--out", "runs/tuned"]
    done = fedhl(project, *arguments)
    assert (done.code, done.err) == (0, ""), done
    assert "fedit@lora.ranks=4: learning rate 0.03\n" in done.out and "(2 of 2)" in done.out
    folder, name = project / "runs/tuned", "fedit-lora.ranks-4"
    assert sorted(p.name for p in (folder / name).iterdir()) == ["rate-0.03", "rate-1e-06"]
    (variant,) = results(folder)["variants"]
    assert variant["learning_rate"] == 0.03 and variant["ranks"] == [4]
    assert [run["folder"] for run in variant["runs"]] == [f"{name}/rate-0.03"]
    assert load_run_config(folder / name / "rate-0.03").training.learning_rate == 0.03
    for trial in variant["grid"]:
        final = read_summary(folder / trial["folder"])["final"]
        assert trial["validation"] == final["clients"]["mean"] != final["full"]
    small, large = (trial["validation"]["accuracy"] for trial in variant["grid"])
    assert large > small
    page = (folder / "comparison.html").read_text("utf-8")
    assert "Grid and choice" in page and "rows that the clients hold back" in page
    assert "0.03, at the edge" in page
    chosen = metrics(folder / name / "rate-0.03")
    assert conditions(chosen) == conditions(metrics(compared / "fedhl/seed-0"))
    # with another method, and then with both: everything is there, but the plan was of one of them
    both = "fedhl,fedit@lora.ranks=4"
    for methods in ("fedhl", both):
        done = fedhl(project, *[methods if a == "fedit@lora.ranks=4" else a for a in arguments])
        assert (done.code, done.err) == (0, ""), done
    assert [variant["variant"] for variant in results(folder)["variants"]] == both.split(",")


@pytest.mark.parametrize("rates", [[], [0.1, 0.2]])
def test_what_is_to_be_run(rates: list[float], project: Path) -> None:
    config = load_config(project / "tiny.yaml", ["data.validation=40"])
    variants = [parse_variant(text) for text in ("fedhl", "fedit@lora.ranks=4")]
    study = Study(config, variants, [3, 4], rates, Path("out"))
    folders = [str(job.folder) for job in study.grid()]
    plan = study.plan({})
    if not rates:
        assert folders == [] and study.later == [3, 4] and study.planned == 4
        assert plan["chosen_on"] is None
        assert [run["folder"] for run in plan["variants"][0]["runs"]] == [
            "fedhl/seed-3",
            "fedhl/seed-4",
        ]
        assert plan["variants"][0]["learning_rate"] == config.training.learning_rate
        return
    assert (
        folders[:2] == ["out/fedhl/rate-0.1", "out/fedit-lora.ranks-4/rate-0.1"]
        and len(folders) == 4
    )
    assert {job.config.seed for job in study.grid()} == {3}
    assert study.later == [4] and study.planned == 2 * (2 + 1)
    assert plan["chosen_on"] == "validation"
    assert [run["folder"] for run in plan["variants"][0]["runs"]] == [None, None]
    chosen = {"fedhl": 0.2, "fedit@lora.ranks=4": 0.1}
    runs = study.plan(chosen)["variants"][0]["runs"]
    assert [run["folder"] for run in runs] == ["fedhl/rate-0.2", "fedhl/seed-4-rate-0.2"]
    used = [job.config.training.learning_rate for job in study.sweep(4, chosen)]
    assert used == [0.2, 0.1]


def test_validation_rows_come_before_those_of_the_clients(tmp_path: Path) -> None:
    write_run(tmp_path / "a", line(0, {"loss": 1.0}, {"loss": 2.0}, {"loss": 3.0}))
    write_run(tmp_path / "b", line(0, {"loss": 1.0}, {"loss": 2.0}))
    runs = [{"seed": 0, "folder": "a"}, {"seed": 1, "folder": "b"}]
    read = read_comparison(write_plan(tmp_path, {"a": runs}))
    found = [read.validation(trial) for trial in read.variants[0].trials]
    assert found == [{"loss": 3.0}, {"loss": 2.0}]


# --- reports of folders that are not easy -------------------------------------------------------


def line(round: int, full: Json | None, mean: Json | None, validation: Json | None = None) -> Json:
    clients = mean and {"mean": mean, "worst": mean, "by_client": {}}
    evaluation = {"metric": "accuracy", "full": full, "truncated": full, "clients": clients}
    evaluation |= {"validation": validation} if validation else {}
    return {"round": round, "evaluation": evaluation, "bytes": {"down": 5, "up": 7}}


def write_run(run: Path, *lines: Json, status: str = "finished") -> None:
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    summary = {"status": status, "metric": "accuracy", "weighting": {"name": "uniform"}}
    (run / "summary.json").write_text(json.dumps(summary | {"clients": [{"id": "a", "rank": 4}]}))


def write_plan(folder: Path, variants: dict[str, list[Json]], **more: Any) -> Path:
    """A comparison of these variants, each with its runs."""
    entries = [
        {"variant": name, "learning_rate": 0.1, "grid": more.get("grid", []), "runs": runs}
        for name, runs in variants.items()
    ]
    config = {"model": {"source": "m"}, "data": {"source": "d"}, "rounds": 1}
    plan = {"name": "hand-made", "seeds": [0, 1], "rates": [], "chosen_on": None, "config": config}
    planned = sum(len(runs) for runs in variants.values())
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**plan, "planned": planned, "variants": entries, **more})
    (folder / "comparison.json").write_text(text)
    return folder


def test_the_best_rate_is_the_first_of_equals_and_never_one_that_diverged(tmp_path: Path) -> None:
    means = {
        0.1: {"accuracy": 0.9, "loss": math.nan},
        0.2: {"accuracy": 0.8, "loss": 0.5},
        0.3: {"accuracy": 0.8, "loss": 0.4},
        0.4: {"accuracy": 0.8, "loss": 0.4},
        0.5: {"accuracy": 0.7, "loss": 0.1},
    }
    grid = []
    for rate, mean in means.items():
        write_run(tmp_path / f"r{rate}", line(0, None, mean))
        grid.append({"rate": rate, "folder": f"r{rate}"})
    write_plan(tmp_path, {"a": []}, grid=grid, rates=[*means], chosen_on="clients")
    read = read_comparison(tmp_path)
    assert best_rate(read, "a", read.variants[0].grid) == 0.3
    with pytest.raises(UserError, match="a: no learning rate of --rates gave a finite loss"):
        best_rate(read, "a", read.variants[0].grid[:1])


@pytest.mark.parametrize(
    ("metric", "greater", "best"), [("f1", True, 0.2), ("mae", False, 0.3), ("loss", False, 0.1)]
)
def test_a_rate_is_chosen_by_the_metric_of_the_task(
    metric: str, greater: bool, best: float, tmp_path: Path
) -> None:
    """Of an error the least is best, and of a share the most."""
    grid = []
    for rate, value, loss in ((0.1, 0.5, 0.1), (0.2, 0.8, 0.4), (0.3, 0.2, 0.5)):
        mean = {"loss": loss} | {metric: loss if metric == "loss" else value}
        written = line(0, None, mean)
        written["evaluation"] |= {"metric": metric, "greater": greater}
        write_run(tmp_path / f"r{rate}", written)
        summary = json.loads((tmp_path / f"r{rate}/summary.json").read_text())
        (tmp_path / f"r{rate}/summary.json").write_text(json.dumps(summary | {"metric": metric}))
        grid.append({"rate": rate, "folder": f"r{rate}"})
    runs = [{"seed": 0, "folder": f"r{best}"}]
    write_plan(tmp_path, {"a": runs}, grid=grid, rates=[0.1, 0.2, 0.3], chosen_on="clients")
    read = read_comparison(tmp_path)
    assert best_rate(read, "a", read.variants[0].grid) == best
    assert (read.metric, read.greater) == (metric, greater)
    html = write_comparison(tmp_path).read_text("utf-8")
    shown = {"f1": "80.0%", "mae": "0.200", "loss": "0.100"}[metric]
    assert f"Final {metric}" in html and shown in html


def test_statistics_are_those_of_the_runs(compared: Path) -> None:
    found = results(compared)
    full = []
    for variant, method in zip(found["variants"], METHODS, strict=True):
        summaries = [read_summary(compared / method / f"seed-{seed}") for seed in (0, 1)]
        final = [summary["final"] for summary in summaries]
        full.append([f["full"]["accuracy"] for f in final])
        for kind, values in {
            "full": full[-1],
            "truncated": [f["truncated"]["accuracy"] for f in final],
            "smallest": [f["ranks"]["1"]["accuracy"] for f in final],
            "worst": [f["clients"]["worst"]["accuracy"] for f in final],
        }.items():
            statistics = variant["scores"][kind]["accuracy"]
            assert statistics["values"] == values
            assert statistics["mean"] == pytest.approx(fmean(values))
            assert statistics["half"] == pytest.approx(t_quantile(1) * stdev(values) / 2**0.5)
        assert variant["bytes"]["up"] == fmean(s["bytes"]["up"] for s in summaries)
        seconds = fmean(s["seconds"]["train"] for s in summaries)
        assert variant["seconds"]["train"] == pytest.approx(seconds)
        for run, summary in zip(variant["runs"], summaries, strict=True):
            assert run["hashes"] == summary["hashes"] and run["commit"] == summary["commit"]
        assert (
            variant["ranks"] == [1, 2, 4, 6] and variant["weighting"] == summaries[0]["weighting"]
        )
    pairs = [b - a for a, b in zip(*full, strict=True)]
    assert found["variants"][1]["difference"]["values"] == pairs
    printed = (compared / "printed.txt").read_text("utf-8")
    row = next(text for text in printed.splitlines() if text.startswith("flexlora  "))
    mean = found["variants"][1]["scores"]["full"]["accuracy"]
    assert spread_text("share of rows", mean["mean"], mean["half"]) in row and " 2/2 " in row


def test_the_page_shows_the_numbers_and_loads_nothing(compared: Path) -> None:
    html = (compared / "comparison.html").read_text("utf-8")
    page = Page(html)
    assert page.open == []
    for tag, attributes in page.tags:
        assert tag not in {"link", "img", "iframe", "object", "base"} and not attributes.get("src")
        href = attributes.get("href") or "#"
        assert href.startswith("#") or (compared / href).is_file()  # the runs' own reports
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert len(links) == 4
    assert "http:" not in html.replace("http-equiv", "") and "https:" not in html
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    numbers = page.numbers()
    for variant in results(compared)["variants"]:
        for kind in ("full", "truncated", "smallest"):
            assert variant["scores"][kind]["accuracy"]["mean"] in numbers
        assert variant["bytes"]["down"] / 2**20 in numbers
        assert variant["difference"]["mean"] in numbers or variant["variant"] == "fedhl"
    titles = ("Final accuracy by seed", "Bytes against final accuracy", "Learning curves")
    for title in (*titles, "Seconds against final accuracy"):
        assert title in html
    assert html.count("<svg") == 2 * 6  # each plot at two widths


def test_many_variants_get_a_small_plot_each(tmp_path: Path) -> None:
    names = [f"method-{k}" for k in range(9)]
    for name in names:
        fake_run(tmp_path / name, clients=3, rounds=2)
    write_plan(tmp_path, {name: [{"seed": 0, "folder": name}] for name in names})
    html = write_comparison(tmp_path).read_text("utf-8")
    assert (
        html.count("<figure>") == 2 * 9
        and "With one seed there is no interval" in html
        and Page(html).open == []
    )
    assert [len(table.rows) for table in comparison_tables(tmp_path)] == [9 + 1, 9]  # untrained


def test_differences_are_taken_seed_by_seed(tmp_path: Path) -> None:
    values = {"a": [0.5, 0.75, 0.25], "b": [0.25, 1.0, 0.75]}
    for name, accuracies in values.items():
        for seed, accuracy in enumerate(accuracies):
            status = "running" if (name, seed) == ("b", 1) else "finished"
            metrics = {"accuracy": accuracy, "loss": 1.0}
            write_run(tmp_path / f"{name}{seed}", line(1, metrics, None), status=status)
    runs = {name: [{"seed": k, "folder": f"{name}{k}"} for k in range(3)] for name in values}
    html = write_comparison(write_plan(tmp_path, runs)).read_text("utf-8")
    found = results(tmp_path)["variants"][1]
    assert found["difference"]["values"] == [-0.25, 0.5] and found["finished"] == 2
    assert "Intervals of 2 seeds are very wide" in html  # those of b
    assert "+12.5 ± 476.5 points" in html  # t = 12.706 at one degree of freedom: 12.706 * 0.75/2


def test_a_seed_without_a_finite_value_takes_the_mean_away(tmp_path: Path) -> None:
    good, bad = {"accuracy": 0.5, "loss": 0.5}, {"accuracy": 0.9, "loss": math.nan}
    for k, value in enumerate((good, bad)):
        write_run(tmp_path / f"a{k}", line(0, value, None), line(1, value, None))
        write_run(tmp_path / f"b{k}", line(0, None, good), line(1, None, good))
    runs = {name: [{"seed": k, "folder": f"{name}{k}"} for k in (0, 1)] for name in "ab"}
    html = write_comparison(write_plan(tmp_path, runs)).read_text("utf-8")
    assert "Intervals of 2 seeds are very wide" in html
    first, second = results(tmp_path)["variants"]
    assert first["scores"]["full"]["loss"] == {"mean": None, "half": None, "values": [0.5, None]}
    assert first["scores"]["full"]["accuracy"]["mean"] == 0.7
    # b has no global model: it is compared by its clients, and said to be missing elsewhere
    assert "full" not in second["scores"] and second["scores"]["mean"]["accuracy"]["mean"] == 0.5
    assert "Without one: b." in html and "Mean client" in html
    assert not re.search(r"\b(nan|None)\b", "".join(Page(html).text))
    assert "–" in [str(cell) for cell in comparison_tables(tmp_path)[0].columns[3].cells]


def test_nothing_finished_yet_and_names_that_are_not_tame(tmp_path: Path) -> None:
    bad = '<script>alert("$x^{$")</script>&'
    write_run(tmp_path / "torn", status="running")
    (tmp_path / "torn/metrics.jsonl").write_text('{"round": 0}\n{"rou')
    write_run(tmp_path / "one", line(0, {"accuracy": 0.5, "loss": 1.0}, None))
    runs = {bad: [{"seed": 0, "folder": "torn"}, {"seed": 1, "folder": None}]}
    html = write_comparison(write_plan(tmp_path, runs, name=bad)).read_text("utf-8")
    assert html.count("<script>") == 1 and Page(html).open == []
    assert "0 of 2 runs are finished" in html and "No run has been evaluated yet" in html
    assert "waits for its learning rate" in html and "running" in html
    comparison_tables(tmp_path)
    runs[bad].append({"seed": 2, "folder": "one"})
    html = write_comparison(write_plan(tmp_path, runs, name=bad)).read_text("utf-8")
    assert html.count("<script>") == 1 and "alert(" in "".join(Page(html).text)
    assert "Too few rounds were evaluated" in html


def test_no_text_of_a_comparison_is_taken_for_markup(tmp_path: Path) -> None:
    """Names, settings, hashes, a config and a metric with a tag in them, in every section and plot."""
    rates = [0.1, 0.2]
    entries = []
    for k, variant in enumerate((EVIL, f"fedhl@data={EVIL}")):
        grid = [{"rate": rate, "folder": f"{k}-{rate}"} for rate in rates]
        runs = [{"seed": seed, "folder": one["folder"]} for seed, one in enumerate(grid)]
        entries.append({"variant": variant, "learning_rate": 0.1, "grid": grid, "runs": runs})
        for one in grid:
            run = fake_run(tmp_path / one["folder"], clients=3, rounds=3, seed=k)
            summary = json.loads((run / "summary.json").read_text())
            own = f"{one['rate']}{EVIL}"  # that of no other run: the header names it
            summary |= {"commit": own, "device": own, "precision": EVIL}
            summary |= {"hashes": {"config": EVIL, "data": own, EVIL: EVIL}}
            summary |= {"weighting": {"name": EVIL, EVIL: EVIL, "k": k}, "versions": {EVIL: EVIL}}
            (run / "summary.json").write_text(json.dumps(summary))
    config = {"model": {"source": EVIL}, "data": {"source": EVIL}, "rounds": EVIL, EVIL: EVIL}
    more = {"name": EVIL, "seeds": [0, EVIL], "rates": rates, "chosen_on": "clients"}
    plan = results(write_plan(tmp_path, {}, config=config, **more))

    def page(entries: list[Json]) -> str:
        (tmp_path / "comparison.json").write_text(json.dumps(plan | {"variants": entries}))
        html = write_comparison(tmp_path).read_text("utf-8")
        assert Page(html).open == [] and evil(html) == []
        comparison_tables(tmp_path)
        return html

    html = page(entries)
    titles = ["Results", "Final models", "Learning curves", "Learning rates", "Runs", "Provenance"]
    assert re.findall("<h2>(.*?)</h2>", html) == titles
    assert "".join(Page(html).text).count(EVIL) > 30  # nothing is lost either
    assert "<figure>" in page([entries[0] | {"variant": f"{k}{EVIL}"} for k in range(9)])
    for folder in tmp_path.glob("*/"):
        evil_metric(folder)
    unfinished = tmp_path / "1-0.2/summary.json"
    unfinished.write_text(unfinished.read_text().replace('"finished"', json.dumps(EVIL)))
    assert f"Final {escape(EVIL)}" in page(entries)


def test_runs_that_were_not_made_alike_are_named(tmp_path: Path) -> None:
    for k in (0, 1):
        run = fake_run(tmp_path / f"run{k}", clients=3, rounds=1)
        summary = json.loads((run / "summary.json").read_text())
        summary |= {"commit": f"abc{k}", "hashes": {"data": f"d{k}", "model": "m"}}
        (run / "summary.json").write_text(json.dumps(summary))
    runs = {"a": [{"seed": k, "folder": f"run{k}"} for k in (0, 1)]}
    html = write_comparison(write_plan(tmp_path, runs)).read_text("utf-8")
    assert "The runs do not share one commit: abc0, abc1." in html
    assert "The runs do not share one data: d0, d1." in html and "one model" not in html


def test_a_folder_that_is_no_comparison(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"comparison\.json cannot be read"):
        read_comparison(tmp_path)


def test_the_config_of_a_comparison_can_be_read_back(compared: Path) -> None:
    stored = Config.model_validate(results(compared)["config"])
    assert stored.name == "tiny" and stored.rounds == 2
    run = yaml.safe_load((compared / "fedhl/seed-1/config.yaml").read_text())
    assert (run["name"], run["seed"]) == ("tiny-fedhl-seed-1", 1)
