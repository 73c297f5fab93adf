"""Time and weigh the same rounds in the three ways: one process, Ray, and over the network.

    python benchmarks/ways.py [--model toy minilm] [--ways WAY ...] [--rounds 3] [--repeats 1] [--json FILE]

Over the network is a SuperLink and a SuperNode for each client, on this machine, once with TLS and node
authentication and once without. Every way trains all clients in every round and must end in the same server
state, to the bit. Nothing is evaluated but in the first round and after the last that is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import psutil

HERE = Path(__file__).parent
sys.path[:0] = [
    str(HERE.parent / "examples" / "deployment"),
    str(HERE.parent / "tests"),
]  # before this folder, which has another `federation`

from federation import difference  # noqa: E402
from loopback import Loopback, family, wait_until  # noqa: E402
from support import tiny  # noqa: E402

from fedhl.config import Config, dump_config, load_config  # noqa: E402
from fedhl.network.node import partition  # noqa: E402
from fedhl.run.commit import commit  # noqa: E402

ACTORS = 2
"""Processes for the clients of Ray: as many as the machine this is run on has processors."""
WAYS = ("one process", "ray", "network, TLS", "network, plain")


class Watch:
    """Looks at processes and at a run's folder twenty times a second: when each round was written, and the
    largest proportional set size (PSS: memory shared by n processes counts 1/n in each) of all together, and
    of each group of processes."""

    def __init__(self, run: Path, groups: Callable[[], dict[str, int]]) -> None:
        self.run, self.groups = run, groups
        self.began, self.written = perf_counter(), list[float]()
        self.together, self.peaks = 0, dict[str, int]()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()

    def look(self) -> None:
        weighed = 0.0
        while not self.over.wait(0.05):
            with suppress(FileNotFoundError):
                lines = (self.run / "metrics.jsonl").read_bytes().count(b"\n")
                self.written += [perf_counter() - self.began] * (lines - len(self.written))
            if perf_counter() - weighed > 1:
                weighed, total = perf_counter(), 0
                for name, pid in self.groups().items():
                    here = sum(pss(process) for process in family(pid))
                    self.peaks[name] = max(self.peaks.get(name, 0), here)
                    total += here
                self.together = max(self.together, total)

    def end(self) -> None:
        sleep(0.2)  # for the last line
        self.over.set()
        self.thread.join()


def pss(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return process.memory_full_info().pss
    return 0


def one_command(config: Path, run: Path, *more: str) -> Watch:
    """`fedhl run`, to its end."""
    fedhl = str(Path(sys.executable).with_name("fedhl"))
    log = run.with_suffix(".log").open("wb")
    with subprocess.Popen(
        [fedhl, "run", str(config), "--out", str(run), "--quiet", *more], stdout=log, stderr=log
    ) as process:
        watch = Watch(run, lambda: {"all": process.pid})
        code = process.wait()
        watch.end()
    assert code == 0, run.with_suffix(".log").read_text("utf-8")
    return watch


def over_network(config: Config, run: Path, clients: Sequence[str], secure: bool) -> Watch:
    """`fedhl serve` with a SuperLink and a SuperNode for each client."""
    federation = Loopback(run.with_name(run.name + "-network"), Path.cwd(), secure)
    groups: dict[str, int] = {}
    watch = Watch(run, lambda: dict(groups))
    try:
        groups["server"] = federation.superlink().pid
        for client in clients:
            if secure:
                federation.register(client)
            node = federation.supernode(client, {"client": client, "data": "partition"})
            groups[f"client {client}"] = node.pid
        process = federation.submit(config, run)
        wait_until(lambda: process.poll() is not None, 3600, lambda: federation.log("run"))
        watch.end()
        finished = json.loads((run / "summary.json").read_text())["status"]
        assert finished == "finished", federation.log("run")
    finally:
        federation.stop()
    return watch


def told(watch: Watch, rounds: int) -> dict[str, Any]:
    """Seconds until the first round begins, of that round and of each other, and the peaks in MB."""
    start, *written = watch.written[: rounds + 1]
    seconds = [later - earlier for earlier, later in zip([start, *written], written, strict=False)]
    clients = [peak for name, peak in watch.peaks.items() if name.startswith("client")]
    groups = {"server": watch.peaks["server"], "client": max(clients)} if clients else {}
    peaks = {"together": watch.together, **groups}
    return {
        "start_seconds": start,
        "first_round_seconds": seconds[0],
        "round_seconds": seconds[1:],
        "peak_pss_mb": {name: peak / 1e6 for name, peak in peaks.items()},
    }


def measure(
    config: Config, folder: Path, ways: Sequence[str], rounds: int, repeats: int
) -> dict[str, Any]:
    """These ways in turn, as often as is asked for; the first is what the others are compared with."""
    file = folder / "config.yaml"
    file.write_text(dump_config(config), "utf-8")
    clients = sorted(partition(config)[1])
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    first: Path | None = None
    for k in range(repeats):
        for way in ways:
            run = folder / f"{way.replace(' ', '-').replace(',', '')}-{k}"
            first = first or run
            if way == "one process":
                watch = one_command(file, run)
            elif way == "ray":
                watch = one_command(file, run, "--ray", str(ACTORS))
            else:
                watch = over_network(config, run, clients, "TLS" in way)
            apart = difference(first, run)
            assert apart == 0, (way, apart)
            found[way].append(told(watch, rounds))
            print(way, json.dumps(found[way][-1]), flush=True)
    return {
        "clients": len(clients),
        "ranks": config.lora.model_dump()["ranks"],
        "steps": config.training.steps,
        "threads": config.compute.threads,
        "largest_state_difference": 0.0,
        "ways": {way: summarised(those) for way, those in found.items()},
    }


def summarised(those: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the repeats, the rounds after the first together; and what they are of."""
    rounds = [x for one in those for x in one["round_seconds"]]
    peaks = {
        name: median(one["peak_pss_mb"][name] for one in those) for name in those[0]["peak_pss_mb"]
    }
    return {
        "start_seconds": median(one["start_seconds"] for one in those),
        "first_round_seconds": median(one["first_round_seconds"] for one in those),
        "round_seconds": median(rounds),
        "peak_pss_mb": peaks,
        "each": list(those),
    }


def settings(model: str, folder: Path, rounds: int) -> Config:
    """The toy of the tests, or the demo, with everybody in each of the rounds and one that is not timed."""
    common = ["participation={fraction: 1.0}", f"rounds={rounds + 1}", "compute.threads=1"]
    common += [f"evaluation.every={rounds + 1}", "evaluation.client_fraction=0.0"]
    if model == "minilm":
        return load_config(
            HERE.parent / "configs" / "demo.yaml", [*common, "data.held_out.count=50"]
        )
    tiny.save_bert(folder / "bert")
    tiny.write_rows(folder / "rows.jsonl", tiny.rows(400))
    tiny.write_config(folder / "toy.yaml", tiny.classification())
    places = [f"model.source={folder / 'bert'}", f"data.source={folder / 'rows.jsonl'}"]
    return load_config(folder / "toy.yaml", [*common, *places])


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--model", nargs="+", choices=["toy", "minilm"], default=["toy", "minilm"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--rounds", type=int, default=3, help="that are timed")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    result: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
        "versions": {name: version(name) for name in ("fedhl", "flwr", "ray", "torch")},
        "commit": commit(),
        "rounds": given.rounds,
        "repeats": given.repeats,
        "models": {},
    }
    with tempfile.TemporaryDirectory() as place:
        os.environ["FEDHL_CACHE"] = str(Path(place) / "cache")
        for model in given.model:
            folder = Path(place) / model
            folder.mkdir()
            config = settings(model, folder, given.rounds)
            result["models"][model] = measure(
                config, folder, given.ways, given.rounds, given.repeats
            )
            if given.json:  # as it comes
                given.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
