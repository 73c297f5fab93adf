"""The example that turns the standard library into data."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "examples" / "stdlib_functions.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=600
    )


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_rows_are_functions_of_several_packages(tmp_path: Path) -> None:
    out = tmp_path / "new" / "functions.jsonl"
    done = run(str(out))
    assert done.returncode == 0, done.stderr
    rows = read(out)
    counts = {row["package"]: 0 for row in rows}
    for row in rows:
        counts[row["package"]] += 1
        (function,) = ast.parse(row["prompt"] + row["completion"]).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function) is not None and len(function.body) > 1
        (stub,) = ast.parse(row["prompt"]).body  # the docstring is a body: the prompt parses alone
        assert isinstance(stub, ast.FunctionDef | ast.AsyncFunctionDef) and len(stub.body) == 1
        assert row["name"].startswith(row["package"] + ".")
        assert 20 <= len(row["completion"]) <= 1200
    assert len({(row["prompt"], row["completion"]) for row in rows}) >= len(rows) * 0.99
    assert len(counts) >= 8 and min(counts.values()) >= 30
    assert f"{'asyncio':<16}{counts['asyncio']:>6}" in done.stdout.splitlines()
    assert str(len(rows)) in done.stdout.splitlines()[-1]


def test_the_same_rows_every_time_and_spread_out(tmp_path: Path) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "all.jsonl"]
    for path in files[:2]:
        assert run(str(path), "--packages", "logging", "--max-per-package", "9").returncode == 0
    run(str(files[2]), "--packages", "logging")
    assert files[0].read_bytes() == files[1].read_bytes()
    some, every = read(files[0]), read(files[2])
    assert len(some) == 9 and [row for row in every if row in some] == some
    assert {row["name"].split(".")[1] for row in some} >= {"config", "handlers"}


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    done = run(str(tmp_path / "a.jsonl"), "--packages", "no_such_package")
    assert done.returncode == 2 and "no_such_package" in done.stderr
    assert "Traceback" not in done.stderr
    assert run(str(tmp_path / "a.jsonl"), "--max-per-package", "0").returncode == 2


def test_how_a_function_is_cut() -> None:
    spec = spec_from_file_location("stdlib_functions", SCRIPT)
    assert spec and spec.loader
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    source = '''\x0c
class Door:
    @property
    def state(self):
        """Open
        or shut."""

        # Why not both?
        return """
kept at the margin
        """ if self.open else "shut"

    def bare(self):
        return "no docstring at all here"

    def stub(self):
        """Nothing but a docstring."""

    def short(self):
        """Doc."""
        pass


async def one_line(x):
    """Doc."""; return "on the same line"
'''
    assert list(script.functions(source)) == [
        (
            "Door.state",
            '@property\ndef state(self):\n    """Open\n    or shut."""\n',
            '    # Why not both?\n    return """\nkept at the margin\n    """ if self.open else "shut"',
        )
    ]
