"""Personal models: each client goes on alone from what it would be sent next, and nobody else is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from pydantic import ValidationError
from support.small_federation import federate, same
from support.small_models import build
from support.tiny import fedhl, start
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification

import fedhl as library
from fedhl import get_method, server
from fedhl.compare import compare
from fedhl.config import load_config
from fedhl.config.conduct import PersonalConfig, TrainingConfig
from fedhl.errors import UserError
from fedhl.federation.engine import run_round
from fedhl.federation.federation import Federation, initial_state
from fedhl.federation.local import evaluate_client, evaluate_rows
from fedhl.federation.personal import personal_change, personal_steps, personalise
from fedhl.federation.prepare import prepare
from fedhl.federation.scores import changed, over_models
from fedhl.lora import dense
from fedhl.method import TaskSequence
from fedhl.methods import METHODS
from fedhl.model import peft
from fedhl.model.training import batches
from fedhl.record import read_metrics, read_scores, read_summary
from fedhl.run import start_run
from fedhl.run.personal import model_file
from fedhl.seeds import derive
from fedhl.server import ServerState
from fedhl.watch import SILENT, Watcher

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

STEPS, RATE = 4, 0.03
SETTINGS: dict[str, Any] = {
    "own": 7,
    "evaluation": {"client_fraction": 0.2, "batch_size": 5},
    "personal": {"steps": STEPS, "learning_rate": RATE},
}


def after(federation: Federation, rounds: int) -> ServerState:
    state = initial_state(federation)
    for _ in range(rounds):
        state, _ = run_round(federation, state)
    return state


# --- against a slow reference -------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedhl", "fedhl_ef"])
def test_it_is_plain_training_of_a_fresh_model_from_what_the_client_is_sent(method: str):
    """With transformers, PEFT and torch alone: M in the base, the factors that are sent in the adapter."""
    federation = federate("bert", method=method, dropout=0.0, **SETTINGS)
    state = after(federation, 2)
    client = federation.clients[1]
    personal, record = personalise(federation, state, client)

    sent = server.broadcast(federation.method, state, client, federation.config.seed)
    model: Any = build("bert", 0.0)
    held = {name: state.ledger.held(client.id, name) for name in sent}
    assert any(M is not None and bool(M.any()) for M in held.values()) == (method == "fedhl_ef")
    with torch.no_grad():
        for name, M in held.items():
            if M is not None:
                model.get_parameter(f"{name}.weight").add_(M)
        for name, value in state.head.items():
            model.get_parameter(name).copy_(value)
    rank, alpha = client.rank, federation.config.lora.alpha_of(client.rank)
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        target_modules=[*sent],
        use_rslora=True,
    )
    inject_adapter_in_model(lora, model)
    trained: list[nn.Parameter] = []
    model.requires_grad_(False)
    for name in federation.slots.modules:
        for factor in "AB":
            parameter = model.get_parameter(f"{name}.lora_{factor}.default.weight")
            parameter.data.copy_(getattr(sent[name].lora, factor))
            trained.append(parameter)
    trained += [model.get_parameter(name) for name in state.head]
    for parameter in trained:
        parameter.requires_grad_(True)

    def scores() -> tuple[float, float]:
        batch = federation.objective.batch(federation.own[client.id])
        inputs = {**batch.inputs} if hasattr(batch, "inputs") else {**batch}
        labels = inputs.pop("labels")
        with torch.no_grad():
            logits = model.eval()(**inputs).logits
        right = (logits.argmax(-1) == labels).float().mean()
        return float(cross_entropy(logits, labels)), float(right)

    def measured(stage: str) -> tuple[float, float]:
        return record[stage]["loss"], record[stage]["accuracy"]

    assert measured("global") == pytest.approx(scores(), rel=1e-4)
    rows, optimizer = federation.rows[client.id], torch.optim.AdamW(trained, RATE, weight_decay=0.0)
    order = batches(len(rows), 4, derive(federation.config.seed, "personal", client.id))
    model.train()
    for _ in range(STEPS):
        batch = federation.objective.batch([rows[k] for k in next(order)])
        optimizer.zero_grad()
        federation.objective.loss(model, batch).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    for name, own in personal.adapter.items():
        for factor in "AB":
            expected = model.get_parameter(f"{name}.lora_{factor}.default.weight")
            torch.testing.assert_close(getattr(own, factor), expected.data, rtol=2e-3, atol=2e-5)
        assert not torch.equal(own.B, sent[name].lora.B)
    for name, value in personal.head.items():
        torch.testing.assert_close(value, model.get_parameter(name).data, rtol=2e-3, atol=2e-5)
    assert measured("personal") == pytest.approx(scores(), rel=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_goes_on_and_is_rebuilt_from_what_is_kept(name: str):
    """The base with the change of the personal model scores as the model did, and the state has not moved."""
    method = get_method(name)
    ranks = {"ada": 2, "bob": 4 if method.mixed_ranks else 2}
    federation = federate("bert", ranks, method=method, **SETTINGS)
    state = after(federation, 1)
    if isinstance(method, TaskSequence):
        state = server.next_task(method, state)  # frozen directions, and their magnitudes
    before, client = deepcopy(state), federation.clients[1]
    own = federation.own[client.id]
    personal, record = personalise(federation, state, client)
    assert same(state, before)
    # also the base model is what it was
    assert record["global"] == evaluate_client(federation, state, client, own)
    assert record["personal"]["loss"] != record["global"]["loss"]
    change = personal_change(federation, state, client, personal)
    rebuilt = ServerState(0, {}, dict(personal.head))
    with changed(federation, rebuilt, {name: dense(delta) for name, delta in change.items()}):
        assert evaluate_rows(federation, own) == pytest.approx(record["personal"], rel=1e-4)


def test_a_client_that_trains_some_layers_keeps_the_others():
    federation = federate("bert", **SETTINGS)
    part = frozenset(name for name in peft.layers(federation.slots) if "layer.1" in name)
    bob, state = replace(federation.clients[1], layers=part), after(federation, 1)
    sent = server.broadcast(federation.method, state, bob, federation.config.seed)
    personal, _ = personalise(federation, state, bob)
    for name, own in personal.adapter.items():
        assert torch.equal(own.B, sent[name].lora.B) == (name not in part)


def test_steps_and_epochs_are_those_of_training():
    rounds = TrainingConfig(steps=7, learning_rate=0.1, schedule="cosine", batch_size=4)
    own = PersonalConfig().training(rounds)
    assert (own.steps_for(10), own.learning_rate, own.schedule) == (3, 0.1, "constant")
    own = PersonalConfig(epochs=2.0, learning_rate=0.2).training(rounds)
    assert (own.steps_for(10), own.learning_rate, own.batch_size) == (5, 0.2, 4)
    with pytest.raises(ValidationError, match="give steps or epochs, not both"):
        PersonalConfig(steps=1, epochs=1.0)


def test_gains_are_counted_by_the_metric_of_the_task():
    federation = federate("bert", **SETTINGS)

    def record(before: float, after: float) -> dict[str, Any]:
        return {
            stage: {"accuracy": value, "loss": 1.0, "examples": 5}
            for stage, value in (("global", before), ("personal", after))
        }

    records = {
        "a": record(0.5, 0.6),
        "b": record(0.5, 0.4),
        "c": record(0.5, 0.5),
        "d": record(0.5, float("nan")),
        "e": record(0.5, 0.9),
    }
    over = over_models(records, federation.objective)
    assert [over[key] for key in ("gained", "lost", "stayed")] == [2, 2, 1]
    del records["d"]
    over = over_models(records, federation.objective)
    assert over["mean"]["global"]["accuracy"] == pytest.approx(0.5)
    assert over["mean"]["personal"]["accuracy"] == pytest.approx(0.6)


# --- a run --------------------------------------------------------------------------------------

SHORT = ["rounds=2", "training.steps=2"]
PERSONAL = [*SHORT, "personal.steps=5"]


@pytest.fixture(scope="module")
def run(project: Path) -> Path:
    """A finished run with personal models; what it said is in personal.txt."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        start_run(load_config("tiny.yaml", PERSONAL), "runs/personal", Watcher(say=said.append))
    (project / "personal.txt").write_text("\n".join(said))
    return project / "runs/personal"


@pytest.fixture(scope="module")
def plain(project: Path) -> Path:
    """The same run without them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        start_run(load_config("tiny.yaml", SHORT), "runs/impersonal")
    return project / "runs/impersonal"


def scores(run: Path) -> dict[str, Any]:
    found = read_scores(run)
    assert found is not None
    return {key: value for key, value in found.items() if key != "seconds"}


def models(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "personal").glob("*.safetensors")}


def test_the_state_is_that_of_a_run_without_personal_models(run: Path, plain: Path):
    for file in plain.glob("state/**/*.safetensors"):
        assert (run / file.relative_to(plain)).read_bytes() == file.read_bytes()
    for one, other in zip(read_metrics(plain), read_metrics(run), strict=True):
        assert one | {"seconds": None} == other | {"seconds": None}
    assert read_summary(plain)["personal"] is None and not (plain / "personal").exists()
    assert "Personal models" not in (plain / "report.html").read_text()


def test_what_a_run_says_of_them(run: Path, project: Path):
    summary, last = read_summary(run)["personal"], read_metrics(run)[-1]["evaluation"]["clients"]
    assert {id: c["global"] for id, c in summary["clients"].items()} == last["by_client"]
    for name, value in last["mean"].items():
        assert summary["mean"]["global"][name] == pytest.approx(value)
    assert summary["gained"] + summary["lost"] + summary["stayed"] == 6 == len(models(run))
    mean = summary["mean"]["personal"]["accuracy"]
    line = next(
        s
        for s in (project / "personal.txt").read_text().splitlines()
        if s.startswith("personal models")
    )
    assert f"{mean:.4f} after" in line and f"{summary['lost']} lost" in line
    page = (run / "report.html").read_text()
    assert "<h2>Personal models</h2>" in page and f'<data value="{mean}">' in page
    for path in (run / "personal").iterdir():
        assert path.stat().st_mode & 0o077 == 0


def test_a_run_that_is_killed_at_the_end_comes_to_the_same(run: Path, project: Path):
    killed = project / "runs/personal-killed"
    changes = [part for change in PERSONAL for part in ("--set", change)]
    command = start(
        project, "run", "tiny.yaml", *changes, "--out", "runs/personal-killed", "--quiet"
    )
    done = command.kill_when(lambda: any(killed.glob(".partial-personal/*.safetensors")))
    assert done.code == -9 and not (killed / "personal").exists()
    assert read_summary(killed)["personal"] is None
    assert fedhl(project, "resume", "runs/personal-killed", "--quiet").code == 0
    assert (scores(killed), models(killed)) == (scores(run), models(run))
    assert not (killed / ".partial-personal").exists()
    kept = (killed / "personal/scores.json").read_bytes()
    assert fedhl(project, "resume", "runs/personal-killed", "--quiet").code == 0  # done once
    assert (killed / "personal/scores.json").read_bytes() == kept
    summary = read_summary(killed)["personal"]
    assert summary == json.loads(kept)


def test_a_run_that_ends_early_has_them_too(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(project)
    early = ["rounds=6", "stop.hours=1e-9", "training.steps=1", "personal.steps=1"]
    result = start_run(load_config("tiny.yaml", early), tmp_path / "early")
    assert result.state.round == 1 and result.personal is not None
    assert result.personal["round"] == 1 and len(result.personal["clients"]) == 6
    config = load_config("tiny.yaml", ["personal.epochs=2", "training.batch_size=8"])
    prepared = prepare(config)
    steps = [personal_steps(prepared.federation, client) for client in result.federation.clients]
    assert steps == [-(-2 * client.examples // 8) for client in result.federation.clients]
    # the client's model, rebuilt from its file
    own = prepared.federation.own["client-5"]
    batch = prepared.federation.objective.batch(own)
    with torch.no_grad():
        score = prepared.federation.objective.score(
            prepared.federation.objective.outputs(result.model("client-5"), batch), batch
        )
    expected = result.personal["clients"]["client-5"]["personal"]["loss"]
    assert float(score["loss"].mean()) == pytest.approx(expected, rel=1e-4)


def test_names_of_files_are_short_enough(tmp_path: Path):
    names = ["north", "台湾" * 60, "台湾" * 61]
    files = [model_file(tmp_path, name) for name in names]
    assert files[0].name == "north.safetensors" and len({*files}) == 3
    for file in files:
        file.touch()


def test_the_exported_model_is_the_one_that_was_measured(
    run: Path, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(project)
    prepared = prepare(load_config(run / "config.yaml"))
    federation, client = prepared.federation, "client-3"
    export = ["export", "runs/personal", "--client", client, "--out"]
    assert fedhl(project, *export, tmp_path / "whole", "--merged").code == 0
    assert fedhl(project, *export, tmp_path / "adapter", "--rank", "32").code == 0
    batch = federation.objective.batch(federation.own[client])
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole").eval()
    base = AutoModelForSequenceClassification.from_pretrained("bert", num_labels=2)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    measured = scores(run)["clients"][client]["personal"]
    logits = []
    for model in (whole, adapted):
        with torch.no_grad():
            outputs = federation.objective.outputs(model, batch)
            found = federation.objective.score(outputs, batch)
        for name in ("loss", "accuracy"):
            assert float(found[name].float().mean()) == pytest.approx(measured[name], rel=1e-4), (
                name
            )
        logits.append(outputs)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-4)
    card = (tmp_path / "whole/README.md").read_text()
    assert f"then by the client {client} alone" in card and "own rows, personal model" in card


def test_what_export_refuses(run: Path, plain: Path, project: Path):
    def refusal(*arguments: str) -> str:
        done = fedhl(project, "export", *arguments, "--merged", "--out", "runs/nothing")
        assert done.code == 2 and not (project / "runs/nothing").exists()
        return " ".join(done.err.split())

    assert "unknown client 'client-9'" in refusal("runs/personal", "--client", "client-9")
    said = refusal("runs/personal", "--client", "client-1", "--round", "best")
    assert "leave --round out" in said
    copied = project / "runs/personal-copied"
    shutil.copytree(run, copied)
    (copied / "personal/client-1.safetensors").write_bytes(b"torn")
    said = refusal("runs/personal-copied", "--client", "client-1")
    assert "client-1.safetensors" in said and "restore the file" in said
    (copied / "personal/scores.json").write_text('{"origin": "of another state"}')
    said = refusal("runs/personal-copied", "--client", "client-1")
    assert "belong to another state than that of round 2" in said
    said = refusal("runs/impersonal", "--client", "client-1")
    assert "runs/impersonal has no personal models" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("evaluation.client_fraction=0", "clients hold none out; set evaluation.client_fraction"),
        ("tasks.count=2", "leave out either personal or tasks"),
        ("participation.pooled=true", "nobody goes on alone"),
        ("privacy={clip: 1, noise: 1}", "leave out either personal or privacy"),
    ],
)
def test_what_a_config_refuses(project: Path, change: str, said: str):
    with pytest.raises(UserError, match=said):
        changes = ["personal.steps=5", "weighting=uniform", "rounds=4", change]
        load_config(project / "tiny.yaml", changes)


def test_a_comparison_shows_local_global_and_personal(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(project)
    changes = ["rounds=1", "training.steps=2", "personal.steps=3", "partition.clients=2"]
    config = load_config("tiny.yaml", [*changes, "lora.ranks=2"])
    comparison = compare(config, ["fedhl_ef", "alone"], [0], tmp_path / "study")
    federated, alone = comparison.variants
    assert comparison.kinds == ["full", "truncated", "mean", "personal", "worst"]
    summary = read_summary(tmp_path / "study" / str(federated.trials[0].folder))["personal"]
    assert federated.values("personal", "accuracy") == [summary["mean"]["personal"]["accuracy"]]
    assert federated.values("mean", "accuracy") == [summary["mean"]["global"]["accuracy"]]
    assert alone.values("mean", "accuracy") and not alone.values("personal", "accuracy")
    assert "Personal client" in (tmp_path / "study/comparison.html").read_text()


# --- from Python --------------------------------------------------------------------------------


def points(count: int, seed: int) -> list[tuple[Tensor, int]]:
    X = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return [(x, int(x[:3].argmax())) for x in X]


def loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def test_a_simulation_has_them_too(tmp_path: Path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    clients = {"north": points(20, 1), "south": points(30, 2)}
    own = {"north": points(9, 3), "south": points(8, 4)}
    given: dict[str, Any] = {"ranks": 2, "rounds": 2, "loss": loss, "watcher": SILENT}
    given |= {"training": {"steps": 3, "learning_rate": 0.05}, "lora": {"targets": ["0", "2"]}}
    plain = library.simulate(model, clients, client_held_out=own, **given)
    given["personal"] = {"steps": 5}
    result = library.simulate(model, clients, client_held_out=own, **given)
    assert same(result.state, plain.state) and plain.personal is None
    assert result.personal is not None
    X, y = (torch.stack([x for x, _ in own["south"]]), torch.tensor([y for _, y in own["south"]]))
    measured = result.personal["clients"]["south"]
    with torch.no_grad():
        now = float(cross_entropy(result.model("south")(X), y))
        assert now == pytest.approx(measured["personal"]["loss"], rel=1e-4)
        assert now != pytest.approx(measured["global"]["loss"], rel=1e-4)
    folder = result.export(tmp_path / "own", rank=3, client="south")
    adapted: Any = PeftModel.from_pretrained(model, str(folder))
    with torch.no_grad():
        assert float(cross_entropy(adapted(X), y)) == pytest.approx(now, rel=1e-3)
    with pytest.raises(UserError, match="unknown client 'west'"):
        result.model("west")
    with pytest.raises(UserError, match="ask for them with personal"):
        plain.model("south")
    del own["north"]
    with pytest.raises(UserError, match="'north' has none; give client_held_out"):
        library.simulate(model, clients, client_held_out=own, **given)
