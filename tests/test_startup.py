"""What needs no tensor is answered without torch: help, and mistakes that show before a model is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny import classification, rows, write_config, write_rows

WITHOUT_TORCH = """
import sys
from runpy import run_module

class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("torch was imported", name="torch")

sys.meta_path.insert(0, Refusal())
run_module("fedhl", run_name="__main__", alter_sys=True)
"""


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


def without_torch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m fedhl ARGUMENTS` where `import torch` fails."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("arguments", ["--help", "--version", "run --help", "bench server --help"])
def test_help_needs_no_torch(arguments: str, folder: Path) -> None:
    done = without_torch(folder, *arguments.split())
    assert (done.returncode, done.stderr) == (0, "")
    assert "fedhl" in done.stdout


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
    # the run folder
    "run tiny.yaml": "runs/tiny exists already",
    "resume nowhere": "nowhere is not a run folder",
    "eval nowhere": "nowhere is not a run folder",
    "eval runs/tiny --round first": "expected best, last or the number",
    "eval runs/tiny --data rowz.jsonl": "did you mean 'rows.jsonl'?",
    "export nowhere --rank 2 --out new": "nowhere is not a run folder",
    "export runs/tiny --rank 0 --out new": "--rank must be at least 1, got 0",
    "export runs/tiny --out new": "give either --rank R",
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
def test_a_mistake_is_told_without_torch(arguments: str, folder: Path) -> None:
    words = [word.replace("\xa0", " ") for word in arguments.split(" ")]
    done = without_torch(folder, *words)
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert MISTAKES[arguments] in done.stderr
    assert not (folder / "new").exists()


def test_the_refusal_of_torch_is_not_idle(folder: Path) -> None:
    """Where nothing is wrong, a run comes to the line that imports torch."""
    done = without_torch(folder, *NEW.split()[:-1])
    assert done.returncode == 1 and "torch was imported" in done.stderr
