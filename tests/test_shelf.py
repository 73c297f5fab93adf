"""States and adapters on disk: the same bits as in memory, one layer at a time, nothing half-written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from fedhl import LoRA, get_method, get_weighting, server
from fedhl.lora import initial
from fedhl.method import flatten
from fedhl.seeds import generator
from fedhl.server import Client, Reply, ServerState
from fedhl.shelf import AdapterFile, Shelf, save_adapter

SHAPES = {"block.0/query": (9, 7), "block.1.value": (6, 11), "ünï.cøde": (8, 8)}
CLIENTS = [Client(f"c{k}", rank, 2.0, 10 + k) for k, rank in enumerate((1, 2, 4, 4))]
METHOD, WEIGHTING = get_method("fedhl"), get_weighting("truncation")


def start(method: str = "fedhl") -> ServerState:
    adapter = {name: initial(m, n, 4, 2.0, seed=0) for name, (m, n) in SHAPES.items()}
    return server.init(get_method(method), adapter, {}, seed=0)


def reply(state: ServerState, client: Client) -> Reply:
    g = generator(state.round, client.id)
    adapter = {
        name: LoRA(
            b.lora.A + torch.randn(b.lora.A.shape, generator=g),
            b.lora.B + torch.randn(b.lora.B.shape, generator=g),
            2.0,
        )
        for name, b in server.broadcast(METHOD, state, client, 0).items()
    }
    return Reply(client, state.round + 1, adapter, {}, 0.5, 1)


def same(a: object, b: object) -> bool:
    x, y = flatten(a), flatten(b)
    return list(x) == list(y) and all(torch.equal(x[name], y[name]) for name in x)


def on_disk(folder: Path, state: ServerState) -> ServerState:
    shelf = Shelf(folder, next(iter(state.layers.values())))
    for name, layer in state.layers.items():
        shelf[name] = layer
    return replace(state, layers=shelf)


@pytest.mark.parametrize("method", ["fedhl", "fedit", "fedhera", "lora_a2"])
def test_a_state_comes_back_to_the_bit(tmp_path: Path, method: str) -> None:
    state = start(method)
    shelf = on_disk(tmp_path, state).layers
    assert set(shelf) == set(SHAPES) and len(shelf) == len(SHAPES) and list(shelf) == sorted(shelf)
    assert all(same(shelf[name], state.layers[name]) for name in SHAPES)
    assert len(list(tmp_path.iterdir())) == len(SHAPES)  # no name led into another folder


def test_rounds_from_disk_are_those_in_memory(tmp_path: Path) -> None:
    """State, adapters and result on disk, against all in memory: weights and states to the bit."""
    memory, disk = start(), on_disk(tmp_path / "0", start())
    for round in (1, 2, 3):
        replies = [reply(memory, client) for client in CLIENTS]
        lazy = []
        for r in replies:
            save_adapter(tmp_path / r.client.id, r.adapter)
            lazy.append(replace(r, adapter=AdapterFile(tmp_path / r.client.id, 2.0)))
        memory, one = server.aggregate(METHOD, WEIGHTING, memory, replies, 0)
        shelf = Shelf(tmp_path / str(round), disk.layers[sorted(SHAPES)[0]])
        disk, two = server.aggregate(METHOD, WEIGHTING, disk, lazy, 0, into=shelf)
        assert disk.layers is shelf and disk.round == round
        assert all(same(shelf[name], memory.layers[name]) for name in SHAPES)
        assert one.clients == two.clients and one.diagnostics == pytest.approx(two.diagnostics)


def test_what_is_read_can_be_kept_and_changed(tmp_path: Path) -> None:
    shelf = on_disk(tmp_path, start()).layers
    name = "block.1.value"
    kept = shelf[name]
    kept.W.add_(1)
    assert not shelf[name].W.any()


def test_a_write_that_fails_leaves_the_old_state(tmp_path: Path) -> None:
    shelf = on_disk(tmp_path, start()).layers
    assert isinstance(shelf, Shelf)
    before = shelf["ünï.cøde"]
    file = shelf.file("ünï.cøde")
    file.with_name(f".{file.name}.partial").mkdir()  # nothing can be written there
    with pytest.raises((OSError, SafetensorError)):
        shelf["ünï.cøde"] = replace(before, W=before.W + 1)
    assert same(shelf["ünï.cøde"], before) and set(shelf) == set(SHAPES)


def test_what_is_not_there_is_a_key_error(tmp_path: Path) -> None:
    state = start()
    shelf = on_disk(tmp_path, state).layers
    assert isinstance(shelf, Shelf)
    del shelf["ünï.cøde"]
    assert "ünï.cøde" not in shelf and len(shelf) == 2
    for act in (lambda: shelf["ünï.cøde"], lambda: shelf.__delitem__("ünï.cøde")):
        with pytest.raises(KeyError, match="ünï"):
            act()
    save_adapter(tmp_path / "adapter", reply(state, CLIENTS[0]).adapter)
    with pytest.raises(KeyError, match="other"):
        AdapterFile(tmp_path / "adapter", 2.0)["other"]


def test_a_damaged_adapter_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "adapter"
    save_adapter(file, reply(start(), CLIENTS[0]).adapter)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(SafetensorError):
        AdapterFile(file, 2.0)
