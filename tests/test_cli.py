"""The command line: what its commands print, and one clear message with exit code 2 for each mistake."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import tiny
from support.tiny import Done, fedhl, rows, write_rows

from fedhl import __version__
from fedhl.cli.app import app, watching
from fedhl.run.overview import size


@pytest.fixture(scope="module")
def bad(project: Path) -> Path:
    """The project, with files that are wrong in one way each."""
    (project / "full").mkdir(exist_ok=True)
    (project / "full/notes.txt").write_text("mine")
    (project / "broken.yaml").write_text("name: [tiny\n")
    made = rows(400)
    del made[307]["text"]
    write_rows(project / "no-text.jsonl", made)
    made = rows(400)
    made[9]["prompt"] = ["a", "list"]
    write_rows(project / "no-prompt.jsonl", made)
    made = rows(20, seed=1)
    made[3]["label"] = "mineral"
    write_rows(project / "new-label.jsonl", made)
    write_rows(project / "one-label.jsonl", [r for r in rows(400) if r["label"] == "plant"])
    made = rows(100)
    made[4]["site"] = "an island"
    write_rows(project / "lonely.jsonl", made)
    return project


def refused(done: Done) -> str:
    """The one message of a command that a user's mistake has stopped."""
    assert done.code == 2, done
    assert "Traceback" not in done.out + done.err
    assert done.err.startswith("error: ") and len(done.err.splitlines()) == 1, done.err
    return done.err.removeprefix("error: ").strip()


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    # the config
    "no config": (["none.yaml"], ["config file none.yaml does not exist"]),
    "unknown key": (["--set", "training.stps=3"], ["'stps'; did you mean 'steps'?"]),
    "rank 0": (["--set", "lora.ranks=0"], ["lora.ranks: expected ranks of at least 1", "got 0"]),
    "too many ranks": (["--set", "lora.ranks=[1, 2]"], ["2 ranks for 6 clients"]),
    "unknown method": (["--set", "method=fedlh"], ["did you mean 'fedhl'?"]),
    "unknown weighting": (["--set", "weighting=unifrom"], ["did you mean 'uniform'?"]),
    "malformed --set": (["--set", "rounds"], ["--set 'rounds': expected KEY=VALUE"]),
    "no CUDA": (["--set", "compute.device=cuda"], ["'cuda' is not available", "finds here: cpu"]),
    "no 4-bit": (
        ["--set", "model.four_bit=true", "--set", "method=fedhl"],
        ["4-bit", "got device 'cpu'"],
    ),
    "no memory in 4-bit": (
        ["--set", "model.four_bit=true"],
        ["model.four_bit", "hold what they were sent in their base", "use method: fedhl"],
    ),
    "no components in 4-bit": (
        ["--set", "model.four_bit=true", "--set", "method=frlora"],
        ["model.four_bit", "components of the base weights", "use method: fedit"],
    ),
    # the model and its layers
    "rank above the layer's": (
        ["--set", "lora.ranks=33"],
        ["layer bert.encoder.layer.0.attention.output.dense of shape 32 x 32", "from 1 to 32"],
    ),
    "no such layer": (["--set", "lora.targets=[querry]"], ["did you mean 'query'?"]),
    "no such model": (["--set", "model.source=./brt"], ["'brt'", "did you mean 'bert'?"]),
    "no model": (["--set", "model.source=full"], ["holds no weights", "notes.txt"]),
    "no adapter": (["--set", "lora.start=bert"], ["bert holds no adapter_config.json"]),
    "mixed ranks": (["--set", "method=fedit"], ["'fedit' needs one rank", "1, 2, 4, 6"]),
    # the data
    "no data": (["--set", "data.source=rowz.jsonl"], ["'rowz.jsonl'", "did you mean 'rows.jsonl'"]),
    "no such field": (["--set", "task.label=labl"], ["rows.jsonl: row 0", "did you mean 'label'?"]),
    "a row without the field": (
        ["--set", "data.source=no-text.jsonl"],
        ["no-text.jsonl: row 307 (counted from 0, line 308): the row has no field 'text'"],
    ),
    "one label": (["--set", "data.source=one-label.jsonl"], ["one-label.jsonl: all", "['plant']"]),
    "a new label": (
        ["--set", "data.held_out={source: new-label.jsonl}"],
        ["new-label.jsonl: row 3", "'mineral', which was not in training", "animal, plant"],
    ),
    "nobody there": (
        ["--set", "data.where={site: mars}"],
        ["data.where", "site mars", "site-0, site-1, site-2"],
    ),
    # the clients
    "more clients than rows": (
        ["--set", "partition={kind: iid, clients: 500}", "--set", "lora.ranks=2"],
        ["340 rows cannot give 500 clients"],
    ),
    "no such split": (
        ["--set", "partition.alpha=0.01", "--set", "partition.min_examples=50"],
        ["min_examples"],
    ),
    "a client of one row": (
        [
            *("--set", "data.source=lonely.jsonl", "--set", "lora.ranks=2"),
            *("--set", "partition={kind: by-column, column: site}", "--set", "data.held_out=null"),
        ],
        ["client 'an island' has 1 rows", "client_fraction"],
    ),
    "unknown client": (
        ["--set", "lora.ranks={clients: {client-7: 3}, default: 1}"],
        ["unknown client 'client-7'"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_anything_is_written(mistake: str, bad: Path) -> None:
    arguments, said = MISTAKES[mistake]
    config = [] if arguments[0].endswith(".yaml") else ["tiny.yaml"]
    message = refused(fedhl(bad, "run", *config, *arguments, "--out", "runs/refused"))
    for part in said:
        assert part in message
    assert not (bad / "runs/refused").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["run", "tiny.yaml", "--rounds", "3"],
            "run has no option --rounds; .* by --set rounds=3$",
        ),
        (["check", "tiny.yaml", "--rounds=3"], "--set rounds=3$"),
        (["run", "tiny.yaml", "--lr", "1e-3"], "--set training.learning_rate=1e-3$"),
        (["run", "--method", "flora", "tiny.yaml"], "--set method=flora$"),
        (["run", "tiny.yaml", "--batch-size"], "training.batch_size=VALUE or --set evaluation.ba"),
    ],
)
def test_a_setting_is_no_option(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        app(arguments)
    printed = capsys.readouterr()
    message = refused(Done(int(str(left.value.code)), printed.out, printed.err))
    assert re.search(said, message)


def test_an_option_that_is_no_setting_either(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app(["run", "tiny.yaml", "--nonsense", "3"])
    assert "No such option" in capsys.readouterr().err


def test_check_says_what_is_odd_in_the_rows(
    bad: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = rows(60)
    for k in range(0, 10):  # prompts without room for a completion
        made[k]["prompt"] = "the " * 40
    write_rows(bad / "odd.jsonl", made)
    write_rows(bad / "odd-held.jsonl", rows(80, seed=5)[60:] + made[20:23])
    monkeypatch.chdir(bad)
    changes = ["data.source=odd.jsonl", "data.limit=null", "task.max_length=16"]
    changes += ["data.held_out={source: odd-held.jsonl}"]
    with pytest.raises(SystemExit) as left:
        app(["check", "lm.yaml", *(f"--set={change}" for change in changes)])
    out = capsys.readouterr().out
    assert left.value.code in (0, None)
    assert "warning: 10 rows dropped: their prompts leave no room for a completion" in out
    seen = re.search(
        r"warning: (\d+) of 23 held-out rows have the text of a training row.*: (.*)", out
    )
    assert seen and seen[2].endswith("line 21, line 22, line 23")
    clients = re.findall(r"│ (site-\d)\s*│\s*\d+ │\s*(\d+)", out)
    assert sorted(clients) == [
        (f"site-{s}", str(sum(k % 3 == s for k in range(10, 60)))) for s in range(3)
    ]


def test_a_broken_config_is_shown_where_it_breaks(bad: Path) -> None:
    done = fedhl(bad, "check", "broken.yaml")
    assert done.code == 2 and "broken.yaml is not valid YAML" in done.err and "line 2" in done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "task.messages=messages"], "no chat template"),
        (["--set", "task.max_length=3"], "max_length 3 leaves no room for a completion"),
        (
            ["--set", "data.source=no-prompt.jsonl"],
            "row 9 (counted from 0, line 10): field 'prompt' is list",
        ),
        (
            ["--set", "partition={kind: dirichlet, clients: 3, alpha: 1}"],
            "needs a field to split by",
        ),
        (["--set", "task.completion=reply"], "has no field 'reply'"),
    ],
)
def test_mistakes_with_language_models(arguments: list[str], said: str, bad: Path) -> None:
    assert said in refused(fedhl(bad, "run", "lm.yaml", *arguments, "--out", "runs/refused"))
    assert not (bad / "runs/refused").exists()


def test_a_folder_that_is_taken(runs: Path, bad: Path) -> None:
    message = refused(fedhl(bad, "run", "tiny.yaml"))
    assert "runs/tiny exists already" in message and "`fedhl resume runs/tiny`" in message
    message = refused(fedhl(bad, "run", "tiny.yaml", "--out", "full"))
    assert "full exists already and is not a run" in message
    assert [p.name for p in (bad / "full").iterdir()] == ["notes.txt"]
    message = refused(fedhl(bad, "run", "tiny.yaml", "--out", "rows.jsonl"))
    assert "rows.jsonl exists already" in message
    message = refused(fedhl(bad, "run", "tiny.yaml", "--out", "rows.jsonl/inside"))
    assert "cannot write to rows.jsonl/inside" in message and "--out" in message


@pytest.mark.parametrize("command", ["resume", "eval", "report", "export --rank 2 --out runs/x"])
@pytest.mark.parametrize("folder", ["full", "nowhere"])
def test_a_folder_that_is_no_run(command: str, folder: str, bad: Path) -> None:
    name, *options = command.split()
    assert folder in refused(fedhl(bad, name, folder, *options))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "x"], "give either --rank R"),
        (["--out", "x", "--rank", "2", "--merged"], "give either --rank R"),
        (["--out", "x", "--rank", "0"], "--rank must be at least 1"),
        (["--out", "x", "--rank", "2", "--round", "first"], "expected best, last or the number"),
        (["--out", "full", "--rank", "2"], "full exists and is not an empty folder"),
    ],
)
def test_exports_that_make_no_sense(arguments: list[str], said: str, bad: Path, runs: Path) -> None:
    assert said in refused(fedhl(bad, "export", runs / "tiny", *arguments))
    assert not (bad / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bert"], "bert holds no adapter_config.json"),
        (["bert", "--weights", "1;2"], "expected numbers separated by commas"),
        (["bert", "--weights", "nan"], "expected finite numbers"),
        (["bert", "--weights", "inf"], "expected finite numbers"),
        (["nowhere/at/all"], "no file or folder 'nowhere/at/all'"),
    ],
)
def test_merges_that_make_no_sense(arguments: list[str], said: str, bad: Path) -> None:
    assert said in refused(fedhl(bad, "merge", *arguments, "--out", "merged"))
    assert not (bad / "merged").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parts", "layer,modle"], "there is no 'modle', only layer"),
        (["--device", "gpu"], "'gpu' is not one of cpu, cuda, mps"),
        (["--run", "full"], "full has no finished round"),
        (["--folder", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_benchmarks_that_cannot_start(arguments: list[str], said: str, bad: Path) -> None:
    assert said in refused(fedhl(bad, "bench", "server", *arguments))


def test_usage_errors_have_the_same_exit_code(bad: Path) -> None:
    for arguments in (["run"], ["frobnicate"], ["run", "tiny.yaml", "--sett", "rounds=1"]):
        done = fedhl(bad, *arguments)
        assert done.code == 2 and "Usage: fedhl" in done.err and "Traceback" not in done.err


def test_ctrl_c_before_there_is_a_run(bad: Path) -> None:
    os.mkfifo(bad / "endless.jsonl")
    source = ["--set", "data.source=endless.jsonl"]
    command = tiny.start(bad, "run", "tiny.yaml", "--out", "runs/early", *source)
    writers: list[int] = []

    def is_read() -> bool:
        try:
            writers.append(os.open(bad / "endless.jsonl", os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # nobody reads it yet
            return False
        return True

    done = command.kill_when(is_read, signal.SIGINT)
    assert done.code == 130
    assert done.err.strip() == "stopped" and not (bad / "runs/early").exists()
    os.close(writers[0])


# --- what the commands print --------------------------------------------------------------------


def test_check_shows_what_a_run_would_be(bad: Path) -> None:
    done = fedhl(bad, "check", "tiny.yaml", "--set", "rounds=7")
    assert (done.code, done.err) == (0, "")
    for part in (
        *("method fedhl_ef, weighting truncation: 7 rounds, 4 of 6 clients", "60 held out"),
        *("17,152 frozen parameters; LoRA on 10 layers; head of 1,122", "client-5", "animal"),
        *("down / round", "together, beside Python, PyTorch and the rows", "activations"),
        "nothing was trained; to train: fedhl run tiny.yaml",
    ):
        assert part in done.out, done.out
    assert not (bad / "runs/early").exists()


def test_check_foresees_the_memory_of_a_run(bad: Path, runs: Path) -> None:
    """Of this one almost all is Python and PyTorch, which a sum of tensors does not know."""
    done = fedhl(bad, "check", "tiny.yaml")
    row = next(r for r in done.out.splitlines() if "the whole process at its peak" in r)
    number, unit = row.split("│")[2].split()
    measured = json.loads((runs / "tiny/summary.json").read_text("utf-8"))["peak_memory_bytes"]
    assert float(number) * {"MB": 1e6, "GB": 1e9}[unit] == pytest.approx(measured, rel=0.3)


def test_check_foresees_the_bytes_of_a_round(bad: Path, runs: Path) -> None:
    done = fedhl(bad, "check", "tiny.yaml")
    first = json.loads((runs / "tiny/metrics.jsonl").read_text("utf-8").splitlines()[1])
    seen: dict[str, Any] = {str(c["rank"]): c["bytes_up"] for c in first["clients"]}
    for rank, bytes in seen.items():
        row = next(r for r in done.out.splitlines() if r.startswith(f"│    {rank} │"))
        assert row.count(f" {size(bytes)} ") == 2


def test_check_counts_what_a_round_sends_and_not_what_all_clients_would(bad: Path) -> None:
    """flora sends everybody the adapters of the whole cohort."""
    full = ["check", "tiny.yaml", "--set", "method=flora", "--set", "weighting=uniform"]
    moves = [
        re.search(r"moves about (\S+) (\S+) down", fedhl(bad, *full, *more).out)
        for more in ([], ["--set", "participation={count: 1}"])
    ]
    four, one = (float(m[1]) * {"kB": 1, "MB": 1e3}[m[2]] for m in moves if m)
    # four times as many clients, and each is sent more; were it always the adapters of all, just four times
    assert four > 5 * one


def test_methods_lists_every_method_law_and_weighting(bad: Path) -> None:
    done = fedhl(bad, "methods")
    assert (done.code, done.err) == (0, "")
    from fedhl import LAWS, METHODS, WEIGHTINGS

    default = f"epsilon={WEIGHTINGS['truncation']().epsilon}"
    for name in (*METHODS, *LAWS, *WEIGHTINGS, default):
        assert name in done.out


def test_report_is_written_anew(runs: Path, bad: Path) -> None:
    page = runs / "tiny/report.html"
    before = page.read_bytes()
    page.unlink()
    done = fedhl(bad, "report", "runs/tiny")
    assert (done.code, done.err) == (0, "")
    assert page.read_bytes() == before
    assert (
        "start" in done.out and "final" in done.out and "report: runs/tiny/report.html" in done.out
    )


def test_eval_takes_other_rows(runs: Path, bad: Path) -> None:
    write_rows(bad / "fresh.jsonl", rows(50, seed=7))
    look = ["--classes", "--rank", "2", "--predictions", "fresh.csv"]
    done = fedhl(bad, "eval", "runs/tiny", "--data", "fresh.jsonl", *look)
    assert (done.code, done.err) == (0, "")
    assert "classes by F1, update truncated to rank 2" in done.out and "\nmacro-F1 0." in done.out
    assert "\npredictions of the update truncated to rank 2 for 50 rows: fresh.csv\n" in done.out
    assert len((bad / "fresh.csv").read_text("utf-8").splitlines()) == 51
    row = next(text for text in done.out.splitlines() if "full-rank update" in text)
    assert " 50 " in row and float(row.split("│")[2]) > 0.8
    assert "new-label.jsonl: row 3" in refused(
        fedhl(bad, "eval", "runs/tiny", "--data", "new-label.jsonl")
    )


def test_help_and_version(bad: Path) -> None:
    assert fedhl(bad, "--version").out == f"fedhl {__version__}\n"
    overview = fedhl(bad, "--help").out
    for command in ("check", "run", "resume", "methods", "merge", "export", "eval", "report"):
        assert command in overview
        done = fedhl(bad, command, "--help")
        assert done.code == 0 and "Usage: fedhl " + command in done.out


# --- completion in the shell --------------------------------------------------------------------


def completed(folder: Path, line: str, variable: str = "complete_bash") -> list[str]:
    """What `python -m fedhl` answers when bash asks it to complete this line."""
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")), "_FEDHL_COMPLETE": variable}
    done = subprocess.run(
        [sys.executable, "-m", "fedhl"],
        cwd=folder,
        env=os.environ | asked,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_the_shell_completes_commands_methods_and_run_folders(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs/one/config.yaml").touch()
    assert completed(tmp_path, "fedhl re") == ["resume", "report"]
    assert completed(tmp_path, "fedhl methods fedh") == ["fedhera", "fedhl", "fedhl_ef"]
    assert completed(tmp_path, "fedhl methods bal") == ["balanced"]
    assert completed(tmp_path, "fedhl resume ") == ["runs/one"]
    assert completed(tmp_path, "fedhl compare c.yaml --methods fedit,fedhl") == [
        *("fedit,fedhl", "fedit,fedhl_ef")
    ]
    assert completed(tmp_path, "fedhl compare c.yaml --methods fedhl,po") == [
        *("fedhl,pooled", "fedhl,pooled_full")
    ]
    assert completed(tmp_path, "fedhl compare c.yaml --weighting un") == ["uniform"]


def test_the_shell_completes_file_names_by_itself(tmp_path: Path) -> None:
    assert completed(tmp_path, "fedhl run ") == []
    script = " ".join(completed(tmp_path, "", "source_bash"))
    assert "complete -o default -F _fedhl_completion fedhl" in script


@pytest.mark.parametrize("level", [logging.NOTSET, logging.ERROR])
def test_a_command_leaves_the_log_of_a_program_as_it_was(level: int) -> None:
    """Within the command the library's notices are shown."""
    logger = logging.getLogger("fedhl")
    before = logger.level, list(logger.handlers)
    logger.setLevel(level)
    try:
        with watching(quiet=False):
            assert logger.isEnabledFor(logging.INFO)
        assert (logger.level, logger.handlers) == (level, before[1])
    finally:
        logger.setLevel(before[0])
