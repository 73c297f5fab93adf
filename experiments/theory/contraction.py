"""How fast a client that remembers catches up, and how far it stays behind a W that moves, beside the bounds.

    python experiments/theory/contraction.py

The server of `fedhl_ef` serves one client of rank r. The client does not train, and W is moved by hand.
Writes contraction.json beside this file, and docs/contraction.svg. One thread; half a minute.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from fedhl import Update
from fedhl.lora import initial, plus
from fedhl.method import Broadcast
from fedhl.methods.fedhl_ef import FedHLEF
from fedhl.methods.full_rank import Tailed
from fedhl.seeds import generator
from fedhl.server.ledger import after

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
RESULT = HERE / "contraction.json"
FIGURE = HERE.parent.parent / "docs" / "contraction.svg"
METHOD = FedHLEF()
SIDE = 128
SIZES = ((128, 16), (128, 4), (576, 4))
"""(side, rank) of the moving W; the last one is drawn round by round."""
SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": torch.ones_like,
    "j^-1/2": lambda j: j**-0.5,
    "j^-1": lambda j: 1 / j,
    "0.9^j": lambda j: 0.9**j,
}
"""Singular values, of j = 1, 2, ..."""
COLOURS = {
    "flat": "#1f5fa8",
    "j^-1/2": "#c2571a",
    "j^-1": "#3b7d4f",
    "0.9^j": "#7a4fa3",
    "random": "#555555",
}


# --- the quantities of docs/maths.md ------------------------------------------------------------


def contraction(side: int, rank: int) -> float:
    """`q`, where `q² = 1 - r / min(m, n)`."""
    return (1 - rank / side) ** 0.5


def bound(side: int, rank: int) -> float:
    """The largest `E / Δ` that is possible, `q / (1 - q)`."""
    q = contraction(side, rank)
    return q / (1 - q)


def uncorrelated(side: int, rank: int) -> float:
    """The largest `E / Δ` for steps that are orthogonal to the error on average, `q / √(1 - q²)`."""
    return (side / rank - 1) ** 0.5


def in_turn(side: int, rank: int) -> float:
    """`E / Δ` for one step of flat spectrum that is taken again and again: each round the next r of its
    directions are sent, so that the lags of all directions are 0, 1, ..., k - 1 with `k = min(m, n) / r`."""
    k = side / rank
    return ((k - 1) * (2 * k - 1) / 6) ** 0.5


# --- a client, and a W that is moved by hand ----------------------------------------------------


def with_spectrum(side: int, spectrum: str, seed: int = 0) -> Tensor:
    """A matrix of norm 1 with these singular values and random singular vectors."""
    g = generator(seed, "contraction", side)
    U, V = (
        torch.linalg.qr(torch.randn(side, side, generator=g, dtype=torch.float64)).Q for _ in "UV"
    )
    S = SPECTRA[spectrum](torch.arange(1, side + 1, dtype=torch.float64))
    return ((U * (S / S.norm())) @ V.T).float()


def noise(side: int) -> Iterator[Tensor]:
    """Random matrices of norm 1, each independent of the others."""
    g = generator(0, "contraction", "noise", side)
    while True:
        X = torch.randn(side, side, generator=g)
        yield X / X.norm()


def errors(side: int, rank: int, steps: Iterator[Tensor]) -> Iterator[float]:
    """`E_t = ||W_t - M_t||` once the client has received round t, without end: W moves by the next of the
    steps before each round."""
    state, held = METHOD.init(initial(side, side, rank, 1.0, seed=0)), None
    while True:
        other = METHOD.broadcast(state, rank, 1.0)  # to a newcomer, whose update moves W
        state = METHOD.aggregate(state, [Update(other, plus(other.lora, next(steps)), 1.0)])
        sent = broadcast(state, held, rank)
        held = after(held, sent)
        yield float((state.full.W.double() - held.double()).norm())


def broadcast(state: Tailed, held: Tensor | None, rank: int) -> Broadcast:
    """What the server sends to a client that holds `held`."""
    if held is None:
        return METHOD.broadcast(state, rank, 1.0)
    return METHOD.catch_up(state, held, rank, 1.0)


def at_rest(spectrum: str, rank: int) -> dict[str, Any]:
    """A W of norm 1 that does not move after it has appeared: the errors, and the exact tails."""
    W, rounds = with_spectrum(SIDE, spectrum), SIDE // rank
    steps = chain([W], repeat(torch.zeros(SIDE, SIDE)))
    found = list(islice(errors(SIDE, rank, steps), rounds))
    S = torch.linalg.svdvals(W.double())
    tails = [float(S[(t + 1) * rank :].norm()) for t in range(rounds)]
    return {"spectrum": spectrum, "side": SIDE, "rank": rank, "error": found, "tail": tails}


def moving(kind: str, side: int, rank: int) -> dict[str, Any]:
    """A W that moves by steps of norm 1: the errors, in units of a step."""
    steps = noise(side) if kind == "random" else repeat(with_spectrum(side, kind))
    found = list(islice(errors(side, rank, steps), 2 * side // rank))
    return {"steps": kind, "side": side, "rank": rank, "error": found, "largest": max(found)}


# --- the result and the figure ------------------------------------------------------------------


def measured() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "at rest": [at_rest(spectrum, rank) for rank in (4, 16) for spectrum in SPECTRA],
        "moving": [moving(kind, *size) for size in SIZES for kind in ("random", "flat", "j^-1/2")],
        "bounds": [
            {
                "side": side,
                "rank": rank,
                "q": contraction(side, rank),
                "bound": bound(side, rank),
                "uncorrelated": uncorrelated(side, rank),
                "in turn": in_turn(side, rank),
            }
            for side, rank in SIZES
        ],
    }


def rounded(x: Any) -> Any:
    """The same with four significant digits, which other machines find too."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


NAMES = {"flat": "flat", "j^-1/2": "$j^{-1/2}$", "j^-1": "$j^{-1}$", "0.9^j": "$0.9^j$"}
STEPS = {
    "random": "a new step each round",
    "flat": "one flat step, again and again",
    "j^-1/2": "one step of spectrum $j^{-1/2}$, again",
}


def draw(result: dict[str, Any], file: Path) -> None:
    plt.rcParams["svg.hashsalt"] = "contraction"
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    rest, following, against = axes

    for row in (row for row in result["at rest"] if row["rank"] == 4):
        t, colour = range(1, len(row["error"]) + 1), COLOURS[row["spectrum"]]
        rest.plot(t, row["tail"], color=colour, linewidth=0.8)
        rest.plot(t, row["error"], ".", color=colour, label=NAMES[row["spectrum"]])
    q = contraction(SIDE, 4)
    t = range(1, SIDE // 4 + 1)
    rest.plot(t, [q**k for k in t], "k--", linewidth=1, label="bound $q^t$")
    rest.set(yscale="log", ylim=(1e-3, 1.5), xlabel="rounds", ylabel=r"$\|W - M\| \,/\, \|W\|$")
    rest.set_title(f"W at rest, {SIDE} x {SIDE}, r = 4", fontsize=9)

    side, rank = SIZES[-1]
    for row in (row for row in result["moving"] if (row["side"], row["rank"]) == SIZES[-1]):
        t, colour = range(1, len(row["error"]) + 1), COLOURS[row["steps"]]
        following.plot(t, row["error"], color=colour, label=STEPS[row["steps"]])
    t = range(1, 2 * side // rank + 1)
    q, worst = contraction(side, rank), bound(side, rank)
    following.plot(t, [worst * (1 - q**k) for k in t], "k--", linewidth=1, label="bound")
    following.set(yscale="log", ylim=(0.5, 1000), xlabel="rounds", ylabel=r"$E_t \,/\, \Delta$")
    following.set_title(f"W moving, {side} x {side}, r = {rank}", fontsize=9)

    for kind in STEPS:
        rows = [row for row in result["moving"] if row["steps"] == kind]
        k = [row["side"] / row["rank"] for row in rows]
        against.plot(k, [row["largest"] for row in rows], "o", color=COLOURS[kind])
    k = [side / rank for side, rank in SIZES]
    for of, style, label in (
        (bound, "k--", "$q/(1-q)$"),
        (in_turn, "k:", "directions in turn"),
        (uncorrelated, "k-.", r"$q/\sqrt{1-q^2}$"),
    ):
        against.plot(k, [of(*size) for size in SIZES], style, linewidth=1, label=label)
    against.set(
        xscale="log", yscale="log", xlabel="min(m, n) / r", ylabel=r"largest $E_t / \Delta$"
    )
    against.set_xticks(k, [f"{x:.0f}" for x in k], minor=False)
    against.set_xticks([], minor=True)
    against.set_title("W moving, three sizes", fontsize=9)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(
            frameon=False,
            fontsize=7,
            loc={rest: "lower left", following: "lower right"}.get(axis, "upper left"),
        )
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    torch.set_num_threads(1)
    result = rounded(measured())
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, FIGURE)


if __name__ == "__main__":
    main()
