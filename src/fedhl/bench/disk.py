"""The server step with states and adapters on disk: its seconds, and its memory."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from time import sleep

import torch

from fedhl import server
from fedhl.bench import problems
from fedhl.bench.checks import check_layer
from fedhl.bench.problems import TOP, draw_ranks, llama_block
from fedhl.bench.timing import Row, Say, describe, timed
from fedhl.lora import LoRA, initial
from fedhl.methods import get_method
from fedhl.seeds import generator
from fedhl.server import Client, Reply, ServerState
from fedhl.shelf import AdapterFile, Shelf, save_adapter
from fedhl.weighting import get_weighting


def reply_to(state: ServerState, client: Client, seed: int) -> Reply:
    """The reply of a client that moved every layer a little."""
    method, g = get_method("fedhl"), generator(seed, "reply")
    adapter = {}
    for name, sent in server.broadcast(method, state, client, 0).items():
        (r, n), m = sent.lora.A.shape, sent.lora.B.shape[0]
        A = sent.lora.A + torch.randn(r, n, generator=g) * (0.2 / n**0.5)
        B = sent.lora.B + torch.randn(m, r, generator=g) * (0.01 / m**0.5)
        adapter[name] = LoRA(A, B, client.scale)
    return Reply(client, state.round + 1, adapter, {}, 0.5, 1)


def from_disk(say: Say, folder: Path | None) -> list[Row]:
    """Rounds of a 7B model with W and the adapters on disk (in `folder`), and the anonymous memory of the
    server: for all q and v projections, and for all linear layers of one block."""
    block = llama_block()
    q_and_v = {
        f"layers.{k}.{name}": block[name]
        for k in range(problems.BLOCKS["llama2"])
        for name in ("q_proj", "v_proj")
    }
    rows = []
    for name, shapes in (("q and v", q_and_v), ("all linear, one block", block)):
        # a process of its own, in which no other part has left memory behind
        with (
            tempfile.TemporaryDirectory(dir=folder) as place,
            ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh,
        ):
            model = f"Llama-2-7B, {name}"
            rows += fresh.submit(rounds_from_disk, model, shapes, Path(place)).result()
        for row in rows[-2:]:
            say(describe(row))
    return rows


def rounds_from_disk(model: str, shapes: Mapping[str, tuple[int, int]], folder: Path) -> list[Row]:
    """Two rounds, with 10 clients and then with 100."""
    method, weighting = get_method("fedhl"), get_weighting("truncation")
    like = method.init(initial(TOP, TOP, rank=TOP, scale=2.0, seed=0), seed=0)
    shelves = [Shelf(folder / f"round-{k}", like) for k in range(3)]
    first = {shape: initial(*shape, rank=TOP, scale=2.0, seed=0) for shape in shapes.values()}
    for name, shape in shapes.items():
        shelves[0][name] = method.init(first[shape], seed=0)
    state, rows = ServerState(0, shelves[0], {}), []
    for round, clients in enumerate((10, 100)):
        replies, size = [], 0
        for k, rank in enumerate(draw_ranks(clients)):
            client, g = Client(f"{k:03d}", rank, 2.0, 100), generator(k, "disk")
            pairs = {  # near the span that was sent, which is that of the first A
                name: LoRA(
                    first[m, n].A[:rank] + torch.randn(rank, n, generator=g) * (0.1 / n**0.5),
                    torch.randn(m, rank, generator=g) * (0.01 / m**0.5),
                    2.0,
                )
                for name, (m, n) in shapes.items()
            }
            save_adapter(folder / client.id, pairs)
            size += (folder / client.id).stat().st_size
            adapter = AdapterFile(folder / client.id, 2.0)
            replies.append(Reply(client, state.round + 1, adapter, {}, 0.5, 1))
            del pairs
        before = state
        with anonymous_memory() as memory:
            (state, outcome), taken = timed(
                partial(
                    server.aggregate,
                    *(method, weighting, before, replies, 0),
                    into=shelves[round + 1],
                    watch=False,
                )
            )
        assert not outcome.refused
        check_layer(list(shapes)[-1], before, state, replies, outcome)
        row: Row = {
            **{"model": model, "matrices": len(shapes), "clients": clients},
            **{"round, s": taken, "adapters on disk, GB": size / 1e9},
            "W on disk, GB": 4e-9 * sum(m * n for m, n in shapes.values()),
            "anonymous memory at its peak, GB": memory[0],
        }
        rows.append(row)
    return rows


@contextmanager
def anonymous_memory() -> Iterator[list[float]]:
    """The largest anonymous memory of this process inside the block, in GB, sampled every 5 ms; mapped
    files do not count. On Linux only; elsewhere NaN."""
    status, peak, over = Path("/proc/self/status"), [float("nan")], threading.Event()

    def sample() -> None:
        peak[0] = 0.0
        while not over.is_set():
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
            peak[0] = max(peak[0], int(lines["RssAnon"].split()[0]) * 1024e-9)
            sleep(0.005)

    watcher = threading.Thread(target=sample)
    if status.is_file():
        watcher.start()
    try:
        yield peak
    finally:
        over.set()
        if status.is_file():
            watcher.join()
