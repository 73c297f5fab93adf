"""Checkpoints: the same bits back, damage always noticed and named, and never half of one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedhl import get_method, get_weighting, server
from fedhl.files import sha256
from fedhl.lora import LoRA, initial
from fedhl.method import flatten
from fedhl.record import rounds_in
from fedhl.run import checkpoint
from fedhl.run.checkpoint import CorruptCheckpoint
from fedhl.seeds import generator
from fedhl.server import ServerState

SHAPES = {"block.0.attention": (5, 7), "block.1.attention": (8, 6)}
NOTES: dict[str, Any] = {
    "metrics": {
        "round": 2,
        "loss": 0.1 + 0.2,
        "nothing": None,
        "client": "Zürich",
        "ranks": [4, 8],
    },
    "best": {"round": 1, "value": 1e-7},
}


def start(method: str) -> ServerState:
    adapter = {name: initial(m, n, 3, 2.0, seed=0) for name, (m, n) in SHAPES.items()}
    head = {"classifier.weight": torch.randn(2, 6, generator=generator(0)).T}  # not contiguous
    return server.init(get_method(method), adapter, head, seed=0)


def example(method: str = "fedhl", round: int = 2) -> ServerState:
    """A state after two rounds of one client, so that everything in it has moved."""
    rule, weighting, state = get_method(method), get_weighting("uniform"), start(method)
    client = server.Client("one", 3, 2.0, 10)
    draw = generator(1)
    for _ in range(2):
        sent = server.broadcast(rule, state, client, 0)
        trained = {
            name: LoRA(
                b.lora.A + torch.randn(b.lora.A.shape, generator=draw),
                b.lora.B + torch.randn(b.lora.B.shape, generator=draw),
                b.lora.scale,
            )
            for name, b in sent.items()
        }
        reply = server.Reply(client, state.round + 1, trained, state.head, 0.5, 1)
        state, _ = server.aggregate(rule, weighting, state, [reply], 0)
    return replace(state, round=round)


def same(a: ServerState, b: ServerState) -> bool:
    """To the bit, with the same names in the same order."""
    parts = [
        {**{f"{n}/{k}": t for n, s in x.layers.items() for k, t in flatten(s).items()}, **x.head}
        for x in (a, b)
    ]
    return (
        a.round == b.round
        and [list(part) for part in (a.layers, a.head)] == [list(p) for p in (b.layers, b.head)]
        and list(parts[0]) == list(parts[1])
        and all(t.dtype == parts[1][n].dtype for n, t in parts[0].items())
        and all(torch.equal(t, parts[1][n]) for n, t in parts[0].items())
    )


@pytest.mark.parametrize("method", ["fedhl", "fedit", "flexlora"])
def test_what_is_saved_is_loaded(tmp_path: Path, method: str) -> None:
    state = example(method)
    path = checkpoint.save(tmp_path / "state", state, NOTES)
    assert path == tmp_path / "state" / "round-000002"
    loaded, manifest = checkpoint.load(path, start(method))
    assert same(loaded, state)
    assert manifest == {"round": 2} | NOTES


def test_the_next_round_from_a_loaded_state_is_the_same(tmp_path: Path) -> None:
    """Not only the numbers: their layout in memory too, on which the last bits of a product hang."""
    state = example()
    loaded, _ = checkpoint.load(checkpoint.save(tmp_path, state, {}), start("fedhl"))
    client = server.Client("two", 2, 1.5, 10)
    rounds = []
    for x in (state, loaded):
        sent = server.broadcast(get_method("fedhl"), x, client, 0)
        trained = {n: LoRA(b.lora.A + 0.1, b.lora.B - 0.3, 1.5) for n, b in sent.items()}
        reply = server.Reply(client, 3, trained, x.head, 0.5, 1)
        weighting = get_weighting("uniform")
        rounds.append(server.aggregate(get_method("fedhl"), weighting, x, [reply], 0)[0])
    assert same(*rounds)


def test_saving_the_same_state_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    paths = [checkpoint.save(tmp_path / name, example(), NOTES) for name in "ab"]
    for file in ("state.safetensors", "manifest.json"):
        assert len({(path / file).read_bytes() for path in paths}) == 1
    assert sorted(p.name for p in paths[0].iterdir()) == ["manifest.json", "state.safetensors"]


@pytest.mark.parametrize("name", ["manifest.json", "state.safetensors"])
def test_one_flipped_bit_anywhere(tmp_path: Path, name: str) -> None:
    path = checkpoint.save(tmp_path, example(), NOTES)
    like, file = start("fedhl"), path / name
    good = file.read_bytes()
    step = 1 if name == "manifest.json" else len(good) // 200
    for position in range(0, len(good), step):
        file.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        try:
            manifest = checkpoint.load(path, like)[1]
        except CorruptCheckpoint:
            continue
        # 0.30000000000000005 is another way to write the number that was saved.
        assert name == "manifest.json" and manifest == {"round": 2} | NOTES, position


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


DAMAGE = {
    "cut short": cut,
    "emptied": lambda file: file.write_bytes(b""),
    "missing": Path.unlink,
    "not text": lambda file: file.write_bytes(b"\xff\xfe\x00"),
    "a list": lambda file: file.write_text("[1, 2]"),
    "an empty mapping": lambda file: file.write_text("{}"),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["manifest.json", "state.safetensors"])
def test_damage_is_noticed_and_the_file_named(tmp_path: Path, name: str, damage: str) -> None:
    path = checkpoint.save(tmp_path, example(), NOTES)
    DAMAGE[damage](path / name)
    with pytest.raises(CorruptCheckpoint, match=rf"round-000002/{name}: "):
        checkpoint.load(path, start("fedhl"))


def test_a_folder_without_files(tmp_path: Path) -> None:
    (tmp_path / "round-000001").mkdir()
    with pytest.raises(CorruptCheckpoint, match=r"manifest\.json: cannot be read"):
        checkpoint.load(tmp_path / "round-000001", start("fedhl"))


@pytest.mark.parametrize(
    "lost", ["head::classifier.weight", "layer::block.0.attention::W", "layer::block.1.attention"]
)
def test_missing_tensors_under_good_checksums(tmp_path: Path, lost: str) -> None:
    """As when the files of two runs are mixed: nothing is damaged, yet the state is not whole."""
    path = checkpoint.save(tmp_path, example(), NOTES)
    file = path / "state.safetensors"
    kept = {name: t for name, t in load_file(file).items() if not name.startswith(lost)}
    save_file(kept, file)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["sha256"]["state.safetensors"] = sha256(file)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptCheckpoint, match=r"state\.safetensors: cannot be read \(KeyError"):
        checkpoint.load(path, start("fedhl"))


def test_tensors_of_another_model(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, example(), NOTES)
    fewer = start("fedhl")
    fewer = replace(fewer, layers={"block.0.attention": fewer.layers["block.0.attention"]})
    with pytest.raises(CorruptCheckpoint, match=r"state\.safetensors.*block\.1\.attention"):
        checkpoint.load(path, fewer)


# Written whole or not at all


def test_a_crash_before_the_rename_leaves_no_checkpoint(tmp_path: Path) -> None:
    """What a killed process leaves behind is not mistaken for a checkpoint, and does not stay."""
    first = checkpoint.save(tmp_path, example(round=1), NOTES)
    whole = checkpoint.save(tmp_path, example(round=2), NOTES)
    partial = tmp_path / ".partial-round-000002"
    whole.rename(partial)
    (partial / "manifest.json").write_text('{"round": ')
    (partial / "stray").write_text("")
    assert rounds_in(tmp_path) == {1: first}
    again = checkpoint.save(tmp_path, example(round=2), NOTES)
    assert not partial.exists() and not (again / "stray").exists()
    assert list(rounds_in(tmp_path).items()) == [(2, again), (1, first)]
    assert same(checkpoint.load(again, start("fedhl"))[0], example(round=2))


def test_a_round_done_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, example(), {"metrics": "old"})
    (path / "state.safetensors").write_bytes(b"rotten")
    assert checkpoint.save(tmp_path, example(), {"metrics": "new"}) == path
    assert checkpoint.load(path, start("fedhl"))[1]["metrics"] == "new"


FULL_DISK = """
import resource, sys
from pathlib import Path
from safetensors import SafetensorError
from test_checkpoint import checkpoint, example, same, start
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
first = checkpoint.save(folder, example(round=1), {})
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # Python ignores the signal: EFBIG
try:
    checkpoint.save(folder, example(round=2), {"notes": "x" * 10_000})
except (OSError, SafetensorError) as error:
    print(type(error).__name__)
assert [path.name for path in folder.iterdir()] == ["round-000001"], list(folder.iterdir())
assert same(checkpoint.load(first, start("fedhl"))[0], example(round=1))
"""


@pytest.mark.parametrize("limit", [100, 4_000], ids=["tensors", "manifest"])
def test_no_room_on_the_disk(tmp_path: Path, limit: int) -> None:
    """A file that may not grow fails as on a full disk: an error, nothing half-written, the last kept."""
    size = (checkpoint.save(tmp_path / "size", example(), {}) / "state.safetensors").stat().st_size
    assert 100 < size < 4_000 < 10_000, "the limits are to hit the one file or the other"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "state"), str(limit)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("OSError", "SafetensorError"), done.stdout + done.stderr


# Which are kept


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, None, [10, 9]),
        (2, 3, [10, 9, 3]),
        (2, 10, [10, 9]),
        (3, 9, [10, 9, 8]),
        (2, 99, [10, 9]),
        (20, 1, list(range(10, 0, -1))),
    ],
)
def test_prune(tmp_path: Path, keep: int, best: int | None, left: list[int]) -> None:
    path = checkpoint.save(tmp_path, example(round=1), NOTES)
    for round in range(2, 11):
        shutil.copytree(path, tmp_path / f"round-{round:06d}")
    (tmp_path / "unrelated").mkdir()
    checkpoint.prune(tmp_path, keep, best)
    assert list(rounds_in(tmp_path)) == left
    assert (tmp_path / "unrelated").exists()


def test_nothing_stored(tmp_path: Path) -> None:
    assert rounds_in(tmp_path / "nowhere") == {}
    checkpoint.prune(tmp_path / "nowhere", 2, None)
