"""Kill a run at every place where it changes a file, resume it, and compare the bytes.

    python benchmarks/kills.py [--method fedhl_ef] [--json FILE]

A small run of two rounds is killed with SIGKILL just before it opens a file for writing, renames, deletes or
makes one, at each such place in turn. The resumed run is killed, too, at a place drawn at random, and resumed
again; at the end the tensors of the last checkpoint and the metrics, but for seconds, are compared with those
of a run that nobody has killed. Exits with 1 if one run differs or cannot be resumed. Some minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedhl import __version__
from fedhl.config import Config, load_config
from fedhl.run import resume_run, start_run
from fedhl.run.commit import commit

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from support import tiny

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "os.chmod"}


def writes(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an audit event (PEP 578) is about a file that is changed."""
    if event == "open":
        _, mode, flags = arguments
        return bool(set(mode or "") & set("wax+")) or bool(
            flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
    return event in CHANGES


def in_child(work: Callable[[], object], folder: Path, at: int | None) -> tuple[bool, int]:
    """Do the work in a process that is killed before its change number `at` in the folder; whether it was
    killed, and how many changes there were."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        done = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal done
            if not writes(event, arguments) or str(folder) not in str(arguments[0]):
                return
            done += 1
            if done == at:
                os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(hook)
            work()
            os.write(write, str(done).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    _, status = os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        told = pipe.read()
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if not killed and status:
        raise RuntimeError(f"the run has failed, with status {status}")
    return killed, int(told or 0)


def result(folder: Path) -> str:
    """A digest of what a run has come to."""
    newest = max((folder / "state").glob("round-*"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds")
    digest = hashlib.sha256((newest / "state.safetensors").read_bytes())
    digest.update(json.dumps(lines).encode())
    return digest.hexdigest()


def go_on(config: Config, folder: Path) -> Callable[[], object]:
    """What an operator does: resume, or start again where nothing has begun."""
    if (folder / "config.yaml").exists():
        return lambda: resume_run(folder)
    return lambda: start_run(config, folder)


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--method", default="fedhl_ef")
    parser.add_argument("--json", type=Path, help="a file for the counts")
    given = parser.parse_args()
    torch.set_num_threads(1)
    file = given.json and given.json.absolute()  # the runs are made elsewhere
    luck, kills, wrong = random.Random(0), 0, []
    with tempfile.TemporaryDirectory() as place:
        os.chdir(tiny.project(Path(place).resolve()))
        changes = {"name": "killed", "method": given.method, "rounds": 2, "training": {"steps": 2}}
        config = load_config(tiny.write_config(Path("killed.yaml"), tiny.classification(**changes)))
        _, places = in_child(lambda: start_run(config, Path("whole")), Path("whole"), None)
        expected = result(Path("whole"))
        for at in range(1, places + 1):
            folder = Path(f"run-{at}")
            killed, _ = in_child(lambda f=folder: start_run(config, f), folder, at)
            kills += killed
            for again in (luck.randint(1, places), None):
                killed, _ = in_child(go_on(config, folder), folder, again)
                kills += killed
                if not killed:
                    break
            if result(folder) != expected:
                wrong.append(at)
                print(f"killed at place {at}, the run comes to another end", file=sys.stderr)
            print(f"{at} of {places} places, {kills} kills", flush=True)
    told = {
        **{"method": given.method, "places": places, "kills": kills, "wrong": wrong},
        **{"fedhl": __version__, "commit": commit()},
    }
    print(json.dumps(told))
    if file:
        file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
