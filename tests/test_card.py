"""The script for a graphics card, tried out on the CPU: it must work in the minute that a card is at hand."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import card
import card_tables
import pytest
import torch

import docs

ROOT = Path(__file__).resolve().parent.parent


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """`python benchmarks/card.py ARGUMENTS`, from elsewhere, without this package on the path."""
    command = [sys.executable, str(ROOT / "benchmarks/card.py"), *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT.parent, **pipes)


def run(*arguments: str | Path) -> tuple[int, str, str]:
    process = start(*arguments)
    out, err = process.communicate()
    return process.returncode, out, err


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {part: json.loads((folder / f"{part}.json").read_text("utf-8")) for part in card.PARTS}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_dry_run(tmp_path: Path) -> None:
    """All parts, one with weights that are none; then again, with what was missing alone."""
    broken, out = tmp_path / "weights", tmp_path / "out"
    (broken / "minilm").mkdir(parents=True)
    (broken / "minilm/config.json").write_text("{}")
    options = ["--dry-run", "--out", out, "--commit", "this"]

    code, said, err = run(*options, "--weights", broken)
    first = results(out)
    assert code == 1, err
    assert first["c"]["status"].startswith("failed: minilm, float32: UserError: model folder")
    assert {step["status"] for step in first["c"]["steps"].values()} >= {"passed"}
    assert f"c  {first['c']['status']}" in said
    for part in "abdf":
        assert first[part]["status"] == "passed", (part, first[part])
    assert first["e"]["status"] == "left out: a 4-bit base needs CUDA"
    for found in first.values():
        assert found["dry run"] and found["versions"]["torch"] == torch.__version__
        assert found["commit"] == "this"

    code, said, err = run(*options)
    second = results(out)
    assert code == 0, (said, err)
    for part in "abdf":
        assert f"{part}  passed, earlier" in said and second[part] == first[part]
    assert second["c"]["status"] == "passed"
    steps = {part: found["steps"] for part, found in second.items()}
    assert steps["c"]["smollm2, batched"] == first["c"]["steps"]["smollm2, batched"]
    assert steps["c"]["minilm, batched"]["verdict"].endswith("asked for 1.3")
    assert steps["f"]["gsm8k"]["rounds"] == 3
    # float32 is not float64, so what is compared is not the same twice
    assert all(check["difference"] > 0 for check in steps["a"]["methods"]["checks"])

    page = card_tables.tables(card_tables.results(out))
    for words in ("hlora", "344 x 128", "demo-llm.yaml", "forward, backward, optimizer", "gsm8k"):
        assert words in page
    assert "**passed**" in card_tables.cuda(second) and "never run" in card_tables.four_bit(second)


def test_what_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    code, said, err = run("--dry-run", "--seconds", "5", "--out", tmp_path)
    assert code == 0, err
    for part, found in results(tmp_path).items():
        assert found["status"].startswith("left out: "), part
        assert part == "e" or "are left (--seconds)" in found["status"]
        assert f"{part}  {found['status']}" in said


def test_an_unknown_part_is_refused() -> None:
    code, _, err = run("--parts", "a,z")
    assert code == 2
    assert "there is no part 'z', only a, b, c, d, e, f" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so(tmp_path: Path) -> None:
    code, said, err = run("--out", tmp_path)
    assert code == 1
    assert "PyTorch finds no CUDA here; --dry-run tries everything on the CPU" in err
    assert "SmolLM2" in said or "smollm2" in said
    assert not any(tmp_path.iterdir())


def test_results_are_not_written_over_by_a_dry_run() -> None:
    code, _, err = run("--dry-run", "--out", card.RESULTS)
    assert code == 1 and "a dry run does not write where results are kept" in err


def test_ctrl_c_leaves_what_there_is(tmp_path: Path) -> None:
    process = start("--dry-run", "--out", tmp_path, "--parts", "d,b")
    end = monotonic() + 600
    while not (tmp_path / "d.json").is_file() and monotonic() < end:
        sleep(0.05)
    sleep(1)  # it imports PyTorch
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=600)
    assert "the same command goes on with what is missing" in out
    found = json.loads((tmp_path / "d.json").read_text("utf-8"))
    assert found["status"] == "stopped: by Ctrl-C"
    assert not (tmp_path / "b.json").exists()


def test_a_difference_beyond_its_tolerance_is_a_failure() -> None:
    from card_parts import check, judged

    good, bad = check("W", 1e-6, 1e-5), check("V", 2e-5, 1e-5)
    assert judged({"checks": [good]}) == "passed" == judged({})
    assert judged({"checks": [good, bad]}) == "failed: V: 2e-05, tolerance 1e-05"
    assert judged({"checks": [check("U", math.nan, 1.0)]}).startswith("failed: U: nan")


def test_the_pages_say_what_the_results_say() -> None:
    for name in card_tables.PAGES:
        page = (ROOT / name).read_text("utf-8")
        assert card_tables.MARKED.search(page), name
        assert page == docs.with_card(page), "write it anew: make docs"
