"""What needs no tensor is answered without torch: help, and mistakes that show before a model is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from support.tiny import classification, rows, write_config, write_rows

WITHOUT_TORCH = """
import gc, json, os, sys
from runpy import run_module

class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("torch was imported", name="torch")

sys.meta_path.insert(0, Refusal())
sys.modules["mlflow"] = None  # as if it were not installed
import fedhl.cli, fedhl.federation.examine, rich.text

gc.freeze()  # or each fork copies and visits all objects when it ends
codes, made = [], []
for number, arguments in enumerate(json.loads(sys.argv[1])):
    if child := os.fork():
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        made.append(os.path.exists("new"))
        continue
    for descriptor, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"said/{number}.{kind}", os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = ["fedhl", *arguments]
    run_module("fedhl", run_name="__main__", alter_sys=True)
    sys.exit()
print(json.dumps([codes, made]))
"""
"""`python -m fedhl ARGUMENTS`, many times, where `import torch` fails: what all import is imported once, and
each goes on in a fork."""


class Done(NamedTuple):
    code: int
    out: str
    err: str
    made: bool
    """Whether there is a folder `new`."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config with its rows, a run folder, and a model that nobody gets to load."""
    folder = tmp_path_factory.mktemp("startup")
    write_rows(folder / "rows.jsonl", rows(100))
    write_config(folder / "tiny.yaml", classification(partition={"min_examples": 1}))
    (folder / "broken.yaml").write_text("name: [tiny\n")
    (folder / "bert").mkdir()
    (folder / "runs/tiny").mkdir(parents=True)
    write_config(folder / "runs/tiny/config.yaml", classification())
    return folder


@pytest.fixture(scope="module")
def done(folder: Path) -> dict[str, Done]:
    """What became of all commands here, by their arguments."""
    commands = [*HELP, *MISTAKES, NOTHING_WRONG]
    words = [[word.replace("\xa0", " ") for word in text.split(" ")] for text in commands]
    (folder / "said").mkdir()
    answer = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, json.dumps(words)],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )

    def said(number: int, kind: str) -> str:
        return (folder / f"said/{number}.{kind}").read_text("utf-8")

    codes, made = json.loads(answer.stdout)
    return {
        text: Done(codes[k], said(k, "out"), said(k, "err"), made[k])
        for k, text in enumerate(commands)
    }


HELP = ["--help", "--version", "run --help", "bench server --help"]


@pytest.mark.parametrize("arguments", HELP)
def test_help_needs_no_torch(arguments: str, done: dict[str, Done]) -> None:
    assert (done[arguments].code, done[arguments].err) == (0, "")
    assert "fedhl" in done[arguments].out


NEW = "run tiny.yaml --out new --set "
MISTAKES = {
    # the config
    "run none.yaml": "config file none.yaml does not exist",
    "check broken.yaml": "broken.yaml is not valid YAML",
    "compare broken.yaml --methods fedhl": "broken.yaml is not valid YAML",
    NEW + "rounds": "expected KEY=VALUE",
    NEW + "training.stps=3": "did you mean 'steps'?",
    NEW + "name=null": "name: input should be a valid string",
    NEW + "rounds=ten": "rounds: input should be a valid integer",
    NEW + "lora.ranks=0": "lora.ranks: expected ranks of at least 1",
    NEW + "task.kind=translation": "task.kind: unknown kind 'translation'",
    NEW + "method=fedlh": "method: unknown method 'fedlh'; did you mean 'fedhl'?",
    NEW + "weighting=unifrom": "weighting: unknown weighting 'unifrom'; did you mean 'uniform'?",
    NEW
    + "privacy={clip:\xa01,noise:\xa01}": "privacy: weighting 'truncation' would let one client",
    NEW + "report_to=wandbb": "report_to: unknown tracker 'wandbb'; did you mean 'wandb'?",
    NEW
    + "report_to=mlflow": "mlflow is not installed; install it with `pip install 'fedhl[mlflow]'`",
    # the run folder
    "run tiny.yaml": "runs/tiny exists already",
    "resume nowhere": "nowhere is not a run folder",
    "eval nowhere": "nowhere is not a run folder",
    "eval runs/tiny --round first": "expected best, last or the number",
    "eval runs/tiny --data rowz.jsonl": "did you mean 'rows.jsonl'?",
    "eval runs/tiny --predictions rows.jsonl": "rows.jsonl: the file is there already",
    "eval runs/tiny --samples 3": "a sequence-classification task writes no texts",
    "eval runs/tiny --rank 2": "--rank 2 chooses the model of --predictions",
    "eval runs/tiny --lm-eval arc_easy": "lm-eval is for causal language models, and this run has a",
    "eval runs/tiny --lm-eval arc_easy --classes": "--classes is for held-out rows",
    "eval runs/tiny --json new": "--json is for --lm-eval; add --lm-eval TASKS",
    "export nowhere --rank 2 --out new": "nowhere is not a run folder",
    "export runs/tiny --rank 0 --out new": "--rank must be at least 1, got 0",
    "export runs/tiny --out new": "give either --rank R",
    "track nowhere": "nowhere is not a run folder",
    "track runs/tiny": "runs/tiny has no tracker in its config; name one, e.g. --to tensorboard",
    "track runs/tiny --to mlflow": "mlflow is not installed",
    "report nowhere": "nowhere is not the folder of a run",
    # the model and the data
    NEW + "model.source=./brt": "did you mean 'bert'?",
    NEW + "data.source=rowz.jsonl": "did you mean 'rows.jsonl'?",
    NEW + "data.source=package:no_such/rows.csv": "no package 'no_such'",
    NEW + "task.label=labl": "did you mean 'label'?",
    NEW + "data.where.site=mars": "no row of rows.jsonl has site mars",
    NEW + "partition.clients=500": "rows cannot give 500 clients",
    NEW + "lora.ranks=[1,2]": "2 ranks for 6 clients",
    NEW + "participation={count:\xa09}": "expected at most 6, the number of clients, got 9",
    # other commands
    "merge nowhere/at/all --out new": "no file or folder 'nowhere/at/all'",
    "merge nowhere --out new": "no adapter folder 'nowhere' here",
    "merge bert --weights 1;2 --out new": "expected numbers separated by commas",
    "compare tiny.yaml --methods fedhl,fedlh": "--methods fedlh: method: unknown method 'fedlh'",
    "compare tiny.yaml --methods fedhl --seeds x": "--seeds 'x': expected numbers separated by commas",
    "methods balancd": "did you mean 'balanced'?",
    "bench server --folder nowhere": "nowhere is not a folder",
}
"""Arguments -> what is said. A space inside an argument is written as one that does not break."""


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_told_without_torch(arguments: str, done: dict[str, Done]) -> None:
    code, _, err, made = done[arguments]
    assert code == 2 and err.startswith("error: "), err
    assert MISTAKES[arguments] in err
    assert not made


NOTHING_WRONG = NEW.removesuffix(" --set ")


def test_the_refusal_of_torch_is_not_idle(done: dict[str, Done]) -> None:
    """Where nothing is wrong, a run comes to the line that imports torch."""
    code, _, err, _ = done[NOTHING_WRONG]
    assert code == 1 and "torch was imported" in err
