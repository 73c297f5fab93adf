"""Timings of the server step, each checked for correctness in the same run: `fedhl bench server`."""

from __future__ import annotations

import json
import platform
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedhl import __version__, server
from fedhl.lora import LoRA, initial, refill, svd
from fedhl.method import Update
from fedhl.methods import get_method
from fedhl.methods.fedhl import FedHL
from fedhl.methods.full_rank import FullRank
from fedhl.record import rounds_in
from fedhl.run.summary import commit
from fedhl.seeds import generator
from fedhl.server import Client, Outcome, Reply, ServerState
from fedhl.shelf import AdapterFile, Shelf, save_adapter
from fedhl.subspace import FLOOR, TOLERANCE, iterate, leading
from fedhl.weighting import get_weighting

RANKS = (4, 8, 16, 32, 64)
TOP = 64
SIDE = 4096
SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "fast, 2^(-j/8)": lambda j: 2 ** (-j / 8),
    "1/j": lambda j: 1 / j,
    "slow, 1/sqrt j": lambda j: j**-0.5,
}
SMOLLM2 = {
    **{"q_proj": (576, 576), "k_proj": (192, 576), "v_proj": (192, 576), "o_proj": (576, 576)},
    **{"gate_proj": (1536, 576), "up_proj": (1536, 576), "down_proj": (576, 1536)},
}
BLOCKS = {"smollm2": 30, "llama2": 32}
Row = dict[str, Any]
Say = Callable[[str], None]
T = TypeVar("T")


def timed(work: Callable[[], T], device: str = "cpu") -> tuple[T, float]:
    """What `work` returns, and its wall time, with what it left running on an accelerator."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = perf_counter()
    result = work()
    wait()
    return result, perf_counter() - start


def interleaved(
    works: Mapping[str, Callable[[], object]], repeats: int, device: str
) -> dict[str, float]:
    """Median seconds of each, after one call of each to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            spent = timed(work, device)[1]
            if repeat:
                taken[name].append(spent)
    return {name: median(times) for name, times in taken.items()}


def orthogonal(n: int, seed: int, columns: int | None = None) -> Tensor:
    """Orthonormal columns (n, columns), as many as rows unless given."""
    return torch.linalg.qr(torch.randn(n, columns or n, generator=generator(seed, "bench"))).Q


def with_spectrum(sigma: Tensor, bases: tuple[Tensor, Tensor]) -> Tensor:
    return (bases[0] * sigma.float()) @ bases[1].T


def harmonic(m: int, n: int) -> Tensor:
    """W (m, n) with the singular values 1/j."""
    k = min(m, n)
    return with_spectrum(1 / torch.arange(1, k + 1), (orthogonal(m, 1, k), orthogonal(n, 2, k)))


def state_of(W: Tensor) -> FullRank:
    """The server's state of one layer with this W."""
    B, A, tail = leading(W, TOP)
    return FullRank(W, refill(LoRA(A, B, 1.0), TOP, 0), tail, 0, 0)


def drawn(clients: int, seed: int = 0) -> list[int]:
    """A rank for each client."""
    g = generator(seed, "ranks")
    return [RANKS[int(torch.randint(len(RANKS), (1,), generator=g))] for _ in range(clients)]


def cohort(state: FullRank, ranks: Sequence[int], seed: int) -> list[Update]:
    """Clients that each moved by about a fifth of the length of what they were sent."""
    method, g = FedHL(), generator(seed, "moves")
    m, n = state.shape
    size = 0.2 * float(state.sent.B.norm())
    sent = {rank: method.broadcast(state, rank, 2.0) for rank in set(ranks)}
    updates = []
    for rank in ranks:
        lora, device = sent[rank].lora, state.W.device
        A = torch.randn(rank, n, generator=g).to(device) * (0.2 / n**0.5)
        B = torch.randn(m, rank, generator=g).to(device) * (size / 2 / (m * rank) ** 0.5)
        trained = LoRA(lora.A + A, lora.B + B, lora.scale)
        updates.append(Update(sent[rank], trained, 1 / len(ranks)))
    return updates


def to(state: FullRank, device: str) -> FullRank:
    sent = LoRA(state.sent.A.to(device), state.sent.B.to(device), 1.0)
    return replace(state, W=state.W.to(device), sent=sent)


def step(method: FedHL, state: FullRank, updates: Sequence[Update]) -> FullRank:
    """What a round costs the server for one layer: sum, truncate, and write what every rank is sent."""
    following = method.aggregate(state, updates)
    for rank in RANKS:
        method.broadcast(following, rank, 2.0)
    return following


def literal(state: FullRank, updates: Sequence[Update]) -> Tensor:
    """`W + Σ p_i (s_i B_i A_i - T_{r_i}(W))` as it is written: a full SVD for each client."""
    total = state.W.clone()
    for u in updates:
        U, S, Vt = svd(state.W)
        r = u.lora.rank
        total += u.weight * (u.lora.delta() - (U[:, :r] * S[:r]) @ Vt[:r])
    return total


def dense_step(state: FullRank, updates: Sequence[Update]) -> Tensor:
    """The same in float64, with what was sent."""
    total = state.W.double()
    for u in updates:
        for sign, x in ((1, u.lora), (-1, u.sent.lora)):
            total += sign * u.weight * x.scale * (x.B.double() @ x.A.double())
    return total


def difference(W: Tensor, state: FullRank, updates: Sequence[Update]) -> float:
    """How far the next W is from that of float64, relative. Raises AssertionError beyond what float32
    sums of inner size `Σ r_i` lose, their rounding errors being of either sign."""
    want = dense_step(state, updates)
    off = float((W.double() - want).norm() / want.norm())
    assert off < 1e-7 * sum(u.lora.rank for u in updates) ** 0.5, off
    return off


def bare(state: FullRank, total_rank: int) -> Callable[[], Tensor]:
    """The product `B A` that no server can do without."""
    (m, n), device = state.shape, state.W.device
    B, A = torch.randn(m, total_rank).to(device), torch.randn(total_rank, n).to(device)
    return lambda: B @ A


def one_layer(repeats: int, say: Say, device: str) -> list[Row]:
    """A step against the bare product, the same with a full SVD, and the literal algorithm."""
    bases, j = (orthogonal(SIDE, 1), orthogonal(SIDE, 2)), torch.arange(1, SIDE + 1)
    rows = []
    for name, spectrum in SPECTRA.items():
        state = to(state_of(with_spectrum(spectrum(j), bases)), device)
        for clients in (10, 100):
            updates = cohort(state, drawn(clients), clients)
            total_rank = sum(u.lora.rank for u in updates)
            works: dict[str, Callable[[], object]] = {
                "bare product": bare(state, total_rank),
                "step": partial(step, FedHL(), state, updates),
            }
            full = clients == 10 and name == "1/j"  # the time of a full SVD does not depend on W
            if full:
                works["step with a full SVD"] = partial(step, FedHL(exact=True), state, updates)
            taken = interleaved(works, repeats, device)
            after = step(FedHL(), state, updates)
            off = difference(after.W, state, updates)
            cold = timed(partial(leading, after.W, TOP), device)[1]
            row: Row = {
                **{"spectrum": name, "side": SIDE, "clients": clients, "total rank": total_rank},
                **{f"{work}, s": value for work, value in taken.items()},
                "step / bare product": taken["step"] / taken["bare product"],
                "truncation from nothing, s": cold,
                "relative difference from float64": off,
            }
            if full:
                theirs, spent = timed(partial(literal, state, updates), device)
                off = float((after.W - theirs).norm() / theirs.norm())
                # both truncations of W are optimal within the tolerance, not the same
                assert off < 2 * TOLERANCE**0.5, off
                row |= {
                    "full SVD / step": taken["step with a full SVD"] / taken["step"],
                    **{"literal, s (once)": spent, "literal / step": spent / taken["step"]},
                    "relative difference from literal": off,
                }
            rows.append(row)
            say(describe(row))
    return rows


def accuracy(say: Say, runs: Sequence[Path]) -> list[Row]:
    """The tail energy that truncation leaves against the optimum, for every rank, in float64."""
    side = SIDE // 2
    bases, j = (orthogonal(side, 1), orthogonal(side, 2)), torch.arange(1, side + 1)
    cases: dict[str, Tensor] = {
        name: with_spectrum(spectrum(j), bases) for name, spectrum in SPECTRA.items()
    }
    cases["none, Gaussian"] = torch.randn(side, side, generator=generator(0, "flat"))
    cases["none, all equal"] = with_spectrum(torch.ones(side), bases)
    cases["rank 30"] = with_spectrum((j <= 30).double(), bases)
    for run in runs:
        newest = next(iter(rounds_in(run / "state").values())) / "state.safetensors"
        cases |= {
            f"{run.name}, {key.split('::')[1]}": tensor
            for key, tensor in load_file(newest).items()
            if key.startswith("layer::") and key.endswith("::W") and tensor.any()
        }
    rows: list[Row] = []
    for name, W in cases.items():
        top = min(TOP, min(W.shape) // 4)
        found, cold = timed(partial(iterate, W, top, None))
        full = timed(partial(svd, W))[1]
        if found is None:
            raise AssertionError(f"{name}: it did not settle")
        tails = torch.linalg.svdvals(W.double()).square().flip(0).cumsum(0).flip(0)
        excess: dict[int, float] = {}
        for r in (r for r in RANKS if r <= top):
            cut = found.B[:, :r].double() @ found.A[:r].double()
            got, best, whole = float((W - cut).square().sum()), float(tails[r]), float(tails[0])
            excess[r] = (got - best) / max(best, FLOOR / TOLERANCE * whole)
        assert max(excess.values()) <= TOLERANCE, (name, excess)
        rows.append(
            {
                **{"spectrum": name, "shape": list(W.shape), "ranks": list(excess)},
                "largest relative excess of the tail": max(excess.values()),
                **{"from nothing, s": cold, "full SVD, s": full},
            }
        )
    worst = max(rows, key=lambda row: row["largest relative excess of the tail"])
    say(f"{len(rows)} matrices, the worst: {describe(worst)}")
    return rows


def growth(repeats: int, say: Say, device: str) -> list[Row]:
    """Time against the number of clients at one total rank, against the total rank, and the side."""
    rows = []

    def measure(side: int, ranks: Sequence[int], what: str) -> None:
        state, updates = states[side], cohort(states[side], ranks, len(ranks))
        method, after = FedHL(), FedHL().aggregate(states[side], updates)
        start = state.sent.A
        taken = interleaved(
            {
                "step": partial(step, method, state, updates),
                "truncation": partial(leading, after.W, TOP, start),
            },
            repeats,
            device,
        )
        difference(after.W, state, updates)
        row = {"series": what, "side": side, "clients": len(ranks), "total rank": sum(ranks)}
        rows.append(row | {f"{work}, s": value for work, value in taken.items()})
        say(describe(rows[-1]))

    sides = (SIDE // 4, SIDE // 2, SIDE)
    states = {side: to(state_of(harmonic(side, side)), device) for side in sides}
    for clients, rank in ((50, 64), (200, 16), (800, 4)):
        measure(SIDE, [rank] * clients + [TOP], f"{clients} of rank {rank}, and one of {TOP}")
    for clients in (10, 30, 100, 300):
        measure(SIDE, drawn(clients), "clients")
    for side in (SIDE // 4, SIDE // 2):
        measure(side, drawn(100), "side")
    return rows


def ceilings(
    repeats: int, say: Say, device: str, cohorts: Sequence[int] = (100,), side: int | None = None
) -> list[Row]:
    """A step of each layer shape of Llama-2-7B, or of one with matrices of another side, against the product
    and the copy of W that no server can do without, for so many clients; last, all linear layers together,
    one after the other."""
    rows: list[Row] = []
    for (m, n), layers in Counter(llama_block(side).values()).items():
        state = to(state_of(harmonic(m, n)), device)
        for ranks in map(drawn, cohorts):
            updates = cohort(state, ranks, len(ranks))
            taken = interleaved(
                {
                    "copy of W": state.W.clone,
                    "bare product": bare(state, sum(ranks)),
                    "step": partial(step, FedHL(), state, updates),
                },
                repeats,
                device,
            )
            off = difference(FedHL().aggregate(state, updates).W, state, updates)
            rows.append(
                {
                    **{"shape": [m, n], "layers": layers * BLOCKS["llama2"], "clients": len(ranks)},
                    **against_ceiling(taken),
                    "copy, GB/s": 8e-9 * m * n / taken["copy of W"],
                    "product, TFLOP/s": 2e-12 * m * n * sum(ranks) / taken["bare product"],
                    "relative difference from float64": off,
                }
            )
            say(describe(rows[-1]))
    wholes: list[Row] = []
    for clients in cohorts:
        theirs = [row for row in rows if row["clients"] == clients]
        total = {
            work: sum(row["layers"] * row[f"{work}, s"] for row in theirs)
            for work in ("copy of W", "bare product", "step")
        }
        count = sum(row["layers"] for row in theirs)
        whole: Row = {"model": "Llama-2-7B, all linear", "layers": count, "clients": clients}
        wholes.append(whole | against_ceiling(total))
        say(describe(wholes[-1]))
    return rows + wholes


def against_ceiling(taken: Mapping[str, float]) -> Row:
    """The seconds of each, and the step's against those of the product and the copy."""
    ratio = taken["step"] / (taken["bare product"] + taken["copy of W"])
    return {f"{work}, s": value for work, value in taken.items()} | {
        "step / (product + copy)": ratio
    }


def llama_block(side: int | None = None) -> dict[str, tuple[int, int]]:
    """The linear layers of one of Llama-2-7B's blocks, or of one with square matrices of another side."""
    side = side or SIDE
    wide = 11008 * side // 4096
    return {
        **{name: (side, side) for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
        **{"gate_proj": (wide, side), "up_proj": (wide, side), "down_proj": (side, wide)},
    }


def whole_model(repeats: int, say: Say) -> list[Row]:
    """A round of SmolLM2-135M's 210 matrices with 100 clients: checks, weights, sums and truncations."""
    shapes = {
        f"layers.{block}.{name}": shape
        for block in range(BLOCKS["smollm2"])
        for name, shape in SMOLLM2.items()
    }
    method, weighting = get_method("fedhl"), get_weighting("truncation")
    adapter = {n: initial(*shape, rank=TOP, scale=2.0, seed=0) for n, shape in shapes.items()}
    state = server.init(method, adapter, {}, seed=0)
    clients = [Client(f"{k:03d}", rank, 2.0, 100) for k, rank in enumerate(drawn(100))]
    state, _ = server.aggregate(
        method,
        weighting,
        state,
        [reply_to(state, c, seed=k) for k, c in enumerate(clients[:10])],
        0,
    )  # so that W is not 0
    replies = [reply_to(state, client, seed=100 + k) for k, client in enumerate(clients)]
    taken = [
        server.aggregate(method, weighting, state, replies, 0, watch=False)[1].seconds["aggregate"]
        for _ in range(repeats)
    ]
    following, outcome = server.aggregate(method, weighting, state, replies, 0)
    for name in ("layers.0.q_proj", f"layers.{BLOCKS['smollm2'] - 1}.down_proj"):
        check_layer(name, state, following, replies, outcome)
    with tempfile.TemporaryDirectory() as folder:
        for r in replies:
            save_adapter(Path(folder) / r.client.id, r.adapter)
        lazy = [AdapterFile(Path(folder) / r.client.id, r.client.scale) for r in replies]
        reading = timed(lambda: [lora.A.sum() + lora.B.sum() for x in lazy for lora in x.values()])[
            1
        ]
    size = sum(4 * (x.A.numel() + x.B.numel()) for r in replies for x in r.adapter.values())
    row: Row = {
        **{"model": "SmolLM2-135M, all linear", "matrices": len(shapes), "clients": len(clients)},
        **{"round, s": median(taken), "diagnostics, s": outcome.seconds["diagnostics"]},
        **{"adapters, GB": size / 1e9, "reading them from files, s": reading},
    }
    say(describe(row))
    return [row]


def check_layer(
    name: str, before: ServerState, after: ServerState, replies: Sequence[Reply], outcome: Outcome
) -> None:
    """`difference` of one layer of a whole round, of which every reply was accepted."""
    method, weights = get_method("fedhl"), [record["weight"] for record in outcome.clients]
    updates = [
        Update(server.broadcast_layer(method, before, name, r.client, 0), r.adapter[name], p)
        for r, p in zip(replies, weights, strict=True)
    ]
    difference(after.layers[name].W, before.layers[name], updates)


def reply_to(state: ServerState, client: Client, seed: int) -> Reply:
    """A client that moved every layer a little."""
    method, g = get_method("fedhl"), generator(seed, "reply")
    adapter = {}
    for name, sent in server.broadcast(method, state, client, 0).items():
        (r, n), m = sent.lora.A.shape, sent.lora.B.shape[0]
        A = sent.lora.A + torch.randn(r, n, generator=g) * (0.2 / n**0.5)
        B = sent.lora.B + torch.randn(m, r, generator=g) * (0.01 / m**0.5)
        adapter[name] = LoRA(A, B, client.scale)
    return Reply(client, state.round + 1, adapter, {}, 0.5, 1)


def from_disk(say: Say, folder: Path | None) -> list[Row]:
    """Rounds of a 7B model with W and the adapters on disk, in `folder` while it runs, and how much
    anonymous memory the server takes: all q and v projections, and all linear layers of one block."""
    block = llama_block()
    q_and_v = {
        f"layers.{k}.{name}": block[name]
        for k in range(BLOCKS["llama2"])
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
        for k, rank in enumerate(drawn(clients)):
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


def describe(row: Row) -> str:
    return "  ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
    )


PARTS = ("layer", "accuracy", "growth", "ceilings", "model", "disk")


def bench_server(
    parts: Sequence[str],
    repeats: int,
    device: str,
    runs: Sequence[Path],
    folder: Path | None,
    file: Path | None,
    say: Say,
    cohorts: Sequence[int] = (100,),
    side: int | None = None,
) -> dict[str, Any]:
    """All figures of the server step, as data; see docs/performance.md. `file`: where they go as soon as
    a part is done, beside the parts that are there already; `cohorts`, `side`: of `ceilings`. Raises
    AssertionError where a result is not that of the float64 reference."""
    machine = {
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        **{"torch": torch.__version__, "fedhl": __version__, "commit": commit()},
        "repeats": repeats,
    }
    works: dict[str, Callable[[], list[Row]]] = {
        "layer": lambda: one_layer(repeats, say, device),
        "accuracy": lambda: accuracy(say, runs),
        "growth": lambda: growth(repeats, say, device),
        "ceilings": lambda: ceilings(repeats, say, device, cohorts, side),
        "model": lambda: whole_model(repeats, say),
        "disk": lambda: from_disk(say, folder),
    }
    known = file is not None and file.is_file()
    result: dict[str, Any] = json.loads(file.read_text("utf-8")) if file and known else {}
    for part in parts:
        say(f"# {part}")
        result[part] = {"machine": machine, "rows": works[part]()}
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result
