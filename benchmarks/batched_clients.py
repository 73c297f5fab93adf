"""Train the adapters of several clients in one forward and backward pass, against one client after the other.

    python benchmarks/batched_clients.py [--model minilm smollm2] [--repeats 3] [--set K=V] [--json FILE]

The rows of K clients are stacked to one batch. The product with the frozen weights is shared; each client has
its own low-rank products (`torch.bmm` over the clients), its own classifier, its own loss (the mean over its
own rows) and its own clipped gradient. Smaller ranks are padded with zeros, which stay zero.
Both ways take the same steps on the same batches, must end at the same adapters, and are timed in turn.

Limitation: the prototype wants as many steps and rows from every client, and a head of linear layers.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedhl.config import load_config
from fedhl.config.conduct import TrainingConfig
from fedhl.federation.prepare import Prepared, prepare
from fedhl.lora import LoRA, initial, pad, prefix
from fedhl.model import peft
from fedhl.model.training import batches, train, training_mode
from fedhl.run.commit import commit
from fedhl.seeds import derive
from fedhl.task.examples import IGNORED, Example

CONFIGS = {"minilm": "demo.yaml", "smollm2": "demo-llm.yaml"}
SETTINGS = {  # rows per client and step, steps, and the most clients that fit the memory
    "minilm": [(16, 4, 8), (4, 8, 8), (1, 16, 8)],
    "smollm2": [(4, 1, 4), (1, 1, 8)],
}
COHORTS = [[8] * 2, [8] * 4, [8] * 8, [4, 8, 16, 32]]
RATE = 1e-3
TOLERANCE = 1e-2
"""Of the distance trained: AdamW divides by the root of the squared gradient, which turns the rounding of
gradients near 0 into steps of full length."""


class Start(NamedTuple):
    """What a client starts from, and its rows. `seed`: of the order it takes them in."""

    adapter: dict[str, LoRA]
    head: dict[str, Tensor]
    rows: Sequence[Example]
    seed: int

    @property
    def rank(self) -> int:
        return next(iter(self.adapter.values())).rank


class End(NamedTuple):
    adapter: dict[str, LoRA]
    head: dict[str, Tensor]


def cohort(prepared: Prepared, ranks: Sequence[int]) -> list[Start]:
    """The clients with the most rows, with adapters that differ, as after some rounds."""
    federation = prepared.federation
    slots, shapes = federation.slots, peft.layers(federation.slots)
    most = sorted(federation.clients, key=lambda client: -client.examples)[: len(ranks)]
    starts = []
    for k, (rank, client) in enumerate(zip(ranks, most, strict=True)):
        draw, adapter = torch.Generator().manual_seed(k), {}
        for name, (m, n) in shapes.items():
            A = initial(m, n, rank, 1.0, derive(k, name)).A
            B = 0.02 * torch.randn(m, rank, generator=draw)
            adapter[name] = LoRA(A, B, peft.scale(slots, rank))
        starts.append(Start(adapter, prepared.start_head, federation.rows[client.id], k))
    return starts


def one_by_one(
    prepared: Prepared, clients: Sequence[Start], training: TrainingConfig, steps: int
) -> list[End]:
    """As fedhl does it."""
    federation, ends = prepared.federation, []
    slots = federation.slots
    for client in clients:
        peft.write(slots, client.rank, client.adapter)
        peft.write_head(slots, client.head)
        train(
            slots.model,
            peft.activate(slots, client.rank),
            client.rows,
            training,
            objective=federation.objective,
            steps=steps,
            rate=lambda _: RATE,
            autocast=federation.autocast,
            seed=client.seed,
        )
        ends.append(End(peft.read(slots, client.rank), peft.read_head(slots)))
    return ends


def together(
    prepared: Prepared, clients: Sequence[Start], training: TrainingConfig, steps: int
) -> list[End]:
    """All clients in each forward and backward pass, one optimizer over all of them."""
    slots, device, K = prepared.federation.slots, prepared.federation.device, len(clients)
    top = max(client.rank for client in clients)
    padded = [{name: pad(x, top) for name, x in client.adapter.items()} for client in clients]
    A = {name: stacked([p[name].A for p in padded], device) for name in slots.modules}
    B = {name: stacked([p[name].B for p in padded], device) for name in slots.modules}
    head = {name: stacked([client.head[name] for client in clients], device) for name in slots.head}
    scales = [peft.scale(slots, client.rank) for client in clients]
    scale = torch.tensor(scales, device=device).view(K, 1, 1)
    parameters = [*A.values(), *B.values(), *head.values()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=training.weight_decay)
    orders = [batches(len(c.rows), training.batch_size, c.seed) for c in clients]
    with training_mode(slots.model), peft.base_only(slots), ExitStack() as undo:
        for name, module in slots.modules.items():
            adds = adds_products(A[name], B[name], scale)
            undo.callback(module.get_base_layer().register_forward_hook(adds).remove)
        for owner in sorted({name.rpartition(".")[0] for name in head}):
            own = linear_of_each(head[f"{owner}.weight"], head[f"{owner}.bias"])
            layer = slots.model.get_submodule(owner)
            undo.callback(layer.register_forward_hook(own).remove)
        for _ in range(steps):
            rows = [
                client.rows[j]
                for client, order in zip(clients, orders, strict=True)
                for j in next(order)
            ]
            made = prepared.federation.objective.batch(rows)
            batch = {name: x.to(device) for name, x in made.items()}
            labels = batch.pop("labels")
            losses(slots.model(**batch).logits, labels, K).sum().backward()
            if training.max_grad_norm is not None:
                clip(parameters, training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return [
        End(
            {
                name: prefix(
                    LoRA(A[name][k].detach().cpu(), B[name][k].detach().cpu(), scales[k]),
                    client.rank,
                    scales[k],
                )
                for name in A
            },
            {name: value[k].detach().cpu() for name, value in head.items()},
        )
        for k, client in enumerate(clients)
    ]


def stacked(tensors: Sequence[Tensor], device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.stack([*tensors]).to(device))


def adds_products(A: Tensor, B: Tensor, scale: Tensor) -> Callable[..., Tensor]:
    """A hook that adds `s_k B_k A_k x` to the output for the rows x of each client k."""

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].reshape(len(A), -1, A.shape[2])
        low = torch.bmm(x, A.mT) * scale
        return torch.baddbmm(output.view(len(A), -1, B.shape[1]), low, B.mT).view(output.shape)

    return hook


def linear_of_each(weight: Tensor, bias: Tensor) -> Callable[..., Tensor]:
    """A hook by which a linear layer gives `W_k x + b_k` for the rows x of each client k."""

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].reshape(len(weight), -1, weight.shape[2])
        return torch.baddbmm(bias[:, None], x, weight.mT).view(output.shape)

    return hook


def losses(logits: Tensor, labels: Tensor, clients: int) -> Tensor:
    """Each client's mean loss over its own rows or next tokens."""
    if labels.ndim == 2:  # each position predicts the next token
        logits, labels = logits[:, :-1], labels[:, 1:]
    flat = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        reduction="none",
        ignore_index=IGNORED,
    )
    counts = (labels != IGNORED).view(clients, -1).sum(1)
    return flat.view(clients, -1).sum(1) / counts


def clip(parameters: Sequence[nn.Parameter], norm: float) -> None:
    """`torch.nn.utils.clip_grad_norm_` for each client, the first dimension of every parameter."""
    grads = [p.grad for p in parameters if p.grad is not None]
    size = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).sqrt()
    factor = (norm / (size + 1e-6)).clamp(max=1.0)
    for g in grads:
        g.mul_(factor.view(-1, *[1] * (g.ndim - 1)))


def difference(clients: Sequence[Start], a: Sequence[End], b: Sequence[End]) -> float:
    """The largest difference of two ends, relative to what the client moved."""
    worst = 0.0
    for client, x, y in zip(clients, a, b, strict=True):
        apart = moved = 0.0
        for name, start in client.adapter.items():
            delta = x.adapter[name].delta()
            apart += float((delta - y.adapter[name].delta()).square().sum())
            moved += float((delta - start.delta()).square().sum())
        for name, start in client.head.items():
            apart += float((x.head[name] - y.head[name]).square().sum())
            moved += float((x.head[name] - start).square().sum())
        worst = max(worst, (apart / moved) ** 0.5)
    return worst


def measure(
    model: str,
    repeats: int,
    overrides: Sequence[str] = (),
    settings: Sequence[tuple[int, int, int]] | None = None,
    cohorts: Sequence[Sequence[int]] = COHORTS,
) -> Iterator[dict[str, Any]]:
    """`settings` and `cohorts` in place of those above."""
    config = load_config(Path(__file__).parents[1] / "configs" / CONFIGS[model], overrides)
    prepared = prepare(config)
    for size, steps, most in settings or SETTINGS[model]:
        training = config.training.model_copy(update={"batch_size": size})
        for ranks in cohorts:
            if len(ranks) > most:
                continue
            clients = cohort(prepared, ranks)
            ways = {"one by one": one_by_one, "together": together}
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            apart = 0.0
            for repeat in range(repeats + 1):
                ends = {}
                for way, run in ways.items() if repeat % 2 else reversed(ways.items()):
                    start = perf_counter()
                    ends[way] = run(prepared, clients, training, steps)
                    if repeat:  # the first one warms up
                        seconds[way].append(perf_counter() - start)
                apart = max(apart, difference(clients, ends["one by one"], ends["together"]))
                assert apart < TOLERANCE, apart
            yield {
                "model": model,
                "rows per client and step": size,
                "steps": steps,
                "ranks": [*ranks],
                **{f"{way} seconds": median(times) for way, times in seconds.items()},
                "ratio": median(a / b for a, b in zip(*seconds.values(), strict=True)),
                "relative difference": apart,
            }


def show(row: Mapping[str, Any]) -> None:
    print(
        f"{row['model']:>8} {row['rows per client and step']:>5} {row['ranks']!s:>26} "
        f"{row['one by one seconds']:>10.3f}s {row['together seconds']:>8.3f}s {row['ratio']:>6.2f}x "
        f"{row['relative difference']:>11.1e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", nargs="+", choices=[*CONFIGS], default=[*CONFIGS])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the configs")
    parser.add_argument(
        "--json", type=Path, default=Path(__file__).parent / "results" / "batched_clients.json"
    )
    arguments = parser.parse_args()
    known = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    print(
        f"{'model':>8} {'rows':>5} {'ranks':>26} {'one by one':>11} {'together':>9} {'ratio':>7} "
        f"{'difference':>11}"
    )
    for model in arguments.model:
        rows = []
        for row in measure(model, arguments.repeats, arguments.set):
            rows.append(row)
            show(row)
        machine = {
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            **{name: version(name) for name in ("torch", "transformers", "peft")},
            "repeats": arguments.repeats,
            "commit": commit(),
        }
        known[model] = {"machine": machine, "rows": rows}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(known, indent=1) + "\n")
    print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
