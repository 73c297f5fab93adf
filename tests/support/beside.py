"""What a federation over Flower is compared with: the same run in this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedhl.config import load_config
from fedhl.federation.engine import InProcess
from fedhl.federation.prepare import prepare
from fedhl.run.loop import start_prepared
from fedhl.watch import Watcher
from support import tiny

TESTS = Path(__file__).parent.parent


def environment(folder: Path, **more: str) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
        "FEDHL_CACHE": str(folder / "cache"),
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        **more,
    }


def alone(
    project: Path,
    name: str,
    config: dict[str, Any],
    answered: Callable[[str, int], bool],
    monkeypatch: pytest.MonkeyPatch,
    forgets: Callable[[str, int], bool] = lambda id, round: False,
) -> Path:
    """The same run in this process, with those clients that answered, and that had lost what they held; its
    folder."""
    monkeypatch.chdir(project)
    folder = project / "runs" / f"{name}-alone"
    settings = load_config(tiny.write_config(project / f"{name}.yaml", config))
    start_prepared(prepare(settings), folder, Watcher(), InProcess(answered, forgets))
    return folder
