"""What the defences that are always on cost an honest federation: seconds of a round, and of a message.

    python benchmarks/defences.py [--model SmolLM2-135M] [--repeats 5] [--json FILE]

Ten honest clients of ranks 4 to 64 reply to one round, with adapters of all linear layers of a model; only
the shapes of its weights are read. Measured, and each checked in the same run:

- the messages read with their checksums and checks, against safetensors' own reading of the same bytes;
- the examination of all replies before any state moves, against the aggregation that follows;
- the trial whether the next state can be sent in float16, the only payload that needs one;
- one message of the largest client through `fedhl gate`, against the same message without the gate, over TLS.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import httpx
import torch
import uvicorn
from private_sums import MODELS, shapes
from safetensors.torch import load
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

sys.path.append(str(Path(__file__).parents[1] / "examples" / "deployment"))
import certificates

from fedhl import get_method, get_weighting, server
from fedhl.lora import LoRA, initial
from fedhl.network.wire import Run, encode_reply, read_reply
from fedhl.run.commit import commit
from fedhl.seeds import generator
from fedhl.server import Client, Reply, refusals
from fedhl.server.layers import Layers
from fedhl.server.sendable import unsendable

RANKS = (4, 4, 4, 4, 8, 8, 16, 16, 32, 64)
METHOD, RUN, SEED = get_method("fedhl"), Run("run", "model", "tokenizer"), 0
ROUTE = "/v1/fleet/push-object"


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The median of the seconds, and what came of it."""
    seconds, got = [], None
    for _ in range(repeats):
        began = perf_counter()
        got = work()
        seconds.append(perf_counter() - began)
    return median(seconds), got


def trained(client: Client, state: server.ServerState) -> Reply:
    """An honest reply: the factors that were sent, with small changes."""
    g = generator(SEED, "trained", client.id)

    def moved(x: torch.Tensor) -> torch.Tensor:
        return x + 1e-3 * torch.randn(x.shape, generator=g)

    sent = server.broadcast(METHOD, state, client, SEED)
    adapter = {n: LoRA(moved(b.lora.A), moved(b.lora.B), client.scale) for n, b in sent.items()}
    return Reply(client, 1, adapter, {}, 1.0, 10, 0.1)


def at_the_server(model: str, repeats: int) -> tuple[dict[str, Any], bytes]:
    """The seconds of a round, and the largest client's message."""
    layers = {f"layer.{k}": shape for k, shape in enumerate(shapes(model))}
    start = {name: initial(m, n, max(RANKS), 1.0, seed=SEED) for name, (m, n) in layers.items()}
    state = server.init(METHOD, start, {}, SEED)
    clients = [Client(f"client-{k}", rank, 1.0, 100) for k, rank in enumerate(RANKS)]
    replies = [trained(client, state) for client in clients]
    sent = {client.id: server.broadcast(METHOD, state, client, SEED) for client in clients}
    messages = [encode_reply(RUN, reply, sent[reply.client.id]) for reply in replies]

    def read() -> list[Reply]:
        got = [
            read_reply(message, RUN, client, layers, sent[client.id].__getitem__, {})
            for message, client in zip(messages, clients, strict=True)
        ]
        return [replace(reply, adapter=dict(reply.adapter)) for reply in got]

    bare, _ = timed(lambda: [load(message) for message in messages], repeats)
    checked, arrived = timed(read, repeats)
    for reply, honest in zip(arrived, replies, strict=True):
        for name, lora in reply.adapter.items():
            assert torch.allclose(lora.B @ lora.A, honest.adapter[name].B @ honest.adapter[name].A)
    examined, reasons = timed(
        lambda: refusals.refusals(Layers(METHOD, state, SEED), replies), repeats
    )
    assert reasons == [None] * len(replies), reasons
    whole, (following, outcome) = timed(
        lambda: server.aggregate(
            METHOD, get_weighting("examples"), state, replies, SEED, watch=False
        ),
        repeats,
    )
    assert not outcome.refused and len(outcome.clients) == len(replies)
    narrow = [replace(client, download="float16") for client in clients]
    tried, reason = timed(lambda: unsendable(METHOD, following, narrow, SEED), 1)
    assert reason is None, reason
    return {
        "layers": len(layers),
        "bytes of the replies": sum(map(len, messages)),
        "read, by safetensors alone": bare,
        "read, with the checks": checked,
        "examined before any state moves": examined,
        "the whole server step, with the examination": whole,
        "tried whether float16 can hold it": tried,
    }, max(messages, key=len)


# --- the gate -----------------------------------------------------------------------------------


async def swallow(request: Request) -> Response:
    return Response(str(len(await request.body())))


def superlink(port: int, keys: str) -> None:
    """Something that takes messages over TLS, in place of a SuperLink."""
    app = Starlette(routes=[Route("/{path:path}", swallow, methods=["POST"])])
    certificate, key = f"{keys}/server.pem", f"{keys}/server.key"
    uvicorn.run(app, port=port, log_level="critical", ssl_certfile=certificate, ssl_keyfile=key)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextmanager
def both_doors(folder: Path) -> Iterator[dict[str, int]]:
    """The ports with and without the gate."""
    keys = folder / "keys"
    certificates.make(keys, ["127.0.0.1"], [])
    doors = {"without the gate": free_port(), "through the gate": free_port()}
    behind, before = doors.values()
    context = multiprocessing.get_context("spawn")
    server = context.Process(target=superlink, args=(behind, str(keys)), daemon=True)
    server.start()
    command = [sys.executable, "-m", "fedhl", "gate", f"127.0.0.1:{behind}"]
    command += ["--certificates", str(keys), "--listen", f"127.0.0.1:{before}"]
    gate = subprocess.Popen(command)
    try:
        yield doors
    finally:
        gate.terminate()
        gate.wait()
        server.terminate()
        server.join()


def over_the_network(message: bytes, repeats: int) -> dict[str, float]:
    """The seconds of one message, with and without the gate in turn."""
    with tempfile.TemporaryDirectory() as folder, both_doors(Path(folder)) as doors:
        trust = ssl.create_default_context(cafile=Path(folder) / "keys" / "ca.crt")
        nodes = {
            name: httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trust, timeout=600)
            for name, port in doors.items()
        }

        def send(node: httpx.Client) -> None:
            answer = node.post(ROUTE, content=message)
            assert answer.text == str(len(message)), answer.text

        for node in nodes.values():
            for _ in range(240):  # until it listens
                try:
                    send(node)
                    break
                except httpx.ConnectError:
                    sleep(0.5)
        seconds: dict[str, list[float]] = {name: [] for name in nodes}
        for _ in range(repeats):
            for name, node in nodes.items():
                seconds[name].append(timed(lambda node=node: send(node), 1)[0])
        for node in nodes.values():
            node.close()
    return {name: median(each) for name, each in seconds.items()}


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--model", choices=MODELS, default="SmolLM2-135M", help="whose shapes")
    parser.add_argument("--repeats", type=int, default=5, help="of which the median counts")
    parser.add_argument("--json", type=Path, help="write the results into this file")
    args = parser.parse_args()

    torch.set_num_threads(1)
    seconds, message = at_the_server(args.model, args.repeats)
    for name, value in seconds.items():
        print(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value:.3f} s")
    doors = over_the_network(message, args.repeats)
    for name, value in doors.items():
        print(f"{len(message):,} bytes {name}: {value:.3f} s")
    if args.json:
        machine = {"torch": torch.__version__, "threads": 1, "commit": commit()}
        result = {"model": args.model, "ranks": RANKS, "seconds": seconds}
        result |= {"message": len(message), "seconds of a message": doors, "machine": machine}
        args.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
