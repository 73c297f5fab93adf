"""Sum of products against product of sums, on an MLP with LoRA, clients of one class each and alike.

    python experiments/theory/sums.py

After arXiv 2508.01348, as it is reported: ten clients, one rank for all, local epochs against rank. In place
of MNIST there is a Gaussian mixture of ten classes. Sum of products is `flexlora`, product of sums `fedit`;
what is evaluated is the pair that is broadcast. Writes sums.json beside this file; some minutes on one
thread, resumable (runs/theory/).
"""

from __future__ import annotations

from typing import Any

import torch
from laboratory import cell, interval, write
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedhl import LoRA, Update, get_method
from fedhl.lora import initial
from fedhl.method import finite
from fedhl.seeds import derive, generator
from fedhl.server import diagnostics
from fedhl.subspace import energy

CLIENTS, CLASSES = 10, 10
WIDTHS = (32, 64, 64, CLASSES)
ROWS, BATCH, TEST = 100, 20, 2000
DISTANCE = 0.75
"""The standard deviation of the classes' centres, beside noise of 1."""
CLIP = 1.0
"""The largest norm of a client's gradient, over all its factors."""
ROUNDS = 20
RANKS, EPOCHS = (1, 4, 16), (1, 4)
RATES = (0.1, 0.4, 1.6, 6.4)
SEEDS = (0, 1, 2, 3)
METHODS = {"sum of products": "flexlora", "product of sums": "fedit"}
CLIENT_DATA = ("alike", "one class each")


def mixture(seed: int, count: int, name: str) -> tuple[Tensor, Tensor]:
    """Rows (count, n) and their classes, as many of each."""
    centres = DISTANCE * torch.randn(CLASSES, WIDTHS[0], generator=generator(seed, "centres"))
    labels = torch.arange(count) % CLASSES
    noise = torch.randn(count, WIDTHS[0], generator=generator(seed, "rows", name))
    return centres[labels] + noise, labels


def shards(seed: int, data: str) -> tuple[Tensor, Tensor]:
    """The rows of every client, (clients, rows, n), and their classes."""
    x, y = mixture(seed, CLIENTS * ROWS, "train")
    if data == "one class each":
        order = y.argsort(stable=True)
    else:
        order = torch.randperm(len(y), generator=generator(seed, "partition"))
    return x[order].view(CLIENTS, ROWS, -1), y[order].view(CLIENTS, ROWS)


def frozen(seed: int) -> list[Tensor]:
    """The base model: He's random weights, which nobody trains."""
    pairs = list(zip(WIDTHS[1:], WIDTHS[:-1], strict=True))
    return [
        torch.randn(m, n, generator=generator(seed, "base", k)) * (2 / n) ** 0.5
        for k, (m, n) in enumerate(pairs)
    ]


def forward(x: Tensor, weights: list[Tensor]) -> Tensor:
    """The logits of the MLP; the weights may be those of all clients, (clients, m, n)."""
    for W in weights[:-1]:
        x = (x @ W.mT).relu()
    return x @ weights[-1].mT


def train(
    base: list[Tensor], sent: list[LoRA], x: Tensor, y: Tensor, epochs: int, rate: float, seed: int
) -> list[list[LoRA]]:
    """What each client returns, by layer: SGD on its rows with clipped gradients, all clients at once."""
    A = [lora.A.expand(CLIENTS, -1, -1).clone().requires_grad_() for lora in sent]
    B = [lora.B.expand(CLIENTS, -1, -1).clone().requires_grad_() for lora in sent]
    factors = [*A, *B]
    for epoch in range(epochs):
        order = torch.rand(CLIENTS, ROWS, generator=generator(seed, "batches", epoch)).argsort(1)
        for batch in order.split(BATCH, dim=1):
            rows = batch[:, :, None].expand(-1, -1, x.shape[2])
            logits = forward(
                x.gather(1, rows), [W + b @ a for W, a, b in zip(base, A, B, strict=True)]
            )
            labels = y.gather(1, batch)
            loss = cross_entropy(logits.flatten(0, 1), labels.flatten()) * CLIENTS
            grads = torch.autograd.grad(loss, factors)
            norms = torch.stack([g.square().sum((1, 2)) for g in grads]).sum(0).sqrt()
            steps = rate * (CLIP / norms.clamp(min=CLIP))[:, None, None]
            with torch.no_grad():
                for factor, grad in zip(factors, grads, strict=True):
                    factor -= steps * grad
    return [
        [LoRA(a[i].detach(), b[i].detach(), 1.0) for i in range(CLIENTS)]
        for a, b in zip(A, B, strict=True)
    ]


def run(
    name: str, data: str, rank: int, epochs: int, rate: float, seed: int
) -> dict[str, list[float]] | None:
    """Accuracy after each round, and the relative mismatch of each way to sum, on the same updates; None if
    the run diverged. With `M = Σ p B_i A_i`, mismatches are `||T_r(M) - M|| / ||M||` of the sum of products
    and `||(Σ p B_i)(Σ p A_i) - M|| / ||M||` of the product of sums, over all layers."""
    method, base = get_method(METHODS[name]), frozen(seed)
    x, y = shards(seed, data)
    test, labels = mixture(seed, TEST, "test")
    ranks = [min(rank, *W.shape) for W in base]
    states = [
        method.init(initial(W.shape[0], W.shape[1], r, 1.0, derive(seed, "adapter", k)))
        for k, (W, r) in enumerate(zip(base, ranks, strict=True))
    ]
    found: dict[str, list[float]] = {"accuracy": [], "of products": [], "of sums": []}
    for round in range(ROUNDS):
        sent = [method.broadcast(state, r, 1.0) for state, r in zip(states, ranks, strict=True)]
        returned = train(
            base, [there.lora for there in sent], x, y, epochs, rate, derive(seed, "round", round)
        )
        if not all(finite(lora) for layer in returned for lora in layer):
            return None
        products, sums, whole = 0.0, 0.0, 0.0
        for k, (there, r) in enumerate(zip(sent, ranks, strict=True)):
            updates = [Update(there, lora, 1 / CLIENTS) for lora in returned[k]]
            mean = diagnostics.of_products(updates)
            spectrum = diagnostics.spectrum(mean)
            products += spectrum.tail_share(r) * spectrum.energy
            sums += diagnostics.product_gap(updates, mean)
            whole += energy(mean)
            states[k] = method.aggregate(states[k], updates)
        now = [
            W + method.broadcast(state, r, 1.0).lora.delta()
            for W, state, r in zip(base, states, ranks, strict=True)
        ]
        right = forward(test, now).argmax(1) == labels
        found["accuracy"].append(float(right.double().mean()))
        found["of products"].append((products / whole) ** 0.5)
        found["of sums"].append((sums / whole) ** 0.5)
    return found


def row(data: str, rank: int, epochs: int) -> dict[str, Any]:
    """Both ways, each at the rate with the best last accuracy on seed 0, and their paired difference."""
    result: dict[str, Any] = {"data": data, "rank": rank, "epochs": epochs}
    ends = {}
    for name in METHODS:

        def at(rate: float, seed: int, name: str = name) -> dict[str, list[float]] | None:
            key = {"way": name, "data": data, "rank": rank, "epochs": epochs}

            key |= {"rate": rate, "seed": seed}
            return cell(__file__, key, lambda: run(name, data, rank, epochs, rate, seed))

        grid = {rate: x["accuracy"][-1] for rate in RATES if (x := at(rate, SEEDS[0]))}
        rate = max(grid, key=lambda rate: grid[rate])
        runs = [x for seed in SEEDS[1:] if (x := at(rate, seed))]
        ends[name] = [x["accuracy"][-1] for x in runs]
        result[name] = {
            "rate": rate,
            "diverged": len(SEEDS) - 1 - len(runs),
            "last": interval(ends[name]),
            "best": interval([max(x["accuracy"]) for x in runs]),
            "curve": [sum(x["accuracy"][t] for x in runs) / len(runs) for t in range(ROUNDS)],
            "mismatch of products": interval([x["of products"][-1] for x in runs]),
            "mismatch of sums": interval([x["of sums"][-1] for x in runs]),
        }
    first, second = (ends[name] for name in METHODS)
    if len(first) == len(second) == len(SEEDS) - 1:
        result["difference"] = interval([a - b for a, b in zip(first, second, strict=True)])
    return result


def main() -> None:
    torch.set_num_threads(1)
    rows = [row(data, r, epochs) for data in CLIENT_DATA for r in RANKS for epochs in EPOCHS]
    about = {"seeds": SEEDS[1:], "seed of the rates": SEEDS[0], "rates": RATES, "rounds": ROUNDS}
    about |= {"widths": WIDTHS, "rows of a client": ROWS, "batch": BATCH, "test rows": TEST}
    write(__file__, about | {"rows": rows})


if __name__ == "__main__":
    main()
