"""The table of sizes in docs/wire.md: bytes of a broadcast of FedHL's, for the models of the demos."""

from __future__ import annotations

import torch

from fedhl.lora import LoRA
from fedhl.method import Broadcast
from fedhl.network.wire import Run, encode_broadcast
from fedhl.server.payload import PAYLOADS, number_bytes

RUN = Run("a-run", "sha256-of-the-model", "sha256-of-the-tokenizer")
MINILM = {
    f"bert.encoder.layer.{k}.attention.self.{part}": (384, 384)
    for k in range(6)
    for part in ("query", "value")
} | {"bert.pooler.dense": (384, 384)}
SMOLLM2 = {
    f"model.layers.{k}.self_attn.{part}_proj": (m, 576)
    for k in range(30)
    for part, m in (("q", 576), ("v", 192))
}
MODELS = {
    "MiniLM-L6": (
        MINILM,
        {"classifier.weight": (2, 384), "classifier.bias": (2,)},
        (4, 8, 16, 32, 64),
    ),
    "SmolLM2-135M": (SMOLLM2, {}, (4, 8, 16, 32)),
}


def sizes(model: str, rank: int, payload: str) -> tuple[int, float]:
    """The bytes of a broadcast of FedHL's as it is sent, and of its numbers as the metrics count them."""
    shapes, heads, _ = MODELS[model]
    head = {name: torch.zeros(shape) for name, shape in heads.items()}
    sent = {
        name: Broadcast(LoRA(torch.ones(rank, n), torch.ones(m, rank), 2.0))
        for name, (m, n) in shapes.items()
    }
    counted = sum(number_bytes(payload, m, n) * rank * (m + n) for m, n in shapes.values())
    header = {**RUN._asdict(), "round": 1, "client": "client-0"}
    message = encode_broadcast(header, sent, head, payload)
    return len(message), counted + 4 * sum(x.numel() for x in head.values())


def size_table() -> str:
    """One row for each model and rank, one column for each payload."""
    lines = [
        "| model | rank | " + " | ".join(PAYLOADS) + " |",
        "|---|---|" + "---|" * len(PAYLOADS),
    ]
    for model, (_, _, ranks) in MODELS.items():
        for rank in ranks:
            found = [f"{sizes(model, rank, payload)[0]:,}" for payload in PAYLOADS]
            lines.append(f"| {model} | {rank} | " + " | ".join(found) + " |")
    return "\n".join(lines)
