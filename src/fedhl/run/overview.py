"""A summary of a config before anything is trained: the clients, their layers and rows, and the cost."""

from __future__ import annotations

import re
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import torch
from accelerate.utils import send_to_device
from rich.table import Table
from torch import Tensor, nn

from fedhl.config.conduct import RobustConfig
from fedhl.data.partition import partition_table
from fedhl.federation.federation import Federation
from fedhl.federation.personal import personal_steps
from fedhl.federation.prepare import Prepared
from fedhl.federation.traffic import bytes_expected
from fedhl.method import Remembering, flatten
from fedhl.model import peft
from fedhl.model.activation_cache import CachedObjective
from fedhl.model.targets import is_linear
from fedhl.names import listed, size
from fedhl.report.format import span
from fedhl.run.summary import parameters, peak_memory
from fedhl.seeds import generator
from fedhl.server import accounting
from fedhl.subspace import leading
from fedhl.weighting import Cohort, data_share

FAR = 10.0
"""A row that counts this many times as much as another is worth a warning."""


def overview(prepared: Prepared) -> Iterator[str]:
    """The clients, rows, layers and parameters to be trained, in a few lines of text."""
    config, federation = prepared.config, prepared.federation
    layers, count = peft.layers(federation.slots), parameters(prepared)
    cohort = config.participation.size(len(federation.clients))
    steps = [federation.steps_for(client.examples) for client in federation.clients]
    rows = [row for of_client in prepared.tokenised.train.values() for row in of_client]
    yield f"{config.name}: {config.task.kind} on {config.model.source}, device {federation.device}"
    yield (
        f"method {config.method.name}, weighting {config.weighting_used.name}: {config.rounds} rounds, "
        f"{cohort} of {len(federation.clients)} clients a round, "
        f"{span(sorted(steps))} steps of {config.training.batch_size} rows each"
    )
    yield (
        f"{len(rows):,} training rows{config.task.sizes(rows)}, {len(federation.held_out):,} held out by the "
        "server"
    )
    if federation.validation:
        yield f"{len(federation.validation):,} validation rows, for the choice of settings"
    if config.personal is not None:
        training = config.personal.training(config.training)
        alone = [personal_steps(federation, client) for client in federation.clients]
        yield (
            f"at the end a personal model for each client: {span(sorted(alone))} steps at a rate of "
            f"{training.learning_rate:g}"
        )
    if config.participation.stragglers:
        yield f"each client is a straggler with probability {config.participation.stragglers:g}"
    for client in federation.clients:
        if client.layers is not None:
            yield f"{client.id} trains {len(client.layers)} of {len(layers)} layers"
    if config.channel is not None:
        yield f"updates are summed over the air, at {config.channel.snr_db:g} dB"
    if config.robust is not None:
        yield f"updates that are too large: {robust_rules(config.robust)}"
    if config.privacy is not None and federation.privacy is not None:
        mechanism, delta = federation.privacy, config.privacy.delta
        yield (
            f"client-level privacy: each client takes part with probability {mechanism.rate:.3g} and moves "
            f"at most {mechanism.clip:g} / {mechanism.denominator:.3g}; noise of deviation "
            f"{mechanism.deviation:.3g} on every number"
        )
        seen = accounting.epsilon(1.0, mechanism.noise, config.rounds, delta)
        yield (
            f"epsilon {federation.epsilon(config.rounds):.2f} at delta {delta:g} after {config.rounds} rounds"
            + (
                f"; {seen:.2f} against an observer who sees which clients take part"
                if mechanism.rate < 1
                else ""
            )
        )
    yield from weights(prepared)
    if isinstance(federation.method, Remembering):
        yield from remembering(prepared)
    yield (
        f"{count['base']:,} frozen parameters; LoRA on {len(layers)} layers"
        + (f"; head of {count['head']:,} parameters trained whole" if count["head"] else "")
    )
    yield from without_adapter(federation.slots)


def without_adapter(slots: peft.Slots) -> Iterator[str]:
    """The layers that "all-linear" leaves out, and the weights that are in no linear layer, such as experts:
    both get no adapter, and stay as they are."""
    alike: dict[str, list[str]] = {}
    for name in slots.left_out:
        alike.setdefault(pattern(name), []).append(name)
    for kind, names in alike.items():
        times = f" ({len(names)} layers)" if len(names) > 1 else ""
        yield f"left out of all-linear: {kind}{times}; {names[0]} {slots.left_out[names[0]]}"
    frozen: dict[str, int] = {}
    for name, weight in outside_layers(slots).items():
        frozen[pattern(name)] = frozen.get(pattern(name), 0) + weight.numel()
    if frozen:
        kinds = sorted(frozen, key=lambda kind: -frozen[kind])
        yield (
            f"{sum(frozen.values()):,} parameters get no adapter and stay frozen, since they are in no "
            f"linear layer: {listed(kinds, 4)}"
        )


def outside_layers(slots: peft.Slots) -> dict[str, Tensor]:
    """The weights of two or more dimensions that are neither in a linear layer nor in an embedding or the
    head."""
    return {
        f"{name}.{own}": weight
        for name, module in slots.model.named_modules()
        if not is_linear(module) and not isinstance(module, nn.Embedding)
        for own, weight in module.named_parameters(recurse=False)
        if weight.ndim > 1 and f"{name}.{own}" not in slots.head
    }


def pattern(name: str) -> str:
    """A name with * for its numbers, which is one for the same layer of every block."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def weights(prepared: Prepared) -> Iterator[str]:
    """The weights that round 1 would use, if all its clients answer and move alike; with a warning where
    they are far from the shares of the rows."""
    federation = prepared.federation
    if federation.privacy is not None:  # all clients are weighted alike
        return
    clients = federation.in_round(1).cohort(1)
    alike = [1.0] * len(clients)
    cohort = Cohort(
        examples=[client.examples for client in clients],
        error=torch.zeros(len(clients), 1),
        energy=torch.zeros(1),
        norms=alike,
        losses=alike,
        bounds=alike,
    )
    p, q = federation.weighting(cohort).tolist(), data_share(cohort).tolist()
    least, most = min(range(len(p)), key=p.__getitem__), max(range(len(p)), key=p.__getitem__)
    yield "weights in round 1: " + (
        f"{p[least]:.3g} ({clients[least].id}, {clients[least].examples:,} rows) to "
        f"{p[most]:.3g} ({clients[most].id}, {clients[most].examples:,} rows)"
        if p[most] > p[least]
        else f"{p[most]:.3g} for each of {len(p)} clients"
    )
    row = [weight / client.examples for weight, client in zip(p, clients, strict=True)]
    light, heavy = min(range(len(p)), key=row.__getitem__), max(range(len(p)), key=row.__getitem__)
    if row[heavy] > FAR * row[light]:
        times = f"{row[heavy] / row[light]:.0f} times as much"
        yield (
            f"warning: a row of client {clients[heavy].id!r} counts {times} as a row of client "
            f"{clients[light].id!r} ({q[heavy]:.2%} and {q[light]:.2%} of the rows); "
            "weighting: examples weights clients by their rows"
        )


def remembering(prepared: Prepared) -> Iterator[str]:
    """What clients that remember cost the server: room for what they hold, and seconds for what they lack."""
    config, federation = prepared.config, prepared.federation
    shapes = list(peft.layers(federation.slots).values())
    one = 4 * sum(m * n for m, n in shapes)
    kinds = {(client.rank, client.scale) for client in federation.clients}
    everyone = config.participation.size(len(federation.clients)) == len(federation.clients)
    most = len(kinds) if everyone else len(federation.clients)
    apart = "one for each rank" if everyone else "one for each client"
    yield (
        f"each client holds {size(one)} in its base; the server keeps up to {most} different ones "
        f"({apart}), {size(most * one)} on disk for each kept checkpoint"
    )
    distinct = sorted(rank for rank, _ in kinds)
    if not everyone:
        distinct = sorted(client.rank for client in federation.cohort(1))
    spent = {(m, n, r): seconds_of(m, n, r) for m, n in {*shapes} for r in {*distinct}}
    total = sum(spent[m, n, r] for m, n in shapes for r in distinct)
    yield (
        f"what the clients lack: {len(distinct)} truncations for each of {len(shapes)} layers, about "
        f"{total:.1f} s of each round"
    )


def seconds_of(m: int, n: int, rank: int) -> float:
    """The seconds of one truncation of an (m, n) matrix whose j-th singular value falls as 1/j."""
    g = generator(0, "overview", m, n)
    width = min(m, n, 4 * rank)
    U, V = torch.randn(m, width, generator=g), torch.randn(width, n, generator=g)
    W = (U / torch.arange(1, width + 1)) @ V
    began = perf_counter()
    leading(W, min(rank, m, n))
    return perf_counter() - began


def robust_rules(config: RobustConfig) -> str:
    """The rules of `robust`, in words."""
    rules = []
    if config.reject is not None:
        rules.append(
            f"refused beyond {config.reject.factor:g} times the median"
            if config.reject.kind == "median"
            else f"the furthest {config.reject.share:.0%} refused"
        )
    if config.clip is not None:
        rules.append(f"clipped to {config.clip:g}")
    return ", ".join(rules)


def clients_table(prepared: Prepared) -> Table:
    """Clients by rank, the number of rows that they train on, and label."""
    data, config = prepared.data, prepared.config
    labels = config.task.classes(data.rows, config.data.source)
    ranks = {client.id: client.rank for client in prepared.federation.clients}
    return partition_table(prepared.tokenised.rows, labels, ranks)


def ranks_table(prepared: Prepared) -> Table:
    """For each rank: the number of clients and of trained parameters, and a client's bytes in a round."""
    federation = prepared.federation
    ranks = [client.rank for client in federation.cohort(1) or federation.clients]
    traffic = bytes_expected(federation, federation.clients, ranks)
    count = parameters(prepared)
    table = Table(title="Ranks", title_justify="left")
    for name in ("rank", "scale", "clients", "trained", "down / round", "up / round"):
        table.add_column(name, justify="right")
    for rank, scale in federation.slots.scales.items():
        members = [client for client in federation.clients if client.rank == rank]
        down, up = traffic[members[0].id]
        trained = numbers_trained(federation, rank) + count["head"]
        table.add_row(
            str(rank), f"{scale:g}", str(len(members)), f"{trained:,}", size(down), size(up)
        )
    cohort = prepared.config.participation.size(len(federation.clients)) / len(federation.clients)
    down, up = (cohort * sum(both) for both in zip(*traffic.values(), strict=True))
    table.caption = f"a round moves about {size(down)} down and {size(up)} up"
    return table


def numbers_trained(federation: Federation, rank: int) -> int:
    """The numbers that a client of this rank trains beside the head."""
    slots = federation.slots
    if federation.config.training.full:
        return sum(m * n for m, n in peft.layers(slots).values())
    return sum(p.numel() for pair in slots.factors[rank].values() for p in pair)


def memory_table(prepared: Prepared) -> Table:
    """Where the memory of a run will go, from one forward pass; and, on a CPU, the peak of the whole process:
    that of this one, which has loaded the same and has tried some steps, with what the server's step adds."""
    federation, config = prepared.federation, prepared.config
    slots = federation.slots
    adapters = sum(
        tensor_bytes(p) for slot in slots.factors.values() for pair in slot.values() for p in pair
    )
    base = sum(tensor_bytes(p) for p in slots.model.parameters()) - adapters
    trained = 4 * numbers_trained(federation, federation.top_rank)
    trained += sum(tensor_bytes(p) for p in slots.head.values())
    state = prepared.initial_state()
    server = sum(
        tensor_bytes(t) for layer in state.layers.values() for t in flatten(layer).values()
    )
    replies = sum(
        sum(tensor_bytes(p) for pair in slots.factors[client.rank].values() for p in pair)
        for client in federation.clients
    ) * (config.participation.size(len(federation.clients)) / len(federation.clients))
    optimizer = 2 * trained if config.training.optimizer == "adamw" else 0
    parts = {
        "base model": base,
        f"adapters, ranks {', '.join(str(rank) for rank in slots.factors)}": adapters,
        f"gradients and {config.training.optimizer}, at rank {federation.top_rank}": trained
        + optimizer,
        "activations of the longest batch": activations(prepared),
        "server: the state before and after a round": 2 * server,
        "server: the updates of a cohort": replies,
    }
    cache = federation.objective
    kept = cache.bytes if isinstance(cache, CachedObjective) else 0
    if kept:
        parts["cached activations of all rows, in main memory"] = kept
    table = Table(title="Memory (estimated)", title_justify="left")
    table.add_column("what")
    table.add_column("size", justify="right")
    for what, bytes in parts.items():
        table.add_row(what, size(bytes))
    table.add_section()
    table.add_row("together, beside Python, PyTorch and the rows", size(sum(parts.values())))
    if federation.device.type == "cpu":
        table.add_row(
            "the whole process at its peak", size(peak_memory() + server + replies + kept)
        )
    return table


def activations(prepared: Prepared) -> int:
    """Bytes that one forward pass of the longest batch keeps for its backward pass, at the top rank."""
    federation, config = prepared.federation, prepared.config
    slots = federation.slots
    rows = sorted(
        (example for rows in prepared.tokenised.train.values() for example in rows),
        key=lambda row: -config.task.length(row),
    )[: config.training.batch_size // config.training.accumulation]
    objective = federation.objective
    batch = send_to_device(objective.batch(rows), federation.device)
    kept: dict[int, int] = {}
    parameters = {p.data_ptr() for p in slots.model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def give(tensor: Any) -> Any:
        return tensor

    peft.activate(slots, federation.top_rank)
    slots.model.train()
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, give), federation.autocast():
            _ = objective.loss(
                slots.model, batch
            )  # the graph must live while its tensors are counted
    finally:
        slots.model.eval()
    return sum(kept.values())


def tensor_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
