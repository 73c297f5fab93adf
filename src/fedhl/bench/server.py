"""Timings of the server step, each checked for correctness in the same run: `fedhl bench server`."""

from __future__ import annotations

import json
import platform
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedhl import __version__, server
from fedhl.bench import problems
from fedhl.bench.checks import check_layer, difference
from fedhl.bench.disk import from_disk, reply_to
from fedhl.bench.problems import (
    RANKS,
    SMOLLM2,
    SPECTRA,
    TOP,
    bare,
    cohort,
    draw_ranks,
    harmonic,
    llama_block,
    orthogonal,
    state_of,
    to,
    with_spectrum,
)
from fedhl.bench.remembering import remembering
from fedhl.bench.timing import Row, Say, describe, interleaved, timed
from fedhl.lora import initial, svd
from fedhl.method import Update
from fedhl.methods import get_method
from fedhl.methods.fedhl import FedHL
from fedhl.methods.full_rank import FullRank
from fedhl.record import rounds_in
from fedhl.run.commit import commit
from fedhl.seeds import generator
from fedhl.server import Client
from fedhl.shelf import AdapterFile, save_adapter
from fedhl.subspace import FLOOR, TOLERANCE, iterate, leading
from fedhl.weighting import get_weighting


def step(method: FedHL, state: FullRank, updates: Sequence[Update]) -> FullRank:
    """The server's work for one layer in a round: sum, truncate, and build the broadcast of every rank."""
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


def one_layer(repeats: int, say: Say, device: str) -> Iterator[Row]:
    """A step against the bare product, the same with a full SVD, and the literal algorithm."""
    bases, j = (
        (orthogonal(problems.SIDE, 1), orthogonal(problems.SIDE, 2)),
        torch.arange(1, problems.SIDE + 1),
    )
    for name, spectrum in SPECTRA.items():
        state = to(state_of(with_spectrum(spectrum(j), bases)), device)
        for clients in (10, 100):
            updates = cohort(state, draw_ranks(clients), clients)
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
                **{
                    "spectrum": name,
                    "side": problems.SIDE,
                    "clients": clients,
                    "total rank": total_rank,
                },
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
            say(describe(row))
            yield row


def accuracy(say: Say, runs: Sequence[Path]) -> Iterator[Row]:
    """The tail energy that truncation leaves against the optimum, for every rank, in float64."""
    side = problems.SIDE // 2
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
            raise AssertionError(f"{name}: the subspace iteration did not settle")
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
        yield rows[-1]
    worst = max(rows, key=lambda row: row["largest relative excess of the tail"])
    say(f"{len(rows)} matrices, the worst: {describe(worst)}")


def growth(repeats: int, say: Say, device: str) -> Iterator[Row]:
    """Time against the number of clients at one total rank, against the total rank, and the side."""

    def measure(side: int, ranks: Sequence[int], what: str) -> Row:
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
        row: Row = {"series": what, "side": side, "clients": len(ranks), "total rank": sum(ranks)}
        row |= {f"{work}, s": value for work, value in taken.items()}
        say(describe(row))
        return row

    sides = (problems.SIDE // 4, problems.SIDE // 2, problems.SIDE)
    states = {side: to(state_of(harmonic(side, side)), device) for side in sides}
    for clients, rank in ((50, 64), (200, 16), (800, 4)):
        yield measure(
            problems.SIDE, [rank] * clients + [TOP], f"{clients} of rank {rank}, and one of {TOP}"
        )
    for clients in (10, 30, 100, 300):
        yield measure(problems.SIDE, draw_ranks(clients), "clients")
    for side in (problems.SIDE // 4, problems.SIDE // 2):
        yield measure(side, draw_ranks(100), "side")


def ceilings(
    repeats: int, say: Say, device: str, cohorts: Sequence[int] = (100,), side: int | None = None
) -> Iterator[Row]:
    """A step of each layer shape of Llama-2-7B, or of such a model with matrices of another side, against the
    product and the copy of W that no server can do without, for each number of clients in `cohorts`; last,
    the sum over all linear layers."""
    rows: list[Row] = []
    for (m, n), layers in Counter(llama_block(side).values()).items():
        state = to(state_of(harmonic(m, n)), device)
        for ranks in map(draw_ranks, cohorts):
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
                    **{
                        "shape": [m, n],
                        "layers": layers * problems.BLOCKS["llama2"],
                        "clients": len(ranks),
                    },
                    **against_ceiling(taken),
                    "copy, GB/s": 8e-9 * m * n / taken["copy of W"],
                    "product, TFLOP/s": 2e-12 * m * n * sum(ranks) / taken["bare product"],
                    "relative difference from float64": off,
                }
            )
            say(describe(rows[-1]))
            yield rows[-1]
    for clients in cohorts:
        theirs = [row for row in rows if row["clients"] == clients]
        total = {
            work: sum(row["layers"] * row[f"{work}, s"] for row in theirs)
            for work in ("copy of W", "bare product", "step")
        }
        count = sum(row["layers"] for row in theirs)
        whole: Row = {"model": "Llama-2-7B, all linear", "layers": count, "clients": clients}
        whole |= against_ceiling(total)
        say(describe(whole))
        yield whole


def against_ceiling(taken: Mapping[str, float]) -> Row:
    """The seconds of each work, and the step's relative to those of the product and the copy."""
    ratio = taken["step"] / (taken["bare product"] + taken["copy of W"])
    return {f"{work}, s": value for work, value in taken.items()} | {
        "step / (product + copy)": ratio
    }


def whole_model(repeats: int, say: Say) -> list[Row]:
    """A round of SmolLM2-135M's 210 matrices with 100 clients: checks, weights, sums and truncations."""
    shapes = {
        f"layers.{block}.{name}": shape
        for block in range(problems.BLOCKS["smollm2"])
        for name, shape in SMOLLM2.items()
    }
    method, weighting = get_method("fedhl"), get_weighting("truncation")
    adapter = {n: initial(*shape, rank=TOP, scale=2.0, seed=0) for n, shape in shapes.items()}
    state = server.init(method, adapter, {}, seed=0)
    clients = [Client(f"{k:03d}", rank, 2.0, 100) for k, rank in enumerate(draw_ranks(100))]
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
    for name in ("layers.0.q_proj", f"layers.{problems.BLOCKS['smollm2'] - 1}.down_proj"):
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


PARTS = ("layer", "remembering", "accuracy", "growth", "ceilings", "model", "disk")


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
    """All figures of the server step, as data; see docs/performance.md. `file`: the file to which each part
    is added row by row, in place of what the file has of that part; `cohorts`, `side`: for `ceilings`. Raises
    AssertionError if a result is not that of the float64 reference."""
    machine = {
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        **{"torch": torch.__version__, "fedhl": __version__, "commit": commit()},
        "repeats": repeats,
    }
    works: dict[str, Callable[[], Iterable[Row]]] = {
        "layer": lambda: one_layer(repeats, say, device),
        "remembering": lambda: remembering(repeats, say, device),
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
        rows: list[Row] = []
        for row in works[part]():
            rows.append(row)
            result[part] = {"machine": machine, "rows": rows}
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result
