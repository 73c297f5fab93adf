"""The examples for Python run to their end, as a reader would run them cell by cell."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples" / "python"
LAST = {
    "quick_start": "held-out accuracy 0.",
    "own_model": "{'calm': ",
    "two_methods": "fedhl_ef - fedhl: ",
    "merging": "largest difference ",
}
"""How the last line that each of them prints begins."""


def test_every_example_is_run():
    assert {path.stem for path in FOLDER.glob("*.py")} == LAST.keys()


@pytest.mark.parametrize("name", LAST)
def test_an_example_runs_to_its_end(name: str, capsys: pytest.CaptureFixture[str]):
    with torch.random.fork_rng():
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1].startswith(LAST[name])
