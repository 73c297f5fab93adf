"""Failures that a run names by itself: each provoked, and none in a healthy run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import small_server
from support.small_server import CLIENTS, FEDHL, SEED, SHAPES
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedhl import get_weighting, server, simulate
from fedhl.config import load_config
from fedhl.lora import LoRA
from fedhl.record import read_metrics
from fedhl.run import resume_run, start_run
from fedhl.run.signatures import ROUNDS, agreement, beyond, first_seen, losses
from fedhl.seeds import generator
from fedhl.server import Reply
from fedhl.watch import SILENT, Watcher

SIDE, RANKS = 12, [2, 2, 2, 2, 4, 8]
WORDS = {
    "explosion": "the weights explode: at equal learning rates the clients move",
    "saturation": "the weights have exploded: the clients hardly move any more",
    "collapse": "the spectrum has collapsed: in 5 rounds less than 2% of ‖W‖² was beyond rank 2",
    "stagnation": "training stagnates: in 5 rounds the clients' updates cancelled each other",
}
"""What is said of each failure."""


def squares(model: nn.Module, batch: list[Tensor]) -> Tensor:
    X, Y = batch
    return 0.5 * (model(X) - Y).square().sum(dim=1).mean()


def regression(seed: int = 0) -> list[list[tuple[Tensor, Tensor]]]:
    """Rows of clients whose optima are `W° + 0.5 Z_i`, all of full rank, as in the laboratory."""
    g = generator(seed, "signatures")
    U, V = (torch.linalg.qr(torch.randn(SIDE, SIDE, generator=g)).Q for _ in "UV")
    sigma = torch.arange(1, SIDE + 1) ** -0.5
    centre = (U * (sigma / sigma.norm())) @ V.T
    clients = []
    for _ in RANKS:
        X = torch.randn(4 * SIDE, SIDE, generator=g)
        Z = torch.randn(SIDE, SIDE, generator=g)
        clients.append([*zip(X, X @ (centre + 0.5 * Z / Z.norm()).T, strict=True)])
    return clients


def linear(method: str, rate: float) -> tuple[list[dict[str, Any]], list[str]]:
    """The metrics of a federation of least squares, and what it said."""
    layer = nn.Linear(SIDE, SIDE, bias=False)
    nn.init.zeros_(layer.weight)
    rows, said = regression(), []
    result = simulate(
        nn.Sequential(layer),
        rows,
        ranks=RANKS,
        loss=squares,
        held_out=rows[0],
        watcher=Watcher(say=said.append),
        rounds=30,
        method=method,
        weighting="uniform",
        lora={"alpha": "1r"},
        training={
            **{"steps": 5, "batch_size": 4 * SIDE},
            **{"optimizer": "sgd", "learning_rate": rate},
        },
        evaluation={"every": 30},
    )
    return list(result.metrics), said


def classes(
    rate: float, between: type[nn.Module] = nn.ReLU
) -> tuple[list[dict[str, Any]], list[str]]:
    """The metrics of a federation of classifiers whose first layer is trained, and what it said."""
    g, said = generator(0, "classes"), []
    X = torch.randn(240, 16, generator=g)
    rows = [*zip(X, X[:, :4].argmax(dim=1), strict=True)]
    torch.manual_seed(0)
    result = simulate(
        nn.Sequential(nn.Linear(16, 24), between(), nn.Linear(24, 4)),
        [rows[k::4] for k in range(4)],
        ranks=[2, 2, 4, 4],
        loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        held_out=rows,
        watcher=Watcher(say=said.append),
        rounds=6,
        lora={"targets": ["0"]},
        training={"steps": 2, "batch_size": 32, "learning_rate": rate},
        evaluation={"every": 6},
    )
    return list(result.metrics), said


PROVOKED = {
    "collapse": lambda: linear("flexlora", 0.02),
    "stagnation": lambda: linear("fedhl", 0.1),
    "explosion": lambda: classes(1.0),
    "saturation": lambda: classes(100.0, nn.Tanh),
}


@pytest.fixture(scope="module")
def provoked() -> dict[str, tuple[list[dict[str, Any]], list[str]]]:
    return {name: provoke() for name, provoke in PROVOKED.items()}


@pytest.mark.parametrize("name", PROVOKED)
def test_a_failure_is_named_once(name: str, provoked: dict[str, Any]) -> None:
    lines, said = provoked[name]
    (text,) = [line["signatures"] for line in lines if "signatures" in line]
    ((called, sentence),) = text.items()
    assert called == ("explosion" if name == "saturation" else name)
    assert sentence.startswith(WORDS[name])
    assert [x for x in said if any(w in x for w in WORDS.values())] == [f"warning: {sentence}"]


def test_nothing_is_named_where_nothing_fails() -> None:
    """The clients that remember, on the rows and at the rate with which those of fedhl stagnate; small steps
    that do not stagnate yet; and a classifier at a rate that suits it."""
    for lines, said in (linear("fedhl_ef", 0.1), linear("fedhl", 0.02), classes(0.02)):
        assert not any("signatures" in line for line in lines)
        assert not any(words in line for line in said for words in WORDS.values())


def test_forgetting_is_no_explosion() -> None:
    """A class for each client, and half of them in a round: after many steps the model knows only these,
    and the loss of the others is a multiple of their first one, while no weight explodes."""
    g = generator(0, "forgetting")
    X = torch.randn(240, 16, generator=g)
    labels = X[:, :4].argmax(dim=1)
    torch.manual_seed(0)
    result = simulate(
        nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4)),
        [[(x, y) for x, y in zip(X, labels, strict=True) if y == k] for k in range(4)],
        ranks=[2, 2, 4, 4],
        loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        watcher=SILENT,
        rounds=10,
        method="fedhl",
        participation={"count": 2},
        training={"steps": 40, "batch_size": 32, "learning_rate": 0.02},
    )
    seen = [losses(result.metrics[1 : t + 1]) for t in range(2, 11)]
    assert max(now / then for now, then in seen if then) > 2
    assert not any("signatures" in line for line in result.metrics)


@pytest.mark.parametrize("name", PROVOKED)
def test_the_lines_so_far_are_all_that_is_known(name: str, provoked: dict[str, Any]) -> None:
    """From the lines as a run folder has them, in any process: the same words in the same round, and nothing
    that was said before."""
    lines = json.loads(json.dumps(provoked[name][0]))
    for t, line in enumerate(lines):
        bare = {key: value for key, value in line.items() if key != "signatures"}
        assert first_seen(lines[:t], bare, len(lines)) == line.get("signatures", {})


def test_a_task_begins_anew(provoked: dict[str, Any]) -> None:
    """No task of four rounds has five in a row."""
    lines = [{k: v for k, v in x.items() if k != "signatures"} for x in provoked["stagnation"][0]]
    assert ROUNDS == 5
    for t, line in enumerate(lines):
        assert first_seen(lines[:t], line, 4) == {}


def test_nothing_is_known_without_drifts(provoked: dict[str, Any]) -> None:
    """As with privacy, whose clients' own numbers nobody may see."""
    lines = json.loads(json.dumps(provoked["explosion"][0]))
    for t, line in enumerate(lines):
        line.pop("signatures", None)
        for client in line["clients"]:
            client["drift"] = None
        assert first_seen(lines[:t], line, 100) == {}


# --- the numbers --------------------------------------------------------------------------------


def line_of(*changes: Tensor) -> dict[str, Any]:
    """The line of a round of fedhl in which client i changes every layer by `changes[i]`, padded with zeros,
    through its B alone."""
    state = small_server.start()
    replies = []
    for client, B in zip(CLIENTS, changes, strict=False):
        sent = server.broadcast(FEDHL, state, client, SEED)
        adapter = {}
        for name, (m, _) in SHAPES.items():
            full = torch.zeros(m, client.rank)
            full[: len(B), :2] = B
            adapter[name] = LoRA(sent[name].lora.A, full / client.scale, client.scale)
        replies.append(Reply(client, 1, adapter, state.head, loss=0.5, steps=3))
    after, outcome = server.aggregate(FEDHL, get_weighting("uniform"), state, replies, SEED)
    spectra = server.spectra(FEDHL, after, 6)
    return {"clients": outcome.clients, "diagnostics": outcome.diagnostics | spectra}


def test_agreement_of_updates() -> None:
    """1 if they are orthogonal, here in rows of their own; `√N_eff` if they are one; 0 if they cancel."""
    B = torch.randn(2, 2, generator=generator(0, "agreement"))
    apart = [torch.cat([torch.zeros(2 * k, 2), B]) for k in range(3)]
    assert agreement(line_of(*apart)) == pytest.approx(1, rel=1e-5)
    assert agreement(line_of(B, B, B)) == pytest.approx(3**0.5, rel=1e-5)
    assert agreement(line_of(B, -B)) == pytest.approx(0, abs=1e-5)
    assert agreement(line_of(0 * B)) == math.inf  # nobody moved


def test_the_share_beyond_a_rank() -> None:
    line = line_of(torch.eye(2))
    state = line["diagnostics"]
    assert beyond(line, 0) == pytest.approx(1)
    energies = [sigma**2 for sigma in state["spectrum"]]
    assert beyond(line, 1) == pytest.approx(1 - energies[0] / sum(energies))
    assert beyond(line, 2) == pytest.approx(0, abs=1e-6)


# --- resumed ------------------------------------------------------------------------------------


def test_a_resumed_run_says_nothing_twice(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(project)
    steep = ["training.learning_rate=3", "training.steps=2", "training.schedule=constant"]
    config = load_config(project / "tiny.yaml", [*steep, "rounds=5", "evaluation.every=5"])
    run, said = tmp_path / "run", []

    def interrupted(text: str) -> None:
        said.append(text)
        if WORDS["explosion"] in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start_run(config, run, Watcher(say=interrupted))
    resume_run(run, Watcher(say=said.append))
    lines = read_metrics(run)
    (text,) = [line["signatures"]["explosion"] for line in lines if "signatures" in line]
    assert len(lines) == 6 and said.count(f"warning: {text}") == 1
    assert (run / "report.html").read_text("utf-8").count(text) == 1
