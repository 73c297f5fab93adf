"""What every test needs: no network, polite threads, and reproducible property tests in CI."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings
from support import tiny

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"  # busy-waiting threads starve a shared machine

pytest.register_assert_rewrite("support.contract", "support.task_federation")

settings.register_profile("local", deadline=None, max_examples=25)
settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process more than processors: that of the federations over a network mostly waits."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first, which has time limits of its own: with several processes, what is begun last
    is what all wait for."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models, rows and configs; runs of tests go into `runs/`, by their own names."""
    return tiny.project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def runs(project: Path) -> Path:
    """Finished runs: `tiny` (mixed ranks), `flexlora`, `fedit` (one rank), `lm` (prompts and
    completions), `chat` (messages, and a server without data). What they printed is in NAME.txt."""
    short = ["--set", "rounds=2", "--set", "training.steps=2", "--quiet", "--out"]
    commands = {
        "tiny": ["tiny.yaml"],
        "lm": ["lm.yaml", "--out", "runs/lm"],
        "chat": ["chat.yaml", "--out", "runs/chat"],
        "flexlora": ["tiny.yaml", "--set", "method=flexlora", *short, "runs/flexlora"],
        "fedit": [
            "tiny.yaml",
            "--set",
            "method=fedit",
            "--set",
            "lora.ranks=4",
            *short,
            "runs/fedit",
        ],
    }
    started = {name: tiny.start(project, "run", *arguments) for name, arguments in commands.items()}
    for name, command in started.items():
        done = command.wait()
        assert (done.code, done.err) == (0, ""), done
        (project / f"{name}.txt").write_text(done.out)
    return project / "runs"
